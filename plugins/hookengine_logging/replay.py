"""``python -m hookengine_logging.replay RUN --to wandb``: write a finished run to a sink."""

from __future__ import annotations

import json
import pkgutil
import threading
from pathlib import Path
from typing import Annotated, Any, cast

import structlog
import typer

from hookengine import PLUGINS, RecordHistory, RunFolder, RunInfo, Runner, Sink
from hookengine_logging.history import Lines


class FinishedRun:
    """Stand in for the Runner of a finished run, as a ``RunInfo`` read from the run's folder.

    Args:
        folder: The folder of the run.

    Raises:
        FileNotFoundError: The folder is not that of a run.
    """

    def __init__(self, folder: Path) -> None:
        self.run_dir = folder
        files = RunFolder(folder)
        for file in (files.metrics, files.description):
            if not file.is_file():
                raise FileNotFoundError(f"{folder} is not a run's folder: it has no {file.name}")
        self._description = json.loads(files.description.read_text())
        self.name = self._description["name"]
        self.logger = structlog.get_logger("hookengine")

    def describe(self) -> dict[str, Any]:
        """Return what ``run.json`` says about the run."""
        return dict(self._description)


def replay(folder: Path, sink: Sink, *, anew: bool = False) -> int:
    """Write to a sink the records of a run that it lacks, and wait until it has them.

    Args:
        folder: The folder of the run.
        sink: A sink that no Runner uses.
        anew: Begin another run there, instead of continuing the one that is there.

    Returns:
        How often the sink failed.
    """
    run: RunInfo = FinishedRun(folder)
    stand_in = cast(Runner, run)  # these two events of a sink use no more of it than a RunInfo has
    sink.configure(stand_in)
    sink.flush_timeout = threading.TIMEOUT_MAX
    records = RecordHistory(Lines(folder, None), path=RunFolder(folder).metrics)
    sink.replay(run, records, continues=not anew)
    sink.unconfigure(stand_in)
    return sink.failures


def main(
    run: Annotated[Path, typer.Argument(help="the folder of a run")],
    to: Annotated[list[str], typer.Option(help="a sink, by name or MODULE:CLASS; may be repeated")],
    option: Annotated[
        list[str],
        typer.Option(
            help="NAME=VALUE (JSON or text), to override an option the sink had in the run"
        ),
    ] = [],  # noqa: B006  (typer only reads it)
    anew: Annotated[
        bool, typer.Option(help="begin another run there instead of continuing")
    ] = False,
) -> None:
    """Write the records of a run, with their images, to sinks that missed them."""
    run = run.expanduser()
    try:
        given = dict(_parsed(each) for each in option)
        sinks = [
            PLUGINS.build({"type": _kind(name), **_options(run, name), **given}) for name in to
        ]
        for name, sink in zip(to, sinks, strict=True):
            if not isinstance(sink, Sink):
                raise TypeError(f"{name!r} is not a sink: records cannot be replayed to it")
        failures = 0
        for name, sink in zip(to, sinks, strict=True):
            failures += replay(run, sink, anew=anew)
            typer.echo(f"{name}: {sink.records} records written")
    except (OSError, ValueError, TypeError, LookupError, AttributeError, ImportError) as error:
        typer.echo(error.args[0] if isinstance(error, KeyError) else error, err=True)
        raise typer.Exit(2) from error
    raise typer.Exit(int(failures > 0))


def _kind(name: str) -> Any:
    """Return the class for ``MODULE:CLASS``, or else the name itself."""
    return pkgutil.resolve_name(name) if ":" in name else name


def _options(folder: Path, name: str) -> dict[str, Any]:
    """Return the options that the sink had in the run."""
    plugins = FinishedRun(folder).describe()["plugins"]
    options: dict[str, Any] = next(
        (plugin["options"] for plugin in plugins if plugin["name"] == name), {}
    )
    return {key: value for key, value in options.items() if value is not None}


def _parsed(option: str) -> tuple[str, Any]:
    name, equals, value = option.partition("=")
    if not equals:
        raise ValueError(f"--option must be NAME=VALUE, got {option!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


if __name__ == "__main__":
    typer.run(main)

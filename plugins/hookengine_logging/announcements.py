"""What the log says about a run as a whole: at its start, when it fails, and at its end."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hookengine import EVENTS, Runner
from hookengine_logging.meter import Meter
from hookengine_logging.replacements import replacements


def announce_run(runner: Runner, moved: Path | None) -> None:
    """Log the run's name, folder, device and plugins, and which plugins replace values.

    Args:
        runner: The Runner.
        moved: Where the records of an earlier run in this folder are now, if there were any.
    """
    plugins, logger = runner.plugins, runner.logger
    blocked = f" (blocked: {', '.join(plugins.blocked)})" if plugins.blocked else ""
    logger.info(
        f"run {runner.name}: files in {_shown(runner.run_dir)}, device {runner.device}, plugins "
        f"{', '.join(plugins)}{blocked}"
    )
    if moved is not None:
        logger.info(f"moved the records of an earlier run in this folder to {moved}")
    for event, names in replacements(plugins).items():
        if EVENTS[event].subject != "build":  # most plugins return these values unchanged
            logger.info(
                f"{event}: {', then '.join(names)} replace the {EVENTS[event].kind.argument}"
            )


def _shown(path: Path) -> Path:
    """Return a path as a user would type it: relative if it is below the working directory."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def announce_error(runner: Runner, error: BaseException) -> None:
    """Log the error that ends a run; the traceback is for run.log alone."""
    progress = runner.progress
    if isinstance(error, KeyboardInterrupt):
        epoch, iteration = progress.current_epoch, progress.iter
        runner.logger.warning(f"interrupted in epoch {epoch}, after iteration {iteration}")
        return
    notes = "; ".join(getattr(error, "__notes__", ()))
    details = f" ({notes})" if notes else ""
    text = f"run ends with {type(error).__name__}: {error}{details}"
    lines = "".join(traceback.format_exception(error)).rstrip()
    runner.logger.error(text, run_log=f"{text}\n{lines}")


def describe_end(progress: Any, error: BaseException | None) -> str:
    """Return the status for ``run.json``: finished, stopped or failed, and why."""
    if error is not None:
        return f"failed: {type(error).__name__}: {error}"
    return "finished" if progress.stopped is None else f"stopped: {progress.stopped}"


def announce_unrecorded(logger: Any, meters: Mapping[str, Meter]) -> None:
    """Warn of values that no record has, because they were logged after the last one.

    Args:
        logger: The run's logger.
        meters: The values, by phase.
    """
    for phase, meter in meters.items():
        if names := meter.waiting():
            logger.warning(
                f"logged after the last {phase} record, and so not recorded: {', '.join(names)}"
            )

"""The command ``hookengine``: list plugins and events, and print the environment."""

from __future__ import annotations

import inspect
import sys
import textwrap
from typing import Annotated

import typer
from pydantic import TypeAdapter
from rich.console import Console
from rich.table import Table

from hookengine.events import hookspecs
from hookengine.events.hookspecs import EVENTS
from hookengine.events.plugin import DEFAULT_PLUGINS
from hookengine.registry import PLUGINS, distribution_of
from hookengine.setup.environment import describe_environment

app = typer.Typer(no_args_is_help=True, add_completion=False)


def _console() -> Console:
    """Return a console as wide as the terminal, or 200 columns wide without one."""
    return Console(width=None if sys.stdout.isatty() else 200)


@app.callback(invoke_without_command=True)
def main(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version of hookengine and exit.")
    ] = False,
) -> None:
    """List plugins and their options, list events, and print the environment."""
    if version:
        typer.echo(describe_environment()["packages"]["hookengine"])
        raise typer.Exit


@app.command()
def plugins(
    name: Annotated[
        str | None, typer.Argument(help="Show the options of this plugin instead.")
    ] = None,
) -> None:
    """List the installed plugins, or show the options of one.

    The list comes from package metadata; no plugin is imported.
    """
    if name is not None:
        _show_options(name)
        return
    table = Table("name", "on by default", "distribution", "object")
    for known, point in PLUGINS.entry_points().items():
        default = "yes" if known in DEFAULT_PLUGINS else ""
        table.add_row(known, default, distribution_of(point), point.value)
    _console().print(table)


def _show_options(name: str) -> None:
    try:
        plugin = PLUGINS.get(name)
    except (KeyError, ImportError) as error:
        raise typer.BadParameter(str(error.args[0])) from None
    typer.echo(inspect.getdoc(plugin) or name)
    table = Table("option", "type", "default", "description")
    schema = TypeAdapter(plugin).json_schema()
    for option, about in schema.get("properties", {}).items():
        kind = about.get("type", " | ".join(map(str, about.get("enum", ["any"]))))
        table.add_row(option, kind, repr(about.get("default")), about.get("description", ""))
    _console().print(table)


@app.command()
def events(
    markdown: Annotated[
        bool, typer.Option(help="Print the documentation of all events as a Markdown page.")
    ] = False,
) -> None:
    """List the events that a plugin can implement."""
    if markdown:
        typer.echo(events_page(), nl=False)
        return
    table = Table("event", "kind", "description")
    for event in EVENTS.values():
        table.add_row(str(event), str(event.kind), event.doc.splitlines()[0])
    _console().print(table)


@app.command()
def env() -> None:
    """Print the environment: versions, devices, number of threads."""
    for key, value in describe_environment().items():
        typer.echo(f"{key}: {value}")


def events_page() -> str:
    """Return the documentation page about events, generated from the hookspecs."""
    text = inspect.getdoc(hookspecs) or ""
    drawing, kinds = text.split("Kinds\n-----\n")
    loop, _, rest = drawing.split("::\n", 1)[1].partition("\n\n``")
    lines = ["# Events", "", "Generated from `hookengine/events/hookspecs.py` by `make docs`.", ""]
    lines += ["```text", textwrap.dedent(loop.strip("\n")), "```", "", "``" + rest.strip(), ""]
    lines += ["## Kinds", ""]
    for line in kinds.splitlines():
        lines.append(f"- **{line}**:" if line.isalpha() else line.replace("    ", "  ", 1))
    subject = ""
    for event in EVENTS.values():
        if event.subject != subject:
            subject = event.subject
            about = inspect.getdoc(getattr(hookspecs, subject.capitalize())) or ""
            lines += ["", f"## {subject.capitalize()}", "", about]
        lines += ["", f"### `{event}`", "", f"*{event.kind}*", "", event.doc]
    return "\n".join(lines) + "\n"

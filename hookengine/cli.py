"""The command ``hookengine``: what is installed, and which events there are."""

from __future__ import annotations

import inspect
import textwrap
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from hookengine import hookspecs
from hookengine.environment import describe_environment
from hookengine.hookspecs import EVENTS
from hookengine.plugins import DEFAULT_PLUGINS
from hookengine.registry import PLUGINS, distribution_of

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False)


@app.command()
def plugins() -> None:
    """List the installed plugins, from metadata alone: none is imported."""
    table = Table("name", "on by default", "distribution", "object")
    for name, point in PLUGINS.entry_points().items():
        default = "yes" if name in DEFAULT_PLUGINS else ""
        table.add_row(name, default, distribution_of(point), point.value)
    Console().print(table)


@app.command()
def events(
    markdown: Annotated[bool, typer.Option(help="Print the page of the documentation.")] = False,
) -> None:
    """List the events that a plugin can answer."""
    if markdown:
        typer.echo(events_page(), nl=False)
        return
    table = Table("event", "kind", "what for")
    for event in EVENTS.values():
        table.add_row(str(event), str(event.kind), event.doc.splitlines()[0])
    Console().print(table)


@app.command()
def env() -> None:
    """Print versions and devices."""
    for key, value in describe_environment().items():
        typer.echo(f"{key}: {value}")


def events_page() -> str:
    """The page of the documentation about events, made from the hookspecs themselves."""
    text = inspect.getdoc(hookspecs) or ""
    drawing, kinds = text.split("Kinds\n-----\n")
    loop, _, rest = drawing.split("::\n", 1)[1].partition("\n\n``")
    lines = ["# Events", "", "Made from `hookengine/hookspecs.py` by `make docs`.", ""]
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

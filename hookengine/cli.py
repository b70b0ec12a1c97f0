"""The command ``hookengine``: list plugins and events, and print the environment."""

from __future__ import annotations

import inspect
import os
import re
import sys
import textwrap
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from hookengine.distributions import OWN, distribution_of, exact_name, is_from
from hookengine.events import hookspecs
from hookengine.events.hookimpl import hook_options_of, names
from hookengine.events.hookspecs import EVENTS
from hookengine.events.order import describe_rhythm, implements, resolve_order
from hookengine.events.plugin import DEFAULT_PLUGINS, Plugin
from hookengine.registry import PLUGINS, unknown
from hookengine.setup.environment import describe_environment

app = typer.Typer(no_args_is_help=True, add_completion=False)


_COUNTERS = {
    "iter": "progress.iter",
    "epoch": "progress.epoch",
    "step": "optim_wrapper.steps",
    "batch": "batch_idx + 1",
}


def _console() -> Console:
    """Return a console as wide as the terminal, or 200 columns wide without one."""
    return Console(width=None if sys.stdout.isatty() else 200)


@app.callback(invoke_without_command=True)
def main(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version of hookengine and exit.")
    ] = False,
) -> None:
    """List plugins, events and their order, and print the environment."""
    if version:
        typer.echo(describe_environment()["packages"]["hookengine"])
        raise typer.Exit


@app.command()
def plugins(
    name: Annotated[str | None, typer.Argument(help="Describe this plugin instead.")] = None,
) -> None:
    """List the installed plugins, or describe one: its options, hooks and state.

    The list comes from package metadata; no plugin is imported. If several distributions offer a
    name, write DISTRIBUTION:NAME.
    """
    if name is not None:
        _describe(name, _plugin(name))
        return
    table = Table("name", "on by default", "distribution", "object")
    offers = PLUGINS.offers()
    clashes = dict(_clashes(offers))
    for point in offers:
        default = "yes" if point.name in DEFAULT_PLUGINS and is_from(point, OWN) else ""
        label = f"{point.name} (clash)" if point.name in clashes else point.name
        table.add_row(label, default, distribution_of(point), point.value)
    _console().print(table)
    for clash, full in clashes.items():
        typer.echo(
            f"Several distributions offer {clash!r}. Choose one by its full name, "
            f"{' or '.join(map(repr, full))}."
        )


def _clashes(offers: list[EntryPoint]) -> Iterator[tuple[str, list[str]]]:
    for name in dict.fromkeys(point.name for point in offers):
        points = [point for point in offers if point.name == name]
        if len({point.value for point in points}) > 1:
            yield name, [exact_name(point) for point in points]


def _plugin(name: str) -> Any:
    try:
        return PLUGINS.get(name)
    except (KeyError, ValueError, ImportError) as error:
        raise typer.BadParameter(str(error.args[0])) from None


def _describe(name: str, plugin: Any) -> None:
    try:
        _print(name, plugin)
    except typer.BadParameter:
        raise
    except Exception as error:  # whatever the code of a plugin does when it is looked at
        text = f"the plugin {name!r} cannot be described: {type(error).__name__}: {error}"
        raise typer.BadParameter(text) from None


def _print(name: str, plugin: Any) -> None:
    answers = any(implements(plugin, event) for event in EVENTS)
    if not answers and not callable(plugin):
        raise typer.BadParameter(
            f"what the distribution offers as {name!r} is not a plugin: it is {plugin!r}, which is "
            "neither a class or function that makes one nor an object that implements an event"
        )
    documented = getattr(plugin, "func", plugin)  # of a partial
    text = documented.__doc__ if isinstance(documented, type) else inspect.getdoc(documented)
    typer.echo(inspect.cleandoc(text) if text else name)
    table = Table("option", "type", "default", "description", title="Options", title_justify="left")
    for row in _options(plugin) if isinstance(plugin, type) or not answers else ():
        table.add_row(*row)
    _console().print(table)
    if not isinstance(plugin, type) and not answers:
        typer.echo("A function makes this plugin: its hooks and state are known once it is called.")
        return
    if not answers:
        typer.echo("It implements no event, so it cannot be enabled.")
        return
    table = Table("event", "place", "called", "what it does", title="Hooks", title_justify="left")
    for event in EVENTS:
        if implements(plugin, event):
            place, rhythm = _declared_place(plugin, event), describe_rhythm(plugin, event)
            first = (inspect.getdoc(getattr(plugin, event)) or "").partition("\n")[0]
            table.add_row(event, place, rhythm, first)
    _console().print(table)
    states = {"state_dict": "saved in checkpoints", "rank_state_dict": "saved for each rank"}
    own = {m: getattr(plugin, m, None) for m in states}
    kept = [f"{states[m]} ({m})" for m, own in own.items() if own not in (None, vars(Plugin)[m])]
    typer.echo(f"State: {', '.join(kept) or 'none'}")
    cleans = implements(plugin, "unconfigure")
    text = (inspect.getdoc(plugin.unconfigure) or "").partition("\n")[0] if cleans else "none"
    typer.echo(f"Clean-up (unconfigure): {text}")


def _options(plugin: Any) -> Iterator[tuple[str, str, str, str]]:
    """Yield name, type, default and description of each option of a class or a function."""
    fields = getattr(plugin, "__pydantic_fields__", None)
    if fields is None or not getattr(plugin, "_by_keyword", True):
        try:
            parameters = inspect.signature(plugin).parameters
        except ValueError:  # written in C
            return
        for name, parameter in parameters.items():
            kind = Any if parameter.annotation is parameter.empty else parameter.annotation
            required = parameter.default is parameter.empty and parameter.kind < 2
            default = "required" if required else repr(parameter.default)
            yield name, _type_name(kind), default, ""
        return
    for name, field in fields.items():
        default = repr(field.default)
        if field.is_required():
            default = "required"
        elif field.default_factory is not None:
            default = f"{field.default_factory.__name__}()"
        yield name, _type_name(field.annotation), default, field.description or ""


def _type_name(annotation: Any) -> str:
    text = annotation.__qualname__ if isinstance(annotation, type) else str(annotation)
    return re.sub(r"\b(typing|collections\.abc)\.", "", text)


def _declared_place(plugin: Any, event: str) -> str:
    """Return what a plugin declares about its place in an event."""
    options = hook_options_of(plugin, event)
    parts = [group for group in ("tryfirst", "trylast") if getattr(options, group)]
    for side in ("after", "before"):
        own = getattr(options, side)
        found = names(getattr(plugin, side, None)) if own is None else own
        parts += [f"{side} {other}" for other in found]
    return ", ".join(parts) or "given order"


@app.command()
def order(
    event: Annotated[str | None, typer.Argument(help="Show only this event.")] = None,
    plugin: Annotated[
        list[str] | None,
        typer.Option(
            "--plugin",
            "-p",
            help="Enable this plugin in addition to the defaults, or disable one with no:NAME. "
            "Give the option once per plugin, in the order of your plugins=[...]. Without it, all "
            "installed plugins are enabled.",
        ),
    ] = None,
) -> None:
    """Show in which order each event calls the plugins, and why.

    A run shows its own order in runner.plugins.order(), and with logging also in run.json.
    """
    if event is not None and event not in EVENTS:
        raise typer.BadParameter(unknown("event", event, EVENTS))
    chosen = plugin if plugin else PLUGINS.names()
    off = {name.removeprefix("no:") for name in chosen if name.startswith("no:")}
    for name in off - {*DEFAULT_PLUGINS}:
        raise typer.BadParameter(unknown("default plugin", name, DEFAULT_PLUGINS))
    off |= {name.strip() for name in os.environ.get("HOOKENGINE_DISABLE", "").split(",")}
    enabled: dict[str, Any] = {}
    for given in (*DEFAULT_PLUGINS, *chosen):
        name = PLUGINS.short_name(given)
        if name in off or given.startswith("no:") or (name in enabled and given in DEFAULT_PLUGINS):
            continue
        try:
            enabled[name] = _plugin(given if given in (plugin or ()) else PLUGINS.own_name(given))
        except typer.BadParameter as error:
            if plugin or name in DEFAULT_PLUGINS:
                raise
            typer.echo(f"left out: {error}", err=True)
    table = Table("event", "plugin", "because", "called")
    for spec in EVENTS.values():
        try:
            places = resolve_order(spec, enabled) if event in (None, spec.name) else []
        except Exception as error:  # also of the code of a plugin
            raise typer.BadParameter(str(error)) from None
        for index, place in enumerate(places):
            label = "" if index else spec.name
            table.add_row(label, *place, end_section=index == len(places) - 1)
    if not table.rows:
        typer.echo(f"None of these plugins implements {event!r}.")
        return
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
    table = Table("event", "kind", "every counts", "description")
    for event in EVENTS.values():
        counts = _COUNTERS[event.kind.counter] if event.kind.counter else ""
        table.add_row(str(event), str(event.kind), counts, event.doc.splitlines()[0])
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
        about = f"*{event.kind}*"
        if event.kind.counter is not None:
            about += f", `every` counts `{_COUNTERS[event.kind.counter]}`"
        lines += ["", f"### `{event}`", "", about, "", event.doc]
    return "\n".join(lines) + "\n"

"""Put the plugins of an event in order: as given, subject to ``after``, ``before`` and groups."""

from __future__ import annotations

import graphlib
import heapq
import warnings
from collections.abc import Collection, Iterator, Mapping
from itertools import pairwise
from typing import NamedTuple

from hookengine.events.hookimpl import hook_options_of, is_function, names
from hookengine.events.hookspecs import EVENTS, Event
from hookengine.events.plugin import PLUGIN_NAMES, FunctionPlugin, Plugin, name_of
from hookengine.registry import PLUGINS, did_you_mean


class Place(NamedTuple):
    """The place of a plugin in an event, and why it has it."""

    plugin: str
    """The plugin's name."""
    reason: str
    """``given order``, ``tryfirst``, ``trylast``, ``after NAME``, ``after all others``, or several;
    and ``moved by NAME`` if a declaration of another plugin keeps it from its usual place."""
    rhythm: str
    """When the plugin is called: ``every 100``, ``every 50 (option interval)``, ``once``, or "" for
    each time."""


class _Constraint(NamedTuple):
    earlier: str
    later: str
    by: str
    side: str
    name: str
    where: str

    @property
    def other(self) -> str:
        return self.earlier if self.by == self.later else self.later

    def __str__(self) -> str:
        return f"{self.side} {self.name}" + ("" if self.other == self.name else f" ({self.other})")

    def quoted(self) -> str:
        """Return who declares this, as a sentence."""
        text = f"{self.by!r} declares {self.side}={self.name!r} ({self.where})"
        return text if self.other == self.name else f"{text}, which includes {self.other!r}"


def resolve_order(event: Event, plugins: Mapping[str, object]) -> list[Place]:
    """Return the plugins that implement ``event``, in the order in which they are called.

    The order depends only on what is declared. Plugins keep the given order within three groups:
    ``tryfirst``, the others, ``trylast``. A plugin that declares ``after`` or ``before`` then moves
    just far enough, also out of its group; the plugin that it names stays. ``after="*"`` stands
    behind all of this, ``before="*"`` in front of it.

    Args:
        event: The event.
        plugins: All plugins by name, in the given order; or their classes.

    Raises:
        ValueError: Declarations contradict each other. The message quotes them.
    """
    members = {n: plugin for n, plugin in plugins.items() if implements(plugin, event.name)}
    if not event.kind.mirrored:
        return _sorted(event, members)
    undone = {n: p for n, p in plugins.items() if n in members or implements(p, "configure")}
    configured = [place.plugin for place in _sorted(EVENTS["configure"], undone)]
    return _sorted(event, {name: members[name] for name in configured[::-1] if name in members})


def _sorted(event: Event, plugins: Mapping[str, object]) -> list[Place]:
    """Sort plugins that stand in their given order, subject to what they declare."""
    constraints = [*_constraints(event, plugins)]
    # By group and given place; a plugin that declares a constraint takes the place of the other.
    place = {name: (_group(event, plugins[name]), index) for index, name in enumerate(plugins)}
    graph: dict[str, set[str]] = {name: set() for name in plugins}
    for one in constraints:
        graph[one.later].add(one.earlier)
    try:
        order = [*graphlib.TopologicalSorter(graph).static_order()]
    except graphlib.CycleError as error:
        raise ValueError(_contradiction(event, error.args[1], constraints)) from None
    for name in order:
        moved = [place[c.earlier] for c in constraints if c.by == c.later == name]
        place[name] = max([place[name], *moved])
    for name in reversed(order):
        moved = [place[c.later] for c in constraints if c.by == c.earlier == name]
        place[name] = min([place[name], *moved])
    given = {name: index for index, name in enumerate(plugins)}
    ordered, ready, reached = [], list[tuple[tuple[int, int], int, str]](), (-9, 0)
    sorter = graphlib.TopologicalSorter(graph)
    sorter.prepare()
    while sorter.is_active():
        for name in sorter.get_ready():
            heapq.heappush(ready, (place[name], given[name], name))
        *_, name = heapq.heappop(ready)
        sorter.done(name)
        told = _reason(event, name, plugins[name], constraints, waited=place[name] < reached)
        reached = max(reached, place[name])
        ordered.append(Place(name, told, describe_rhythm(plugins[name], event.name)))
    return ordered


def _reason(
    event: Event, name: str, plugin: object, constraints: list[_Constraint], waited: bool
) -> str:
    """Return why a plugin has its place; ``waited`` if later ones were placed before it."""
    options = hook_options_of(plugin, event.name)
    reasons = [group for group in ("tryfirst", "trylast") if getattr(options, group)]
    for side in ("after", "before"):
        reasons += [f"{side} all others"] * ("*" in _side(event, plugin, side))
    reasons += dict.fromkeys(str(c) for c in constraints if c.by == name)
    if not reasons:
        reasons = ["configured later" if event.kind.mirrored else "given order"]
    if waited and (others := {c.by: None for c in constraints if c.by != name == c.later}):
        reasons.append(f"moved by {', '.join(others)}")
    return ", ".join(reasons)


def describe_rhythm(plugin: object, event: str) -> str:
    """Return when a plugin is called, as in ``Place.rhythm``."""
    options = hook_options_of(plugin, event)
    parts = ["once"] if options.once else []
    if isinstance(options.every, str):
        value = getattr(plugin, options.every, None)
        known = "every" if isinstance(plugin, type) else f"every {value}" if value else "off"
        parts.insert(0, f"{known} (option {options.every})")
    elif options.every is not None:
        parts.insert(0, f"every {options.every}")
    return ", ".join(parts)


def implements(plugin: object, event: str) -> bool:
    """Return whether a plugin implements an event."""
    return is_function(getattr(plugin, event, None))


def _side(event: Event, plugin: object, side: str) -> tuple[str, ...]:
    """Return the names in ``after`` or ``before`` that apply to a plugin in an event."""
    options = hook_options_of(plugin, event.name)
    own: tuple[str, ...] | None = getattr(options, side)
    if own is not None or event.kind.mirrored:  # the class has its say in `configure`
        return own or ()
    opposite = getattr(options, "before" if side == "after" else "after") or ()
    return tuple(name for name in names(getattr(plugin, side, None)) if name not in opposite)


def _group(event: Event, plugin: object) -> int:
    options = hook_options_of(plugin, event.name)
    last, first = ("*" in _side(event, plugin, side) for side in ("after", "before"))
    if last and first:
        raise ValueError(f"{plugin!r} declares both after='*' and before='*' in {event.name!r}")
    return 2 * (last - first) or options.trylast - options.tryfirst


def _constraints(event: Event, plugins: Mapping[str, object]) -> Iterator[_Constraint]:
    """Yield what the plugins of an event declare about each other."""
    meant = _meanings(plugins)
    for name, plugin in plugins.items():
        for side in ("after", "before"):
            own = getattr(hook_options_of(plugin, event.name), side) is not None
            for other in _side(event, plugin, side):
                for one in meant.get(PLUGINS.short_name(other), ()):
                    # A name that stands for a class does not order the plugins of one class.
                    alike = isinstance(plugin, Plugin) and isinstance(plugins[one], type(plugin))
                    if one != name and (one == other or not alike):
                        pair = (one, name) if side == "after" else (name, one)
                        where = "with @hookimpl" if own else "on its class"
                        yield _Constraint(*pair, name, side, other, where)


def _contradiction(event: Event, cycle: list[str], constraints: list[_Constraint]) -> str:
    """Quote the declarations along a cycle, in which each plugin comes before the next."""
    along = [
        next(c.quoted() for c in constraints if (c.earlier, c.later) == step)
        for step in pairwise(cycle)
    ]
    return (
        f"plugins contradict each other about their order in the event {event.name!r}: "
        f"{', and '.join(along)}. Remove one of these declarations"
    )


def _meanings(plugins: Mapping[str, object]) -> dict[str, list[str]]:
    """Map each name that ``after`` and ``before`` may use to the plugins that it stands for.

    A name stands for the plugin of that name, and for renamed plugins of the class of that name or
    of a class derived from it. A function registered with ``runner.on`` also has its own name.
    """
    meant: dict[str, list[str]] = {}
    for name, plugin in plugins.items():
        cls = plugin if isinstance(plugin, type) else type(plugin)
        bases = [c for c in cls.__mro__ if issubclass(c, Plugin) and c is not Plugin]
        short = [name.partition(":")[2]] if isinstance(plugin, FunctionPlugin) else []
        for called in {name, name_of(cls), *map(name_of, bases), *short}:
            meant.setdefault(called, []).append(name)
    return meant


def check_constraints(plugins: Mapping[str, object], new: set[str]) -> None:
    """Check the names in ``after`` and ``before``, and warn of those without effect.

    Args:
        plugins: All plugins by name.
        new: Names of those that were not checked before.

    Raises:
        ValueError: A name looks like a misspelled plugin.
    """
    meant = _meanings(plugins)
    events = {n: [e for e in EVENTS if implements(p, e)] for n, p in plugins.items()}
    for name, plugin in plugins.items():
        own = [(f"with @hookimpl, {e}", hook_options_of(plugin, e), [e]) for e in events[name]]
        for where, declared, mine in [("on its class", plugin, _main(events[name])), *own]:
            for side in ("after", "before"):
                for other in names(getattr(declared, side, None) or ()):
                    text = f"plugin {name!r} declares {side}={other!r} ({where})"
                    if (short := PLUGINS.short_name(other)) not in meant:
                        if name in new:
                            _check_known(text, other, meant)
                        continue
                    for one in meant[short]:
                        if one != name and new & {name, one} and not {*mine} & {*events[one]}:
                            warnings.warn(
                                f"{text}, which has no effect in {', '.join(mine)}: {one!r} does "
                                f"not implement this, only {', '.join(events[one])}",
                                stacklevel=2,
                            )


def _main(events: list[str]) -> list[str]:
    """Leave out the events that most plugins implement, unless there is no other."""
    return [e for e in events if e not in ("configure", "unconfigure")] or events


def _check_known(text: str, other: str, meant: Collection[str]) -> None:
    """Reject a misspelled name. Another unknown one may be of a plugin that is not installed."""
    if other == "*" or other in PLUGIN_NAMES or other in PLUGINS:
        return
    if near := did_you_mean(other, {*meant, *PLUGINS.names()}, cutoff=0.75):
        raise ValueError(f"{text}, but no plugin of that name is enabled or installed.{near}")

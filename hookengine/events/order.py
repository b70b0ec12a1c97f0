"""Put plugins in order: as given, subject to their ``after`` and ``before``."""

from __future__ import annotations

import difflib
import graphlib
import warnings
from collections.abc import Mapping

from hookengine.events.plugin import Plugin, name_of
from hookengine.events.registry import PLUGINS


def resolve_order(plugins: Mapping[str, object]) -> list[str]:
    """Return the names of the plugins in order.

    The order depends only on the declarations: plugins keep the given order, except that each is
    preceded by those that it must come after.

    Raises:
        ValueError: The constraints form a cycle. The message shows it.
    """
    _check_known(plugins)
    meant = _meanings(plugins)
    earlier: dict[str, list[str]] = {name: [] for name in plugins}
    for name, plugin in plugins.items():
        for other in _names(plugin, "after"):
            earlier[name] += [one for one in meant.get(other, ()) if one != name]
        for other in _names(plugin, "before"):
            for one in meant.get(other, ()):
                if one != name:
                    earlier[one].append(name)
    try:
        graphlib.TopologicalSorter(earlier).prepare()
    except graphlib.CycleError as error:
        cycle = " -> ".join(reversed(error.args[1]))
        raise ValueError(
            f"the order of the plugins has a cycle: {cycle} (each declares that it is called after "
            "the next). Remove one of these 'after' or 'before' declarations"
        ) from None
    order: dict[str, None] = {}

    def place(name: str) -> None:
        if name not in order:
            for other in earlier[name]:
                place(other)
            order[name] = None

    for name in plugins:
        place(name)
    return list(order)


def _meanings(plugins: Mapping[str, object]) -> dict[str, list[str]]:
    """Map each name that ``after`` and ``before`` may use to the plugins that it stands for.

    A name stands for the plugin of that name, and for renamed plugins of the class of that name or
    of a class derived from it.
    """
    meant: dict[str, list[str]] = {}
    for name, plugin in plugins.items():
        bases = [c for c in type(plugin).__mro__ if issubclass(c, Plugin) and c is not Plugin]
        for called in {name, name_of(type(plugin)), *map(name_of, bases)}:
            meant.setdefault(called, []).append(name)
    return meant


def _check_known(plugins: Mapping[str, object]) -> None:
    """Warn if ``after`` or ``before`` names what looks like a misspelled plugin."""
    for name, plugin in plugins.items():
        for other in (*_names(plugin, "after"), *_names(plugin, "before")):
            if other in plugins or other in PLUGINS:
                continue
            known = {*plugins, *PLUGINS.names()}
            if near := difflib.get_close_matches(other, known, n=1, cutoff=0.8):
                warnings.warn(
                    f"plugin {name!r}: 'after' or 'before' names the unknown plugin {other!r}. Did "
                    f"you mean {near[0]!r}?",
                    stacklevel=2,
                )


def _names(plugin: object, attribute: str) -> tuple[str, ...]:
    value = getattr(plugin, attribute, ())
    return (value,) if isinstance(value, str) else tuple(value) if value else ()

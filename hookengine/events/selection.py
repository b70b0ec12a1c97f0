"""Select the enabled plugins: the defaults and those that the user passes to the Runner."""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from hookengine.answers import answer, warn_of_priority
from hookengine.distributions import distribution_of
from hookengine.events.hookspecs import EVENTS
from hookengine.events.order import implements
from hookengine.events.plugin import DEFAULT_PLUGINS, Plugin, name_of
from hookengine.registry import PLUGINS, unknown

PluginLike: TypeAlias = str | Mapping[str, Any] | object


class Selection:
    """The plugins of one Runner, built from what the user passed.

    Args:
        entries: Names, ``dict(type=NAME or class, **options)``, instances, or ``"no:NAME"``.
        defaults: Names of the plugins that are enabled without being named.

    Attributes:
        plugins: The plugins by name: the defaults first, then the user's, as given.
        sources: ``distribution version`` of each plugin that an entry point offers.
        blocked: Names of the plugins that would be enabled but are disabled, sorted.
    """

    def __init__(self, entries: Iterable[PluginLike] | None, defaults: Sequence[str]) -> None:
        self.sources: dict[str, str] = {}
        wanted: dict[str, PluginLike] = {
            PLUGINS.short_name(name): PLUGINS.own_name(name) for name in defaults
        }
        named, off = _named(entries, wanted)
        wanted.update(named)
        off |= _disabled_by_environment(wanted)
        self.blocked = sorted(off & wanted.keys())
        self.plugins = {n: self.build(n, entry) for n, entry in wanted.items() if n not in off}

    def build(self, name: str, entry: PluginLike) -> object:
        """Build one plugin and remember its source.

        Raises:
            KeyError: The name is unknown.
            ImportError: The plugin cannot be imported.
            TypeError: The entry is a class, or an option does not exist or is invalid.
        """
        if isinstance(entry, str):
            entry = {"type": entry}
        if isinstance(entry, type):
            raise TypeError(
                f"the plugin {name!r} is a class: pass an instance, {entry.__name__}(...), or "
                f"dict(type={entry.__name__}, ...)"
            )
        kind = entry["type"] if isinstance(entry, Mapping) else entry
        if isinstance(kind, str) and kind not in PLUGINS and (text := answer(kind)):
            raise KeyError(f"unknown plugin {kind!r}: {text}")
        point = PLUGINS.entry_point(kind) if isinstance(kind, str) else PLUGINS.offered_as(kind)
        if point is not None:
            self.sources[name] = distribution_of(point)
        warn_of_priority(name, kind if isinstance(kind, type) else type(kind))
        plugin = self._made(name, kind, entry) if isinstance(entry, Mapping) else entry
        if isinstance(plugin, Plugin) and plugin.plugin_name != name:
            plugin.__dict__["plugin_name"] = name  # the class may have another one
        return plugin

    def _made(self, name: str, kind: Any, entry: Mapping[str, Any]) -> object:
        options = {key: value for key, value in entry.items() if key != "plugin_name"}
        made = PLUGINS.get(kind) if isinstance(kind, str) else kind
        if isinstance(made, type) or not any(implements(made, event) for event in EVENTS):
            makes = callable(made) and getattr(made, "__name__", "") not in EVENTS
            made, maker = PLUGINS.build(options) if makes else None, made
        elif options.keys() - {"type"}:
            raise TypeError(f"the plugin {name!r} is an object, which has no options: {options}")
        if made is None:
            raise TypeError(
                f"the plugin {name!r} of {self.sources.get(name, 'this process')} cannot be used: "
                f"{maker!r} is neither a class or function that makes a plugin nor an object with "
                "methods named after events"
            )
        return made


def entry_name(entry: PluginLike) -> str:
    """Return the name of the plugin that an entry of ``plugins=[...]`` stands for.

    Raises:
        KeyError: The entry is a dict without a ``type``.
    """
    if isinstance(entry, Mapping):
        if "type" not in entry:
            raise KeyError(f"a plugin needs a 'type' (a name or a class), got {dict(entry)!r}")
        if isinstance(given := entry.get("plugin_name"), str) and given:
            return given
        entry = entry["type"]
    if isinstance(entry, str):
        return PLUGINS.short_name(entry)
    name = name_of(entry)
    cls = entry if isinstance(entry, type) else type(entry)
    if name != name_of(cls):
        return name  # the instance was renamed
    point = PLUGINS.offered_as(entry)  # other plugins refer to this name
    return name if point is None else point.name


def _named(
    entries: Iterable[PluginLike] | None, defaults: Collection[str]
) -> tuple[dict[str, PluginLike], set[str]]:
    """Split the user's entries into those to enable, by name, and the names to disable."""
    if entries is None:
        entries = ()
    if isinstance(entries, str | Mapping) or not isinstance(entries, Iterable):
        raise TypeError(f"plugins= takes a list, got {entries!r}. Write plugins=[...]")
    named: dict[str, PluginLike] = {}
    off: set[str] = set()
    for entry in entries:
        if isinstance(entry, str) and entry.startswith("no:"):
            name = PLUGINS.short_name(entry.removeprefix("no:"))
            if name not in defaults and name not in DEFAULT_PLUGINS:
                raise KeyError(unknown("default plugin", name, DEFAULT_PLUGINS))
            off.add(name)
            continue
        name = entry_name(entry)
        if name in named:
            raise ValueError(
                f"the plugin {name!r} is given twice. Give one of them another name with the "
                "option plugin_name"
            )
        named[name] = entry
    return named, off


def _disabled_by_environment(wanted: Mapping[str, PluginLike]) -> set[str]:
    listed = os.environ.get("HOOKENGINE_DISABLE", "").split(",")
    names = {PLUGINS.short_name(name.strip()) for name in listed if name.strip()}
    for name in names - wanted.keys() - {*DEFAULT_PLUGINS}:
        if name not in PLUGINS:
            what = unknown("plugin", name, {*wanted, *PLUGINS.names()})
            warnings.warn(f"HOOKENGINE_DISABLE: {what}", stacklevel=2)
    return names

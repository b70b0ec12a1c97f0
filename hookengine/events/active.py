"""The active plugins: found by name, registered with pluggy, called in order."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any, cast

import pluggy

from hookengine.events.checks import check_methods, returns_a_value
from hookengine.events.dispatch import Hooks, Observer, resolve
from hookengine.events.hookspecs import EVENTS, PROJECT, HookSpecs
from hookengine.events.order import resolve_order
from hookengine.events.plugin import FunctionPlugin
from hookengine.events.registry import unknown


class ActivePlugins(pluggy.PluginManager):
    """Plugins by name, in the order in which events call them.

    The whole set is sorted again whenever it changes, so that the order never depends on when a
    plugin was added.
    """

    def __init__(self) -> None:
        super().__init__(PROJECT)
        self.add_hookspecs(HookSpecs)
        self._hooks = Hooks()
        self._observers: tuple[Observer, ...] = ()
        self._declared: dict[str, object] = {}
        self.order: list[str] = []

    @property
    def hooks(self) -> HookSpecs:
        """The events as functions with positional arguments; always the same object."""
        return cast(HookSpecs, self._hooks)

    def __getitem__(self, name: str) -> Any:
        if name not in self._declared:
            raise KeyError(unknown("active plugin", name, self._declared))
        return self._declared[name]

    def __contains__(self, name: object) -> bool:
        return name in self._declared

    def __iter__(self) -> Iterator[str]:
        return iter(self.order)

    def items(self) -> list[tuple[str, Any]]:
        """Return ``(name, plugin)`` pairs in the resolved order."""
        return [(name, self._declared[name]) for name in self.order]

    def _module(self, name: str) -> str:
        plugin = self[name]
        if isinstance(plugin, FunctionPlugin):
            return plugin.function.__module__
        if isinstance(plugin, types.ModuleType):
            return plugin.__name__
        return type(plugin).__module__

    def parse_hookimpl_opts(self, plugin: Any, name: str) -> pluggy.HookimplOpts | None:
        """Treat every method named after an event as an implementation of that event."""
        if name not in EVENTS or not inspect.isroutine(getattr(plugin, name, None)):
            return None
        if isinstance(plugin, FunctionPlugin):
            return {**_NO_OPTIONS, "tryfirst": plugin.tryfirst, "trylast": plugin.trylast}
        return super().parse_hookimpl_opts(plugin, name) or _NO_OPTIONS.copy()

    def _arrange(self, declared: dict[str, object]) -> None:
        """Register all plugins again in the resolved order, and resolve the hooks."""
        order = resolve_order(declared)
        for name in order:
            check_methods(name, declared[name])
        for name in self.order:
            self.unregister(name=name)
        for name in reversed(order):  # pluggy calls the last registered first
            self.register(declared[name], name=name)
        self._declared, self.order = declared, order
        self._resolve()

    def _resolve(self) -> None:
        resolve(self._hooks, self.hook, self._observers)

    def observe(self, observer: Observer) -> Callable[[], None]:
        """Let ``observer`` wrap each implementation; return a function that removes it."""
        self._observers += (observer,)
        self._resolve()

        def stop() -> None:
            self._observers = tuple(o for o in self._observers if o is not observer)
            self._resolve()

        return stop

    def calls(self) -> dict[str, list[str]]:
        """Return, per implemented event, the names of its plugins in the order they are called."""
        table = {}
        for event in EVENTS.values():
            impls = getattr(self.hook, event.name).get_hookimpls()
            names = [impl.plugin_name for impl in impls]
            if names:
                table[event.name] = names if event.kind.reverse else names[::-1]
        return table

    def replacements(self) -> dict[str, list[str]]:
        """Return, per transform with several plugins that replace its value, their names in order.

        A plugin whose method always returns None only observes, and is left out.
        """
        table = {}
        for event in EVENTS.values():
            if event.kind.name == "transform":
                impls = getattr(self.hook, event.name).get_hookimpls()[::-1]
                names = [impl.plugin_name for impl in impls if returns_a_value(impl.function)]
                if len(names) > 1:
                    table[event.name] = names
        return table


_NO_OPTIONS: pluggy.HookimplOpts = {
    "wrapper": False,
    "hookwrapper": False,
    "optionalhook": False,
    "tryfirst": False,
    "trylast": False,
    "specname": None,
}

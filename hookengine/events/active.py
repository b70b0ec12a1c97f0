"""The active plugins: found by name, registered with pluggy, called in order."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from typing import Any, cast

import pluggy

from hookengine.events.checks import check_methods
from hookengine.events.dispatch import Called, Hooks, Observer, resolve
from hookengine.events.hookspecs import EVENTS, PROJECT, HookSpecs
from hookengine.events.order import Place, check_constraints, implements, resolve_order
from hookengine.events.plugin import FunctionPlugin
from hookengine.registry import unknown


class ActivePlugins(pluggy.PluginManager):
    """Plugins by name, and the order in which each event calls them.

    The order is resolved again whenever the set changes, so that it never depends on when a plugin
    was added.
    """

    def __init__(self) -> None:
        super().__init__(PROJECT)
        self.add_hookspecs(HookSpecs)
        self._hooks = Hooks()
        self._observers: tuple[Observer, ...] = ()
        self._called: Called = {}
        self._declared: dict[str, object] = {}
        self._places: dict[str, list[Place]] = {}

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
        return iter(self._declared)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({[*self]})"

    def items(self) -> list[tuple[str, Any]]:
        """Return ``(name, plugin)`` pairs in the given order: defaults, then the user's."""
        return [*self._declared.items()]

    def _source(self, name: str, plugin: object) -> str:
        """Return the module of a plugin."""
        if isinstance(plugin, FunctionPlugin):
            return plugin.function.__module__
        if isinstance(plugin, types.ModuleType):
            return plugin.__name__
        return type(plugin).__module__

    def parse_hookimpl_opts(self, plugin: Any, name: str) -> pluggy.HookimplOpts | None:
        """Treat every method named after an event as an implementation of that event."""
        # The groups are left out here, since `_use` puts the implementations in order.
        return _NO_OPTIONS.copy() if name in EVENTS and implements(plugin, name) else None

    def _plan(self, declared: dict[str, object]) -> dict[str, list[Place]]:
        """Return the places of these plugins in every event, after checking those that are new."""
        new = self._new(declared)
        for name in new:
            check_methods(name, declared[name], self._source(name, declared[name]))
        check_constraints(declared, new)
        return {name: resolve_order(event, declared) for name, event in EVENTS.items()}

    def _new(self, declared: dict[str, object]) -> set[str]:
        return {n for n, plugin in declared.items() if self._declared.get(n) is not plugin}

    def _use(self, declared: dict[str, object], places: dict[str, list[Place]]) -> None:
        """Use these plugins, in these places, from now on."""
        new = self._new(declared)
        for name in self._declared:
            if name in new or name not in declared:
                self.unregister(name=name)
                self._called = {key: done for key, done in self._called.items() if key[0] != name}
        for name in declared:
            if name in new:
                self.register(declared[name], name=name)
        for event, order in places.items():
            caller = getattr(self.hook, event)
            impls = {impl.plugin_name: impl for impl in caller.get_hookimpls()}
            # pluggy has no public way to order them, and calls the last one first.
            caller._hookimpls[:] = [impls[place.plugin] for place in reversed(order)]
        self._declared, self._places = declared, places
        self._resolve()

    def _resolve(self) -> None:
        resolve(self._hooks, self.hook, self._observers, self._called)

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
        return {event: [place.plugin for place in order] for event, order in self.order().items()}

    def order(self) -> dict[str, list[Place]]:
        """Return, per implemented event, its plugins in order, with the reason for each place."""
        return {event: [*order] for event, order in self._places.items() if order}


_NO_OPTIONS: pluggy.HookimplOpts = {
    "wrapper": False,
    "hookwrapper": False,
    "optionalhook": False,
    "tryfirst": False,
    "trylast": False,
    "specname": None,
}

"""The plugin manager: which plugins are on, their order, their states, and who is to blame."""

from __future__ import annotations

import dis
import inspect
import os
import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, TypeAlias, cast

import pluggy

from hookengine import migration
from hookengine.blame import blame
from hookengine.dispatch import Hooks, Observer, observed, resolve
from hookengine.hookspecs import EVENTS, PROJECT, HookSpecs
from hookengine.plugins import DEFAULT_PLUGINS, check_methods, name_of, resolve_order
from hookengine.registry import PLUGINS, distribution_of, unknown

PluginLike: TypeAlias = str | Mapping[str, Any] | object


class FunctionPlugin:
    """One function as a plugin; its options are kept here, since the function may serve twice.

    Args:
        event: The event that it answers.
        function: The function.
        tryfirst: See ``hookimpl``.
        trylast: Likewise.
    """

    def __init__(
        self, event: str, function: Callable[..., Any], tryfirst: bool, trylast: bool
    ) -> None:
        if event not in EVENTS:
            raise KeyError(unknown("event", event, EVENTS))
        if not inspect.isroutine(function):
            raise TypeError(f"a function is needed for {event!r}, got {function!r}")
        name = function.__name__
        if name == "<lambda>":  # of the same place, so that a cell that is run again replaces it
            code = inspect.unwrap(function).__code__
            name = f"<lambda, {os.path.basename(code.co_filename)}:{code.co_firstlineno}>"
        self.plugin_name = f"{event}:{name}"
        self.function = function
        self.tryfirst = tryfirst
        self.trylast = trylast
        setattr(self, event, function)

    def __repr__(self) -> str:
        return f"FunctionPlugin({self.plugin_name!r})"


class PluginManager(pluggy.PluginManager):
    """The plugins that are on, in order; ``hooks`` calls them.

    Args:
        plugins: Names, ``dict(type=NAME or class, **options)``, instances, or ``"no:NAME"`` to
            switch a default off. Naming a default gives its options.
        defaults: Names of the plugins that are on without being named.

    Raises:
        ValueError: a name twice, or an order that is a cycle.
        KeyError: an unknown name. ImportError: one that cannot be imported.
        TypeError: a misspelt event, an option that does not exist or does not validate.
    """

    def __init__(
        self,
        plugins: Iterable[PluginLike] | None = (),
        defaults: Sequence[str] = DEFAULT_PLUGINS,
    ) -> None:
        super().__init__(PROJECT)
        self.add_hookspecs(HookSpecs)
        self._hooks = Hooks()
        self._observers: tuple[Observer, ...] = ()
        self._sources: dict[str, str] = {}
        self._open: list[str] = []
        self.configured: set[str] = set()
        self.blocked: list[str] = []
        self.order: list[str] = []
        self._declared = self._select(plugins, defaults)
        self._arrange(self._declared)

    @property
    def hooks(self) -> HookSpecs:
        """Every event as a function with positional arguments; the same object for ever."""
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
        """(name, plugin) in the resolved order."""
        return [(name, self._declared[name]) for name in self.order]

    def source(self, name: str) -> str:
        """Where a plugin comes from: ``distribution version``, or its module."""
        plugin = self[name]
        if name in self._sources:
            return self._sources[name]
        if isinstance(plugin, FunctionPlugin):
            return plugin.function.__module__
        if isinstance(plugin, types.ModuleType):
            return plugin.__name__
        return type(plugin).__module__

    # -- which ----------------------------------------------------------------------------------

    def _select(
        self, plugins: Iterable[PluginLike] | None, defaults: Sequence[str]
    ) -> dict[str, object]:
        if plugins is None:
            plugins = ()
        if isinstance(plugins, str | Mapping) or not isinstance(plugins, Iterable):
            raise TypeError(f"plugins= takes a list, got {plugins!r}: write plugins=[...]")
        disabled = os.environ.get("HOOKENGINE_DISABLE", "").split(",")
        blocked = {name.strip() for name in disabled if name.strip()}
        named: dict[str, PluginLike] = {}
        for entry in plugins:
            if isinstance(entry, str) and entry.startswith("no:"):
                name = entry.removeprefix("no:")
                if name not in defaults and name not in DEFAULT_PLUGINS:
                    raise KeyError(unknown("default plugin", name, DEFAULT_PLUGINS))
                blocked.add(name)
                continue
            name = self._name(entry)
            if name in named:
                raise ValueError(
                    f"the plugin {name!r} is given twice; give one of them another name, with the "
                    "option plugin_name"
                )
            named[name] = entry
        wanted: dict[str, PluginLike] = {**{name: name for name in defaults}, **named}
        self.blocked = sorted(blocked & wanted.keys())
        for name in blocked - wanted.keys() - {*DEFAULT_PLUGINS}:
            if name not in PLUGINS:
                what = unknown("plugin", name, {*wanted, *PLUGINS.names()})
                warnings.warn(f"HOOKENGINE_DISABLE: {what}", stacklevel=2)
        return {n: self._build(n, entry) for n, entry in wanted.items() if n not in blocked}

    def _name(self, entry: PluginLike) -> str:
        if isinstance(entry, Mapping):
            if "type" not in entry:
                raise KeyError(f"a plugin needs a 'type', a name or a class; got {dict(entry)!r}")
            entry = entry.get("plugin_name") or entry["type"]
        if isinstance(entry, str):
            return entry
        name = name_of(entry)
        cls = entry if isinstance(entry, type) else type(entry)
        if name != name_of(cls):
            return name  # the instance has one of its own
        point = PLUGINS.offered_as(cls)  # by which others know it
        return name if point is None else point.name

    def _build(self, name: str, entry: PluginLike) -> object:
        if isinstance(entry, str):
            entry = {"type": entry}
        if isinstance(entry, type):
            raise TypeError(
                f"the plugin {name!r} is a class: pass an instance, {entry.__name__}(...), or "
                f"dict(type={entry.__name__}, ...)"
            )
        kind = entry["type"] if isinstance(entry, Mapping) else type(entry)
        if isinstance(kind, str) and kind not in PLUGINS and (text := migration.answer(kind)):
            raise KeyError(f"there is no plugin {kind!r}: {text}")
        point = PLUGINS.entry_point(kind) if isinstance(kind, str) else PLUGINS.offered_as(kind)
        if point is not None:
            self._sources[name] = distribution_of(point)
        cls = entry["type"] if isinstance(entry, Mapping) else type(entry)
        own = vars(cls) if isinstance(cls, type) else {}
        if isinstance(own.get("priority"), str) and "priority" not in own.get(
            "__annotations__", {}
        ):
            warnings.warn(f"plugin {name!r}: {migration.answer('priority')}", stacklevel=2)
        if not isinstance(entry, Mapping):
            return entry
        options = {key: value for key, value in entry.items() if key != "plugin_name"}
        plugin = PLUGINS.build(options)
        if "plugin_name" in entry:
            plugin.plugin_name = name
        return plugin

    # -- in which order -------------------------------------------------------------------------

    def parse_hookimpl_opts(self, plugin: Any, name: str) -> pluggy.HookimplOpts | None:
        """Take every method that is named after an event for an implementation of it."""
        if name not in EVENTS or not inspect.isroutine(getattr(plugin, name, None)):
            return None
        if isinstance(plugin, FunctionPlugin):
            return {**_NO_OPTIONS, "tryfirst": plugin.tryfirst, "trylast": plugin.trylast}
        return super().parse_hookimpl_opts(plugin, name) or _NO_OPTIONS.copy()

    def _arrange(self, declared: dict[str, object]) -> None:
        """Register all of them anew in the resolved order, and resolve the hooks."""
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
        """Let ``observer`` wrap each implementation; returns what takes it away again."""
        self._observers += (observer,)
        self._resolve()

        def stop() -> None:
            self._observers = tuple(o for o in self._observers if o is not observer)
            self._resolve()

        return stop

    def calls(self) -> dict[str, list[str]]:
        """Per event that somebody implements, the plugins in the order in which it calls them."""
        table = {}
        for event in EVENTS.values():
            impls = getattr(self.hook, event.name).get_hookimpls()
            names = [impl.plugin_name for impl in impls]
            if names:
                table[event.name] = names if event.kind.reverse else names[::-1]
        return table

    def replacements(self) -> dict[str, list[str]]:
        """Per transform that several plugins answer with a replacement, these in order.

        A method that only ever returns None (an observer) is none of them.
        """
        table = {}
        for event in EVENTS.values():
            if event.kind.name == "transform":
                impls = getattr(self.hook, event.name).get_hookimpls()[::-1]
                names = [impl.plugin_name for impl in impls if _returns(impl.function)]
                if len(names) > 1:
                    table[event.name] = names
        return table

    # -- in mid-run -----------------------------------------------------------------------------

    def configure(self) -> None:
        """Emit ``configure``; remembers who was told, for ``unconfigure``."""
        impls = self.hook.configure.get_hookimpls()[::-1]
        self.configured |= {*self.order} - {impl.plugin_name for impl in impls}
        for impl in impls:
            self.configured.add(impl.plugin_name)
            self._call(impl, "configure")

    def unconfigure(self) -> None:
        """Emit ``unconfigure`` to all who were configured, in reverse order, once each.

        Raises:
            BaseExceptionGroup: what they raised, after all were told; one alone as it is.
        """
        errors: list[BaseException] = []
        impls = self.hook.unconfigure.get_hookimpls()  # from the last to call to the first
        told, self.configured = self.configured, set()
        for impl in impls:
            if impl.plugin_name in told:
                try:
                    self._call(impl, "unconfigure")
                except BaseException as error:
                    errors.append(error)
        if errors:
            raise errors[0] if len(errors) == 1 else BaseExceptionGroup("in unconfigure", errors)

    @contextmanager
    def opened(self, event: str) -> Iterator[None]:
        """Remember that ``event``, a ``before_*``, is open; who is added meanwhile is told it."""
        self._open.append(event)
        try:
            yield
        finally:
            self._open.remove(event)

    def add(self, plugin: PluginLike, *, replace: bool = False) -> str:
        """Switch a plugin on, also in mid-run; returns its name.

        In mid-run it is told ``configure`` and the ``before_*`` events that are open.

        Raises:
            ValueError: the name is taken, or (in a built Runner) the plugin has build events.
        """
        runner = self._hooks.runner
        if runner is not None and runner.closed:
            raise RuntimeError("this Runner is closed: no plugin can be added to it")
        name = self._name(plugin)
        if name in self._declared and not replace:
            raise ValueError(f"the plugin {name!r} is on already; remove({name!r}) it first")
        built = self._build(name, plugin)
        check_methods(name, built)
        if runner is not None and runner.built:
            build = [e.name for e in EVENTS.values() if e.subject == "build"]
            if missed := [e for e in build if self.parse_hookimpl_opts(built, e)]:
                raise ValueError(
                    f"the plugin {name!r} implements {', '.join(missed)}, and this Runner is built "
                    "already: pass it as Runner(plugins=[...])"
                )
        resolve_order({**self._declared, name: built})
        if name in self._declared:
            self.remove(name)
        self._arrange({**self._declared, name: built})
        if runner is not None:
            self.configured.add(name)
            try:
                for event in ("configure", *self._open):
                    self._tell(name, event)
            except BaseException as error:
                self.blame(error)  # before it is off, and nobody's any more
                try:
                    self.remove(name)
                except Exception as other:
                    error.add_note(f"and then, in unconfigure, {type(other).__name__}: {other}")
                raise
        return name

    def remove(self, name: str) -> None:
        """Switch a plugin off, also in mid-run; it is told ``unconfigure``.

        The event that is being emitted at that moment may still reach it.
        """
        if name not in self._declared:  # a function's short name will do
            ends = [full for full in self._declared if full.endswith(f":{name}")]
            name = ends[0] if len(ends) == 1 else name
        self[name]
        try:
            if name in self.configured:
                self.configured.discard(name)
                self._tell(name, "unconfigure")
        finally:
            self._arrange({n: p for n, p in self._declared.items() if n != name})

    def _tell(self, name: str, event: str) -> None:
        for impl in getattr(self.hook, event).get_hookimpls():
            if impl.plugin_name == name:
                self._call(impl, event)

    def _call(self, impl: pluggy.HookImpl, event: str) -> None:
        """Emit an event whose only argument is the Runner, to one implementation."""
        wanted = len(impl.argnames) + len(impl.kwargnames)
        observed(event, impl, self._observers)(*[self._hooks.runner] * wanted)

    # -- state and blame ------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The states that are not empty, by plugin name."""
        return self._collect("state_dict")

    def rank_state_dict(self) -> dict[str, Any]:
        """The states of this rank that are not empty, by plugin name."""
        return self._collect("rank_state_dict")

    def _collect(self, method: str) -> dict[str, Any]:
        states = {n: getattr(p, method)() for n, p in self.items() if hasattr(p, method)}
        return {name: state for name, state in states.items() if state}

    def load_state_dict(self, states: Mapping[str, Any], *, allow: Iterable[str] = ()) -> None:
        """Give every plugin its state back.

        Args:
            states: What ``state_dict`` returned.
            allow: Names that may be missing on either side.

        Raises:
            ValueError: a state without its plugin, or a plugin whose state is missing.
        """
        allowed = set(allow)
        problems = [(n, text) for n, text in self.differences(states) if n not in allowed]
        if problems:
            texts = "; ".join(f"{name}: {text}" for name, text in problems)
            raise ValueError(f"the plugins differ from those of the state: {texts}")
        for name, state in states.items():
            if name in self._declared:
                self[name].load_state_dict(state)

    def differences(
        self, states: Mapping[str, Any], were_on: Iterable[str] = ()
    ) -> Iterator[tuple[str, str]]:
        """The plugins that have a state on one side only, and what there is to say.

        Args:
            states: What ``state_dict`` returned.
            were_on: Plugins that were on then: one of them may have had nothing to keep yet.
        """
        for name in sorted({*states} - {*self}):
            yield name, f"there is a state of {name!r}, which is not on: switch it on"
        for name in sorted({*self.state_dict()} - {*states} - {*were_on}):
            yield name, f"there is no state for {name!r}, which is on: switch it off"

    def load_rank_state_dict(self, states: Mapping[str, Any]) -> None:
        """Give every plugin that is on the state of this rank back."""
        for name, state in states.items():
            if name in self._declared:
                self[name].load_rank_state_dict(state)

    def blame(self, error: BaseException) -> None:
        """Add a note to ``error``: which plugin raised it, in which event, at which iteration."""
        impls = [(e, impl) for e in EVENTS for impl in getattr(self.hook, e).get_hookimpls()]
        progress = getattr(self._hooks.runner, "progress", None)
        blame(error, impls, self.source, progress)


def _returns(function: Callable[..., Any]) -> bool:
    """Whether a function returns anything but None, as far as its code tells."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    if code is None:
        return True
    steps = [s for s in dis.get_instructions(code) if s.opname not in ("NOP", "CACHE")]
    returned = [
        before if step.opname == "RETURN_VALUE" else step
        for before, step in pairwise(steps)
        if step.opname in ("RETURN_VALUE", "RETURN_CONST")
    ]
    return not all(
        s.opname in ("LOAD_CONST", "RETURN_CONST") and s.argval is None for s in returned
    )


_NO_OPTIONS: pluggy.HookimplOpts = {
    "wrapper": False,
    "hookwrapper": False,
    "optionalhook": False,
    "tryfirst": False,
    "trylast": False,
    "specname": None,
}

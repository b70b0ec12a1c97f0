"""The plugin manager: selects the plugins of a Runner, configures them, collects their states."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import pluggy

from hookengine.abandoned import serve
from hookengine.events.active import ActivePlugins
from hookengine.events.blame import blame, note
from hookengine.events.checks import check_state
from hookengine.events.dispatch import compile_event
from hookengine.events.hookspecs import EVENTS
from hookengine.events.order import implements
from hookengine.events.plugin import DEFAULT_PLUGINS
from hookengine.events.selection import PluginLike, Selection, entry_name
from hookengine.registry import PLUGINS


class PluginManager(ActivePlugins):
    """The plugins of a Runner, in order; ``hooks`` calls them.

    Args:
        plugins: Names, ``dict(type=NAME or class, **options)``, instances, or ``"no:NAME"`` to
            disable a default. Name a default to set its options.
        defaults: Names of the plugins that are enabled without being named.

    Attributes:
        configured: Names of the plugins that have received ``configure``.

    Raises:
        ValueError: A name is given twice, or ``after`` and ``before`` contradict each other or
            name what looks like a misspelled plugin.
        KeyError: A name is unknown.
        ImportError: A plugin cannot be imported.
        TypeError: An event is misspelled, or an option does not exist or is invalid.
    """

    def __init__(
        self,
        plugins: Iterable[PluginLike] | None = (),
        defaults: Sequence[str] = DEFAULT_PLUGINS,
    ) -> None:
        super().__init__()
        self._selection = Selection(plugins, defaults)
        self._open: list[str] = []
        self.configured: set[str] = set()
        self._use(self._selection.plugins, self._plan(self._selection.plugins))

    @property
    def blocked(self) -> list[str]:
        """Names of the plugins that would be enabled but are disabled, sorted."""
        return self._selection.blocked

    def source(self, name: str) -> str:
        """Return where a plugin comes from: ``distribution version``, or its module."""
        return self._source(name, self[name])

    def _source(self, name: str, plugin: object) -> str:
        return self._selection.sources.get(name) or super()._source(name, plugin)

    # -- changes during a run -------------------------------------------------------------------

    def configure(self) -> None:
        """Emit ``configure``, and remember which plugins received it for ``unconfigure``."""
        for plugin in self._declared.values():
            self._take(plugin)
        impls = self.hook.configure.get_hookimpls()[::-1]
        self.configured |= {*self} - {impl.plugin_name for impl in impls}
        for impl in impls:
            self.configured.add(impl.plugin_name)
            self._call(impl, "configure")

    def _take(self, plugin: object) -> None:
        """Have a plugin object that serves another Runner leave that one first."""
        if (other := serve(plugin, self)) is not None:
            for name in [name for name, one in other.items() if one is plugin]:
                other._leave(name)

    def _leave(self, name: str) -> None:
        if name in self.configured:
            self.configured.discard(name)
            self._emit_to(name, "unconfigure")

    def unconfigure(self) -> None:
        """Emit ``unconfigure`` once to each configured plugin, the last configured one first.

        Raises:
            BaseException: The exception of a plugin, after all plugins were called, or a
                BaseExceptionGroup if several plugins raised one.
        """
        errors: list[BaseException] = []
        impls = self.hook.unconfigure.get_hookimpls()[::-1]
        configured, self.configured = self.configured, set()
        for impl in impls:
            if impl.plugin_name in configured:
                try:
                    self._call(impl, "unconfigure")
                except BaseException as error:
                    errors.append(error)
        if errors:
            raise errors[0] if len(errors) == 1 else BaseExceptionGroup("in unconfigure", errors)

    @contextmanager
    def opened(self, event: str) -> Iterator[None]:
        """Mark ``event``, a ``before_*``, as in progress: plugins added now receive it."""
        self._open.append(event)
        try:
            yield
        finally:
            self._open.remove(event)

    def is_open(self, event: str) -> bool:
        """Return whether ``event``, a ``before_*``, is in progress."""
        return event in self._open

    def add(self, plugin: PluginLike, *, replace: bool = False) -> str:
        """Enable a plugin, at any time, and return its name.

        A plugin added mid-run receives ``configure`` and every ``before_*`` event still in
        progress.

        Args:
            plugin: A name, ``dict(type=NAME or class, **options)``, or an instance.
            replace: Whether to replace a plugin of the same name.

        Raises:
            ValueError: The name is taken, or the plugin implements events of the construction and
                the Runner is already built.
            RuntimeError: The Runner is closed.
        """
        runner = self._hooks.runner
        if runner is not None and runner.closed:
            raise RuntimeError("cannot add a plugin, because this Runner is closed")
        name = entry_name(plugin)
        if name in self._declared and not replace:
            raise ValueError(f"the plugin {name!r} is already enabled. Call remove({name!r}) first")
        built = self._selection.build(name, plugin)
        if runner is not None and runner.built:
            build = [e.name for e in EVENTS.values() if e.subject == "build"]
            if missed := [event for event in build if implements(built, event)]:
                raise ValueError(
                    f"the plugin {name!r} implements {', '.join(missed)}, but this Runner is "
                    "already built. Pass the plugin to Runner(plugins=[...])"
                )
        declared = {**self._declared, name: built}  # a replaced plugin keeps its place
        places = self._plan(declared)
        if name in self._declared:
            self.remove(name)
        self._use(declared, places)
        if runner is not None:
            self._take(built)
            self.configured.add(name)
            try:
                for event in ("configure", *self._open):
                    self._emit_to(name, event)
            except BaseException as error:
                self.blame(error)  # while the plugin is registered
                try:
                    self.remove(name)
                except Exception as other:
                    error.add_note(f"then unconfigure raised {type(other).__name__}: {other}")
                raise
        return name

    def remove(self, name: str) -> None:
        """Disable a plugin, at any time. The plugin receives ``unconfigure``.

        An event that is already being emitted may still call it.

        Args:
            name: The plugin's name. For a function registered with ``runner.on``, its own name is
                enough.
        """
        if name not in self._declared:
            ends = [full for full in self._declared if full.endswith(f":{name}")]
            name = ends[0] if len(ends) == 1 else PLUGINS.short_name(name)
        self[name]
        try:
            self._leave(name)
        finally:
            others = {n: p for n, p in self._declared.items() if n != name}
            self._use(others, self._plan(others))

    def _emit_to(self, name: str, event: str) -> None:
        for impl in getattr(self.hook, event).get_hookimpls():
            if impl.plugin_name == name:
                self._call(impl, event)

    def _call(self, impl: pluggy.HookImpl, event: str) -> None:
        """Call one implementation of an event whose only argument is the Runner."""
        call = compile_event(EVENTS[event], [impl], self._observers, self._called)
        call(self._hooks.runner)

    # -- state and blame ------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the states that are not empty, by plugin name."""
        return self._collect("state_dict")

    def rank_state_dict(self) -> dict[str, Any]:
        """Return the states of this rank that are not empty, by plugin name."""
        return self._collect("rank_state_dict")

    def _collect(self, method: str) -> dict[str, Any]:
        states = {}
        for name, plugin in self.items():
            with self._blaming(name, method):
                check_state(name, plugin)  # `configure` may have set the methods
                if (collect := getattr(plugin, method, None)) is None:
                    continue
                if not isinstance(state := collect(), Mapping | None):
                    raise TypeError(f"{method} must return a dict, got {type(state).__name__}")
            if state:
                states[name] = state
        return states

    def load_state_dict(self, states: Mapping[str, Any]) -> None:
        """Load the states of the enabled plugins; those of other plugins are ignored."""
        self._load("load_state_dict", states)

    def load_rank_state_dict(self, states: Mapping[str, Any]) -> None:
        """Load the states of this rank into the enabled plugins."""
        self._load("load_rank_state_dict", states)

    def _load(self, method: str, states: Mapping[str, Any]) -> None:
        for name, state in states.items():
            if name in self._declared:
                with self._blaming(name, method):
                    getattr(self[name], method)(state)

    @contextmanager
    def _blaming(self, name: str, method: str) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            note(error, f"plugin {name!r} ({self.source(name)}), method {method!r}")
            raise

    def blame(self, error: BaseException) -> None:
        """Add a note to ``error`` that names the plugin, the event and the iteration."""
        impls = [(e, impl) for e in EVENTS for impl in getattr(self.hook, e).get_hookimpls()]
        progress = getattr(self._hooks.runner, "progress", None)
        with suppress(Exception):  # whatever the traceback holds, it must not hide the error
            blame(error, impls, self.source, progress, self._hooks.replaced)

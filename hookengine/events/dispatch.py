"""Resolve pluggy's hook callers into generated direct calls.

pluggy registers, validates and orders the implementations; it is not on the hot path. Each event
becomes one plain function, generated as ``dataclasses`` generates ``__init__``. An event that no
plugin implements gets a shared empty function. Any other event gets a straight sequence of calls,
each with only the arguments that the implementation declares. An implementation with a rhythm
(``every``, ``once``) is called within an ``if``, so that one that is not due costs no call.
"""

from __future__ import annotations

import linecache
import reprlib
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, cast

import pluggy

from hookengine.events.blame import GENERATED
from hookengine.events.hookimpl import HookOptions, hook_options_of
from hookengine.events.hookspecs import EVENTS, Counter, Event, HookSpecs

if TYPE_CHECKING:
    from hookengine.runner import Runner

Function = Callable[..., Any]
Observer = Callable[[str, str, Function], Function]
"""``observer(event, plugin, function)`` returns the function to call instead of ``function``.

``event`` and ``plugin`` are names. Both functions take the arguments of ``function``, by position
or by name.
"""
Called = dict[tuple[str, str], list[bool]]
"""Per plugin and event, whether an implementation with ``once`` was called: then not empty."""

_COUNTERS: dict[Counter, str] = {
    "iter": "runner.progress.iter",
    "epoch": "runner.progress.epoch",
    "step": "optim_wrapper.steps",
    "batch": "(batch_idx + 1)",
}

# The plugin manager calls these two itself, one implementation at a time.
COMPILED = [e for name, e in EVENTS.items() if name not in ("configure", "unconfigure")]


class Hooks:
    """One function per compiled event, and the Runner that they belong to.

    A copied or unpickled instance is silent, so that a copied model emits no events.
    """

    __slots__ = (*(event.name for event in COMPILED), "__weakref__", "replaced", "runner")

    runner: Runner | None
    replaced: dict[str, str | None]

    def __init__(self) -> None:
        self.runner = None
        self.replaced = {}
        for event in COMPILED:
            setattr(self, event.name, compile_event(event, ()))

    def __deepcopy__(self, memo: dict[int, Any]) -> HookSpecs:
        return SILENT

    def __reduce__(self) -> tuple[Function, tuple[()]]:
        return _silent, ()


def resolve(
    hooks: Hooks,
    relay: pluggy.HookRelay,
    observers: Sequence[Observer] = (),
    called: Called | None = None,
) -> None:
    """Point every event of ``hooks`` at the implementations that ``relay`` currently holds."""
    called = {} if called is None else called
    hooks.replaced.clear()
    for event in COMPILED:
        impls = getattr(relay, event.name).get_hookimpls()[::-1]  # pluggy stores the first one last
        setattr(hooks, event.name, compile_event(event, impls, observers, called, hooks.replaced))


def compile_event(
    event: Event,
    impls: Sequence[pluggy.HookImpl],
    observers: Sequence[Observer] = (),
    called: Called | None = None,
    replaced: dict[str, str | None] | None = None,
) -> Function:
    """Generate the function that calls ``impls`` in order, as the event's kind says.

    Args:
        event: The event.
        impls: Its implementations.
        observers: Functions that wrap each implementation, in turn.
        called: Which implementations with ``once`` were called; updated by the calls.
        replaced: Per transform, which plugin replaced the value; updated by the calls.
    """
    if not impls:
        return _empty(event)
    called = {} if called is None else called
    replaced = {} if replaced is None else replaced
    namespace: dict[str, Any] = {"answer": event.kind.answer, "replaced": replaced}
    namespace["reject"] = _reject
    calls = []
    for index, impl in enumerate(impls):
        function: Function = impl.function
        for observe in observers:
            function = observe(event.name, impl.plugin_name, function)
            if not callable(function):
                raise TypeError(
                    f"the observer {observe!r} must return a function, got {function!r}"
                )
        options = hook_options_of(impl.plugin, event.name)
        namespace[f"f{index}"], namespace[f"p{index}"] = function, impl.plugin
        if options.once:
            namespace[f"once{index}"] = called.setdefault((impl.plugin_name, event.name), [])
        keywords = [name for name in impl.kwargnames if name in event.arguments]
        arguments = [*impl.argnames, *(f"{name}={name}" for name in keywords)]
        conditions = _conditions(event, options, index)
        calls.append(_Call(event, impl.plugin_name, index, ", ".join(arguments), conditions))
    lines = [f"def {event.name}({', '.join(event.arguments)}):"]
    lines += [f"    {line}" for line in _body(event, calls)]
    source, namespace["lines"] = "\n".join(lines) + "\n", lines
    filename = f"{GENERATED}{event.name}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
    exec(compile(source, filename, "exec"), namespace)
    return cast(Function, namespace[event.name])


def _conditions(event: Event, options: HookOptions, index: int) -> list[str]:
    """Return the conditions under which an implementation is due."""
    conditions = []
    if options.every is not None and event.kind.counter is not None:
        every = str(options.every)
        if isinstance(options.every, str):
            every = f"p{index}.{options.every}"
            conditions.append(every)  # None and 0 turn the implementation off
        conditions.append(f"{_COUNTERS[event.kind.counter]} % {every} == 0")
    return [*conditions, f"not once{index}"] if options.once else conditions


class _Call:
    """The call of one implementation in a generated function."""

    def __init__(
        self, event: Event, name: str, index: int, arguments: str, conditions: list[str]
    ) -> None:
        self.event = event
        self.name = name
        self.index = index
        self.conditions = conditions
        self.text = f"f{index}({arguments})"

    def lines(self, first: str, *rest: str) -> list[str]:
        """Return the statements around the call, which ``first`` contains, if it is due."""
        if not self.conditions:
            return [first, *rest]
        once = f"once{self.index}"
        mark = [f"{once}.append(True)"] if f"not {once}" in self.conditions else []
        due = f"if {' and '.join(self.conditions)}:  # p{self.index}"
        return [due, *_indent(*mark, first, *rest)]

    def answered(self, *then: str) -> list[str]:
        """Return the statements around the call that run ``then`` if it returns a value, ``r``."""
        kind, check = self.event.kind, list[str]()
        if kind.answer is not object:
            reject = f"reject({self.event.name!r}, {kind.expects!r}, {self.name!r}, r)"
            same = f"r is not {kind.argument} and " if kind.argument else ""
            check = [f"if {same}not isinstance(r, answer): {reject}  # p{self.index}"]
        return self.lines(f"r = {self.text}", "if r is not None:", *_indent(*check, *then))


def _reject(event: str, expects: str, plugin: str, answer: object) -> NoReturn:
    raise TypeError(
        f"{event} of the plugin {plugin!r} must return {expects} or None, got "
        f"{reprlib.repr(answer)}"
    )


def _indent(*lines: str) -> list[str]:
    return [f"    {line}" for line in lines]


def _body(event: Event, calls: list[_Call]) -> list[str]:
    kind = event.kind
    lines: list[str] = []
    if kind.closing:
        lines = ["errors = []"]
        for call in calls:
            lines += ["try:", *_indent(*call.lines(call.text))]
            lines += ["except BaseException as e:", "    errors.append(e)"]
        lines += ["if len(errors) == 1: raise errors[0]"]
        return [*lines, f"if errors: raise BaseExceptionGroup('errors in {event.name}', errors)"]
    if kind.name == "event":
        return [line for call in calls for line in call.lines(call.text)]
    if kind.name == "decision":
        for call in calls:
            lines += call.answered("return r")
        return lines
    if kind.name == "veto":
        for call in calls:
            lines += call.answered("ok = ok and r")
        return ["ok = True", *lines, "return ok"]
    if kind.name == "transform":
        for call in calls:
            by = f"if r is not {kind.argument}: by = {call.name!r}"
            lines += call.answered(by, f"{kind.argument} = r")
        mark = f"replaced[{event.name!r}] = by"
        return ["by = None", *lines, mark, f"return {kind.argument}"]
    for call in calls:
        lines += call.answered("found += (r,)")
    return ["found = ()", *lines, "return found"]


# The functions of events that no plugin implements. They are shared, and have no *args, which would
# allocate a tuple at every call. A test ensures that no event has more than five arguments.


def _nothing(a: Any = None, b: Any = None, c: Any = None, d: Any = None, e: Any = None) -> None:
    return None


def _agreed(a: Any = None, b: Any = None, c: Any = None, d: Any = None, e: Any = None) -> bool:
    return True


def _no_contexts(
    a: Any = None, b: Any = None, c: Any = None, d: Any = None, e: Any = None
) -> tuple[()]:
    return ()


def _second(a: Any, b: Any, c: Any = None, d: Any = None, e: Any = None) -> Any:
    return b


def _third(a: Any, b: Any, c: Any, d: Any = None, e: Any = None) -> Any:
    return c


def _empty(event: Event) -> Function:
    if event.kind.argument is not None:
        return (_second, _third)[event.arguments.index(event.kind.argument) - 1]
    return {"veto": _agreed, "contexts": _no_contexts}.get(event.kind.name, _nothing)


SILENT = cast(HookSpecs, Hooks())
"""Hooks without implementations, for an optimizer wrapper or a model outside a Runner."""


class HooksReference(weakref.ref[HookSpecs]):
    """A weak reference to hooks; like the hooks, it is silent once it is copied or unpickled."""

    def __deepcopy__(self, memo: dict[int, Any]) -> HooksReference:
        return HooksReference(SILENT)

    def __reduce__(self) -> tuple[Function, tuple[HookSpecs]]:
        return HooksReference, (SILENT,)


def _silent() -> HookSpecs:
    return SILENT

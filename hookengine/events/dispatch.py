"""Resolve pluggy's hook callers into generated direct calls.

pluggy registers, validates and orders the implementations; it is not on the hot path. Each event
becomes one plain function, generated as ``dataclasses`` generates ``__init__``. An event that no
plugin implements gets a shared empty function. Any other event gets a straight sequence of calls,
each with only the arguments that the implementation declares.
"""

from __future__ import annotations

import linecache
from collections.abc import Callable, Sequence
from typing import Any, cast

import pluggy

from hookengine.events.hookspecs import EVENTS, Event, HookSpecs

Function = Callable[..., Any]
Observer = Callable[[str, pluggy.HookImpl, Function], Function]
"""``(event, implementation, function)`` -> the function to call instead of ``function``."""

# The plugin manager calls these two itself, one implementation at a time.
COMPILED = [e for name, e in EVENTS.items() if name not in ("configure", "unconfigure")]


class Hooks:
    """One function per compiled event, and the Runner that they belong to.

    A copied or unpickled instance is silent, so that a copied model emits no events.
    """

    __slots__ = (*(event.name for event in COMPILED), "__weakref__", "runner")

    runner: Any

    def __init__(self) -> None:
        self.runner = None
        for event in COMPILED:
            setattr(self, event.name, compile_event(event, ()))

    def __deepcopy__(self, memo: dict[int, Any]) -> HookSpecs:
        return SILENT

    def __reduce__(self) -> tuple[Function, tuple[()]]:
        return _silent, ()


def resolve(hooks: Hooks, relay: pluggy.HookRelay, observers: Sequence[Observer] = ()) -> None:
    """Point every event of ``hooks`` at the implementations that ``relay`` currently holds."""
    for event in COMPILED:
        impls = getattr(relay, event.name).get_hookimpls()[::-1]  # pluggy stores the first one last
        setattr(hooks, event.name, compile_event(event, impls, observers))


def observed(event: str, impl: pluggy.HookImpl, observers: Sequence[Observer]) -> Function:
    """Return the function of an implementation, wrapped by the observers in turn."""
    function: Function = impl.function
    for observe in observers:
        function = observe(event, impl, function)
    return function


def compile_event(
    event: Event, impls: Sequence[pluggy.HookImpl], observers: Sequence[Observer] = ()
) -> Function:
    """Generate the function that calls ``impls`` in order, as the event's kind says."""
    if not impls:
        return _empty(event)
    namespace: dict[str, Any] = {}
    calls = []
    for index, impl in enumerate(impls):
        namespace[f"f{index}"] = observed(event.name, impl, observers)
        keywords = [name for name in impl.kwargnames if name in event.arguments]
        arguments = [*impl.argnames, *(f"{name}={name}" for name in keywords)]
        calls.append(f"f{index}({', '.join(arguments)})")
    lines = [f"def {event.name}({', '.join(event.arguments)}):"]
    lines += [f"    {line}" for line in _body(event, calls)]
    source = "\n".join(lines) + "\n"
    filename = f"<hookengine event {event.name}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
    exec(compile(source, filename, "exec"), namespace)
    return cast(Function, namespace[event.name])


def _body(event: Event, calls: list[str]) -> list[str]:
    kind = event.kind
    if kind.closing:
        lines = ["errors = []"]
        for call in calls:
            lines += ["try:", f"    {call}", "except BaseException as e:", "    errors.append(e)"]
        lines += ["if len(errors) == 1: raise errors[0]"]
        lines += [f"if errors: raise BaseExceptionGroup('errors in {event.name}', errors)"]
        return lines
    if kind.name == "event":
        return calls
    if kind.name == "decision":
        lines = []
        for call in calls[:-1]:
            lines += [f"r = {call}", "if r is not None: return r"]
        return [*lines, f"return {calls[-1]}"]
    if kind.name == "veto":
        lines = ["ok = True"]
        for call in calls:
            lines += [f"r = {call}", "if r is not None and not r: ok = False"]
        return [*lines, "return ok"]
    if kind.name == "transform":
        lines = []
        for call in calls:
            lines += [f"r = {call}", f"if r is not None: {kind.argument} = r"]
        return [*lines, f"return {kind.argument}"]
    results = [f"r{index}" for index in range(len(calls))]
    lines = [f"{result} = {call}" for result, call in zip(results, calls, strict=True)]
    if len(results) == 1:
        return [*lines, "return () if r0 is None else (r0,)"]
    return [*lines, f"return tuple([r for r in ({', '.join(results)}) if r is not None])"]


# The functions of events that no plugin implements. They are shared, and have no *args, which would
# allocate a tuple at every call. A test ensures that no event has more than four arguments.


def _nothing(a: Any = None, b: Any = None, c: Any = None, d: Any = None) -> None:
    return None


def _agreed(a: Any = None, b: Any = None, c: Any = None, d: Any = None) -> bool:
    return True


def _no_contexts(a: Any = None, b: Any = None, c: Any = None, d: Any = None) -> tuple[()]:
    return ()


def _second(a: Any, b: Any, c: Any = None, d: Any = None) -> Any:
    return b


def _third(a: Any, b: Any, c: Any, d: Any = None) -> Any:
    return c


def _empty(event: Event) -> Function:
    if event.kind.argument is not None:
        return (_second, _third)[event.arguments.index(event.kind.argument) - 1]
    return {"veto": _agreed, "contexts": _no_contexts}.get(event.kind.name, _nothing)


SILENT = cast(HookSpecs, Hooks())
"""Hooks without implementations, for an optimizer wrapper or a model outside a Runner."""


def _silent() -> HookSpecs:
    return SILENT

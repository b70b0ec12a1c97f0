"""Call a sink's methods with those of the arguments that they take."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hookengine.records.record import Record
from hookengine.registry import did_you_mean, unknown

Parameter = inspect.Parameter
_VARIABLE = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)


class Method:
    """A method as the body of a class defines it: a function, a staticmethod, a partial, ...

    Args:
        name: Its name.
        defined: What the class holds.
        known: The arguments that it may take, in the order in which they are documented.
    """

    def __init__(self, name: str, defined: Any, known: Sequence[str]) -> None:
        self.name = name
        self.defined = defined
        self.known = known
        self._plan: tuple[list[str], list[str]] | None = None

    def bind(self, owner: object) -> Callable[..., Any]:
        """Return the function to call without ``self``."""
        bound = self.defined
        if hasattr(bound, "__get__"):
            bound = bound.__get__(owner, type(owner))
        function: Callable[..., Any] = bound
        return function

    def check(self, owner: object, where: str) -> None:
        """Check that the method can be called.

        Args:
            owner: An instance of the class.
            where: What precedes the message of an error, such as the name of the plugin.

        Raises:
            TypeError: It is not callable, takes an argument that nobody passes, or returns a
                coroutine or a generator, which nobody runs.
        """
        function = self.bind(owner)
        what = f"{where}, method {self.name!r}"
        if not callable(function):
            raise TypeError(f"{what}: expected a method, got {function!r}")
        called = function.func if isinstance(function, functools.partial) else function
        for one in (called, inspect.getattr_static(called, "__call__", None)):
            if inspect.iscoroutinefunction(one) or inspect.isasyncgenfunction(one):
                raise TypeError(f"{what}: it is async, and nothing awaits it. Remove 'async'")
            if inspect.isgeneratorfunction(one):
                raise TypeError(f"{what}: it is a generator, and nothing runs it. Remove 'yield'")
        if inspect.isfunction(self.defined):
            first = next(iter(_parameters(self.defined)), None)
            if first is None or first.name in self.known:
                raise TypeError(f"{what}: it has no 'self'. Add it")
        for parameter in _parameters(function):
            name = parameter.name
            if name in self.known or parameter.kind in _VARIABLE:
                continue
            optional = parameter.default is not Parameter.empty  # as in def write(self, f=print)
            if not optional or did_you_mean(name, self.known, cutoff=0.6):
                raise TypeError(f"{what}: {unknown('argument', name, self.known)}")

    def call(self, owner: object, available: Mapping[str, Any]) -> Any:
        """Call the method with those of the available arguments that it takes.

        Raises:
            TypeError: It has returned a coroutine.
        """
        function = self.bind(owner)
        if self._plan is None:
            self._plan = _plan(function, self.known)
        positional, named = self._plan
        result = function(
            *(available[name] for name in positional), **{name: available[name] for name in named}
        )
        if inspect.iscoroutine(result):
            result.close()
            raise TypeError(f"{self.name} has returned a coroutine, and nothing awaits it")
        return result


def by_name(arguments: Sequence[Any], known: Sequence[str]) -> dict[str, Any]:
    """Give positional arguments their names; what they are tells which of them were left out."""
    named: dict[str, Any] = {}
    for value in arguments:
        if isinstance(value, Record):
            name = "record"
        elif isinstance(value, Mapping) and "kept" in known:
            name = "kept"
        else:
            name = next((name for name in known if name not in named), "runner")
        named[name] = value
    return named


def signature_of(defined: Any) -> inspect.Signature:
    """Return the signature of what the body of a class defines, with ``self`` as first parameter.

    Raises:
        TypeError: It is not callable.
    """
    if isinstance(defined, staticmethod):
        own = inspect.signature(defined.__func__)
        first = Parameter("self", Parameter.POSITIONAL_ONLY)
        return own.replace(parameters=[first, *own.parameters.values()])
    if isinstance(defined, classmethod):
        return inspect.signature(defined.__func__)
    if isinstance(defined, functools.partialmethod):
        return inspect.signature(defined.__get__(None, object))
    if inspect.isfunction(defined):
        return inspect.signature(defined)
    own = inspect.signature(defined)  # a partial or another object, which is not bound
    first = Parameter("self", Parameter.POSITIONAL_ONLY)
    return own.replace(parameters=[first, *own.parameters.values()])


def _parameters(function: Callable[..., Any]) -> list[Parameter]:
    """Return the parameters; those of a decorated function if the decorator passes all on."""
    try:
        own = [*inspect.signature(function, follow_wrapped=False).parameters.values()]
        if any(parameter.kind in _VARIABLE for parameter in own):
            return [*inspect.signature(function).parameters.values()]
    except ValueError:  # some functions written in C have none
        return [Parameter("args", Parameter.VAR_POSITIONAL)]
    return own


def _plan(function: Callable[..., Any], known: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return which arguments to pass by position, and which by name."""
    parameters = _parameters(function)
    try:
        own = inspect.signature(function, follow_wrapped=False).parameters.values()
        takes_names = any(parameter.kind is Parameter.VAR_KEYWORD for parameter in own)
        is_decorated = any(parameter.kind in _VARIABLE for parameter in own)
    except ValueError:
        takes_names, is_decorated = False, True
    everything = [p for p in parameters if p.kind in _VARIABLE]
    wanted = [p for p in parameters if p.name in known]
    positional = [p.name for p in wanted if p.kind is Parameter.POSITIONAL_ONLY]
    named = [p.name for p in wanted if p.kind is not Parameter.POSITIONAL_ONLY]
    if is_decorated and not takes_names:  # by def wrapper(*args)
        plain = [p.name for p in wanted if p.kind is Parameter.POSITIONAL_OR_KEYWORD]
        positional, named = positional + plain, [n for n in named if n not in plain]
    others = [name for name in known if name not in (*positional, *named)]
    if any(parameter.kind is Parameter.VAR_KEYWORD for parameter in everything):
        named += others
    elif everything and not named:
        positional += others
    return positional, named

"""``hookimpl``: the place and the rhythm of one implementation of an event."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from numbers import Integral
from typing import Any, TypedDict, TypeVar, Unpack, overload

from hookengine.registry import unknown

F = TypeVar("F", bound=Callable[..., Any])


class HookArguments(TypedDict, total=False):
    """The arguments of ``hookimpl``, for type checkers."""

    after: str | Iterable[str]
    before: str | Iterable[str]
    tryfirst: bool
    trylast: bool
    every: int | str
    once: bool


@dataclass(frozen=True)
class HookOptions:
    """The checked arguments of ``hookimpl``. None means that they were not given."""

    after: tuple[str, ...] | None = None
    before: tuple[str, ...] | None = None
    tryfirst: bool = False
    trylast: bool = False
    every: int | str | None = None
    once: bool = False

    @classmethod
    def checked(cls, arguments: HookArguments, base: HookOptions | None = None) -> HookOptions:
        """Check the arguments of ``hookimpl``.

        Args:
            arguments: The arguments.
            base: The options of another ``hookimpl`` on the same function; those not given stay.

        Raises:
            ValueError: The implementation is to be called both first and last, or ``every`` is
                below 1.
            TypeError: An argument is unknown, or of a wrong type.
        """
        given: dict[str, Any] = {**arguments}
        known = [field.name for field in fields(cls)]
        for name, value in given.items():
            if name not in known:
                raise TypeError(unknown("argument of hookimpl", name, known))
            if name in ("after", "before"):
                given[name] = None if value is None else names(value)
            elif name == "every":
                given[name] = _checked_every(value)
            elif not isinstance(value, bool):
                raise TypeError(f"hookimpl: {name} takes True or False, got {value!r}")
        options = replace(base or _NONE, **given)
        if options.tryfirst and options.trylast:
            raise ValueError(
                "hookimpl got both tryfirst=True and trylast=True, but an implementation is called "
                "either first or last. Remove one of the two"
            )
        return options


def is_function(attribute: object) -> bool:
    """Return whether an attribute is a function or method, as an event's implementation must be."""
    return isinstance(getattr(attribute, "__func__", attribute), types.FunctionType)


def names(given: Any) -> tuple[str, ...]:
    """Return the names in ``after`` or ``before``, which may be a single one, or None.

    Raises:
        TypeError: ``given`` is not made of names.
    """
    found = [given] if isinstance(given, str) or not isinstance(given, Iterable) else [*given]
    for name in found if given is not None else ():
        several = isinstance(name, str) and "<" not in name and set(name) & set(", ")
        if not isinstance(name, str) or not name or several:
            raise TypeError(
                f"after and before take the name of a plugin, or a tuple of names; got {given!r}"
            )
    return tuple(found) if given is not None else ()


def _checked_every(every: Any) -> int | str | None:
    if isinstance(every, Integral) and not isinstance(every, bool):
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        return int(every)
    if every is None or (isinstance(every, str) and every.isidentifier()):
        return every
    raise TypeError(
        "every takes a whole number, as in every=100, or the name of an option of the plugin, as "
        f'in every="interval"; got {every!r}'
    )


@overload
def hookimpl(function: F, /) -> F: ...
@overload
def hookimpl(**options: Unpack[HookArguments]) -> Callable[[F], F]: ...
def hookimpl(
    function: F | None = None, /, **options: Unpack[HookArguments]
) -> F | Callable[[F], F]:
    """Set options on the implementation of an event. You need this decorator only for options.

    Args:
        function: The method, if you use the decorator without arguments.
        **options: ``after`` names the plugins that are called earlier, ``before`` those that are
            called later; ``"*"`` stands for all others. They replace what the plugin's class
            declares, which is the default for all its events.

            ``tryfirst=True`` calls the implementation before those of other plugins,
            ``trylast=True`` after them. Several such implementations are called in the order of
            their plugins.

            ``every`` calls the implementation only if the counter of the event is a multiple of
            this number, or of the plugin's option of this name. The option is read at each event;
            None or 0 turns the implementation off. The counter is ``progress.iter`` for events of
            an iteration, ``progress.epoch`` for those of an epoch, ``steps`` of the optimizer
            wrapper for those of an optimizer step, and ``batch_idx + 1`` for those of a batch of
            evaluation. Other events have no counter.

            ``once=True`` calls the implementation at most once per Runner, the first time it is
            due.

    Raises:
        ValueError: Both ``tryfirst`` and ``trylast`` are set, or ``every`` is below 1.
        TypeError: An argument is unknown, or ``every`` is neither a number nor a name.
    """
    if function is not None and not hasattr(function, "__get__"):
        raise TypeError(f"hookimpl decorates a method, got {function!r}. Name its options")
    HookOptions.checked(options)

    def mark(function: F) -> F:
        method: Any = getattr(function, "__func__", function)  # of a classmethod, a staticmethod
        base = getattr(method, "hookengine_options", None)
        method.hookengine_options = HookOptions.checked(options, base)
        return function

    return mark(function) if function is not None else mark


def hook_options_of(plugin: object, event: str) -> HookOptions:
    """Return what ``hookimpl`` has declared about a plugin's method for ``event``."""
    for marked in (plugin, method := getattr(plugin, event, None)):  # a function's plugin first
        options = getattr(marked, "hookengine_options", None)
        if isinstance(options, HookOptions):
            return options
    marks = getattr(method, "hookengine_impl", None)  # by pluggy's own marker
    if isinstance(marks, dict):
        return HookOptions(tryfirst=marks["tryfirst"], trylast=marks["trylast"])
    return _NONE


_NONE = HookOptions()

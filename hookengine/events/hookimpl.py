"""``hookimpl``: the place and the rhythm of one implementation of an event."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
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
    def checked(cls, arguments: HookArguments) -> HookOptions:
        """Check the arguments of ``hookimpl``.

        Raises:
            ValueError: The implementation is to be called both first and last, or ``every`` is
                below 1.
            TypeError: An argument is unknown, or ``every`` is neither a number nor a name.
        """
        given: dict[str, Any] = {**arguments}
        known = [field.name for field in fields(cls)]
        for name in given.keys() - known:
            raise TypeError(unknown("argument of hookimpl", name, known))
        sides = {side: given.get(side) for side in ("after", "before")}
        given.update({side: names(value) for side, value in sides.items() if value is not None})
        options = cls(**given)
        if options.tryfirst and options.trylast:
            raise ValueError(
                "hookimpl got both tryfirst=True and trylast=True, but an implementation is called "
                "either first or last. Remove one of the two"
            )
        every = options.every
        number = isinstance(every, int) and not isinstance(every, bool)
        name_given = isinstance(every, str) and every.isidentifier()
        if not (every is None or number or name_given):
            raise TypeError(
                "every takes a number, as in every=100, or the name of an option of the plugin, as "
                f'in every="interval"; got {every!r}'
            )
        if isinstance(every, int) and every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        return options


def names(given: str | Iterable[str]) -> tuple[str, ...]:
    """Return the names in ``after`` or ``before``, which may be a single one.

    Raises:
        TypeError: ``given`` is not made of names.
    """
    found = (given,) if isinstance(given, str) else tuple(given)
    for name in found:
        if not isinstance(name, str):
            raise TypeError(f"after and before take the names of plugins, got {name!r}")
    return found


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
        **options: ``after`` and ``before`` name the plugins that are called before and after this
            implementation. They replace those of the plugin's class, which are the defaults for
            all its events.

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
    checked = HookOptions.checked(options)

    def mark(function: F) -> F:
        function.hookengine_options = checked  # type: ignore[attr-defined]
        return function

    return mark(function) if function is not None else mark


def hook_options_of(plugin: object, event: str) -> HookOptions:
    """Return what ``hookimpl`` has declared about a plugin's method for ``event``."""
    for marked in (plugin, method := getattr(plugin, event, None)):  # a function's plugin first
        options = getattr(marked, "hookengine_options", None)
        if isinstance(options, HookOptions):
            return options
    if isinstance(
        marks := getattr(method, "hookengine_impl", None), dict
    ):  # by pluggy's own marker
        return HookOptions(tryfirst=marks["tryfirst"], trylast=marks["trylast"])
    return _NONE


_NONE = HookOptions()

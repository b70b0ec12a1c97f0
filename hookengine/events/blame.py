"""Who raised an exception: worked out when the kernel catches it, at no cost before."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from hookengine.loop.progress import Progress

Implementations = Iterable[tuple[str, pluggy.HookImpl]]


def answering(runner: Any, event: str) -> str:
    """Who answers an event, for a message about an answer that will not do."""
    names = runner.plugins.calls().get(event, []) if runner is not None else []
    return f"{event} of {' or '.join(map(repr, names)) or 'a plugin'}"


def blame(
    error: BaseException,
    impls: Implementations,
    source: Callable[[str], str],
    progress: Progress | None,
) -> None:
    """Add a note to ``error``: plugin, distribution and version, event, epoch, iteration.

    The frames of the traceback are compared with the implementations; the innermost one that is an
    implementation is to blame. An exception that has the note already, or that no plugin raised,
    gets none; in a group each exception is blamed, or else the group itself.

    Args:
        error: The exception, with its traceback.
        impls: (event, implementation) of all that are registered.
        source: Where the plugin of a name comes from.
        progress: Where the run stands.
    """
    impls = list(impls)
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            blame(inner, impls, source, progress)
        if any(_is_blamed(inner) for inner in error.exceptions):
            return
    if _is_blamed(error) or (found := _culprit(error, impls)) is None:
        return
    event, name = found
    note = f"raised by plugin {name!r} ({source(name)}), event {event!r}"
    if progress is not None:
        note += f", epoch {progress.current_epoch}, iteration {progress.iter}"
    error.add_note(note)


def _culprit(error: BaseException, impls: Implementations) -> tuple[str, str] | None:
    by_code: dict[types.CodeType, list[tuple[str, pluggy.HookImpl]]] = {}
    for event, impl in impls:
        code = getattr(inspect.unwrap(impl.function), "__code__", None)
        if code is not None:
            by_code.setdefault(code, []).append((event, impl))
    found = None
    traceback = error.__traceback__
    while traceback is not None:
        frame = traceback.tb_frame
        for event, impl in by_code.get(frame.f_code, ()):
            first = frame.f_code.co_varnames[:1]
            owner = frame.f_locals.get(first[0]) if first else None
            # Of two plugins of one class, the one that is the method's self.
            if owner is impl.plugin or not isinstance(owner, type(impl.plugin)):
                found = event, impl.plugin_name
        traceback = traceback.tb_next
    return found


def _is_blamed(error: BaseException) -> bool:
    return any(note.startswith("raised by plugin") for note in getattr(error, "__notes__", ()))

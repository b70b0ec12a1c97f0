"""Find the plugin that raised an exception, at no cost until the kernel catches one."""

from __future__ import annotations

import inspect
import re
import traceback
import types
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from hookengine.loop.progress import Progress

GENERATED = "<hookengine event "
"""How the file names of the functions start that ``dispatch`` generates."""
Implementations = Iterable[tuple[str, pluggy.HookImpl]]


def blame(
    error: BaseException,
    impls: Implementations,
    source: Callable[[str], str],
    progress: Progress | None,
    replaced: Mapping[str, str | None],
) -> None:
    """Add a note to ``error``: plugin, distribution and version, event, epoch, iteration.

    The plugin is the owner of the innermost frame in the traceback that belongs to a registered
    implementation. An exception gets no note if it already has one or if no plugin raised it. In a
    group, each exception gets its note; if none has one, the group gets it. An error that no plugin
    raised, over a batch or a loss that a plugin has replaced, gets a note about that.

    Args:
        error: The exception, with its traceback.
        impls: (event, implementation) of each registered implementation.
        source: Maps the name of a plugin to its distribution and version, or to its module.
        progress: The counters of the run, or None to leave out epoch and iteration.
        replaced: Per transform, the plugin that replaced the current value.
    """
    impls = list(impls)
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            blame(inner, impls, source, progress, replaced)
        if any(_is_blamed(inner) for inner in error.exceptions):
            return
    if _is_blamed(error):
        return
    if (found := _culprit(error, impls)) is not None:
        where = f"event {found[0]!r}"
        if progress is not None:
            where += f", epoch {progress.current_epoch}, iteration {progress.iter}"
        note(error, f"plugin {found[1]!r} ({source(found[1])}), {where}")
    elif isinstance(error, Exception):
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        passed = [_CONSUMERS.get(frame.f_code.co_name, "") for frame in frames]
        event = next((event for event in reversed(passed) if replaced.get(event)), None)
        if event is not None:
            text = f"plugin {replaced[event]!r} had replaced what this error is about, in {event}"
            if text not in getattr(error, "__notes__", ()):
                error.add_note(text)


def note(error: BaseException, whose: str) -> None:
    """Add a note to ``error`` about who raised it, unless it has one."""
    if not _is_blamed(error):
        error.add_note(f"raised by {whose}")


# The functions that receive what these events return.
_CONSUMERS = {
    "train_step": "before_train_iter",
    "val_step": "before_val_iter",
    "test_step": "before_test_iter",
    "parse_losses": "after_forward",
    "backward": "scale_loss",
}


def _culprit(error: BaseException, impls: Implementations) -> tuple[str, str] | None:
    by_code: dict[types.CodeType, list[tuple[str, pluggy.HookImpl]]] = {}
    for event, impl in impls:
        code = getattr(inspect.unwrap(impl.function), "__code__", None)
        if code is not None:
            by_code.setdefault(code, []).append((event, impl))
    found = None
    for frame, line in traceback.walk_tb(error.__traceback__):
        for event, impl in by_code.get(frame.f_code, ()):
            first = frame.f_code.co_varnames[:1]
            owner = frame.f_locals.get(first[0]) if first else None
            # Two plugins of one class share their code; blame the one that is the method's self.
            if owner is impl.plugin or not isinstance(owner, type(impl.plugin)):
                found = event, impl.plugin_name
        if frame.f_code.co_filename.startswith(GENERATED):
            mark = re.search(r"  # p(\d+)$", frame.f_globals["lines"][line - 1])
            plugin = frame.f_globals[f"p{mark[1]}"] if mark else None
            owners = [impl.plugin_name for _, impl in impls if impl.plugin is plugin]
            found = (frame.f_code.co_name, owners[0]) if owners else found
    return found


def _is_blamed(error: BaseException) -> bool:
    return any(note.startswith("raised by ") for note in getattr(error, "__notes__", ()))

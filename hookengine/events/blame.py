"""Find the plugin that raised an exception, at no cost until the kernel catches one."""

from __future__ import annotations

import inspect
import re
import traceback
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from hookengine.loop.progress import Progress

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
    raised, in an iteration whose batch a plugin has replaced, gets a note about that.

    Args:
        error: The exception, with its traceback.
        impls: (event, implementation) of each registered implementation.
        source: Maps the name of a plugin to its distribution and version, or to its module.
        progress: The counters of the run, or None to leave out epoch and iteration.
        replaced: Per event, the plugin that replaced the current batch.
    """
    impls = list(impls)
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            blame(inner, impls, source, progress, replaced)
        if any(_is_blamed(inner) for inner in error.exceptions):
            return
    if _is_blamed(error):
        return
    if (found := _culprit(error, impls)) is None:
        for event, name in _replacers(error, replaced):
            error.add_note(f"the batch was replaced by plugin {name!r} ({source(name)}) in {event}")
        return
    event, name = found
    where = f"event {event!r}"
    if progress is not None:
        where += f", epoch {progress.current_epoch}, iteration {progress.iter}"
    note(error, name, source(name), where)


def note(error: BaseException, name: str, source: str, where: str) -> None:
    """Add a note to ``error`` that a plugin raised it, unless another plugin has one."""
    if not _is_blamed(error):
        error.add_note(f"raised by plugin {name!r} ({source}), {where}")


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
        generated = frame.f_globals.get("generated")  # the lines of a function of `dispatch`
        if generated and (mark := re.search(r"  # p(\d+)$", generated[line - 1])):
            plugin = frame.f_globals[f"p{mark[1]}"]
            owners = [impl.plugin_name for _, impl in impls if impl.plugin is plugin]
            found = (frame.f_code.co_name, owners[0]) if owners else found
    return found


def _replacers(
    error: BaseException, replaced: Mapping[str, str | None]
) -> Iterator[tuple[str, str]]:
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_globals["__name__"] == "hookengine.loop.loops" and "batch_idx" in frame.f_locals:
            event = f"before_{frame.f_locals.get('phase', 'train')}_iter"
            if name := replaced.get(event):
                yield event, name


def _is_blamed(error: BaseException) -> bool:
    notes = getattr(error, "__notes__", ())
    return any(note.startswith(("raised by plugin", "the batch was replaced")) for note in notes)

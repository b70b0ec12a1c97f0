"""Find the plugin that raised an exception, at no cost until the kernel catches one."""

from __future__ import annotations

import inspect
import linecache
import re
import types
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from hookengine.loop.progress import Progress
    from hookengine.runner import Runner

Implementations = Iterable[tuple[str, pluggy.HookImpl]]


def answering(runner: Runner | None, event: str) -> str:
    """Describe which plugins implement an event, for an error about an invalid return value."""
    names = runner.plugins.calls().get(event, []) if runner is not None else []
    return f"{event} of {' or '.join(map(repr, names)) or 'a plugin'}"


def blame(
    error: BaseException,
    impls: Implementations,
    source: Callable[[str], str],
    progress: Progress | None,
) -> None:
    """Add a note to ``error``: plugin, distribution and version, event, epoch, iteration.

    The plugin is the owner of the innermost frame in the traceback that belongs to a registered
    implementation. An exception gets no note if it already has one or if no plugin raised it. In a
    group, each exception gets its note; if none has one, the group gets it.

    Args:
        error: The exception, with its traceback.
        impls: (event, implementation) of each registered implementation.
        source: Maps the name of a plugin to its distribution and version, or to its module.
        progress: The counters of the run, or None to leave out epoch and iteration.
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
            # Two plugins of one class share their code; blame the one that is the method's self.
            if owner is impl.plugin or not isinstance(owner, type(impl.plugin)):
                found = event, impl.plugin_name
        line = linecache.getline(frame.f_code.co_filename, traceback.tb_lineno)
        if rhythm := re.match(r" *if p(\d+)\.\w+ and ", line):  # an option that `every` names
            plugin = frame.f_globals.get(f"p{rhythm[1]}")
            owners = [impl.plugin_name for _, impl in impls if impl.plugin is plugin]
            found = (frame.f_code.co_name, owners[0]) if owners else found
        traceback = traceback.tb_next
    return found


def _is_blamed(error: BaseException) -> bool:
    return any(note.startswith("raised by plugin") for note in getattr(error, "__notes__", ()))

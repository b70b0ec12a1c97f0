"""Close the Runners that the script did not close: when they are collected, or at exit."""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from typing import Any, Protocol, TypeVar

T = TypeVar("T")


class Closable(Protocol):
    """What this file uses of a Runner."""

    logger: Any

    def close(self) -> None:
        """Have the plugins release their resources."""


_open: weakref.WeakKeyDictionary[Closable, int] = weakref.WeakKeyDictionary()
"""The process that built each open Runner: forked processes have copies, which are not theirs."""
_closing: set[threading.Thread] = set()
_served: weakref.WeakKeyDictionary[object, weakref.ref[Any]] = weakref.WeakKeyDictionary()
"""The manager of the Runner that each plugin serves; a script may pass one to several Runners."""


def remember(runner: Closable) -> None:
    """Close ``runner`` at exit unless it is closed by then."""
    _open[runner] = os.getpid()


def forget(runner: Closable) -> None:
    """Leave ``runner`` alone, since it is closed."""
    _open.pop(runner, None)


def close_later(runner: Closable) -> None:
    """Close a Runner that the garbage collector has found, on another thread.

    Python may collect garbage at any moment on any thread, which may hold any lock: that of a
    logger, a queue or a file. A plugin that waited for this lock here would wait forever. So this
    function takes no lock, and does not wait for the plugins. The process does before it exits.
    """
    thread = threading.Thread(
        target=_close_on_thread, args=(runner,), name="closing a Runner", daemon=True
    )
    _closing.add(thread)
    try:
        thread.start()
    except RuntimeError:  # no more threads: the interpreter is ending, or a limit is reached
        _closing.discard(thread)
        _close_quietly(runner)


def wait_until_closed() -> None:
    """Wait until every Runner that the garbage collector has found is closed."""
    for thread in {*_closing} - {threading.current_thread()}:
        thread.join()


def serve(plugin: object, manager: T) -> T | None:
    """Note that ``plugin`` serves the Runner of ``manager`` from now on.

    Returns:
        The manager of the Runner that it has served before, if that Runner still exists.
    """
    try:
        before = _served.get(plugin)
        _served[plugin] = weakref.ref(manager)
    except TypeError:  # an object that cannot be a key, or has no weak references
        return None
    if before is None:
        return None
    wait_until_closed()  # that Runner may be about to be closed
    previous: T | None = before()
    return None if previous is manager else previous


def _close_on_thread(runner: Closable) -> None:
    try:
        _close_quietly(runner)
    finally:
        _closing.discard(threading.current_thread())


def _close_quietly(runner: Closable) -> None:
    try:
        runner.close()
    except Exception as error:
        runner.logger.error(f"failed to close the Runner: {error!r}")


@atexit.register
def _close_all() -> None:
    for runner, process in [*_open.items()]:
        if process == os.getpid():
            _close_quietly(runner)
    wait_until_closed()

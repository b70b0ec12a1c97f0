"""Dataloader workers that leave signals to the main process, however they are started.

A terminal or a scheduler sends a signal to a whole group of processes. Forked workers inherit the
handlers of the main process. Workers that are started by ``spawn`` or ``forkserver`` would die, and
so would the processes that help to start them.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import context
from typing import Any

from torch.utils.data import DataLoader

from hookengine import copy_dataloader

_SIGNALS = ("SIGINT", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGTERM")
"""A process that starts with these blocked keeps them so, until it unblocks them."""


def protected(dataloader: Any) -> tuple[Any, Callable[[], None] | None]:
    """Make the workers of a dataloader survive signals that the whole group of processes gets.

    The workers get another ``worker_init_fn``, which calls the user's, and another multiprocessing
    context if they are not forked and the context is not of the user's class.

    Args:
        dataloader: Any dataloader. Only a torch DataLoader with workers is changed.

    Returns:
        A copy of the dataloader, or the dataloader itself if its class has its own ``__iter__``, as
        it may have a state; and in that case, a function that restores what it had before.
    """
    if not isinstance(dataloader, DataLoader) or not dataloader.num_workers:
        return dataloader, None
    init, given = dataloader.worker_init_fn, dataloader.multiprocessing_context
    if isinstance(init, LeaveSignals):  # of another Runner
        init = init.worker_init_fn
    is_plain = type(dataloader).__iter__ is DataLoader.__iter__
    changed = copy_dataloader(dataloader) if is_plain else dataloader
    changed.worker_init_fn = LeaveSignals(init)
    if type(given) in (type(None), context.DefaultContext, *_CONTEXTS):
        own = _CONTEXTS.get(type((given or multiprocessing).get_context(_method(given))))
        changed.multiprocessing_context = given if own is None else own()

    def restore() -> None:
        dataloader.worker_init_fn, dataloader.multiprocessing_context = init, given

    return changed, None if is_plain else restore


def _method(given: Any) -> str:
    """Return how a context starts processes; unlike torch, do not fix the default thereby."""
    method: str | None = (given or multiprocessing).get_start_method(allow_none=True)
    return method or multiprocessing.get_all_start_methods()[0]


def _numbers() -> list[signal.Signals]:
    return [getattr(signal, name) for name in _SIGNALS if hasattr(signal, name)]


@contextmanager
def _blocked() -> Iterator[None]:
    """Block the signals, so that a process that starts meanwhile begins with them blocked.

    They arrive at the end of the block; none is lost.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    from multiprocessing import resource_tracker

    before = signal.pthread_sigmask(signal.SIG_BLOCK, _numbers())
    try:
        resource_tracker.ensure_running()  # it may unblock some of them
        signal.pthread_sigmask(signal.SIG_BLOCK, _numbers())
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class LeaveSignals:
    """A ``worker_init_fn`` that leaves signals to the main process, and calls the user's function.

    Args:
        worker_init_fn: The user's function, or None.
    """

    def __init__(self, worker_init_fn: Callable[[int], None] | None) -> None:
        self.worker_init_fn = worker_init_fn

    def __call__(self, worker_id: int) -> None:
        if isinstance(multiprocessing.current_process(), _Worker):
            # torch asks for the process that has started this one: a server, or nobody by now.
            threading.Thread(target=_end_with_main, daemon=True).start()
        _ignore()
        # Only now: torch has installed a handler of SIGTERM when the worker began.
        signal.signal(signal.SIGTERM, _end_later)
        _unblock(signal.SIGTERM)
        if self.worker_init_fn is not None:
            self.worker_init_fn(worker_id)


def _ignore() -> None:
    """Ignore the signals in a worker, except SIGTERM and where the user's code has a handler."""
    for number in _numbers():
        if number == signal.SIGTERM:
            continue
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, signal.SIG_IGN)
        _unblock(number)


def _unblock(number: int) -> None:
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [number])


def _end_later(number: int, frame: object) -> None:
    """Leave the worker half a minute: the main process saves a checkpoint and then ends it."""
    signal.signal(number, signal.SIG_DFL)  # a second one ends it immediately
    if hasattr(signal, "alarm"):
        signal.alarm(30)


def _end_with_main() -> None:
    """End this process when the main process has ended, even by SIGKILL."""
    if (main := multiprocessing.parent_process()) is not None:
        main.join()
        os._exit(1)


class _Worker:
    """A worker that is not forked from the main process."""


class SpawnedWorker(_Worker, context.SpawnProcess):
    """A worker in a new interpreter."""

    def start(self) -> None:
        """Start the process with the signals blocked."""
        with _blocked():
            super().start()


class _Workers(context.BaseContext):
    def Queue(self, maxsize: int = 0) -> Any:  # noqa: N802
        """Return a queue; the process that tracks its semaphores starts with signals blocked."""
        with _blocked():
            return super().Queue(maxsize)


class _SpawnedWorkers(_Workers, context.SpawnContext):
    Process = SpawnedWorker


_CONTEXTS: dict[type, Any] = {context.SpawnContext: _SpawnedWorkers}

if sys.platform != "win32":
    from multiprocessing import forkserver

    class _Server(forkserver.ForkServer):
        """A fork server with the signals blocked, which all its processes inherit.

        Python's own server has processes of the user, too, which may wait for a signal.
        """

        def ensure_running(self) -> None:
            """Start the server if it does not run."""
            pythons: Any = vars(forkserver)["_forkserver"]
            self.set_forkserver_preload(pythons._preload_modules)
            with _blocked():
                super().ensure_running()

    @functools.cache
    def _server_of(process: int) -> _Server:
        return _Server()

    @contextmanager
    def _own_server() -> Iterator[None]:
        pythons = forkserver.connect_to_new_process
        forkserver.connect_to_new_process = _server_of(os.getpid()).connect_to_new_process
        try:
            yield
        finally:
            forkserver.connect_to_new_process = pythons

    class ServedWorker(_Worker, context.ForkServerProcess):
        """A worker that is forked from a server."""

        def start(self) -> None:
            """Start the process from a server with the signals blocked."""
            with _own_server():
                super().start()

    class _ServedWorkers(_Workers, context.ForkServerContext):
        Process = ServedWorker

    _CONTEXTS[context.ForkServerContext] = _ServedWorkers

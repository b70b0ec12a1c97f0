"""How records reach a sink: its queue, its thread, what it holds, and what it has missed."""

from __future__ import annotations

import functools
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any, cast

import structlog

from hookengine.records.record import Record

if TYPE_CHECKING:
    from hookengine.records.sink import Sink


_this_thread = threading.local()
"""``sink``: whose thread it is, also when that sink has finished, or serves another Runner."""


def on_thread_of(sink: Sink) -> bool:
    """Whether this is the thread that writes to the sink."""
    return getattr(_this_thread, "sink", None) is sink


class Delivery:
    """The queue, the thread and the counts of one sink."""

    def __init__(self, sink: Sink) -> None:
        self.sink = sink
        self.held: dict[str, int] = {}
        self.records = self.failures = self.dropped = 0
        self.opened = False
        self.behind = self.behind_told = False
        self.hurry = threading.Event()
        self.lock = threading.Lock()
        self.queue: queue.Queue[Callable[[], object] | None] = queue.Queue()
        self.thread: threading.Thread | None = None
        self.written: dict[str, int] = {}
        self.left_behind = 0
        self.continues = False
        self.history: Iterable[Record] | None = None
        self.runner: Any = None

    @property
    def serves(self) -> bool:
        """Whether the sink has not been given to another Runner meanwhile."""
        return self.sink._state is self

    def put(self, job: Callable[[], object]) -> None:
        """Have ``job`` done after those before it."""
        if self.thread is None:
            name = f"sink {self.sink.plugin_name}"
            self.thread = threading.Thread(target=self._work, name=name, daemon=True)
            self.thread.start()
        self.queue.put(job)

    def put_record(self, record: Record, write: Callable[[], None]) -> None:
        """Have a record written, unless too many wait; from then on, until all of them are."""
        with self.lock:
            if self.behind or self.queue.qsize() >= self.sink.queue_size:
                self.behind = True
                self.dropped += 1
            else:
                self.put(lambda: self.deliver(record, write))
                return
        if not self.behind_told:
            self.behind_told = True
            self.warn("cannot keep up; records are left for later (metrics.jsonl has them all)")

    def _work(self) -> None:
        _this_thread.sink = self.sink
        self.guard("open", self._open, everything=True)
        for job in self._jobs():
            if self.serves:
                job()
                if self.behind and self.queue.empty():
                    self._catch_up()
            self.queue.task_done()
        if self.serves:
            self.guard("close", lambda: self.sink.close(self.runner), everything=True)
        self.queue.task_done()

    def _open(self) -> None:
        self.sink.open(self.runner)
        self.opened = True

    def _jobs(self) -> Iterator[Callable[[], object]]:
        while True:
            gathered = not self.queue.empty()
            job = self.queue.get()
            if job is None:
                return
            if not gathered:  # a batch costs training one change of threads
                self.hurry.wait(self.sink.pause)
            yield job

    def deliver(self, record: Record, write: Callable[[], None]) -> None:
        """Write one record, on the thread, unless the sink has it already."""
        if not self.opened:
            with self.lock:
                self.dropped += 1
        elif record.iter > self.held.get(record.phase, -1):
            self.written[record.phase] = record.iter
            failures = self.failures
            self.guard("write", write, everything=True)
            self.records += self.failures == failures
        else:
            self.guard("skip", lambda: self.sink.skip(self.runner, record), everything=True)

    def _catch_up(self) -> None:
        """Take what was dropped from the history, if somebody keeps one."""
        with self.lock:  # what comes from here on is in the queue, and may be in the history too
            self.behind, missed = False, self.dropped
        history = self.guard("history", lambda: self.runner.hooks.history(self.runner))
        if history is None:
            return
        self.repeat()
        if self.fill(history):
            with self.lock:
                self.dropped -= missed
        self.repeat()

    def fill(self, records: Iterable[Record]) -> bool:
        """Write what the sink does not hold, on the thread; returns whether all were read."""
        write = cast(Any, self.sink).write  # a sink is a plugin that has one

        def each() -> bool:
            for record in records:
                self.deliver(record, functools.partial(write, self.runner, record))
            return True

        return bool(self.guard("history", each, everything=True))

    def join_late(self) -> None:
        """Begin with what the history has of a run that goes on already."""
        self.continues = self.runner.hooks.history(self.runner) is not None
        self.behind = self.continues
        self.put(lambda: None)  # after which the thread catches up

    def after_load(self) -> None:
        """What was written until now may come again."""
        if self.thread is None:
            self.repeat()
        else:
            self.put(self.repeat)  # after what still waits

    def repeat(self) -> None:
        """Take what was written so far for held."""
        for phase, iteration in self.written.items():
            self.held[phase] = max(iteration, self.held.get(phase, -1))

    def guard(self, what: str, call: Callable[[], Any], everything: bool = False) -> Any:
        """Run ``call``; an exception is counted, and the first one reported.

        Args:
            everything: Also SystemExit and the like, which would end the sink's thread.
        """
        try:
            return call()
        except BaseException as error:
            if not (everything or isinstance(error, Exception)):
                raise
            self.failures += 1
            if self.failures == 1:
                self.warn(f"failed in {what}; training goes on", error)
            return None

    def warn(self, message: str, error: BaseException | None = None) -> None:
        details = {} if error is None else {"error": f"{type(error).__name__}: {error}"}
        logger = structlog.get_logger() if self.runner is None else self.runner.logger
        name = self.sink.plugin_name
        with suppress(Exception):  # a logger that fails is no reason to stop either
            logger.bind(plugin=name).warning(f"sink {name!r} {message}", **details)

    def flush(self, timeout: float) -> bool:
        if self.thread is None:
            return True
        if self.left_behind and self.queue.unfinished_tasks >= self.left_behind:
            timeout = 0  # it has not moved since it was given up
        deadline = time.monotonic() + timeout
        self.hurry.set()
        try:
            with self.queue.all_tasks_done:
                while self.queue.unfinished_tasks:
                    left = deadline - time.monotonic()
                    if left <= 0:
                        return self._give_up(timeout)
                    self.queue.all_tasks_done.wait(left)
            return True
        finally:
            self.hurry.clear()

    def _give_up(self, timeout: float) -> bool:
        if not self.left_behind:
            waiting = self.queue.unfinished_tasks
            self.warn(f"did not finish within {timeout:g} s; {waiting} records wait")
        self.left_behind = self.queue.unfinished_tasks
        return False

    def finish(self, timeout: float) -> None:
        waiting = 0
        if self.thread is not None:
            done = self.flush(timeout)
            waiting = 0 if done else self.queue.unfinished_tasks
            self.queue.put(None)  # one that comes back later closes too
            if done:
                self.thread.join(timeout)
                if self.thread.is_alive():
                    self.warn(f"did not close within {timeout:g} s; it is left to itself")
        self.thread = None
        if self.failures or self.dropped or waiting:
            counts = f"{self.failures} failures, {self.dropped} dropped, {waiting} not written"
            self.warn(f"lost records: {counts}; metrics.jsonl has them all")

"""Sinks: plugins that hand records to somewhere else, and can fail or hang without harm."""

from __future__ import annotations

import functools
import inspect
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Self, cast

import structlog

from hookengine import dist
from hookengine.hookspecs import EVENTS
from hookengine.plugins import Plugin
from hookengine.record import Record

if TYPE_CHECKING:
    from hookengine.runner import Runner


class Sink(Plugin):
    """A plugin whose ``write(runner, record)`` runs on a thread of its own, behind a queue.

    A subclass defines ``write``, and may define ``open(runner)`` and ``close(runner)``, which
    run on that thread before the first record and after the last one; of the Runner these three
    ask for no more than ``name``, ``run_dir``, ``logger`` and ``describe()``, since records may be
    replayed when there is no Runner any more. It may also answer events, on the main thread.
    Whatever any of these raises is reported once and counted; training goes on, bit-identically.

    The delay that a sink adds is bounded: a record that finds the queue full (``queue_size``
    records are waiting) is dropped, without waiting; at the end of a run, at a load and in
    ``unconfigure`` the queue is given ``flush_timeout`` seconds to run dry (one that has not moved
    since is not waited for again), and ``close`` as many. What was dropped is made up for from the
    ``history`` when the sink has caught up; what never was is counted and said at the end. A record
    whose ``write`` has raised is not tried again.

    A run that goes on gives no gap and no repetition: ``open`` says in ``held`` what is there
    already, by phase and iteration. A record at or before that is left out (``skip`` is told), and
    what the event ``history`` has beyond it is written before anything else.
    """

    queue_size = 1000
    flush_timeout = 10.0
    pause = 1.0
    """Seconds for which records are gathered before they are written together."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        for name in EVENTS.keys() & cls.__dict__.keys():
            method = cls.__dict__[name]
            if callable(method):
                setattr(cls, name, _WRAPPERS.get(name, _isolated)(method))
        super().__init_subclass__(**kwargs)

    def __new__(cls, *args: Any, **options: Any) -> Self:
        """Refuse one that would write nothing."""
        if not hasattr(cls, "write"):
            raise TypeError(f"the sink {cls.__name__} has no write(self, runner, record)")
        return super().__new__(cls, *args, **options)

    def open(self, runner: Runner) -> None:
        """Connect; on the sink's thread. May set ``held`` from what is there already."""

    def close(self, runner: Runner) -> None:
        """Disconnect; on the sink's thread, after the last record."""

    def skip(self, runner: Runner, record: Record) -> None:
        """A record that the sink holds already; on the sink's thread."""

    def enqueue(self, job: Callable[[], None]) -> None:
        """Run ``job`` on the sink's thread, after the records so far; a failure is counted."""
        self._state.put(lambda: self._state.guard("a job", job, everything=True))

    def replay(self, runner: Any, records: Iterable[Record], continues: bool = True) -> None:
        """Give the sink all of ``records`` that it does not hold, whatever ``queue_size`` is.

        Args:
            runner: The Runner, or what stands for it: with ``name``, ``run_dir``, ``logger`` and
                ``describe()``, which is all that ``open``, ``write`` and ``close`` may ask for.
            records: Read on the sink's thread, once.
            continues: Whether to add to what is there of the run already; else it begins anew.
        """
        self._state.runner = runner
        self._state.continues = continues
        self._state.put(functools.partial(self._state.fill, records))

    @property
    def held(self) -> dict[str, int]:
        """Per phase the last iteration that this sink had a record of before it was opened."""
        return self._state.held

    @property
    def continues(self) -> bool:
        """Whether the run goes on in the history that it had, so that there may be some to hold."""
        return self._state.continues

    @property
    def records(self) -> int:
        """How many records were written."""
        return self._state.records

    @property
    def failures(self) -> int:
        """How often the sink raised."""
        return self._state.failures

    @property
    def dropped(self) -> int:
        """How many records were dropped since the queue was full, and not made up for."""
        return self._state.dropped

    @property
    def _state(self) -> _SinkState:
        state = self.__dict__.get("_sink_state")
        if state is None:
            state = self.__dict__["_sink_state"] = _SinkState(self)
        return state

    # A subclass that answers one of these events adds to it: see _isolated.

    def configure(self, runner: Runner) -> None:
        """Begin anew: a sink may serve one Runner after another."""
        self.__dict__["_sink_state"] = state = _SinkState(self)
        state.runner = runner

    def after_load_checkpoint(self, runner: Runner) -> None:
        """What is written from here on may be a repetition."""
        self._state.flush(self.flush_timeout)
        self._state.after_load()
        self._state.history = runner.hooks.history(runner)
        self._state.continues = self._state.history is not None

    def before_run(self, runner: Runner) -> None:
        """What the history has, and the sink has not, comes first."""
        state = self._state
        history, state.history = state.history, None
        if not dist.is_main_process():
            return
        if history is not None:
            self.replay(runner, history)
        elif state.thread is None and state.runner is not None and runner.progress.iter > 0:
            state.join_late()  # it was added in mid-run

    def after_run(self, runner: Runner) -> None:
        """Wait, ``flush_timeout`` seconds at most, until the records so far are written."""
        self._state.flush(self.flush_timeout)

    def unconfigure(self, runner: Runner) -> None:
        """Write what is left, close, and report what was lost."""
        self._state.finish(self.flush_timeout)


_this_thread = threading.local()
"""``sink``: whose thread it is, also when that sink has finished, or serves another Runner."""


class _SinkState:
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


def _queued(write: Callable[..., None]) -> Callable[..., None]:
    """Put a call of ``write`` into the sink's queue; on the sink's own thread call it directly."""
    wanted = [*inspect.signature(write).parameters][1:]

    def put(self: Sink, runner: Runner, record: Record) -> None:
        state = self._state
        arguments = {"runner": runner, "record": record}
        call = functools.partial(write, self, **{name: arguments[name] for name in wanted})
        if getattr(_this_thread, "sink", None) is self:
            call()
        else:
            state.runner = runner
            state.put_record(record, call)

    put.__name__, put.__doc__ = write.__name__, write.__doc__  # the signature is that of the event
    return put


def _isolated_configure(method: Callable[..., None]) -> Callable[..., None]:
    """Isolated too; asks for the Runner also where the method does not, to warn through it."""
    wanted = len(inspect.signature(method).parameters) - 1

    def configure(self: Sink, runner: Runner) -> None:
        Sink.configure(self, runner)
        self._state.guard("configure", lambda: method(self, *[runner] * wanted))

    return configure


def _isolated(method: Callable[..., Any]) -> Callable[..., Any]:
    """Keep what an event's implementation raises away from training."""
    name = method.__name__
    base: Callable[[Sink, Any], None] | None = Sink.__dict__.get(name)

    @functools.wraps(method)
    def call(self: Sink, *args: Any, **kwargs: Any) -> Any:
        result = self._state.guard(name, lambda: method(self, *args, **kwargs))
        if base is not None:
            base(self, self._state.runner)
        return result

    return call


_WRAPPERS: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
    "write": _queued,
    "configure": _isolated_configure,
}

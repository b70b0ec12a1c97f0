"""Deliver records to a sink: its queue and thread, and the records that it holds or has missed."""

from __future__ import annotations

import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from hookengine.records.held import Held
from hookengine.records.open_files import keep_files_of, release_files_of
from hookengine.records.record import Record, RecordHistory

if TYPE_CHECKING:
    from hookengine.events.hookspecs import HookSpecs
    from hookengine.records.sink import RunInfo

_this_thread = threading.local()
"""``owner``: the sink that this thread writes to, even after that sink serves another Runner."""


def on_thread_of(owner: object) -> bool:
    """Return whether the current thread is one that writes to this sink."""
    return getattr(_this_thread, "owner", None) is owner


ARGUMENTS = {
    "open": ("runner",),
    "write": ("runner", "record"),
    "skip": ("runner", "record"),
    "cut": ("runner", "kept"),
    "close": ("runner",),
}
"""The methods that a delivery calls on its thread, with their arguments."""


@dataclass(frozen=True)
class Destination:
    """What a delivery knows of its sink.

    Attributes:
        name: The sink's name, for the thread and for warnings.
        call: Calls a method of the sink by name, with its arguments by name.
        cuts_late: Whether to cut only once the run does not repeat what the sink holds.
        pause: Returns the number of seconds to gather records before they are written.
    """

    name: str
    call: Callable[[str, Mapping[str, Any]], None]
    cuts_late: bool
    pause: Callable[[], float]


class Delivery:
    """The queue, the thread and the counts of one sink, for one Runner.

    The thread ends when the queue is empty; the next job starts another one. Only a thread keeps
    the Runner alive: a sink that waits for records does not.

    Args:
        owner: The sink. See ``on_thread_of``.
        destination: The functions to call.
        runner: The Runner that the records come from, or None if there is none yet.

    Attributes:
        arguments: What the sink's method that is running was called with, by name.
        held: What the sink already holds of the run.
        continues: Whether the run resumes a history, part of which the sink may already hold.
        history: The records that a loaded checkpoint had, until the next run begins; None if there
            are none.
        loaded: Whether a checkpoint was loaded since the last run.
        reached_limit: Whether training has reached its limit in this run.
        records: The number of records written.
        failures: The number of calls that raised an exception.
        dropped: The number of records dropped and not replayed from the history since.
        begun: Whether there was a job since the start, or since the sink was closed.
        thread: The thread, or None while no job is waiting.
        warned_of_missing: Whether a warning has said that nothing makes records.
    """

    def __init__(
        self, owner: object, destination: Destination, runner: RunInfo | None = None
    ) -> None:
        self._runner: Callable[[], RunInfo | None] = lambda: None
        self._kept_alive: RunInfo | None = None
        self.runner = runner
        self.arguments: Mapping[str, Any] = {}
        self.held = Held()
        self.continues = self.loaded = self.reached_limit = False
        self.history: RecordHistory | None = None
        self._resumed: RecordHistory | None = None
        self.records = self.failures = self.dropped = 0
        self.begun = False
        self.thread: threading.Thread | None = None
        self._owner = owner
        self._to = destination
        self._queue: queue.Queue[Callable[[], object]] = queue.Queue()
        self._lock = threading.Lock()
        self._starting = threading.Lock()
        self._hurry = threading.Event()
        self._tried_to_open = self._opened = self._retired = False
        self._behind = self._warned_behind = False
        self._left_behind = self._lost = 0
        self.warned_of_missing = False
        self._replayed_from: Path | None = None

    @property
    def runner(self) -> RunInfo | None:
        """The Runner that the records come from; None before there is one and after it is gone."""
        return self._runner()

    @runner.setter
    def runner(self, runner: RunInfo | None) -> None:
        if runner is not self.runner:
            self._runner = (lambda: None) if runner is None else weakref.ref(runner)

    def retire(self) -> None:
        """Stop writing, because the sink now serves another Runner."""
        self._retired = True

    # -- what goes into the queue -----------------------------------------------------------------

    def put(self, job: Callable[[], object]) -> threading.Thread:
        """Run ``job`` on a thread, after the jobs before it; return the thread."""
        with self._starting:
            self.begun = True
            self._kept_alive = self.runner
            self._queue.put(job)
            if self.thread is None:
                name = f"sink {self._to.name}"
                self.thread = threading.Thread(target=self._work, name=name, daemon=True)
                self.thread.start()
            return self.thread

    def put_record(self, record: Record, limit: float, runner: RunInfo | None) -> None:
        """Write a record of ``runner``, or drop it if ``limit`` jobs are waiting.

        Once a record has been dropped, all later ones are dropped too until the queue has drained,
        so that the history can supply them in order.
        """
        self.runner = self.runner if runner is None else runner
        with self._lock:
            if self._behind or self._queue.qsize() >= limit:
                self._behind = True
                self.dropped += 1
            else:
                self.put(lambda: self._deliver(record))
                return
        if not self._warned_behind:
            self._warned_behind = True
            self.warn(f"cannot keep up; records are dropped for now{self._kept_in()}")

    def replay(self, history: RecordHistory, resumed_at: int) -> None:
        """Write the records that the sink does not hold, however many jobs are waiting.

        Args:
            history: The records that the run continues.
            resumed_at: The iteration at which it resumes.
        """
        self.put(lambda: self._continue(history, resumed_at))

    def replay_all(self, records: Iterable[Record]) -> None:
        """Make the sink hold these records and no others of the run.

        Args:
            records: The records, oldest first; iterated over once, on the thread.
        """
        self._replayed_from = getattr(records, "path", None)
        self.put(lambda: self._hold_exactly(records))

    def cut_back(self) -> None:
        """Cut what the run has left, since training continues from where it has resumed."""
        if self.begun:
            self.put(self._cut_back)

    def end_repetition(self) -> None:
        """Cut what the run has not repeated, since training has reached its limit."""
        if self.begun:
            self.put(self._end_repetition)

    def resume_without_history(self, iteration: int) -> None:
        """Cut what is later than an iteration, since nothing tells what belongs to the run."""
        if self.begun:
            self.put(lambda: self._cut_after(iteration))

    def catch_up_first(self) -> None:
        """Write the records of the history before any new one: the sink was added mid-run."""
        self.continues = self._history() is not None
        self.put(self._catch_up_at_first)

    def expect_repetition(self) -> None:
        """Hold the records written so far, since they may come again after a load."""
        if self.begun:
            self.put(self.held.include_written)  # after the waiting records
        else:
            self.held.include_written()

    # -- the thread -------------------------------------------------------------------------------

    def _work(self) -> None:
        _this_thread.owner = self._owner
        if self._tried_to_open:  # one switch of threads per batch of records
            self._hurry.wait(min(max(self._to.pause(), 0), threading.TIMEOUT_MAX))
        else:
            self._open()
        while self._continues():
            job = self._queue.get()
            if not self._retired:
                job()
                if self._behind and self._queue.empty():
                    self._catch_up()
            del job  # it may hold the Runner
            self._queue.task_done()

    def _continues(self) -> bool:
        """Return whether jobs are waiting; if not, the thread ends."""
        with self._starting:
            if self._queue.empty():
                self.thread = self._kept_alive = None
                return False
            return True

    def _open(self) -> None:
        self._tried_to_open = True
        failures = self.failures
        self._call("open")
        self._opened = self.failures == failures
        keep_files_of(self._owner)

    def _close(self) -> None:
        self._call("close")
        self._tried_to_open = self._opened = False
        release_files_of(self._owner)

    def _call(self, name: str, **arguments: Any) -> None:
        """Call a method of the sink; count an exception."""
        arguments["runner"] = self.runner
        self.arguments = arguments
        self.guard(name, lambda: self._to.call(name, arguments), everything=True)
        self.arguments = {}

    def _deliver(self, record: Record) -> None:
        if not self._opened:
            with self._lock:
                self.dropped += 1
            return
        match self.held.meet(record):
            case "held":
                self._call("skip", record=record)
            case "different":
                self._cut(self.held.kept)
                self._fill_from_history()  # which holds this record, too
                if record.iter > self.held.iterations.get(record.phase, -1):
                    self._write(record)
            case "new":
                self._write(record)

    def _write(self, record: Record) -> None:
        self.held.note(record)
        failures = self.failures
        self._call("write", record=record)
        self.records += self.failures == failures
        self._lost += self.failures > failures

    def _catch_up(self) -> None:
        """Write the dropped records from the history, if a plugin keeps one."""
        with self._lock:  # later records are queued, and may be in the history as well
            self._behind, missed = False, self.dropped
        if self._fill_from_history():
            with self._lock:
                self.dropped -= missed

    def _catch_up_at_first(self) -> None:
        history = self.guard("history", self._history)
        if history is not None:
            self._hold_exactly(history)
            self.held.include_written()  # later records are queued, and in the history as well

    def _fill_from_history(self) -> bool:
        """Write what the sink lacks of the history so far; return whether that was possible."""
        history = self.guard("history", self._history)
        if history is None:
            return False
        self.held.include_written()
        filled = self._fill(history)
        self.held.include_written()
        return filled

    def _history(self) -> Iterable[Record] | None:
        hooks: HookSpecs | None = getattr(self.runner, "hooks", None)  # a past run has none
        return None if hooks is None else hooks.history(hooks.runner)

    def _kept_in(self) -> str:
        """Return the end of a message on lost records: which file has them, if one has all."""
        path = self._replayed_from
        with suppress(Exception):  # it is only for a message
            history = self._history()
            path = path if history is None else getattr(history, "path", None)
        return "" if path is None else f"; {path} has them all"

    def _fill(self, records: Iterable[Record]) -> bool:
        """Write the records that the sink does not hold; return whether all could be read."""

        def each() -> bool:
            for record in records:
                self._deliver(record)
            return True

        return bool(self.guard("history", each, everything=True))

    # -- a run that resumes from an earlier point -------------------------------------------------

    def _continue(self, history: RecordHistory, resumed_at: int) -> None:
        self._resumed = history
        same = self.guard(
            "history", lambda: self.held.compare(history, resumed_at), everything=True
        )
        if same is False:
            self._cut({})
        self._fill(history)

    def _hold_exactly(self, records: Iterable[Record]) -> None:
        if self.held.iterations:
            history = RecordHistory([*records])  # they are read twice
            self._continue(history, max((record.iter for record in history), default=-1))
            self._cut_back()
        else:
            self._fill(records)

    def _cut_back(self) -> None:
        history, self._resumed = self._resumed, None
        if history is None:  # nothing was loaded since the last time
            return
        late = self._to.cuts_late
        if not self.held.expect_repetition() if late else self.held.is_beyond():
            self._cut(self.held.kept)
            if self.held.lacks(self.held.kept):
                self._fill(history)

    def _cut_after(self, iteration: int) -> None:
        held = self.held.iterations.items()
        kept = {phase: min(last, iteration) for phase, last in held if iteration >= 0}
        if any(last > iteration for _, last in held):
            self._cut(kept)

    def _end_repetition(self) -> None:
        if self.held.is_repeating:
            self._cut(self.held.kept)
            self._fill_from_history()

    def _cut(self, kept: Mapping[str, int]) -> None:
        """Have the sink remove the records after ``kept``."""
        kept = dict(kept)
        self.held.cut(kept)
        if self._opened:
            self._call("cut", kept=kept)

    # -- failures ---------------------------------------------------------------------------------

    def guard(self, what: str, call: Callable[[], Any], everything: bool = False) -> Any:
        """Run ``call``; count an exception and warn about the first one.

        Args:
            what: The name of the method, for the warning.
            call: The function to run. Its return value is returned, or None if it raised.
            everything: Also catch KeyboardInterrupt, which is not the user's on the thread.
        """
        try:
            return call()
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt) and not everything:
                raise
            self.failures += 1
            if self.failures == 1:
                self.warn(f"failed in {what}; training continues", error)
            return None

    def warn(self, message: str, error: BaseException | None = None) -> None:
        """Log a warning about the sink, through the Runner's logger if there is one."""
        logger = structlog.get_logger() if self.runner is None else self.runner.logger
        name = self._to.name
        with suppress(Exception):  # a failing logger must not end training either
            details = {} if error is None else {"error": _described(error)}
            logger.bind(plugin=name).warning(f"sink {name!r} {message}", **details)

    # -- the end ----------------------------------------------------------------------------------

    def flush(self, timeout: float) -> bool:
        """Wait at most ``timeout`` seconds until the queue is empty; return whether it is.

        If the queue has made no progress since a wait timed out, do not wait for it again.
        """
        if self._left_behind and self._queue.unfinished_tasks >= self._left_behind:
            timeout = 0
        timeout = min(timeout, threading.TIMEOUT_MAX)
        deadline = time.monotonic() + timeout
        self._hurry.set()
        try:
            with self._queue.all_tasks_done:
                while self._queue.unfinished_tasks:
                    left = deadline - time.monotonic()
                    if left <= 0:
                        return self._give_up(timeout)
                    self._queue.all_tasks_done.wait(left)
            self._join(timeout)
            return True
        finally:
            self._hurry.clear()

    def _give_up(self, timeout: float) -> bool:
        if not self._left_behind:
            waiting = self._queue.unfinished_tasks
            self.warn(f"did not finish within {timeout:g} s; {waiting} records are waiting")
        self._left_behind = self._queue.unfinished_tasks
        return False

    def _join(self, timeout: float) -> None:
        """Wait until the thread has ended, as it does once the queue is empty."""
        thread = self.thread
        if thread is not None and not on_thread_of(self._owner):
            thread.join(timeout)

    def finish(self, runner: RunInfo | None, timeout: float) -> None:
        """Write the remaining records, close, and warn about lost records.

        This waits at most ``timeout`` seconds for the queue, and as long for the thread.

        Args:
            runner: The Runner. There is no other reference to it if it is being collected.
            timeout: See above.
        """
        self.runner = runner
        waiting = 0
        if self.begun:
            done = self.flush(timeout)
            waiting = 0 if done else self._queue.unfinished_tasks
            self._hurry.set()
            thread = self.put(self._close)  # a sink that hangs now and returns later closes too
            if done:
                thread.join(min(timeout, threading.TIMEOUT_MAX))
                if thread.is_alive():
                    self.warn(f"did not close within {timeout:g} s; its thread is left running")
        self.begun = False
        if self._lost or self.dropped or waiting:
            counts = f"{self.failures} failures, {self.dropped} dropped, {waiting} not written"
            self.warn(f"lost records: {counts}{self._kept_in()}")
        elif self.failures > 1:
            self.warn(f"failed {self.failures} times, but lost no records")


def _described(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:  # its __str__ fails
        return type(error).__name__

"""Sinks: plugins that hand records to somewhere else, and can fail or hang without harm."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Self

from hookengine import dist
from hookengine.events.hookspecs import EVENTS
from hookengine.events.plugin import Plugin
from hookengine.records.delivery import Delivery, on_thread_of
from hookengine.records.record import Record

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
    def _state(self) -> Delivery:
        state = self.__dict__.get("_sink_state")
        if state is None:
            state = self.__dict__["_sink_state"] = Delivery(self)
        return state

    # A subclass that answers one of these events adds to it: see _isolated.

    def configure(self, runner: Runner) -> None:
        """Begin anew: a sink may serve one Runner after another."""
        self.__dict__["_sink_state"] = state = Delivery(self)
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


def _queued(write: Callable[..., None]) -> Callable[..., None]:
    """Put a call of ``write`` into the sink's queue; on the sink's own thread call it directly."""
    wanted = [*inspect.signature(write).parameters][1:]

    def put(self: Sink, runner: Runner, record: Record) -> None:
        state = self._state
        arguments = {"runner": runner, "record": record}
        call = functools.partial(write, self, **{name: arguments[name] for name in wanted})
        if on_thread_of(self):
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

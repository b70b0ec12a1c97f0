"""Sinks: plugins that send records elsewhere and may fail or hang without affecting training."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

from hookengine import dist
from hookengine.events.hookspecs import EVENTS
from hookengine.events.plugin import Plugin
from hookengine.records.delivery import Delivery, Destination, on_thread_of
from hookengine.records.record import Record, RecordHistory

if TYPE_CHECKING:
    from hookengine.runner import Runner


class RunInfo(Protocol):
    """What a sink may use of the Runner on its own thread; also enough to replay a past run."""

    name: str
    logger: Any

    @property
    def run_dir(self) -> Path:
        """The folder of the run."""

    def describe(self) -> dict[str, Any]:
        """Describe the run, as ``Runner.describe`` does."""


class Sink(Plugin):
    """A plugin whose ``write(runner, record)`` runs on its own thread, behind a queue.

    A subclass defines ``write``. It may also define ``open(runner)`` and ``close(runner)``, which
    run on the same thread before the first record and after the last one. These three methods may
    use only ``name``, ``run_dir``, ``logger`` and ``describe()`` of the Runner, since records can
    be replayed after the Runner is gone. A subclass may implement events too; they run on the main
    thread. An exception raised by any of these methods is counted, the first one is logged as a
    warning, and training continues with bit-identical weights.

    The delay that a sink adds is bounded. If ``queue_size`` jobs are waiting, a new record is
    dropped at once. At the end of a run, when a checkpoint is loaded, and in ``unconfigure``, the
    Runner waits at most ``flush_timeout`` seconds for the queue to drain, and in ``unconfigure`` at
    most as long again for ``close``. If the queue has made no progress since a wait timed out, the
    Runner does not wait for it again. After the queue drains, dropped records are replayed from the
    ``history``. Records that could not be replayed are counted, and a warning at the end gives
    their number. A record whose ``write`` raised an exception is not tried again.

    A resumed run leaves no gap and repeats no record: ``open`` sets ``held`` to the last iteration
    of each phase that the sink already holds, and ``held_values`` to the numbers of that record.
    Records up to that iteration go to ``skip`` instead of ``write``, and later records from the
    event ``history`` are written first.

    A run that resumes from an older checkpoint leaves the records after it. When training begins,
    ``cut(runner, kept)`` removes them from the sink. Without ``cut``, or with ``cuts_late``, the
    sink keeps them for as long as the run repeats them exactly; the first record that differs is
    then preceded by ``cut``. Without ``cut``, the sink holds both records, and a warning says so.
    """

    queue_size = 1000
    flush_timeout = 10.0
    pause = 1.0
    """Seconds to gather records before they are written together."""
    cuts_late = False
    """Whether ``cut`` is called only once the run does not repeat the records that it has left."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        for name in EVENTS.keys() & cls.__dict__.keys():
            method = cls.__dict__[name]
            if callable(method):
                setattr(cls, name, _WRAPPERS.get(name, _isolated)(method))
        super().__init_subclass__(**kwargs)

    def __new__(cls, *args: Any, **options: Any) -> Self:
        """Reject a sink without ``write``."""
        if not hasattr(cls, "write"):
            raise TypeError(f"the sink {cls.__name__} has no write(self, runner, record). Add it")
        return super().__new__(cls, *args, **options)

    # -- what a subclass may override -------------------------------------------------------------

    def open(self, runner: Runner) -> None:
        """Connect, on the sink's thread; may fill ``held`` with what the sink already holds."""

    def close(self, runner: Runner) -> None:
        """Disconnect, on the sink's thread, after the last record."""

    def skip(self, runner: Runner, record: Record) -> None:
        """Receive a record that the sink already holds, on the sink's thread."""

    def cut(self, runner: Runner, kept: Mapping[str, int]) -> None:
        """Remove the records that the run has left, on the sink's thread.

        ``held`` is lowered to ``kept`` already. A sink that removes more lowers it further; it then
        receives the records of the history again.

        Args:
            runner: The Runner.
            kept: The last iteration of each phase that still belongs to the run. It is empty if
                the sink holds no record of this run's history.
        """
        after = f"those after iteration {max(kept.values())}" if kept else "the records"
        runner.logger.warning(
            f"sink {self.plugin_name!r} still holds {after} of an attempt that the run has left, "
            "and receives the new ones as well. To remove them, define cut(self, runner, kept)",
            plugin=self.plugin_name,
        )

    # -- what a subclass may use ------------------------------------------------------------------

    def enqueue(self, job: Callable[[], None]) -> None:
        """Run ``job`` on the sink's thread, after the records so far; a failure is counted."""
        delivery = self._sink_delivery
        delivery.put(lambda: delivery.guard("a job", job, everything=True))

    def replay(self, runner: RunInfo, records: Iterable[Record], continues: bool = True) -> None:
        """Make the sink hold ``records``, and no others of the run, regardless of ``queue_size``.

        Args:
            runner: The Runner, or a stand-in with what ``open``, ``write`` and ``close`` may use.
            records: The records, oldest first; iterated over once, on the sink's thread.
            continues: Whether to add to what the sink already holds of the run, or to start over.
        """
        self._sink_delivery.runner = runner
        self._sink_delivery.continues = continues
        self._sink_delivery.replay_all(records)

    @property
    def held(self) -> dict[str, int]:
        """The last iteration of each phase for which the sink already holds a record."""
        return self._sink_delivery.held.iterations

    @property
    def held_values(self) -> dict[str, Mapping[str, float]]:
        """The numbers of that record by name, per phase, to recognize it in the history."""
        return self._sink_delivery.held.values

    @property
    def continues(self) -> bool:
        """Whether the run resumes a history, part of which the sink may already hold."""
        return self._sink_delivery.continues

    @property
    def records(self) -> int:
        """The number of records written."""
        return self._sink_delivery.records

    @property
    def failures(self) -> int:
        """The number of calls of the sink's methods that raised an exception."""
        return self._sink_delivery.failures

    @property
    def dropped(self) -> int:
        """The number of records dropped because the queue was full and not replayed since."""
        return self._sink_delivery.dropped

    @property
    def _sink_delivery(self) -> Delivery:
        return self.__dict__.get("_sink_current") or _begin(self, None)

    # -- events; a subclass that implements one adds to it, see _isolated --------------------------

    def configure(self, runner: Runner) -> None:
        """Start over, because one sink may serve several Runners in turn."""
        self._sink_delivery.retire()
        _begin(self, runner)

    def after_load_checkpoint(self, runner: Runner) -> None:
        """Keep the history for ``before_run``; records may be repeated from here on."""
        delivery = self._sink_delivery
        delivery.flush(self.flush_timeout)
        delivery.expect_repetition()
        history = runner.hooks.history(runner)
        delivery.history = history if history is None else _as_history(history)
        delivery.continues = history is not None
        delivery.loaded = True

    def before_run(self, runner: Runner) -> None:
        """Write the records of the history that the sink does not hold."""
        delivery = self._sink_delivery
        history, delivery.history = delivery.history, None
        loaded, delivery.loaded = delivery.loaded, False
        if not dist.is_main_process():
            return
        if history is not None:
            delivery.runner = runner
            delivery.replay(history, runner.progress.iter)
        elif loaded:
            other = "history" in runner.plugins.calls()  # the history of another run
            delivery.resume_without_history(-1 if other else runner.progress.iter)
        elif delivery.thread is None and delivery.runner is not None and runner.progress.iter > 0:
            delivery.catch_up_first()  # the sink was added mid-run

    def before_train(self, runner: Runner) -> None:
        """Cut the records that the run has left."""
        self._sink_delivery.reached_limit = False
        self._sink_delivery.cut_back()

    def after_train(self, runner: Runner) -> None:
        """Note whether training has reached its limit, so that it repeats nothing more."""
        self._sink_delivery.reached_limit = runner.progress.stopped is None

    def after_run(self, runner: Runner) -> None:
        """Wait at most ``flush_timeout`` seconds until the records so far are written."""
        if self._sink_delivery.reached_limit:
            self._sink_delivery.end_repetition()
        self._sink_delivery.flush(self.flush_timeout)

    def unconfigure(self, runner: Runner) -> None:
        """Write the remaining records, close, and warn about lost records."""
        self._sink_delivery.finish(self.flush_timeout)


def _begin(sink: Sink, runner: RunInfo | None) -> Delivery:
    """Give a sink an empty queue, and counts at zero.

    Names of a subclass cannot collide with what a Sink keeps: its names begin with ``_sink``.
    """
    write: Callable[[Any, Record], None] = sink.write  # type: ignore[attr-defined]
    late = sink.cuts_late or type(sink).cut is Sink.cut
    to = Destination(
        *(sink.plugin_name, sink.open, write, sink.skip, sink.cut, late),
        *(sink.close, lambda: sink.pause),
    )
    sink.__dict__["_sink_current"] = delivery = Delivery(sink, to, runner)
    return delivery


def _as_history(records: Iterable[Record]) -> RecordHistory:
    if isinstance(records, RecordHistory):
        return records
    return RecordHistory([*records] if iter(records) is records else records)


def _queued(write: Callable[..., None]) -> Callable[..., None]:
    """Put a call of ``write`` into the sink's queue; on the sink's own thread call it directly."""
    wanted = [*inspect.signature(write).parameters][1:]

    def put(self: Sink, runner: Runner, record: Record) -> None:
        if on_thread_of(self):
            arguments = {"runner": runner, "record": record}
            write(self, **{name: arguments[name] for name in wanted})
        else:
            self._sink_delivery.runner = runner
            self._sink_delivery.put_record(record, self.queue_size)

    return _named_as(write, put)


def _isolated_configure(method: Callable[..., None]) -> Callable[..., None]:
    """Isolate ``configure``; ask for the Runner even if the method does not, to warn through it."""
    wanted = len(inspect.signature(method).parameters) - 1

    def configure(self: Sink, runner: Runner) -> None:
        Sink.configure(self, runner)
        self._sink_delivery.guard("configure", lambda: method(self, *[runner] * wanted))

    return _named_as(method, configure)


def _named_as(method: Callable[..., None], wrapper: Callable[..., None]) -> Callable[..., None]:
    """Copy a method's name, docstring and hookimpl options, but not its signature."""
    wrapper.__name__, wrapper.__doc__ = method.__name__, method.__doc__
    kept = ("hookengine_options", "hookengine_impl")
    vars(wrapper).update({name: vars(method)[name] for name in kept if name in vars(method)})
    return wrapper


def _isolated(method: Callable[..., Any]) -> Callable[..., Any]:
    """Keep exceptions of an event's implementation away from training."""
    name = method.__name__
    base: Callable[[Sink, Any], None] | None = Sink.__dict__.get(name)

    @functools.wraps(method)
    def call(self: Sink, *args: Any, **kwargs: Any) -> Any:
        result = self._sink_delivery.guard(name, lambda: method(self, *args, **kwargs))
        if base is not None:
            base(self, self._sink_delivery.runner)
        return result

    return call


_WRAPPERS: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
    "write": _queued,
    "configure": _isolated_configure,
}

"""Sinks: plugins that send records elsewhere and may fail or hang without affecting training."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self, cast

from hookengine import dist
from hookengine.events.hookspecs import EVENTS
from hookengine.events.plugin import Plugin
from hookengine.records.calling import Method, by_name, signature_of
from hookengine.records.delivery import ARGUMENTS, Delivery, Destination, on_thread_of
from hookengine.records.record import Record, RecordHistory
from hookengine.records.recording import missing_records

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
    """A plugin whose ``write(runner, record)`` runs on another thread, behind a queue.

    A subclass defines ``write``. It may also define ``open(runner)`` and ``close(runner)``, which
    run there too, before the first record and after the last one. At most one thread at a time
    calls them. It ends when the queue is empty, and the next record starts another one, so pass
    ``check_same_thread=False`` to ``sqlite3.connect``. Each of the methods takes those of its
    arguments that it needs; another argument is an error when the sink is created. These
    three methods may use only ``name``, ``run_dir``, ``logger`` and ``describe()`` of the Runner,
    since records can be replayed after the Runner is gone. A subclass may implement events too;
    they run on the main thread. An exception raised by any of these methods is counted, the first
    one is logged as a warning, and training continues with bit-identical weights. Only Ctrl-C on
    the main thread ends it.

    The delay that a sink adds is bounded. If ``queue_size`` jobs are waiting, a new record is
    dropped at once. At the end of a run, when a checkpoint is loaded, and in ``unconfigure``, the
    Runner waits at most ``flush_timeout`` seconds for the queue to drain, and in ``unconfigure`` at
    most as long again for ``close``. If the queue has made no progress since a wait timed out, the
    Runner does not wait for it again. After the queue drains, dropped records are replayed from the
    ``history``. Records that could not be replayed are counted, and a warning at the end gives
    their number. A record whose ``write`` raised an exception is not tried again.

    If the script does not close the Runner, ``close`` is called when the Runner is collected, or
    at exit. Files that are attributes of the sink stay open until then.

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
    hookengine_options = None  # is read from every plugin, and a __getattr__ may fail

    def __init_subclass__(cls, **kwargs: Any) -> None:
        for name in (*ARGUMENTS, *EVENTS, *STATES):
            owner = next((base for base in cls.__mro__ if name in vars(base)), Plugin)
            defined = vars(owner).get(name)
            if owner in (Sink, Plugin) or hasattr(defined, "sink_method"):  # as in cut = Other.cut
                continue
            if name in ARGUMENTS:
                setattr(cls, name, _on_the_thread(name, defined))
            elif _is_method(defined):
                setattr(cls, name, _isolated(name, defined))
        super().__init_subclass__(**kwargs)

    def __new__(cls, *args: Any, **options: Any) -> Self:
        """Reject a sink without ``write``, or with a method that cannot be called as it should."""
        sink = super().__new__(cls, *args, **options)
        where = f"the sink {cls.__name__}"
        if not hasattr(cls, "write"):
            near = difflib.get_close_matches("write", vars(cls), n=1, cutoff=0.7)
            hint = f", or rename {near[0]!r}" if near else ""
            raise TypeError(f"{where} has no write(self, runner, record). Add it{hint}")
        for name in (*ARGUMENTS, *EVENTS, *STATES):
            method = getattr(getattr(cls, name, None), "sink_method", None)
            if method is not None:
                method.check(sink, where)
        return sink

    # -- what a subclass may override; each takes those of its arguments that it needs -------------

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
    def begun(self) -> bool:
        """Whether the sink has received a record or a job, and is not closed."""
        return self._sink_delivery.begun

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
        delivery.flush(_number(self, "flush_timeout"))
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
        known = runner is not None and not delivery.warned_of_missing
        if known and (text := missing_records(runner)):
            delivery.warned_of_missing = True
            runner.logger.warning(f"sink {self.plugin_name!r}: {text}")
        if history is not None:
            delivery.runner = runner
            delivery.replay(history, runner.progress.iter)
        elif loaded:
            other = "history" in runner.plugins.calls()  # the history of another run
            delivery.resume_without_history(-1 if other else runner.progress.iter)
        elif not delivery.begun and delivery.runner is not None and runner.progress.iter > 0:
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
        self._sink_delivery.flush(_number(self, "flush_timeout"))

    def unconfigure(self, runner: Runner) -> None:
        """Write the remaining records, close, and warn about lost records."""
        self._sink_delivery.finish(runner, _number(self, "flush_timeout"))


def _begin(sink: Sink, runner: RunInfo | None) -> Delivery:
    """Give a sink an empty queue, and counts at zero.

    Names of a subclass cannot collide with what a Sink keeps: its names begin with ``_sink``.
    """
    late = sink.cuts_late or _defined(type(sink), "cut") is _defined(Sink, "cut")
    to = Destination(
        sink.plugin_name,
        lambda name, arguments: getattr(sink, name)(**arguments),
        late,
        lambda: _number(sink, "pause"),
    )
    sink.__dict__["_sink_current"] = delivery = Delivery(sink, to, runner)
    return delivery


def _as_history(records: Iterable[Record]) -> RecordHistory:
    if isinstance(records, RecordHistory):
        return records
    return RecordHistory([*records] if iter(records) is records else records)


# -- the methods of subclasses, wrapped --------------------------------------------------------


def _defined(cls: type[Sink], name: str) -> Method:
    """Return a method of the sink's thread as its class defines it."""
    wrapper: Any = getattr(cls, name)
    method: Method = wrapper.sink_method
    return method


def _on_the_thread(name: str, defined: Any) -> Callable[..., None]:
    """Wrap a method of the sink's thread, so that it may be called with any of its arguments.

    Its class may take fewer arguments than the subclass that calls it, as in
    ``super().write(record)``. ``write`` puts the record into the queue if another thread calls it.
    """
    method = Method(name, defined, ARGUMENTS[name])

    def call(self: Sink, passed: Mapping[str, Any]) -> None:
        delivery = self._sink_delivery
        given = by_name([value for value in passed.values() if value is not None], method.known)
        if on_thread_of(self):
            method.call(self, {**delivery.arguments, **given})
        elif name == "write":
            limit = _number(self, "queue_size")
            delivery.put_record(given["record"], limit, given.get("runner"))
        else:
            method.call(self, {"runner": delivery.runner, **given})

    return _wrapper(method, [*method.known], call)


def _isolated(name: str, defined: Any) -> Callable[..., Any]:
    """Keep exceptions of an event's implementation away from training.

    What the class ``Sink`` does in the event follows; in ``configure``, it comes first.
    """
    base = _BASE.get(name)
    in_contexts = name in EVENTS and EVENTS[name].kind.name == "contexts"
    parameters = [*signature_of(defined).parameters.values()][1:]
    event = EVENTS[name].arguments if name in EVENTS else ()
    own = [p.name for p in parameters if p.default is p.empty or p.name in event]
    method = Method(name, defined, own)

    def run(self: Sink, call: Callable[[], Any]) -> Any:
        delivery = self._sink_delivery
        result = delivery.guard(name, call)
        if in_contexts and result is not None:
            return _IsolatedContext(delivery, name, result)
        return {} if result is None and name in _RETURN_STATES else result

    if base is None and inspect.isfunction(defined):

        @functools.wraps(defined)
        def directly(self: Sink, *args: Any, **kwargs: Any) -> Any:
            return run(self, lambda: defined(self, *args, **kwargs))

        directly.sink_method = method  # type: ignore[attr-defined]
        return directly

    def call(self: Sink, passed: Mapping[str, Any]) -> Any:
        runner = passed.get("runner") or self._sink_delivery.runner
        if base is not None and name == "configure":
            base(self, runner)
        result = run(self, lambda: method.call(self, {n: passed[n] for n in own}))
        if base is not None and name != "configure":
            base(self, runner)
        return result

    names = own if base is None or "runner" in own else ["runner", *own]
    wrapper: Any = _wrapper(method, names, call)
    asked = [inspect.Parameter(n, _EITHER) for n in ("self", *names) if n not in own]
    wrapper.__signature__ = inspect.Signature([*asked, *parameters])  # as it is checked
    return cast(Callable[..., Any], wrapper)


def _wrapper(
    method: Method, names: Sequence[str], call: Callable[[Sink, Mapping[str, Any]], Any]
) -> Callable[..., Any]:
    """Make a method with the given parameters, which pluggy reads, that calls ``call``."""
    takes = "".join(f", {name}=None" for name in names)
    passes = ", ".join(f"{name!r}: {name}" for name in names)
    namespace: dict[str, Any] = {"call": call}
    exec(f"def method(self{takes}): return call(self, {{{passes}}})", namespace)
    wrapper = namespace["method"]
    defined = method.defined
    wrapper.__name__, wrapper.__doc__ = method.name, getattr(defined, "__doc__", None)
    wrapper.__qualname__ = getattr(defined, "__qualname__", method.name)
    wrapper.__module__ = getattr(defined, "__module__", __name__)
    for kept in ("hookengine_options", "hookengine_impl"):
        if hasattr(defined, kept):
            setattr(wrapper, kept, getattr(defined, kept))
    wrapper.sink_method = method
    return cast(Callable[..., Any], wrapper)


def _is_method(defined: Any) -> bool:
    bound_later = isinstance(defined, (classmethod, functools.partialmethod))
    return bound_later or (callable(defined) and not isinstance(defined, type))


class _IsolatedContext:
    """A context manager of a sink, whose exceptions do not end training."""

    def __init__(self, delivery: Delivery, name: str, context: Any) -> None:
        self._guard = functools.partial(delivery.guard, name)
        self._context = context

    def __enter__(self) -> None:
        self._entered = self._guard(lambda: (self._context.__enter__(),))

    def __exit__(self, *error: Any) -> None:
        if self._entered:
            self._guard(lambda: self._context.__exit__(*error))


def _number(sink: Sink, name: str) -> float:
    """Return a setting of a sink; that of the class ``Sink`` if it is not a number."""

    def read() -> float:
        return float(getattr(sink, name))

    number = sink._sink_delivery.guard(name, read)
    return float(getattr(Sink, name)) if number is None or number != number else number


_EITHER = inspect.Parameter.POSITIONAL_OR_KEYWORD
_RETURN_STATES = ("state_dict", "rank_state_dict")
STATES = (*_RETURN_STATES, "load_state_dict", "load_rank_state_dict")
"""Methods that the Runner calls besides the events."""
_BASE = {name: method for name, method in vars(Sink).items() if name in EVENTS}
for _name in ARGUMENTS.keys() & vars(Sink).keys():
    setattr(Sink, _name, _on_the_thread(_name, vars(Sink)[_name]))

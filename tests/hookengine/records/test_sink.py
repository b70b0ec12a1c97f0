"""Sinks may raise, hang and repeat; training does not notice."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch

from hookengine import Record, Runner, Sink, read_records
from tests.fixtures import MakeRunner
from tests.hookengine.records.keeping import Keeping, record, trained_weights


def test_records_arrive_in_order_on_the_sinks_own_thread(make: MakeRunner) -> None:
    sink = Keeping()
    runner = make(plugins=[sink])
    for iteration in range(1, 4):
        runner.hooks.write(runner, record(iteration, loss=0.5))
    runner.close()
    expected = [("train", iteration, {"loss": 0.5}) for iteration in range(1, 4)]
    assert sink.log == ["open", *expected, "close"]
    assert sink.threads == {"sink keeping"}


def test_a_run_is_over_when_its_records_are_written(make: MakeRunner) -> None:
    sink = Keeping()
    runner = make(plugins=[sink, dict(type="logging", interval=2)])
    runner.train()
    assert [(phase, iteration) for phase, iteration, _ in sink.log[1:]] == [
        ("train", 2),
        ("train", 4),
        ("train", 5),
        ("train", 7),
        ("train", 9),
        ("train", 10),
    ]
    assert {"loss", "lr", "time", "samples_per_second"} <= set(sink.log[1][2])


def test_what_the_sink_held_when_it_was_opened_is_left_out(make: MakeRunner) -> None:
    class Resumed(Keeping):
        def open(self, runner: Any) -> None:
            self.held.update(train=2)

    sink = Resumed()
    runner = make(plugins=[sink])
    for iteration in (1, 2, 3, 3, 2):  # two plugins may write a record of one iteration
        runner.hooks.write(runner, record(iteration))
    runner.hooks.write(runner, record(1, phase="val"))
    runner.close()
    assert [entry[:2] for entry in sink.log[:-1]] == [("train", 3), ("train", 3), ("val", 1)]
    assert sink.held == {"train": 2}


def test_what_is_repeated_after_a_load_is_left_out(make: MakeRunner) -> None:
    sink = Keeping()
    runner = make(plugins=[sink, dict(type="logging", interval=1)], train_cfg=dict(max_iters=4))
    states = []
    runner.on("safe_point")(lambda runner: states.append(copy.deepcopy(runner.state_dict())))
    runner.train()
    runner.load_state_dict(states[1])
    runner.train(max_iters=6)
    runner.close()
    assert [entry[1] for entry in sink.log[1:-1]] == [1, 2, 3, 4, 5, 6]


def test_one_sink_serves_one_runner_after_another(make: MakeRunner) -> None:
    sink = Keeping()
    for _ in range(2):
        sink.log.clear()
        runner = make(plugins=[sink])
        runner.hooks.write(runner, record(1))
        runner.close()
        assert sink.log == ["open", ("train", 1, {}), "close"]


class Raising(Sink):
    """Raises wherever it can."""

    def configure(self) -> None:  # type: ignore[override]
        raise OSError("configure")

    def open(self, runner: Any) -> None:
        raise OSError("open")

    def write(self, runner: Any, record: Record) -> None:
        raise OSError("write")

    def after_val_epoch(self, metrics: Any) -> None:
        raise OSError("after_val_epoch")

    def after_run(self) -> None:  # type: ignore[override]
        raise OSError("after_run")

    def close(self, runner: Any) -> None:
        raise OSError("close")


def test_a_sink_that_raises_changes_nothing_and_warns_once(
    make: MakeRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    sink = Raising()
    assert torch.equal(trained_weights(make, sink), trained_weights(make))
    # configure, open, 2 validations, after_run, close; nothing is written to what is not open
    assert sink.failures == 1 + 1 + 2 + 1 + 1
    assert sink.dropped == 12
    lines = [line for line in capsys.readouterr().out.splitlines() if "sink 'raising'" in line]
    assert len(lines) == 2
    assert "failed in configure; training continues" in lines[0]
    assert "OSError: configure" in lines[0]
    assert "6 failures, 12 dropped" in lines[1]
    assert all(line[:2].isdigit() for line in lines)  # they went through the run's own logger


def test_a_sink_without_a_runner_warns_all_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    class Broken(Sink):
        def write(self) -> None: ...

        def before_run(self) -> None:  # type: ignore[override]
            raise OSError("no")

    sink = Broken()
    sink.before_run()
    assert "sink 'broken' failed in before_run" in capsys.readouterr().out
    assert sink.failures == 1


def test_a_subclass_may_call_the_write_that_it_inherits(make: MakeRunner) -> None:
    class Twice(Keeping):
        def write(self, runner: Any, record: Record) -> None:
            super().write(runner, record)
            super().write(runner, record)

    sink = Twice()
    runner = make(plugins=[sink])
    runner.hooks.write(runner, record(1))
    runner.close()
    assert sink.log == ["open", ("train", 1, {}), ("train", 1, {}), "close"]


def test_what_is_left_out_is_told(make: MakeRunner) -> None:
    class Resumed(Keeping):
        def open(self, runner: Any) -> None:
            self.held.update(train=2, val=1)

        def skip(self, runner: Any, record: Record) -> None:
            self.log.append(("skipped", record.phase, record.iter))
            raise OSError("no")

    sink = Resumed()
    runner = make(plugins=[sink])
    for iteration in (2, 3):
        runner.hooks.write(runner, record(iteration))
        runner.hooks.write(runner, record(iteration, phase="val"))
    runner.close()
    assert sink.log == [
        ("skipped", "train", 2),
        ("val", 2, {}),
        ("train", 3, {}),
        ("val", 3, {}),
        "close",
    ]
    assert sink.failures == 1


def test_a_sink_may_ask_for_the_record_alone(make: MakeRunner) -> None:
    class Plain(Sink):
        def __post_init__(self) -> None:
            self.seen: list[int] = []

        def write(self, record: Record) -> None:
            self.seen.append(record.iter)

    sink = Plain()
    runner = make(plugins=[sink])
    sink.replay(runner, [record(1)])
    runner.hooks.write(runner, record(2))
    runner.close()
    assert sink.seen == [1, 2]


def test_what_a_sink_that_cannot_open_misses_is_counted(
    make: MakeRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    class Closed(Keeping):
        def open(self, runner: Any) -> None:
            raise ConnectionError("no server")

    sink = Closed()
    runner = make(plugins=["logging", sink])
    runner.hooks.write(runner, record(1))
    runner.close()
    assert sink.log == ["close"]
    assert sink.dropped == 1
    out = capsys.readouterr().out
    assert "failed in open; training continues  error=ConnectionError: no server" in out


def interrupted(make: MakeRunner, upto: int, state_at: int) -> Any:
    """A run of ten iterations that has written ``upto`` of them; its state at another one."""
    runner = make(name="run", plugins=[dict(type="logging", interval=1)], validate=True)
    states = {}

    @runner.on("safe_point")
    def save(runner: Any) -> None:
        if runner.progress.iter == state_at and not runner.progress.val_due:
            states[state_at] = copy.deepcopy(runner.state_dict())
        if runner.progress.iter == upto:
            runner.stop()

    runner.train()
    runner.close()
    return states[state_at]


@pytest.mark.parametrize("held", [{}, {"train": 2}, {"train": 4}, {"train": 6, "val": 5}])
def test_a_sink_gets_what_it_lacks_of_a_run_that_goes_on_and_gets_it_once(
    make: MakeRunner, held: dict[str, int]
) -> None:
    class Holding(Keeping):
        def open(self, runner: Any) -> None:
            assert self.continues
            self.held.update(held)

    state = interrupted(make, upto=6, state_at=4)
    sink = Holding()
    runner = make(name="run", plugins=[dict(type="logging", interval=1), sink], validate=True)
    runner.load_state_dict(state)
    runner.train()
    runner.close()
    written = [entry[:2] for entry in sink.log[:-1]]
    order = [("train", i) for i in range(1, 6)] + [("val", 5)]
    order += [("train", i) for i in range(6, 11)] + [("val", 10)]
    assert written == [each for each in order if each[1] > held.get(each[0], 0)]


def test_a_run_that_begins_anew_does_not_continue(make: MakeRunner) -> None:
    interrupted(make, upto=6, state_at=4)

    class Asks(Keeping):
        def open(self, runner: Any) -> None:
            self.log.append(self.continues)

    sink = Asks()
    runner = make(name="run", plugins=[dict(type="logging", interval=1), sink])
    runner.train()
    runner.close()
    assert sink.log[0] is False
    assert [entry[1] for entry in sink.log[1:-1]] == [*range(1, 11)]


def test_a_sink_that_writes_nothing_is_refused() -> None:
    class Empty(Sink):
        def open(self, runner: Any) -> None: ...

    with pytest.raises(TypeError, match=r"the sink Empty has no write\(self, runner, record\)"):
        Empty()


def test_a_sink_that_is_added_in_mid_run_gets_what_was_before_it(make: MakeRunner) -> None:
    sink = Keeping()
    runner = make(plugins=[dict(type="logging", interval=1)], validate=True)

    @runner.on("after_train_iter")
    def add(runner: Any) -> None:
        if runner.progress.iter == 4:
            runner.plugins.add(sink)

    runner.train()
    runner.close()
    written = [(r.phase, r.iter) for r in read_records(runner.run_dir)]
    assert [entry[:2] for entry in sink.log if entry not in ("open", "close")] == written
    assert len(written) == 12
    assert sink.dropped == 0


class Crowded(Sink):
    """A sink with attributes of the names that one would take."""

    def configure(self, runner: Runner) -> None:
        self._history: list[Record] = []
        self._begin = self._delivery = self._state = 7

    def write(self, record: Record) -> None:
        self._history.append(record)


def test_a_subclass_may_use_any_name(make: MakeRunner) -> None:
    sink = Crowded()
    for _ in range(2):
        runner = make(plugins=["logging", sink])
        runner.train()
        runner.close()
        assert (len(sink._history), sink.records, sink.failures) == (2, 2, 0)


# -- a run that goes back -----------------------------------------------------------------------


class Remembering(Keeping):
    """Keeps records from one Runner to the next, as a file would; can cut them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.rows: list[Record] = []
        self.cuts: list[dict[str, int]] = []

    def open(self, runner: Any) -> None:
        if not self.continues:
            self.rows.clear()
        for row in self.rows:
            self.held[row.phase] = row.iter
            self.held_values[row.phase] = dict(row.scalars)

    def write(self, record: Record) -> None:  # type: ignore[override]
        self.rows.append(record)

    def cut(self, runner: Any, kept: Any) -> None:
        self.cuts.append(kept)
        self.rows = [row for row in self.rows if row.iter <= kept.get(row.phase, -1)]

    def close(self, runner: Any) -> None: ...


class Late(Remembering):
    """Keeps what the run may repeat."""

    cuts_late = True


class Appending(Remembering):
    """Cannot remove anything."""

    cut = Sink.cut


def losses(records: Any) -> list[tuple[str, int, float | None]]:
    return [(r.phase, r.iter, r.scalars.get("loss")) for r in records]


def holds_the_history(sink: Remembering, runner: Any) -> bool:
    assert sink.failures == 0
    assert losses(sink.rows) == losses(read_records(runner.run_dir))
    return True


def attempt(
    make: MakeRunner, sink: Sink | None, state: Any = None, lr: float = 0.1, **options: Any
) -> tuple[Any, dict[int, Any]]:
    """Train in the folder ``run``; return the Runner, and its state after each iteration."""
    log = dict(type="logging", interval=options.pop("interval", 1))
    limits = options.pop("limits", {})
    runner = make(name="run", plugins=[log, *[sink] * bool(sink)], validate=True, **options)
    if state is not None:
        runner.load_state_dict(copy.deepcopy(state))
        runner.optim_wrapper.optimizer.param_groups[0]["lr"] = lr
    states: dict[int, Any] = {}

    @runner.on("safe_point")
    def keep(runner: Any) -> None:
        states.setdefault(runner.progress.iter, copy.deepcopy(runner.state_dict()))

    runner.train(**limits)
    runner.close()
    return runner, states


@pytest.mark.parametrize("kind", [Remembering, Late])
@pytest.mark.parametrize("interval", [1, 2])
@pytest.mark.parametrize("lr", [0.1, 0.4])
def test_what_a_run_has_left_is_cut_from_a_sink(
    make: MakeRunner, kind: type[Remembering], interval: int, lr: float
) -> None:
    sink = kind()
    _, states = attempt(make, sink)
    written = len(sink.rows)
    runner, _ = attempt(make, sink, states[3], lr=lr, interval=interval)
    assert holds_the_history(sink, runner)
    cuts = [{"train": 3}]
    if kind is Late and lr == 0.1:  # all is repeated, or what comes before the longer interval
        cuts = [] if interval == 1 else [{"train": 5, "val": 5}]
    assert sink.cuts == cuts
    assert written == 12
    runner, _ = attempt(make, sink, states[7], lr=0.3)  # of the first attempt
    assert holds_the_history(sink, runner)


@pytest.mark.parametrize("kind", [Remembering, Late])
def test_a_run_that_goes_back_and_ends_earlier_leaves_nothing(
    make: MakeRunner, kind: type[Remembering]
) -> None:
    sink = kind()
    _, states = attempt(make, sink)
    runner, _ = attempt(make, sink, states[3], limits=dict(max_epochs=1))
    assert holds_the_history(sink, runner)
    assert sink.rows[-1].iter == 5


@pytest.mark.parametrize("kind", [Remembering, Late])
def test_a_sink_that_has_missed_an_attempt_gets_all_of_it(
    make: MakeRunner, kind: type[Remembering]
) -> None:
    sink = kind()
    _, states = attempt(make, sink)
    _, states = attempt(make, None, states[3], lr=0.4)
    runner, _ = attempt(make, sink, states[7], lr=0.4)
    assert sink.cuts[0] == {}
    assert holds_the_history(sink, runner)


@pytest.mark.parametrize("kind", [Remembering, Late])
def test_a_run_that_is_interrupted_before_it_has_repeated_anything(
    make: MakeRunner, kind: type[Remembering]
) -> None:
    sink = kind()
    _, states = attempt(make, sink)
    killed = make(name="run", plugins=[dict(type="logging", interval=1)], validate=True)
    killed.load_state_dict(copy.deepcopy(states[3]))
    killed.on("before_train_iter")(_fail)
    with pytest.raises(LookupError):
        killed.train()  # the history is cut back, and the sink is not
    killed.close()
    runner, _ = attempt(make, sink, states[3], lr=0.4)
    assert holds_the_history(sink, runner)


def _fail() -> None:
    raise LookupError("no")


def test_an_evaluation_alone_cuts_nothing(make: MakeRunner) -> None:
    sink = Remembering()
    _, states = attempt(make, sink)
    before = losses(sink.rows)
    runner = make(name="run", plugins=["logging", sink], validate=True)
    runner.load_state_dict(states[5])
    runner.val()
    assert (losses(sink.rows), sink.cuts) == (before, [])
    runner.train()
    runner.close()
    assert sink.cuts == [{"train": 5}]  # its validation is still due
    assert holds_the_history(sink, runner)


def test_one_runner_may_go_back(make: MakeRunner) -> None:
    sink = Remembering()
    runner = make(plugins=[dict(type="logging", interval=1), sink])
    states: dict[int, Any] = {}

    @runner.on("safe_point")
    def keep(runner: Any) -> None:
        states.setdefault(runner.progress.iter, copy.deepcopy(runner.state_dict()))

    runner.train()
    for iteration in (8, 2):
        runner.load_state_dict(copy.deepcopy(states[iteration]))
        runner.optim_wrapper.optimizer.param_groups[0]["lr"] = 0.4
        runner.train()
    runner.close()
    assert sink.cuts == [{"train": 8}, {"train": 2}]
    assert holds_the_history(sink, runner)


def test_a_runner_that_loads_a_state_of_another_run_starts_over(make: MakeRunner) -> None:
    other = make(name="other", plugins=[dict(type="logging", interval=1)])
    other.train(max_epochs=1)
    state = copy.deepcopy(other.state_dict())
    other.close()
    sink = Remembering()
    runner = make(name="run", plugins=[dict(type="logging", interval=1), sink])
    runner.train(max_epochs=1)
    runner.load_state_dict(state)
    runner.train()
    runner.close()
    assert sink.cuts == [{}]
    assert holds_the_history(sink, runner)


def test_a_sink_without_cut_gets_the_new_records_too_and_a_warning_says_so(
    make: MakeRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    sink = Appending()
    first, states = attempt(make, sink)
    history = losses(read_records(first.run_dir))
    attempt(make, sink, states[7])  # repeats it
    assert losses(sink.rows) == history
    assert "of an attempt that the run has left" not in capsys.readouterr().out
    runner, _ = attempt(make, sink, states[7], lr=0.4)
    assert losses(sink.rows) == history + losses(read_records(runner.run_dir))[8:]
    out = capsys.readouterr().out
    assert "sink 'appending' still holds those after iteration 7 of an attempt" in out
    assert out.count("define cut(self, runner, kept)") == 1


def test_a_cut_that_fails_ends_nothing(
    make: MakeRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    class Broken(Remembering):
        def cut(self, runner: Any, kept: Any) -> None:
            raise SystemExit("no")

    sink = Broken()
    _, states = attempt(make, sink)
    attempt(make, sink, states[7], lr=0.4)
    assert sink.failures == 1
    assert sink.rows[-1].iter == 10
    assert "sink 'broken' failed in cut; training continues" in capsys.readouterr().out


def test_without_a_history_what_comes_after_the_loaded_state_is_cut(make: MakeRunner) -> None:
    sink = Remembering()
    runner = make(plugins=[sink], train_cfg=dict(max_iters=2))
    states: list[Any] = []
    runner.on("safe_point")(lambda runner: states.append(copy.deepcopy(runner.state_dict())))
    runner.on("after_train_iter")(
        lambda runner: runner.hooks.write(runner, record(runner.progress.iter))
    )
    runner.train()
    runner.load_state_dict(states[0])
    runner.train(max_iters=3)
    runner.close()
    assert sink.cuts == [{"train": 1}]
    assert [row.iter for row in sink.rows] == [1, 2, 3]


def test_what_is_replayed_is_all_that_a_sink_holds(make: MakeRunner) -> None:
    sink = Remembering()
    runner, states = attempt(make, sink)
    attempt(make, None, states[3], lr=0.4, limits=dict(max_epochs=1))
    again = make(name="again", plugins=[sink])
    sink.replay(again, read_records(runner.run_dir))
    again.close()
    assert holds_the_history(sink, runner)
    assert sink.rows[-1].iter == 5


# -- nothing in a sink ends training ------------------------------------------------------------


class Nameless(BaseException):
    """Has no text."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


@pytest.mark.parametrize("error", [SystemExit(3), Nameless()])
@pytest.mark.parametrize(
    "event",
    [
        *("before_run", "before_train", "before_train_epoch", "before_train_iter", "after_forward"),
        *("scale_loss", "backward", "before_optim_step", "optim_step", "after_train_iter"),
        *("safe_point", "after_train_epoch", "before_val", "after_val", "after_train", "after_run"),
        *("log", "configure", "unconfigure", "forward_context", "before_save_checkpoint"),
        *("state_dict", "rank_state_dict", "open", "write", "close", "setup_dataloader"),
    ],
)
def test_whatever_a_sink_raises_training_is_the_same(
    make: MakeRunner, event: str, error: BaseException
) -> None:
    def raising(self: Any) -> None:
        raise error

    members: dict[str, Any] = {"write": lambda self: None, event: raising}
    if event.endswith("state_dict"):
        members[f"load_{event}"] = lambda self, state: None
    sink = type("Raiser", (Sink,), members)()
    logged = make(plugins=[dict(type="logging", interval=1), sink], validate=True)
    logged.on("after_train_iter")(lambda runner: runner.log({"a": 1.0}))
    logged.train()
    logged.state_dict()
    logged.plugins.rank_state_dict()
    logged.close()
    plain = make(plugins=[dict(type="logging", interval=1)], validate=True)
    plain.train()
    assert torch.equal(logged.bare_model.net.weight, plain.bare_model.net.weight)
    assert sink.failures > 0


@pytest.mark.parametrize("setting", ["queue_size", "flush_timeout", "pause"])
@pytest.mark.parametrize("value", ["raises", "ten", None, float("inf"), float("nan"), -1, "3"])
def test_a_setting_that_is_no_number_ends_nothing(
    make: MakeRunner, setting: str, value: Any
) -> None:
    def read(self: Any) -> Any:
        if value == "raises":
            raise SystemExit("no")
        return value

    endless = setting == "pause" and value == float("inf")
    kind = type("Odd", (Keeping,), {setting: property(read)})
    sink = kind()
    runner = make(plugins=["logging", sink])
    runner.train()
    runner.close()
    odd = value in ("raises", "ten", None)
    assert (sink.failures > 0) is odd
    if value != -1 and not endless:
        assert [entry[1] for entry in sink.log[1:-1]] == [5, 10]


def test_a_context_of_a_sink_that_fails_ends_nothing(make: MakeRunner) -> None:
    class Entered(Keeping):
        at_the_end = False

        @contextlib.contextmanager
        def forward_context(self) -> Any:
            if not self.at_the_end:
                raise SystemExit("at the beginning")
            yield
            raise OSError("at the end")

    sink = Entered()
    runner = make(plugins=[sink], train_cfg=dict(max_iters=2))
    runner.train()
    assert sink.failures == 2
    sink.at_the_end = True
    runner.train(max_iters=3)
    assert (sink.failures, runner.progress.iter) == (3, 3)


def test_a_state_that_cannot_be_loaded_ends_nothing(
    make: MakeRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    class Stateful(Keeping):
        def state_dict(self) -> dict[str, Any]:
            return {"number": 1}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            raise KeyError("other")

    first = make(plugins=["logging", Stateful()])
    first.train(max_epochs=1)
    state = first.state_dict()
    sink = Stateful()
    runner = make(plugins=["logging", sink])
    runner.load_state_dict(state)
    runner.train()
    assert sink.failures == 1
    assert "sink 'stateful' failed in load_state_dict" in capsys.readouterr().out


def test_an_attribute_that_a_sink_fails_to_give_ends_nothing(make: MakeRunner) -> None:
    class Asked(Keeping):
        armed = False

        def before_run(self) -> None:  # type: ignore[override]
            self.armed = True

        def __getattr__(self, name: str) -> Any:
            raise (RuntimeError if self.armed else AttributeError)(name)

    sink = Asked()
    runner = make(plugins=["logging", sink], validate=True)
    runner.train()
    runner.state_dict()
    runner.describe()
    runner.close()
    assert (runner.progress.iter, sink.failures) == (10, 0)

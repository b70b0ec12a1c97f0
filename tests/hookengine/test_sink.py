"""Sinks may raise, hang and repeat; training does not notice."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from hookengine import Record, Sink


class Keeping(Sink):
    """Keeps what it is given."""

    def __post_init__(self) -> None:
        self.log: list[Any] = []
        self.threads: set[str] = set()

    def open(self, runner: Any) -> None:
        self.log.append("open")

    def write(self, runner: Any, record: Record) -> None:
        self.threads.add(threading.current_thread().name)
        self.log.append((record.phase, record.iter, dict(record.scalars)))

    def close(self, runner: Any) -> None:
        self.log.append("close")


def record(iteration: int, phase: str = "train", **scalars: float) -> Record:
    return Record(phase, 0, iteration, iteration, scalars)


def test_records_arrive_in_order_on_the_sinks_own_thread(make: Any) -> None:
    sink = Keeping()
    runner = make(plugins=[sink])
    for iteration in range(1, 4):
        runner.hooks.write(runner, record(iteration, loss=0.5))
    runner.close()
    expected = [("train", iteration, {"loss": 0.5}) for iteration in range(1, 4)]
    assert sink.log == ["open", *expected, "close"]
    assert sink.threads == {"sink keeping"}


def test_a_run_is_over_when_its_records_are_written(make: Any) -> None:
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


def test_what_the_sink_held_when_it_was_opened_is_left_out(make: Any) -> None:
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


def test_what_is_repeated_after_a_load_is_left_out(make: Any) -> None:
    sink = Keeping()
    runner = make(plugins=[sink, dict(type="logging", interval=1)], train_cfg=dict(max_iters=4))
    states = []
    runner.on("safe_point")(lambda runner: states.append(runner.state_dict()))
    runner.train()
    runner.load_state_dict(states[1])
    runner.train(max_iters=6)
    runner.close()
    assert [entry[1] for entry in sink.log[1:-1]] == [1, 2, 3, 4, 5, 6]


def test_one_sink_serves_one_runner_after_another(make: Any) -> None:
    sink = Keeping()
    for _ in range(2):
        sink.log.clear()
        runner = make(plugins=[sink])
        runner.hooks.write(runner, record(1))
        runner.close()
        assert sink.log == ["open", ("train", 1, {}), "close"]


def test_a_slow_sink_is_given_time_again_and_what_is_left_is_counted(
    make: Any, capsys: Any
) -> None:
    release = threading.Event()

    class Slow(Keeping):
        flush_timeout = 0.01

        def write(self, runner: Any, record: Record) -> None:
            release.wait()
            super().write(runner, record)

    sink = Slow()
    runner = make(plugins=["logging", sink])
    for iteration in (1, 2, 3):
        runner.hooks.write(runner, record(iteration))
    runner.hooks.after_run(runner)
    runner.close()
    assert "lost records: 0 failures, 0 dropped, 3 not written" in capsys.readouterr().out
    release.set()


def test_an_exit_in_a_sink_does_not_end_its_thread(make: Any) -> None:
    class Exiting(Keeping):
        def write(self, runner: Any, record: Record) -> None:
            if record.iter == 1:
                raise SystemExit
            super().write(runner, record)

    sink = Exiting()
    runner = make(plugins=[sink])
    for iteration in (1, 2):
        runner.hooks.write(runner, record(iteration))
    runner.close()
    assert sink.failures == 1
    assert sink.log == ["open", ("train", 2, {}), "close"]


def trained_weights(make: Any, *plugins: Any) -> torch.Tensor:
    runner = make(plugins=[dict(type="logging", interval=1), *plugins], validate=True)
    runner.train()
    runner.close()
    return runner.bare_model.net.weight.clone()


class Raising(Sink):
    """Raises wherever it can."""

    def configure(self) -> None:
        raise OSError("configure")

    def open(self, runner: Any) -> None:
        raise OSError("open")

    def write(self, runner: Any, record: Record) -> None:
        raise OSError("write")

    def after_val_epoch(self, metrics: Any) -> None:
        raise OSError("after_val_epoch")

    def after_run(self) -> None:
        raise OSError("after_run")

    def close(self, runner: Any) -> None:
        raise OSError("close")


def test_a_sink_that_raises_changes_nothing_and_warns_once(make: Any, capsys: Any) -> None:
    sink = Raising()
    assert torch.equal(trained_weights(make, sink), trained_weights(make))
    # configure, open, 10 + 2 writes, 2 validations, after_run, close
    assert sink.failures == 1 + 1 + 12 + 2 + 1 + 1
    lines = [line for line in capsys.readouterr().out.splitlines() if "sink 'raising'" in line]
    assert len(lines) == 2
    assert "failed in configure; training goes on" in lines[0]
    assert "OSError: configure" in lines[0]
    assert "18 failures, 0 dropped" in lines[1]
    assert all(line[:2].isdigit() for line in lines)  # they went through the run's own logger


def test_a_sink_that_hangs_changes_nothing_and_is_not_waited_for(make: Any, capsys: Any) -> None:
    release = threading.Event()

    class Hanging(Sink):
        queue_size = 3
        flush_timeout = 0.01

        def write(self, runner: Any, record: Record) -> None:
            release.wait()

    sink = Hanging()
    assert torch.equal(trained_weights(make, sink), trained_weights(make))
    # of 12 records one hangs and three wait
    assert sink.dropped in (8, 9)  # whether the thread took the first before the fourth came
    release.set()
    out = capsys.readouterr().out
    assert out.count("cannot keep up; records are left for later") == 1
    assert out.count("did not finish within 0.01 s") == 1
    assert "0 failures" in out


def test_a_sink_without_a_runner_warns_all_the_same(capsys: Any) -> None:
    class Broken(Sink):
        def before_run(self) -> None:
            raise OSError("no")

    sink = Broken()
    sink.before_run()
    assert "sink 'broken' failed in before_run" in capsys.readouterr().out
    assert sink.failures == 1


def test_a_subclass_may_call_the_write_that_it_inherits(make: Any) -> None:
    class Twice(Keeping):
        def write(self, runner: Any, record: Record) -> None:
            super().write(runner, record)
            super().write(runner, record)

    sink = Twice()
    runner = make(plugins=[sink])
    runner.hooks.write(runner, record(1))
    runner.close()
    assert sink.log == ["open", ("train", 1, {}), ("train", 1, {}), "close"]


def test_an_interrupt_is_no_failure_of_the_sink() -> None:
    class Interrupted(Sink):
        def before_run(self) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Interrupted().before_run()

"""Tests of ``hookengine/records/delivery.py``."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch

from hookengine import Plugin, Record, Sink
from tests.fixtures import MakeRunner
from tests.hookengine.records.keeping import Keeping, record, trained_weights


def test_a_slow_sink_is_given_time_again_and_what_is_left_is_counted(
    make: MakeRunner, capsys: pytest.CaptureFixture[str]
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
    left = sink._sink_delivery.thread
    assert left is not None
    runner.close()
    assert "lost records: 0 failures, 0 dropped, 3 not written" in capsys.readouterr().out
    release.set()
    left.join(60)
    assert [entry[1] for entry in sink.log[1:-1]] == [1, 2, 3]  # late, since it lives on
    assert sink.log[-1] == "close"


def test_what_a_sink_left_behind_stays_away_from_its_next_runner(make: MakeRunner) -> None:
    entered, release = threading.Event(), threading.Event()

    class Slow(Keeping):
        flush_timeout = 0.01

        def write(self, runner: Any, record: Record) -> None:
            entered.set()
            release.wait()
            super().write(runner, record)

    sink = Slow()
    runner = make(plugins=["logging", sink])
    for iteration in (1, 2, 3):
        runner.hooks.write(runner, record(iteration))
    assert entered.wait(60)
    left = sink._sink_delivery.thread
    assert left is not None
    runner.close()
    make(plugins=["logging", sink])
    release.set()
    left.join(60)
    assert [entry[1] for entry in sink.log[1:]] == [1]  # the one that it was in


def test_an_exit_in_a_sink_does_not_end_its_thread(make: MakeRunner) -> None:
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


def test_a_sink_that_hangs_changes_nothing_and_is_not_waited_for(
    make: MakeRunner, capsys: pytest.CaptureFixture[str]
) -> None:
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
    assert out.count("cannot keep up; records are dropped for now") == 1
    assert out.count("did not finish within 0.01 s") == 1
    assert "0 failures" in out


def test_an_interrupt_is_no_failure_of_the_sink() -> None:
    class Interrupted(Sink):
        def write(self) -> None: ...

        def before_run(self) -> None:  # type: ignore[override]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Interrupted().before_run()


class Released(Keeping):
    """Writes when it is told to; does not wait for a second to gather records."""

    pause = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.may_write = threading.Semaphore(0)
        self.wrote = threading.Semaphore(0)
        self.busy = threading.Event()

    def write(self, runner: Any, record: Record) -> None:
        self.busy.set()
        self.may_write.acquire()
        super().write(runner, record)
        self.wrote.release()

    def let(self, number: int) -> None:
        """Let it write so many, and wait until it has."""
        for _ in range(number):
            self.may_write.release()
        for _ in range(number):
            self.wrote.acquire()

    @property
    def iterations(self) -> list[int]:
        return [entry[1] for entry in self.log if isinstance(entry, tuple)]


def test_a_job_comes_after_the_records_so_far_and_may_fail(
    make: MakeRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    sink = Keeping()
    runner = make(plugins=["logging", sink])
    threads: list[str] = []

    def job() -> None:
        threads.append(threading.current_thread().name)
        sink.log.append("job")
        raise SystemExit("no")

    runner.hooks.write(runner, record(1))
    sink.enqueue(job)
    runner.hooks.write(runner, record(2))
    runner.close()
    assert sink.log == ["open", ("train", 1, {}), "job", ("train", 2, {}), "close"]
    assert threads == ["sink keeping"]
    assert sink.failures == 1
    assert "sink 'keeping' failed in a job" in capsys.readouterr().out


def test_the_end_of_a_run_does_not_wait_for_more_records_to_gather(make: MakeRunner) -> None:
    class Gathering(Keeping):
        pause = flush_timeout = threading.TIMEOUT_MAX

    sink = Gathering()
    runner = make(plugins=[sink, "logging"])
    runner.train()  # would never come back
    assert [entry[1] for entry in sink.log[1:]] == [5, 10]


@pytest.mark.parametrize("continues", [True, False])
def test_what_is_replayed_may_go_on_or_begin_anew(make: MakeRunner, continues: bool) -> None:
    class Held(Keeping):
        queue_size = 1

        def open(self, runner: Any) -> None:
            self.log.append((runner.name, self.continues))
            if self.continues:
                self.held["train"] = 2

    sink = Held()
    runner = make(plugins=[sink], name="run")
    sink.replay(runner, iter([record(i) for i in range(1, 6)]), continues=continues)
    runner.hooks.after_run(runner)
    runner.hooks.write(runner, record(6))
    runner.close()
    written = [entry[1] for entry in sink.log[1:-1]]
    assert written == ([3, 4, 5, 6] if continues else [1, 2, 3, 4, 5, 6])
    assert sink.log[0] == ("run", continues)
    assert sink.dropped == 0


def test_records_that_cannot_be_read_are_a_failure(
    make: MakeRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> Any:
        yield record(1)
        raise OSError("no disk")

    sink = Keeping()
    runner = make(plugins=["logging", sink])
    sink.replay(runner, broken())
    runner.close()
    assert sink.log == ["open", ("train", 1, {}), "close"]
    assert (
        "failed in history; training continues  error=OSError: no disk" in capsys.readouterr().out
    )


def test_what_waited_when_the_run_was_rolled_back_is_not_repeated(make: MakeRunner) -> None:
    class Late(Released):
        flush_timeout = 0.01

    sink = Late()
    runner = make(plugins=[dict(type="logging", interval=1), sink], train_cfg=dict(max_iters=4))
    states = []
    runner.on("safe_point")(lambda runner: states.append(copy.deepcopy(runner.state_dict())))
    runner.train()
    runner.load_state_dict(states[2])  # while all four wait
    sink.flush_timeout = 10.0
    for _ in range(20):
        sink.may_write.release()
    runner.train(max_iters=6)
    runner.close()
    assert sink.iterations == [1, 2, 3, 4, 5, 6]


def behind(make: MakeRunner, sink: Any, **options: Any) -> Any:
    sink.queue_size = 3
    return make(
        plugins=[dict(type="logging", interval=1), sink], train_cfg=dict(max_iters=20), **options
    )


def test_a_sink_that_hung_for_a_while_gets_everything_from_the_history(
    make: MakeRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    sink = Released()
    runner = behind(make, sink)

    @runner.on("after_train_iter", trylast=True)
    def release(runner: Any) -> None:
        if runner.progress.iter == 15:
            assert sink.dropped > 0
            for _ in range(100):
                sink.may_write.release()

    runner.train()
    runner.close()
    assert sink.iterations == [*range(1, 21)]
    assert sink.dropped == 0
    out = capsys.readouterr().out
    assert out.count("cannot keep up") == 1
    assert "lost records" not in out


def test_what_comes_while_it_catches_up_does_not_overtake_what_was_dropped(
    make: MakeRunner,
) -> None:
    sink = Released()
    runner = behind(make, sink)

    @runner.on("after_train_iter", trylast=True)
    def release(runner: Any) -> None:
        if runner.progress.iter == 10:  # of which about five were dropped: there is room again
            sink.let(2)
        if runner.progress.iter == 14:
            sink.let(4)
        if runner.progress.iter == 18:
            for _ in range(100):
                sink.may_write.release()

    runner.train()
    runner.close()
    assert sink.iterations == [*range(1, 21)]


def test_without_a_history_what_was_dropped_is_counted(make: MakeRunner) -> None:
    sink = Released()
    sink.queue_size = 3
    runner = make(plugins=[sink])
    for iteration in range(1, 11):
        runner.hooks.write(runner, record(iteration))
    dropped = sink.dropped
    assert dropped in (6, 7)
    sink.let(10 - dropped)
    runner.hooks.after_run(runner)
    for _ in range(2):
        sink.may_write.release()
        runner.hooks.write(runner, record(11))
    runner.close()
    assert sink.iterations == [*range(1, 11 - dropped), 11, 11]
    assert sink.dropped == dropped


def test_a_job_is_never_dropped(make: MakeRunner) -> None:
    sink = Released()
    runner = behind(make, sink)
    done: list[str] = []

    @runner.on("after_train_iter", trylast=True)
    def release(runner: Any) -> None:
        if runner.progress.iter == 2:
            sink.busy.wait()
        if runner.progress.iter == 10:
            sink.enqueue(lambda: done.append("full"))
            sink.let(2)
            sink.enqueue(lambda: done.append("behind"))  # also while records are held back
            for _ in range(100):
                sink.may_write.release()

    runner.train()
    runner.close()
    assert done == ["full", "behind"]
    assert sink.iterations == [*range(1, 21)]
    assert sink.dropped == 0


class Broken(Sink):
    def write(self, record: Record) -> None:
        raise OSError("gone")


class Writing(Plugin):
    """Makes records by itself."""

    def after_train_iter(self, runner: Any) -> None:
        runner.hooks.write(runner, record(runner.progress.iter))


class Keeper(Plugin):
    """Keeps the records without saying that a file has them all."""

    def history(self) -> list[Record]:
        return [record(1)]


def end_of_lost(text: str) -> str:
    (line,) = (line for line in text.splitlines() if "lost records" in line)
    return line.partition(" not written")[2]


def test_a_message_names_the_file_that_has_all_records(
    make: MakeRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    runner = make(plugins=["logging", Broken()], name="run")
    runner.train()
    runner.close()
    path = runner.run_dir / "metrics.jsonl"
    assert path.is_file()
    assert end_of_lost(capsys.readouterr().out) == f"; {path} has them all"


@pytest.mark.parametrize("keeper", [[], [Keeper()]])
def test_no_file_is_named_where_none_has_all_records(
    make: MakeRunner, caplog: pytest.LogCaptureFixture, keeper: list[Any]
) -> None:
    runner = make(plugins=[Writing(), Broken(), *keeper])
    runner.train()
    runner.close()
    assert end_of_lost(caplog.text) == ""


def test_no_file_is_named_where_the_disk_has_failed(
    make: MakeRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    runner = make(plugins=["logging", Broken()])
    runner.on("before_train")(lambda: (runner.run_dir / "metrics.jsonl").mkdir())
    runner.train()
    runner.close()
    assert end_of_lost(capsys.readouterr().out) == ""


def test_what_is_dropped_is_promised_only_where_it_is_kept(
    make: MakeRunner, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    class Slow(Released):
        flush_timeout = 0.01

    kept = behind(make, Slow())
    kept.train()
    kept.close()
    (line,) = (x for x in capsys.readouterr().out.splitlines() if "cannot keep up" in x)
    assert line.endswith(f"dropped for now; {kept.run_dir / 'metrics.jsonl'} has them all")
    sink = Slow()
    sink.queue_size = 3
    make(plugins=[Writing(), sink]).train()
    assert "cannot keep up; records are dropped for now\n" in caplog.text

"""A run has one complete history without repetitions, even after a resume."""

from __future__ import annotations

import copy
from typing import Any

from tests.fixtures import MakeRunner
from tests.plugins.hookengine_logging.runs import logging_runner, written


def test_runs_without_a_name_never_share_a_folder(make: MakeRunner) -> None:
    runners = [logging_runner(make) for _ in range(3)]
    for runner in runners:
        runner.train()
    assert len({runner.run_dir for runner in runners}) == 3
    for runner in runners:
        assert len(written(runner)) == 6
    again = logging_runner(make, name=runners[0].name)
    again.train()  # the same name shares the folder; each run has its complete history
    assert len(written(again)) == 6
    assert len((again.run_dir / "metrics_1.jsonl").read_text().splitlines()) == 6


def test_a_resumed_run_writes_what_an_uninterrupted_run_writes(make: MakeRunner) -> None:
    def without_times(runner: Any) -> list[dict[str, Any]]:
        timing = {
            "time",
            "data_time",
            "samples_per_second",
            "memory",
            "eta",
            "timestamp",
            "seconds",
        }
        return [{k: v for k, v in r.items() if k not in timing} for r in written(runner)]

    uninterrupted = logging_runner(make, validate=True, interval=3, name="uninterrupted")
    uninterrupted.train()
    states: dict[int, Any] = {}
    first = logging_runner(make, validate=True, interval=3, name="resumed")

    @first.on("safe_point")
    def save(runner: Any) -> None:
        progress = runner.progress
        due = progress.val_due or (progress.batch == 0 and progress.iter)
        states[len(states)] = (progress.iter, due, runner.state_dict())

    @first.on("before_save_checkpoint", trylast=True)
    def freeze(checkpoint: Any) -> None:
        checkpoint.update(copy.deepcopy(checkpoint))

    first.train()
    first.close()
    complete = (first.run_dir / "metrics.jsonl").read_text()
    assert without_times(first) == without_times(uninterrupted)
    for _, _, state in states.values():
        (first.run_dir / "metrics.jsonl").write_text(complete + '{"phase": "tra')  # a kill
        second = logging_runner(make, validate=True, interval=3, name="resumed")
        second.load_state_dict(state)
        second.train()
        second.close()
        assert without_times(second) == without_times(uninterrupted)


def test_a_record_written_at_a_stop_is_removed_by_a_resume(make: MakeRunner) -> None:
    first = logging_runner(make, interval=5, name="run")
    states = []

    @first.on("after_train_iter")
    def stop(runner: Any) -> None:
        if runner.progress.iter == 3:
            runner.stop()

    @first.on("safe_point")
    def save(runner: Any) -> None:
        states.append(runner.state_dict())

    first.train()
    first.close()
    assert [r["iter"] for r in written(first)] == [3]
    second = logging_runner(make, interval=5, name="run")
    second.load_state_dict(states[2])
    second.train()
    assert [r["iter"] for r in written(second)] == [5, 10]


def test_a_state_whose_records_were_replaced_begins_another_history(make: MakeRunner) -> None:
    def attempt(state: Any, lr: float) -> dict[int, Any]:
        runner = logging_runner(make, interval=1, name="run")
        if state is not None:
            runner.load_state_dict(copy.deepcopy(state))
        runner.optim_wrapper.optimizer.param_groups[0]["lr"] = lr
        states: dict[int, Any] = {}

        @runner.on("safe_point")
        def keep(runner: Any) -> None:
            states.setdefault(runner.progress.iter, copy.deepcopy(runner.state_dict()))

        runner.train()
        runner.close()
        return states

    folder = make(name="run").run_dir
    first = attempt(None, 0.1)
    second = attempt(first[3], 0.4)
    attempt(second[8], 0.4)
    assert not (folder / "metrics_1.jsonl").exists()
    assert [r["iter"] for r in written(make(name="run"))] == [*range(1, 11)]
    attempt(first[2], 0.4)  # which all of them share
    assert not (folder / "metrics_1.jsonl").exists()
    attempt(first[7], 0.1)
    assert [r["iter"] for r in written(make(name="run"))] == [8, 9, 10]
    assert (folder / "metrics_1.jsonl").exists()


def test_a_state_of_an_earlier_version_has_no_digest(make: MakeRunner) -> None:
    first = logging_runner(make, interval=1, name="run")
    first.train(max_epochs=1)
    state = copy.deepcopy(first.state_dict())
    first.close()
    del state["plugins"]["logging"]["last"]
    second = logging_runner(make, interval=1, name="run")
    second.load_state_dict(state)
    second.train()
    assert [r["iter"] for r in written(second)] == [*range(1, 11)]

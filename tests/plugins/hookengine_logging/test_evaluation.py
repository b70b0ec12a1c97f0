"""The records of validations and tests."""

from __future__ import annotations

from tests.fixtures import MakeRunner
from tests.plugins.hookengine_logging.runs import logging_runner, written


def test_an_evaluation_records_how_long_it_took(make: MakeRunner) -> None:
    runner = logging_runner(make, validate=True, test=True)
    runner.train()
    runner.val()
    runner.test()
    records = written(runner, "val") + written(runner, "test")
    assert len(records) == 4
    assert all(record["seconds"] > 0 for record in records)
    runner.on("after_val_epoch")(lambda runner: runner.log({"seconds": -1.0}, phase="val"))
    runner.val()
    assert written(runner, "val")[-1]["seconds"] == -1.0  # a logged value wins


def test_values_logged_after_a_validation_join_its_record(make: MakeRunner) -> None:
    runner = logging_runner(make, validate=True)
    runner.on("after_val")(lambda runner: runner.log({"wrong": runner.progress.iter}, phase="val"))
    runner.train()
    assert [(r["iter"], r["wrong"]) for r in written(runner, "val")] == [(5, 5.0), (10, 10.0)]

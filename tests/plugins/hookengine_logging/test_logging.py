"""The plugin as a whole: what it opens it closes, and what it replaces it restores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hookengine import read_records
from tests.fixtures import MakeRunner
from tests.plugins.hookengine_logging.runs import logging_runner


def test_a_folder_that_cannot_be_made_is_an_error_at_once(make: MakeRunner, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    runner = logging_runner(make, work_dir=tmp_path / "file")
    with pytest.raises(
        OSError, match=r"cannot create the folder of the run, .*Pass another work_dir"
    ):
        runner.train()
    assert runner.progress.iter == 0


def test_nothing_is_opened_again_after_the_plugin_was_removed(make: MakeRunner) -> None:
    runner = logging_runner(make, interval=1)
    runner.on("after_train_iter")(
        lambda runner: "logging" in runner.plugins and runner.plugins.remove("logging")
    )
    runner.train()
    assert runner.progress.iter == 10


def test_the_previous_logger_is_restored(
    make: MakeRunner, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    runner = logging_runner(make)
    runner.close()
    runner.logger.warning("after")
    assert "after" not in capsys.readouterr().out
    assert "after" in caplog.text


def test_what_a_last_hook_logs_is_in_the_record_of_its_iteration(make: MakeRunner) -> None:
    runner = make(plugins=[dict(type="logging", interval=5)], validate=True)

    @runner.on("after_train_iter", trylast=True)
    def value(runner: Any) -> None:
        runner.log({"iteration": runner.progress.iter})

    @runner.on("after_val", trylast=True)
    def after(runner: Any) -> None:
        runner.log({"validated": runner.progress.iter}, phase="val")

    runner.train()
    records = [(r.phase, dict(r.scalars)) for r in read_records(runner.run_dir)]
    assert [r["iteration"] for phase, r in records if phase == "train"] == [3.0, 8.0]
    assert [r["validated"] for phase, r in records if phase == "val"] == [5.0, 10.0]


def test_a_metric_that_a_last_hook_adds_can_be_monitored(make: MakeRunner) -> None:
    best = dict(type="checkpoint", keep_best="score", greater_is_better=True)
    stop = dict(type="early_stop", metric="score", rule="greater", threshold=5.0)
    runner = make(plugins=[best, stop, "logging"], validate=True)

    @runner.on("after_val_epoch", trylast=True)
    def add(runner: Any, metrics: Any) -> None:
        metrics["score"] = float(runner.progress.epoch)

    runner.train()
    assert runner.plugins["checkpoint"].best["value"] == 2.0
    records = [dict(r.scalars) for r in read_records(runner.run_dir) if r.phase == "val"]
    assert [r["score"] for r in records] == [1.0, 2.0]

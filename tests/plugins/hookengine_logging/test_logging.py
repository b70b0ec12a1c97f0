"""The plugin as a whole: what it opens it closes, and what it replaces it restores."""

from __future__ import annotations

from pathlib import Path

import pytest

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

"""``metrics.jsonl`` holds complete lines, even if the disk fails."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures import MakeRunner
from tests.plugins.hookengine_logging.runs import SCRIPT, logging_runner, written


def test_a_failing_disk_loses_no_record(
    make: MakeRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    runner = logging_runner(make)
    path = runner.run_dir / "metrics.jsonl"
    runner.on("before_train")(lambda: path.mkdir())  # cannot be opened as a file

    @runner.on("after_train_epoch", tryfirst=True)
    def repair(runner: Any) -> None:
        if path.is_dir():
            path.rmdir()

    runner.train()
    assert [r["iter"] for r in written(runner)] == [2, 4, 5, 7, 9, 10]
    assert capsys.readouterr().out.count("WARNING cannot write") == 1


FULL_DISK = (
    SCRIPT
    + """
def room(size): resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
@runner.on("before_train_iter")
def fill(runner):
    if runner.progress.iter == 2: room(400)  # in the middle of a line
    if runner.progress.iter == 4: room(resource.RLIM_INFINITY)
runner.train()
"""
)


@pytest.mark.process
def test_a_disk_that_fills_up_in_the_middle_of_a_line_leaves_complete_lines(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path)]  # prints into a pipe, not a file
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*/metrics.jsonl")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["iter"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert "cannot write" in done.stdout


def test_a_disk_that_fails_to_the_end_is_reported_at_the_end(
    make: MakeRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    runner = logging_runner(make)
    runner.on("before_train")(lambda runner: (runner.run_dir / "metrics.jsonl").mkdir())
    runner.train()
    runner.close()
    assert "ERROR 6 records could not be written" in capsys.readouterr().out

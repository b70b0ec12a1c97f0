"""The console line of a record."""

from __future__ import annotations

import re

import pytest

from tests.fixtures import MakeRunner
from tests.plugins.hookengine_logging.runs import logging_runner


def test_console_lines_are_readable(make: MakeRunner, capsys: pytest.CaptureFixture[str]) -> None:
    runner = logging_runner(make, validate=True, interval=50)
    runner.train()
    out = capsys.readouterr().out
    assert re.search(
        r"^\d\d:\d\d:\d\d  train  epoch 2/2  iter 10/10  loss \d\.\d+  lr 0.1  \d+\.\d ms  "
        r"(waits for data \d+%  )?\d+ samples/s  eta 0:00:00$",
        out,
        re.MULTILINE,
    )
    assert re.search(r"^\S+  val    epoch 1/2  iter 5/10  accuracy \d", out, re.MULTILINE)
    log = (runner.run_dir / "run.log").read_text()
    for line in out.splitlines():
        assert line[10:] in log

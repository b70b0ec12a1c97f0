"""The lines on the console and in run.log: JSON, ranks, and disks that fail."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import sys
import threading
import warnings
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from hookengine_logging.output import Output
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from hookengine import Plugin, Record, Runner, Sink
from tests import forks
from tests.fixtures import MakeRunner
from tests.plugins.hookengine_logging.runs import SCRIPT
from tests.ranks import on_ranks


@pytest.mark.process
def test_a_full_disk_behind_the_console_does_not_end_training(tmp_path: Path) -> None:
    script = SCRIPT + "runner.train()"
    done = forks.run(script, str(tmp_path), stdout=Path("/dev/full"))
    (path,) = tmp_path.glob("*/metrics.jsonl")
    assert len(path.read_text().splitlines()) == 6
    assert "can no longer print to the console, see run.log" in done.stderr


def strict(text: str) -> list[dict[str, Any]]:
    """Parse lines as strict JSON, without NaN and infinities."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


class Speaking(Plugin):
    """Log lines in a hook and in a helper, and through warnings."""

    def before_train(self, runner: Any) -> None:
        runner.logger.info("in a hook", many=[1.0, float("nan")], one=float("inf"), odd={(1, 2): 3})
        self.helper(runner)
        warnings.warn("through Python", stacklevel=1)
        logging.getLogger("torch.nn").warning("through %s", "torch")

    def helper(self, runner: Any) -> None:
        runner.logger.warning("in a helper")


class Talking(Sink):
    """Log a line on the thread of the sink."""

    def write(self, runner: Any, record: Record) -> None:
        if record.iter == 10:
            runner.logger.info("on a thread", thread=threading.current_thread().name)


def test_every_line_is_json_with_its_context(
    make: MakeRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    plugins = [dict(type="logging", renderer="json", interval=5), Speaking(), Talking()]
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        check_json_lines_of(make(plugins=plugins, validate=True, name="mine"), capsys)


def check_json_lines_of(runner: Any, capsys: pytest.CaptureFixture[str]) -> None:
    @runner.on("after_train_iter")
    def function(runner: Any) -> None:
        if runner.progress.iter == 7:
            runner.logger.info("in a function")
            runner.log({"nan": float("nan"), "event": 3.0, "epoch": 0.5, "phase": 1.0, "level": 2})

    runner.logger.info("before the run")
    runner.train()
    runner.logger.error("by the user")
    runner.close()
    printed = strict(capsys.readouterr().out)
    filed = strict((runner.run_dir / "run.log").read_text())
    for line in [*printed, *filed]:
        assert {"run", "epoch", "iteration", "level", "timestamp", "event"} <= line.keys()
        assert line["run"] == "mine"
        assert isinstance(line["epoch"], int)
        assert isinstance(line["event"], str)
        assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", line["timestamp"])
    by_event = {line["event"]: line for line in filed}
    plugins = {event: line.get("plugin") for event, line in by_event.items()}
    assert plugins["in a hook"] == plugins["in a helper"] == "speaking"
    assert plugins["UserWarning: through Python"] == "speaking"
    assert plugins["torch.nn: through torch"] == "speaking"
    assert plugins["in a function"] == "after_train_iter:function"
    assert plugins["on a thread"] == "talking"
    assert by_event["on a thread"]["thread"] == "sink talking"
    assert plugins["before the run"] is plugins["by the user"] is None
    hook = by_event["in a hook"]
    assert (hook["many"], hook["one"], hook["odd"]) == ("[1.0, nan]", "inf", "{(1, 2): 3}")
    where = {event: (line["epoch"], line["iteration"]) for event, line in by_event.items()}
    assert where["before the run"] == where["in a hook"] == (0, 0)
    assert where["in a function"] == (2, 7)
    (record,) = (r for r in filed if r.get("phase") == "train" and r["iteration"] == 10)
    assert (record["plugin"], record["level"], record["step"]) == ("logging", "info", 10)
    assert (record["nan"], record["epoch"], record["value/epoch"]) == ("nan", 2, 0.5)
    assert (record["value/event"], record["value/phase"], record["value/level"]) == (3.0, 1.0, 2.0)
    assert [line for line in filed if not line["event"].startswith("torch.nn")] == printed


def test_an_exception_is_one_json_line(
    make: MakeRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    runner = make(plugins=[dict(type="logging", renderer="json")])
    try:
        raise LookupError("two\nlines")
    except LookupError:
        runner.logger.exception("it failed")
    (line,) = strict(capsys.readouterr().out)
    assert (line["event"], line["level"]) == ("it failed", "error")
    assert "LookupError: two\nlines" in line["exception"]


@pytest.mark.parametrize("renderer", ["console", "json"])
def test_a_text_that_the_console_cannot_encode_is_escaped(
    make: MakeRunner, capsys: pytest.CaptureFixture[str], renderer: str
) -> None:
    runner = make(plugins=[dict(type="logging", renderer=renderer)])
    runner.logger.info("file \udcff.png", name="\ud800")
    runner.train()
    runner.logger.info("and on")
    runner.close()
    out = capsys.readouterr().out
    assert "file \\udcff.png" in out
    assert "and on" in out
    assert "file \\udcff.png" in (runner.run_dir / "run.log").read_text()


class Rank1Sink(Sink):
    """Remember whether it was opened."""

    def __post_init__(self) -> None:
        self.opened = False

    def open(self, runner: Any) -> None:
        self.opened = True

    def write(self, record: Record) -> None: ...


def speak_on_ranks(folder: Path) -> bool:
    rank = os.environ["RANK"]
    with (folder / f"out_{rank}").open("w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    data = TensorDataset(torch.randn(8, 4), torch.arange(8) % 3)
    sink = Rank1Sink()
    runner = Runner(
        nn.Linear(4, 3),
        folder / "work_dir",
        train_dataloader=DataLoader(data, batch_size=2),
        train_cfg=dict(max_epochs=1),
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.1)),
        loss=nn.functional.cross_entropy,
        plugins=["no:progress_bar", sink],
        device="cpu",
        name="run",
    )

    @runner.on("before_train")
    def speak(runner: Any) -> None:
        runner.logger.info(f"info of rank {rank}")
        runner.logger.warning(f"warning of rank {rank}")
        runner.logger.error(f"error of rank {rank}")
        warnings.warn(f"Python of rank {rank}", stacklevel=1)
        logging.getLogger("torch.something").warning(f"torch of rank {rank}")
        logging.getLogger("torch.something").error(f"torch fails on rank {rank}")

    runner.train()
    runner.close()
    sys.stdout.flush()
    return sink.opened


@pytest.mark.ranks
def test_rank_0_logs_everything_and_other_ranks_print_only_errors(tmp_path: Path) -> None:
    assert on_ranks(2, speak_on_ranks, tmp_path) == [True, False]
    first, second = ((tmp_path / f"out_{rank}").read_text() for rank in range(2))
    assert "error of rank 1" in second
    for quiet in ("info of", "warning of", "Python of", "torch of", "iter 2/2"):
        assert quiet not in second, quiet
        assert quiet in first or quiet == "torch of"
    log = (tmp_path / "work_dir" / "run" / "run.log").read_text()
    for text in ("info of", "warning of", "error of", "Python of", "torch of", "torch fails on"):
        assert log.count(f"{text} rank 0") == 1, text
        assert "rank 1" not in log
    assert log.count("iter 2/2") == 1


def event(text: str, **more: Any) -> dict[str, Any]:
    return {"timestamp": "2026-01-01 10:00:00", "level": "info", "event": text, **more}


def test_the_console_refers_to_run_log_only_while_it_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = Output(console=True)
    output.line(event("short", run_log="a long text"))
    output.open(tmp_path / "run.log")
    output.line(event("two\nlines", run_log="many\nlines"))
    output.line(event("the beginning", run_log="the beginning and the rest"))
    output.close()
    output.line(event("late", run_log="a late text"))
    assert capsys.readouterr().out == (
        "10:00:00  short  (in full in run.log)\n"
        "10:00:00  two\nlines\n  (in full in run.log)\n"
        "10:00:00  the beginning\n"
        "10:00:00  late\n"
    )
    assert "  a long text\n" in (tmp_path / "run.log").read_text()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_where_the_console_and_run_log_fail_neither_is_promised(
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = Output(console=True)
    output.open(Path("/dev/full"))
    output.line(event("short", run_log="a long text"))
    assert "can no longer write run.log" in capsys.readouterr().out
    closed = io.StringIO()
    closed.close()
    with redirect_stdout(closed):
        output.line(event("text"))
    assert "can no longer print to the console: " in capsys.readouterr().err

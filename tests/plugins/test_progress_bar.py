"""The bar: drawn on a terminal, above it the log; elsewhere, a line a minute."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hookengine_progress_bar import ProgressBar
from torch import Tensor, nn

from hookengine import Runner
from tests import forks
from tests.fixtures import MakeRunner, ToyRunner
from tests.ranks import on_ranks

SCRIPT = """
import threading, torch
import rich.live
from torch import nn
from hookengine import Runner

drawn = threading.Semaphore(0)
refresh = rich.live.Live.refresh

def refresh_and_tell(live):
    refresh(live)
    drawn.release()

rich.live.Live.refresh = refresh_and_tell

class Drawn:
    # before each batch rich's thread has drawn the bar as it is then
    def __len__(self): return 8
    def __iter__(self):
        for _ in range(8):
            while drawn.acquire(blocking=False): pass
            for _ in range(2): drawn.acquire()  # the first may have begun before
            yield torch.ones(2, 4), torch.zeros(2, dtype=torch.long)

class Count:
    def reset(self): self.n = 0
    def update(self, output, target): self.n = 1
    def compute(self): return float(self.n)
    def to(self, device): return self

model = nn.Linear(4, 3)
with Runner(model, {folder!r}, Drawn(), loss=nn.CrossEntropyLoss(),
            optim_wrapper=torch.optim.SGD(model.parameters(), lr=0.1),
            train_cfg=dict(max_epochs=2), val_dataloader=Drawn(), val_evaluator=Count(),
            plugins=[dict(type="logging", interval=4),
                     dict(type="progress_bar", refresh_per_second=50, line_interval=1e-9)],
            ) as runner:
    runner.train()
    print("printed by the script")
"""


def on_a_terminal(script: str) -> str:
    """What a script writes to a real (pseudo) terminal."""
    parent, child = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "160", "LINES": "40"}
    terminal = Path(os.ttyname(child))
    written: list[bytes] = []

    def read() -> None:
        with contextlib.suppress(OSError):  # the other end is closed
            while piece := os.read(parent, 4096):
                written.append(piece)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        done = forks.run(script, env=environment, stdout=terminal, stderr=terminal)
    finally:
        os.close(child)
        reader.join()
        os.close(parent)
    assert done.returncode == 0, b"".join(written).decode()
    return b"".join(written).decode()


def screen(written: str) -> list[str]:
    """The lines that remain on a terminal, from what was written to it."""
    lines, row, column = [""], 0, 0
    for code, text in re.findall(r"(\x1b\[[0-9;?]*[A-Za-z]|\r|\n)|([^\x1b\r\n]+)", written):
        if text:
            line = lines[row].ljust(column)
            lines[row] = line[:column] + text + line[column + len(text) :]
            column += len(text)
        elif code == "\n":
            row += 1
            column = 0
            if row == len(lines):
                lines.append("")
        elif code == "\r":
            column = 0
        elif code.endswith("A"):
            row = max(row - int(code[2:-1] or 1), 0)
        elif code.endswith("K"):
            lines[row] = "" if code[2:-1] == "2" else lines[row][:column]
    return [line.rstrip() for line in lines]


@pytest.mark.process
def test_on_a_terminal_the_bar_goes_away_and_leaves_the_lines_whole(tmp_path: Path) -> None:
    written = on_a_terminal(SCRIPT.format(folder=str(tmp_path)))
    assert "━" in written  # a bar was drawn
    assert "epoch 1/2" in written
    assert re.search(r"val.*\d/8", written)
    left = [line for line in screen(written) if line]
    assert not any("━" in line for line in left)
    logged = [line for line in left if re.match(r"\d\d:\d\d:\d\d  ", line)]
    assert len([line for line in logged if "  train  epoch" in line]) == 4
    assert len([line for line in logged if "  val    epoch" in line]) == 2
    for line in logged[1:]:
        if "  seed" in line:
            continue
        assert re.search(r"(eta \d+:\d\d:\d\d|Count 1)$", line), line
    assert left[-1] == "printed by the script"
    assert "elapsed" not in written  # no lines beside a bar


def test_a_short_run_elsewhere_is_silent(
    make: MakeRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    make(defaults=("progress_bar",), validate=True, test=True).train()
    runner = make(defaults=("progress_bar",), validate=True, test=True)
    runner.test()
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


class Clock:
    """Advances only when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(ProgressBar, "clock", clock)
    return clock


def lines(text: str) -> list[str]:
    """The lines about the progress, without their times."""
    return [line[10:] for line in text.splitlines() if "elapsed" in line]


BATCH = torch.ones(2, 4), torch.zeros(2, dtype=torch.long)


def evaluating(make: MakeRunner, clock: Clock, seconds: float, **options: Any) -> ToyRunner:
    """A Runner that takes that time for each batch of validation and of the test."""
    options.setdefault("val_dataloader", [BATCH] * 200)
    options.setdefault("test_dataloader", [BATCH] * 200)
    runner = make(validate=True, test=True, defaults=("logging", "progress_bar"), **options)

    def wait() -> None:
        clock.now += seconds

    runner.on("before_val_iter")(wait)
    runner.on("before_test_iter")(wait)
    return runner


@pytest.mark.parametrize("phase", ["val", "test"])
def test_a_long_pass_logs_a_line_a_minute(
    make: MakeRunner, clock: Clock, capsys: pytest.CaptureFixture[str], phase: str
) -> None:
    runner = evaluating(make, clock, 1.0)
    getattr(runner, phase)()
    expected = [
        f"{phase}  60/200 batches, 30 %, 1:00 elapsed, about 2:20 left",
        f"{phase}  120/200 batches, 60 %, 2:00 elapsed, about 1:20 left",
        f"{phase}  180/200 batches, 90 %, 3:00 elapsed, about 0:20 left",
    ]
    assert lines(capsys.readouterr().out) == expected
    written = (runner.run_dir / "run.log").read_text()
    assert [line.partition("  ")[2] for line in written.splitlines() if "elapsed" in line] == (
        expected
    )


def test_a_pass_of_unknown_length_counts_its_batches(
    make: MakeRunner, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    class Unknown:
        def __iter__(self) -> Any:
            return iter([BATCH] * 100)

    class Wrong(Unknown):
        def __len__(self) -> int:
            return 10

    evaluating(make, clock, 45.0, val_dataloader=Unknown()).val()
    assert lines(capsys.readouterr().out)[::20] == [
        "val  2 batches, 1:30 elapsed",
        "val  42 batches, 31:30 elapsed",
        "val  82 batches, 1:01:30 elapsed",
    ]
    evaluating(make, clock, 60.0, val_dataloader=Wrong()).val()
    assert lines(capsys.readouterr().out)[9:11] == [
        "val  10/10 batches, 100 %, 10:00 elapsed, about 0:00 left",
        "val  11 batches, 11:00 elapsed",
    ]


def test_each_evaluated_model_is_a_pass(
    make: MakeRunner, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    runner = evaluating(make, clock, 60.0, val_dataloader=[BATCH] * 3)
    runner.on("evaluated_models")(lambda runner: {"": runner.model, "ema": runner.model})
    runner.val()
    assert lines(capsys.readouterr().out) == [
        "val  1/3 batches, 33 %, 1:00 elapsed, about 2:00 left",
        "val  2/3 batches, 66 %, 2:00 elapsed, about 1:00 left",
        "val  3/3 batches, 100 %, 3:00 elapsed, about 0:00 left",
        "val ema  1/3 batches, 33 %, 0:00 elapsed",
        "val ema  2/3 batches, 66 %, 1:00 elapsed, about 1:00 left",
        "val ema  3/3 batches, 100 %, 2:00 elapsed, about 0:00 left",
    ]


def training(make: MakeRunner, clock: Clock, interval: int, **options: Any) -> ToyRunner:
    """A Runner that takes 20 seconds for an iteration."""
    plugins = [dict(type="logging", interval=interval), "progress_bar"]
    options.setdefault("train_dataloader", [BATCH] * 8)
    runner = make(plugins=plugins, **options)

    @runner.on("before_train_iter")
    def wait() -> None:
        clock.now += 20.0

    return runner


def test_training_logs_a_line_where_records_are_rare(
    make: MakeRunner, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    training(make, clock, 1000).train()
    assert lines(capsys.readouterr().out) == [
        "train  epoch 1/2  3/8 batches, 37 %, 1:00 elapsed, about 1:40 left",
        "train  epoch 1/2  6/8 batches, 75 %, 2:00 elapsed, about 0:40 left",
        "train  epoch 2/2  3/8 batches, 37 %, 1:00 elapsed, about 1:40 left",
        "train  epoch 2/2  6/8 batches, 75 %, 2:00 elapsed, about 0:40 left",
    ]
    training(make, clock, 1000, train_cfg=dict(max_iters=10)).train()
    assert lines(capsys.readouterr().out) == [
        "train  3/10 iterations, 30 %, 1:00 elapsed, about 2:20 left",
        "train  6/10 iterations, 60 %, 2:00 elapsed, about 1:20 left",
        "train  9/10 iterations, 90 %, 3:00 elapsed, about 0:20 left",
    ]
    training(make, clock, 3).train()  # a record a minute
    assert lines(capsys.readouterr().out) == []


def test_the_batch_norm_pass_of_swa_logs_lines(
    make: MakeRunner, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    class Slow(nn.BatchNorm1d):
        def forward(self, inputs: Tensor) -> Tensor:
            clock.now += 20.0 if self.momentum is None else 0.0  # in torch's update_bn
            return super().forward(inputs)

    runner = make(
        model=nn.Sequential(nn.Linear(4, 3), Slow(3)),
        loss=nn.CrossEntropyLoss(),
        plugins=["logging", "progress_bar", "swa"],
        train_dataloader=[BATCH] * 8,
    )
    runner.train()
    expected = [
        "swa batch norm  3/8 batches, 37 %, 1:00 elapsed, about 1:40 left",
        "swa batch norm  6/8 batches, 75 %, 2:00 elapsed, about 0:40 left",
    ]
    assert lines(capsys.readouterr().out) == expected
    runner.plugins["swa"].finish(runner)  # outside a run
    assert lines(capsys.readouterr().out) == expected


def test_nothing_is_printed_without_logging(
    make: MakeRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    runner = make(plugins=[ProgressBar(line_interval=1e-9)], validate=True, test=True)
    runner.train()
    runner.test()
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def on_a_rank(folder: Path) -> None:
    model = nn.Linear(4, 3)
    with Runner(
        model,
        folder,
        loss=nn.CrossEntropyLoss(),
        train_dataloader=[BATCH] * 4,
        train_cfg=dict(max_epochs=1),
        optim_wrapper=torch.optim.SGD(model.parameters(), lr=0.1),
        plugins=[ProgressBar(line_interval=1e-9)],
        device="cpu",
    ) as runner:
        runner.train()


@pytest.mark.ranks
def test_only_rank_0_logs_lines(tmp_path: Path) -> None:
    on_ranks(2, on_a_rank, tmp_path)
    assert len(lines((tmp_path / "printed_0").read_text())) > 0
    assert lines((tmp_path / "printed_1").read_text()) == []

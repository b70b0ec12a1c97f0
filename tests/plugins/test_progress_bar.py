"""The bar: drawn on a terminal, above it the log; silent elsewhere."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import threading
from pathlib import Path

import pytest

from tests import forks
from tests.fixtures import MakeRunner

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
                     dict(type="progress_bar", refresh_per_second=50)]) as runner:
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


def test_elsewhere_it_is_silent(make: MakeRunner, capsys: pytest.CaptureFixture[str]) -> None:
    make(defaults=("progress_bar",), validate=True, test=True).train()
    runner = make(defaults=("progress_bar",), validate=True, test=True)
    runner.test()
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""

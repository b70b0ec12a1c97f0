"""What mypy tells a user: nothing about a correct script, and one error for each mistake."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

pytest.importorskip("mypy")

ROOT = Path(__file__).parents[1]
CORRECT = '''
"""A user's script."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from hookengine import (
    BaseModel,
    OptimWrapper,
    OptimWrapperDict,
    Phase,
    Plugin,
    Record,
    RunFolder,
    RunInfo,
    Runner,
    Sink,
    hookimpl,
)


class Classifier(BaseModel):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, 2)

    def forward(self, inputs: Tensor, target: Tensor, mode: str = "tensor") -> Any:
        return self.losses(inputs, target) if mode == "loss" else self.net(inputs)

    def losses(self, inputs: Tensor, target: Tensor) -> dict[str, Tensor]:
        return {"loss": nn.functional.cross_entropy(self.net(inputs), target)}

    def train_step(self, data: Any, optim_wrapper: OptimWrapper) -> dict[str, Tensor]:
        inputs, target = self.data_preprocessor(data, True)
        with optim_wrapper.optim_context(self):
            losses = self.losses(inputs, target)
        loss, log_vars = self.parse_losses(losses)
        optim_wrapper.update_params(loss)
        return log_vars


class Several(BaseModel):
    def train_step(self, data: Any, optim_wrapper: OptimWrapperDict) -> dict[str, Tensor]:
        log_vars: dict[str, Tensor] = {}
        for name, wrapper in optim_wrapper.items():
            loss, log_vars = self.parse_losses({f"loss_{name}": [self(data)]})
            wrapper.update_params(loss)
        return log_vars

    def forward(self, data: Tensor) -> Tensor:
        return data.sum()


class Gradients(Plugin, name="gradients"):
    interval: int = 100

    def after_forward(
        self, losses: Mapping[str, Tensor | Sequence[Tensor]]
    ) -> Mapping[str, Tensor | Sequence[Tensor]]:
        return {**losses, "loss_more": torch.zeros(())}

    @hookimpl(every="interval", trylast=True)
    def before_optim_step(self, runner: Runner, optim_wrapper: OptimWrapper) -> None:
        norms = [p.grad.norm() for p in optim_wrapper.parameters() if p.grad is not None]
        runner.log({"norm": torch.stack(norms).mean()})

    def after_val_epoch(self, runner: Runner, metrics: Mapping[str, Any]) -> None:
        if metrics["accuracy"] > 0.9:
            runner.stop("accurate")

    def setup_dataloader(self, dataloader: DataLoader[Any], phase: Phase) -> DataLoader[Any] | None:
        return None if phase == "train" else dataloader


class Printing(Sink):
    def write(self, runner: RunInfo, record: Record) -> None:
        print(RunFolder(runner.run_dir).metrics, record.scalars)


loader = DataLoader(TensorDataset(torch.ones(8, 2), torch.ones(8, dtype=torch.long)), 4)
train = dict(train_dataloader=loader, train_cfg=dict(max_epochs=2), optim_wrapper=dict(lr=0.1))
runner = Runner(Classifier(), "work_dir", plugins=["ema", Gradients(interval=50), Printing()])
named = Runner(Classifier(), work_dir="work_dir")
scheduled = Runner(Classifier(), plugins=[dict(type="schedule", scheduler="CosineAnnealingLR")])


@runner.on("after_train_epoch", trylast=True)
def report(runner: Runner) -> None:
    print(runner.model, runner.bare_model)
    print(runner.progress.iter)
    print(runner.dataloaders["train"], [w.steps for w in runner.optim_wrappers.values()])


metrics = runner.train(max_epochs=3)
metrics = named.train(max_epochs=4)
metrics = runner.val()
print(metrics, runner.plugins.items())
'''
MISTAKES = {
    'work_dir="work_dir"': 'workdir="work_dir"',
    'plugins=[dict(type="schedule"': 'param_scheduler=[dict(type="schedule"',
    "print(runner.model,": "print(runner.modle,",
    "runner.val()": "runner.vall()",
    "train(max_epochs=3)": "train(max_epoch=3)",
    "train(max_epochs=4)": 'train(max_epochs="4")',
    'runner.on("after_train_epoch", trylast=True)': 'runner.on("after_train_epoch", trylst=True)',
    "progress.iter)": "progress.iteration)",
    "Gradients(interval=50)": "Gradients(intervall=50)",
    "runner.plugins.items()": 'runner.plugins.call("report")',
}
"""Ten things that a user means to write in the script above, and writes instead."""
MISSPELLED_HOOKIMPL = 'every="interval"', 'evry="interval"'
"""An eleventh one, about which mypy says several things in its line."""


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[int, str]]]:
    """The errors of mypy in each script, strict: lines and texts."""
    wrong = CORRECT
    for meant, written in MISTAKES.items():
        assert CORRECT.count(meant) == 1, meant
        wrong = wrong.replace(meant, written)
    folder = tmp_path_factory.mktemp("typing")
    (folder / "correct.py").write_text(CORRECT)
    (folder / "mistakes.py").write_text(wrong)
    (folder / "hook.py").write_text(CORRECT.replace(*MISSPELLED_HOOKIMPL))
    files = [str(folder / f"{name}.py") for name in ("correct", "mistakes", "hook")]
    command = [sys.executable, "-m", "mypy", *files]
    # There, mypy finds the project's options and cache. Without a cache, it takes 20 times as long.
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    found: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for name, line, text in re.findall(r"(\w+)\.py:(\d+): error: (.*)", done.stdout):
        found[name].append((int(line), text))
    assert set(found) == {"mistakes", "hook"}, done.stdout + done.stderr
    return found


def line_of(text: str) -> int:
    return CORRECT[: CORRECT.index(text)].count("\n") + 1


@pytest.mark.process
def test_mypy_reports_ten_errors_for_ten_mistakes_and_none_in_a_correct_script(
    errors: dict[str, list[tuple[int, str]]],
) -> None:
    assert "correct" not in errors
    assert len(MISTAKES) == 10
    assert [line for line, _ in errors["mistakes"]] == sorted(map(line_of, MISTAKES))
    assert {line for line, _ in errors["hook"]} == {line_of(MISSPELLED_HOOKIMPL[0])}


@pytest.mark.parametrize("meant", MISTAKES)
def test_each_mistake_has_a_line_of_its_own(meant: str) -> None:
    (line,) = (line for line in CORRECT.splitlines() if meant in line)
    assert [other for other in MISTAKES if other in line] == [meant]

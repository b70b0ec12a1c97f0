"""Every plugin without each of the default plugins: it works, or says first what it lacks.

Plugins that start processes or compile are left out: ``compile``, and ``wandb`` with records.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from hookengine import PLUGINS
from hookengine.events.plugin import DEFAULT_PLUGINS
from tests.fixtures import MakeRunner

OPTIONS: dict[str, dict[str, Any]] = {
    "accumulate": dict(steps=2),
    "amp": dict(dtype="bfloat16"),
    "checkpoint": dict(keep_best="accuracy"),
    "clip": dict(max_norm=1.0),
    "early_stop": dict(metric="accuracy"),
    "ema": dict(momentum=0.5),
    "mixup": dict(num_classes=3),
    "schedule": dict(scheduler="CosineAnnealingLR"),
    "watch": dict(every=1),
}
NEEDS_RECORDS = {"report", "tensorboard", "wandb", "watch"}
PROCESSES = {"compile"}
EVERYTHING = "everything"
WITHOUT = {
    "logging": ("logging",),
    "checkpoint": ("checkpoint",),
    "the others": ("seed", "preprocess", "init"),  # together, to save time
    EVERYTHING: (),
}


class Accuracy:
    """A metric with torchmetrics' methods."""

    def __init__(self) -> None:
        self.right: list[bool] = []

    def reset(self) -> None:
        self.right.clear()

    def update(self, output: torch.Tensor, target: torch.Tensor) -> None:
        self.right += (output.argmax(1) == target).tolist()

    def compute(self) -> float:
        return sum(self.right) / len(self.right)

    def to(self, device: torch.device) -> Accuracy:
        return self


def cases() -> list[tuple[str, str]]:
    found = []
    for name in PLUGINS.names():
        for off in WITHOUT:
            has_records = off not in ("logging", EVERYTHING)
            slow = has_records and (name == "wandb" or (name == "report" and off != "checkpoint"))
            if name not in PROCESSES and not slow and WITHOUT[off] != (name,):
                found.append((name, off))
    return found


def test_all_first_party_plugins_are_covered() -> None:
    covered = {name for name, _ in cases()} | PROCESSES
    own = {name for name in PLUGINS.names() if PLUGINS.own_entry_points().get(name)}
    assert own <= covered
    assert covered >= NEEDS_RECORDS | {*DEFAULT_PLUGINS, *OPTIONS}


@pytest.mark.parametrize(("name", "off"), cases())
def test_it_works_or_says_what_it_lacks(
    make: MakeRunner,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    name: str,
    off: str,
) -> None:
    images, labels = torch.ones(8, 3, 4, 4), torch.arange(8) % 3
    data = TensorDataset(images, labels)
    model = nn.Sequential(nn.Conv2d(3, 3, 4), nn.BatchNorm2d(3), nn.Flatten())
    plugins: list[Any] = [dict(type=name, **OPTIONS.get(name, {}))]
    plugins += [f"no:{one}" for one in WITHOUT[off] if one != name]
    runner = make(
        model=model,
        loss=nn.CrossEntropyLoss(),
        train_dataloader=DataLoader(data, batch_size=4),
        train_cfg=dict(max_epochs=1),
        val_dataloader=DataLoader(data, batch_size=4),
        val_evaluator=dict(accuracy=Accuracy()),
        defaults=() if off == EVERYTHING else DEFAULT_PLUGINS,
        plugins=plugins,
        device="cpu",
    )

    def warnings() -> str:
        lines = [r.getMessage() for r in caplog.records if r.levelname in ("WARNING", "ERROR")]
        printed = capsys.readouterr().out.splitlines()
        return "\n".join([*lines, *(x for x in printed if "  WARNING " in x or "  ERROR " in x)])

    before: list[str] = []
    runner.on("before_train", trylast=True)(lambda: before.append(warnings()))
    runner.train()
    runner.close()
    assert runner.progress.iter == 2
    after = warnings().replace(before[0], "")
    lacks = name in NEEDS_RECORDS and off in ("logging", EVERYTHING)
    assert before[0].count("Enable 'logging'") == lacks
    assert "failed" not in before[0] + after
    assert "lost" not in after


@pytest.mark.parametrize(
    ("checkpoints", "others", "fix"),
    [
        ("all", [], "Enable 'checkpoint'"),
        ("best", [], "Enable 'checkpoint'"),
        ("best", ["checkpoint"], "Set dict(type='checkpoint', keep_best=METRIC)"),
        ("all", ["checkpoint"], ""),
    ],
)
def test_uploads_that_cannot_come_are_warned_about(
    make: MakeRunner,
    caplog: pytest.LogCaptureFixture,
    checkpoints: str,
    others: list[str],
    fix: str,
) -> None:
    runner = make(plugins=[dict(type="wandb", checkpoints=checkpoints), *others])
    runner.hooks.before_run(runner)
    told = [r.getMessage() for r in caplog.records if "uploads nothing" in r.getMessage()]
    assert [text.endswith(fix) for text in told] == [True] * bool(fix)

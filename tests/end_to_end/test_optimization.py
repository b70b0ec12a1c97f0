"""Every combination of the plugins between loss and step equals the recipe written by hand.

``docs/optimization.md`` points here for each pair of them.
"""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms import v2

from hookengine import BaseModel, Runner

FEATURES = ("amp", "accumulate", "clip", "schedule", "early_stop", "mixup", "paramwise", "compile")
EPOCHS, STEPS, LR, DECAY = 4, 4, 0.2, 0.05


class Net(BaseModel):
    """Images of one channel and 2 x 2 pixels into three classes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.norm = nn.LayerNorm(8)
        self.last = nn.Linear(8, 3)

    def forward(self, inputs: Tensor, labels: Tensor, mode: str = "tensor") -> Any:
        scores = self.last(F.relu(self.norm(self.first(inputs.flatten(1)))))
        if mode == "loss":
            return {"loss": F.cross_entropy(scores, labels)}
        return (scores, labels) if mode == "predict" else scores


def loader(samples: int, batch_size: int, seed: int) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(samples, 1, 2, 2, generator=generator)
    labels = torch.randint(3, (samples,), generator=generator)
    return DataLoader(TensorDataset(inputs, labels), batch_size)


def train_batches() -> DataLoader[Any]:
    return loader(22, 4, seed=1)  # six batches, the last of two samples: windows of four and two


def val_batches() -> DataLoader[Any]:
    return loader(10, 4, seed=2)


def with_runner(features: frozenset[str], dtype: str, tmp_path: Path) -> Any:
    options: dict[str, dict[str, Any]] = {
        "amp": dict(dtype=dtype, init_scale=2.0**18, growth_interval=5),
        "accumulate": dict(steps=STEPS),
        "clip": dict(max_norm=0.3),
        "schedule": dict(scheduler="CosineAnnealingLR", by_epoch=False, warmup=3),
        "early_stop": dict(metric="loss", patience=1, min_delta=0.02),
        "mixup": dict(mixup=0.4, num_classes=3),
        "compile": dict(backend="eager"),
    }
    # Given in reverse, since the order in which they are called is theirs to declare.
    plugins = [dict(type=f, **options[f]) for f in reversed(FEATURES) if f in features & {*options}]
    torch.manual_seed(0)
    wrapper: dict[str, Any] = dict(
        optimizer=dict(type="SGD", lr=LR, momentum=0.9, weight_decay=DECAY)
    )
    if "paramwise" in features:
        wrapper["paramwise"] = dict(custom_keys={"last": dict(lr_mult=0.5)}, norm_decay_mult=0)
    runner = Runner(
        Net(),
        tmp_path,
        train_dataloader=train_batches(),
        train_cfg=dict(max_epochs=EPOCHS),
        optim_wrapper=wrapper,
        val_dataloader=val_batches(),
        val_cfg=dict(loss=True),
        plugins=plugins,
        defaults=(),
    )
    runner.train()
    return runner


def by_hand(features: frozenset[str], dtype: str) -> dict[str, Any]:
    """What one writes with torch alone; the order of the lines is the point of it."""
    torch.manual_seed(0)
    model = Net()
    if "compile" in features:
        model.compile(backend="eager")
    if "paramwise" in features:
        groups: Any = [
            dict(params=[*model.first.parameters()]),
            dict(params=[*model.norm.parameters()], weight_decay=0.0),
            dict(params=[*model.last.parameters()], lr=LR * 0.5),
        ]
    else:
        groups = model.parameters()
    optimizer = torch.optim.SGD(groups, lr=LR, momentum=0.9, weight_decay=DECAY)
    autocast = dict(device_type="cpu", dtype=getattr(torch, dtype), enabled="amp" in features)
    scaler = torch.amp.GradScaler(
        "cpu",
        init_scale=2.0**18,
        growth_interval=5,
        enabled="amp" in features and dtype == "float16",
    )
    k = STEPS if "accumulate" in features else 1
    if "schedule" in features:
        total = EPOCHS * -(-6 // k)
        scheduler = torch.optim.lr_scheduler.SequentialLR(
            optimizer,
            [
                torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=3),
                torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total - 3),
            ],
            [3],
        )
    mix = v2.MixUp(alpha=0.4, num_classes=3)
    steps, best, losses = 0, float("inf"), []
    for _ in range(EPOCHS):
        model.train()
        batches = list(train_batches())
        for start in range(0, len(batches), k):
            window = batches[start : start + k]
            expected, held = len(window) * len(window[0][0]), 0
            for batch in window:
                if "mixup" in features:
                    batch = mix(batch)
                with torch.autocast(**autocast):
                    loss = model(*batch, mode="loss")["loss"]
                if k > 1:
                    loss = loss * (len(batch[0]) / expected)
                held += len(batch[0])
                scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            if k > 1 and held != expected:
                for parameter in model.parameters():
                    assert parameter.grad is not None
                    parameter.grad *= expected / held
            if "clip" in features:
                nn.utils.clip_grad_norm_(model.parameters(), 0.3)
            before = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            if scaler.get_scale() >= before:
                steps += 1
                if "schedule" in features:
                    scheduler.step()
        model.eval()
        total_loss, state = 0.0, torch.get_rng_state()
        with torch.no_grad(), torch.autocast(**autocast):
            for inputs, labels in val_batches():
                total_loss += model(inputs, labels, mode="loss")["loss"].item() * len(inputs)
        torch.set_rng_state(state)  # a DataLoader draws a number whenever it is gone through
        losses.append(total_loss / 10)
        if "early_stop" in features:
            if losses[-1] > best - 0.02:
                break
            best = losses[-1]
    lrs = [group["lr"] for group in optimizer.param_groups]
    return dict(weights=model.state_dict(), steps=steps, losses=losses, lrs=lrs)


def check(features: frozenset[str], dtype: str, tmp_path: Path) -> dict[str, Any]:
    runner, expected = with_runner(features, dtype, tmp_path), by_hand(features, dtype)
    for name, value in runner.bare_model.state_dict().items():
        assert torch.equal(value, expected["weights"][name]), name
    assert runner.progress.step == expected["steps"]
    assert runner.progress.epoch == len(expected["losses"])
    assert runner.val_loop.metrics["loss"] == pytest.approx(expected["losses"][-1], rel=1e-12)
    assert runner.optim_wrapper.get_lr() == pytest.approx(expected["lrs"], rel=1e-12)
    runner.close()
    return expected


PAIRS = [
    pytest.param("-".join(pair), marks=[pytest.mark.process] if "compile" in pair else [])
    for pair in combinations(FEATURES, 2)
]


@pytest.mark.parametrize("pair", PAIRS)
def test_pair(pair: str, tmp_path: Path) -> None:
    for dtype in ("float16", "bfloat16") if pair.startswith("amp-") else ("float32",):
        check(frozenset(pair.split("-")), dtype, tmp_path)


def test_all_other_combinations(tmp_path: Path) -> None:
    features = [feature for feature in FEATURES if feature != "compile"]  # takes its time
    done = 0
    for count in (0, 1, *range(3, len(features) + 1)):
        for chosen in combinations(features, count):
            check(frozenset(chosen), "float16", tmp_path)
            done += 1
    assert done == 128 - 21


@pytest.mark.process
def test_all_at_once_and_every_part_of_it_happens(tmp_path: Path) -> None:
    whole = check(frozenset(FEATURES), "float16", tmp_path)
    assert len(whole["losses"]) < EPOCHS, "it stops early"
    assert whole["steps"] < 2 * len(whole["losses"]), "it skips a step"
    for feature in FEATURES:
        if feature not in ("compile", "early_stop"):
            without = by_hand(frozenset(FEATURES) - {feature}, "float16")
            assert not torch.equal(
                without["weights"]["first.weight"], whole["weights"]["first.weight"]
            ), f"{feature} makes a difference"

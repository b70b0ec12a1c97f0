"""Requests of one rank are settled by all, at the same place; and nothing else is exchanged."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import profile
from torch.utils.data import DataLoader, TensorDataset

from hookengine import BaseMetric, BaseModel, Plugin, Runner
from tests.ranks import on_ranks

pytestmark = pytest.mark.ranks


class Count(BaseMetric):
    def process(self, data_batch: Any, data_samples: Any) -> None:
        self.results.append(len(data_samples[1]))

    def compute_metrics(self, results: list[Any]) -> dict[str, Any]:
        return {"accuracy": float(sum(results))}


def build(folder: Path, epochs: int = 3, **options: Any) -> Runner:
    data = TensorDataset(torch.randn(64, 4), torch.arange(64) % 3)
    return Runner(
        options.pop("model", None) or nn.Linear(4, 3),
        folder,
        train_dataloader=DataLoader(data, batch_size=1),
        train_cfg=dict(max_epochs=epochs),
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.1)),
        val_dataloader=DataLoader(data, batch_size=8),
        val_evaluator=Count(),
        device="cpu",
        **{
            "loss": nn.functional.cross_entropy,
            "plugins": ["no:progress_bar", dict(type="logging", level="ERROR")],
            **options,
        },
    )


def decide(folder: Path) -> dict[str, Any]:
    """Stop, save and early-stop as one rank wishes; where each rank stood then."""
    rank = int(os.environ["RANK"])
    seen: dict[str, Any] = {}
    with build(folder / "stop", epochs=100) as runner:

        @runner.on("after_train_iter")
        def wish(runner: Any) -> None:
            if runner.progress.iter == 3 and rank == 1:
                runner.stop("rank 1 has had enough")

        runner.train()
        seen["stop"] = [runner.progress.iter, runner.progress.stopped]
        seen["named"] = [runner.name, runner.run_dir.is_dir()]
    with build(folder / "save") as runner:
        saved: list[int] = []

        @runner.on("after_train_iter")
        def ask(runner: Any) -> None:
            if runner.progress.iter == 3 and rank == 1:
                runner.requests["save"] = "rank 1 wants it"

        @runner.on("safe_point")
        def note(runner: Any, agreed: Any) -> None:
            if "save" in agreed:
                saved.append(runner.progress.iter)

        runner.train()
        seen["save"] = saved
    stop = dict(type="early_stop", metric="accuracy", patience=1)
    quiet = ["no:progress_bar", dict(type="logging", level="ERROR")]
    best = dict(type="checkpoint", keep_best="accuracy")
    with build(folder / "early", plugins=[stop, best, *quiet], epochs=50) as runner:
        runner.train()
        seen["early"] = [runner.progress.epoch, runner.progress.batch]
        seen["best"] = runner.plugins["checkpoint"].best
    return seen


def test_what_one_rank_asks_for_all_ranks_do(tmp_path: Path) -> None:
    first, second = on_ranks(2, decide, tmp_path)
    assert first["stop"] == second["stop"]
    assert first["stop"][1] == "rank 1 has had enough"
    assert first["named"] == second["named"]
    assert first["named"][1]
    assert len(first["save"]) == 1
    assert first["save"] == second["save"]
    assert first["early"] == second["early"] == [2, 0]  # at once, where all see the same
    assert first["best"]["value"] == second["best"]["value"] == 64


class Profile(Plugin):
    """The shapes of what was reduced in 8 iterations within an epoch."""

    def configure(self) -> None:
        self.profiler = profile(record_shapes=True)

    def before_train_iter(self, batch_idx: int) -> None:
        if batch_idx == 8:
            self.profiler.__enter__()
        elif batch_idx == 16:
            self.profiler.__exit__(None, None, None)

    def reduced(self) -> list[int]:
        """Elements of each all-reduce, and 0 for each other collective."""
        events = [e for e in self.profiler.events() if e.name.startswith("gloo:")]
        return [math.prod(e.input_shapes[0]) if e.name == "gloo:all_reduce" else 0 for e in events]


class Twice(BaseModel):
    """Calls itself twice before its backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 3)

    def forward(self, inputs: Any, labels: Any, mode: str = "tensor") -> Any:
        return self.net(inputs), labels

    def train_step(self, data: Any, optim_wrapper: Any) -> dict[str, Any]:
        with optim_wrapper.optim_context(self):
            losses = [nn.functional.cross_entropy(*self(x, data[1])) for x in (data[0], -data[0])]
        optim_wrapper.update_params(losses[0] + losses[1])
        return {"loss": losses[0].detach()}


def reduce(folder: Path) -> list[list[int]]:
    seen = []
    twice = dict(model=Twice(), loss=None)
    for accumulate, more in (([dict(type="accumulate", steps=4)], {}), ([], {}), ([], twice)):
        look = Profile()
        options: dict[str, Any] = dict(defaults=("distributed", "preprocess"), epochs=1, **more)
        with build(folder, plugins=[*accumulate, look], **options) as runner:
            runner.train()
        seen.append(look.reduced())
    return seen


def test_gradients_are_exchanged_once_per_step_and_nothing_else_but_the_question(
    tmp_path: Path,
) -> None:
    for accumulated, plain, twice in on_ranks(2, reduce, tmp_path):
        assert twice.count(15) == 8
        assert plain.count(15) == 8  # the gradients, 12 weights and 3 biases
        assert accumulated.count(15) == 2  # once per window
        assert accumulated.count(1) == 2  # its samples
        assert set(plain) <= {15, 2}  # two numbers about once a second: who has a request
        assert set(accumulated) <= {15, 1, 2}

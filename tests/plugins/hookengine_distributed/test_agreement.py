"""Requests of one rank are settled by all, at the same place; and nothing else is exchanged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from hookengine import BaseMetric, Runner, dist
from tests.ranks import on_ranks


class Count(BaseMetric):
    def process(self, data_batch: Any, data_samples: Any) -> None:
        self.results.append(len(data_samples[1]))

    def compute_metrics(self, results: list[Any]) -> dict[str, Any]:
        return {"accuracy": float(sum(results))}


def build(folder: Path, epochs: int = 3, **options: Any) -> Runner:
    data = TensorDataset(torch.randn(64, 4), torch.arange(64) % 3)
    return Runner(
        nn.Linear(4, 3),
        folder,
        train_dataloader=DataLoader(data, batch_size=1),
        train_cfg=dict(max_epochs=epochs),
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.1)),
        val_dataloader=DataLoader(data, batch_size=8),
        val_evaluator=Count(),
        loss=nn.functional.cross_entropy,
        device="cpu",
        **{"plugins": ["no:progress_bar", dict(type="logging", level="ERROR")], **options},
    )


def decide(folder: Path) -> dict[str, Any]:
    """Stop, save and early-stop as one rank wishes; where each rank stood then."""
    rank = dist_rank()
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
        def note(runner: Any) -> None:
            if "save" in runner.agreed:
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


def dist_rank() -> int:
    import os

    return int(os.environ["RANK"])


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


def count_collectives(folder: Path) -> dict[str, list[str]]:
    """The names of the collectives of 8 iterations: the bare kernel's, and the plugin's."""
    from torch.profiler import profile

    seen: dict[str, list[str]] = {}
    for name, options in (
        ("accumulate", dict(plugins=[dict(type="accumulate", steps=4)])),
        ("plain", dict(plugins=[])),
    ):
        defaults = ("distributed", "preprocess")
        with build(folder, defaults=defaults, epochs=1, **options) as runner:
            records: list[Any] = []

            @runner.on("after_train_iter")
            def measure(runner: Any, records: Any = None) -> None: ...

            events: list[str] = []
            profiler = profile()

            @runner.on("before_train_iter")
            def start(runner: Any, batch_idx: int) -> None:
                if batch_idx == 8:
                    profiler.__enter__()

            @runner.on("before_train_iter")
            def stop(runner: Any, batch_idx: int) -> None:
                if batch_idx == 16:
                    profiler.__exit__(None, None, None)

            runner.train()
            events = [e.name for e in profiler.events() if e.name.startswith("gloo:")]
            seen[name] = events
    torch_dist.barrier()
    return seen

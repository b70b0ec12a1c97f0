"""Helpers alone and over two real gloo ranks."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as torch_dist
from torch import nn

from hookengine import BaseMetric, dist
from tests.ranks import spawn


def test_alone_they_are_trivial() -> None:
    assert not dist.is_distributed()
    assert (dist.get_rank(), dist.get_world_size(), dist.is_main_process()) == (0, 1, True)
    assert dist.broadcast_object("x") == "x"
    assert dist.gather_objects("x") == ["x"]
    assert dist.collect_results([1, 2, 3], size=2) == [1, 2, 3]  # nobody padded anything
    assert dist.sum_over_ranks(torch.ones(2)).tolist() == [1, 1]


class Order(BaseMetric):
    """Gives the gathered results back."""

    def process(self, data_batch: Any, data_samples: Any) -> None:
        self.results.extend(data_samples)

    def compute_metrics(self, results: list[Any]) -> dict[str, Any]:
        return {"order": results, "mean": sum(results) / len(results)}


def on_rank(rank: int, port: int, folder: str) -> None:
    """Run by each rank; an assertion that fails there fails the test."""
    torch.set_num_threads(1)
    torch_dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    assert (dist.get_rank(), dist.get_world_size()) == (rank, 2)
    assert dist.is_main_process() == (rank == 0)
    assert dist.broadcast_object(f"from {rank}", src=1) == "from 1"
    gathered = dist.gather_objects(f"from {rank}")
    assert gathered == (["from 0", "from 1"] if rank == 0 else None)
    assert dist.sum_over_ranks(torch.tensor([1.0 + rank])).item() == 3
    lazy = nn.LazyLinear(2).weight
    for dtype in (torch.float32, torch.bfloat16, torch.bool, torch.int16, torch.complex64):
        whole = torch.full((2, 3), rank, dtype=dtype)
        column = torch.full((3, 2), rank, dtype=dtype).T[0]  # not dense
        scalar = torch.tensor(rank, dtype=dtype)
        dist.broadcast_tensors([whole, lazy, column, torch.empty(0), scalar], src=1)
        assert bool(scalar == 1), dtype
        assert bool((whole == 1).all()), dtype
        assert bool((column == 1).all()), dtype

    # Dealt in turn, five samples: rank 0 has 0 2 4, rank 1 has 1 3, and once 0 again as padding.
    metric = Order()
    metric.process(None, [0, 2, 4] if rank == 0 else [1, 3, 0])
    assert metric.evaluate(5) == {"order": [0, 1, 2, 3, 4], "mean": 2.0}
    metric.process(None, [0, 2, 4] if rank == 0 else [1, 3])  # unequal, not padded
    assert metric.evaluate(5) == {"order": [0, 1, 2, 3, 4], "mean": 2.0}

    metrics = evaluate_share(rank, folder)
    assert abs(metrics["loss"] - metrics["expected"]) < 1e-6
    train_with_defaults(rank, folder)
    torch_dist.barrier()
    torch_dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads can abort a Python that finalizes: pytorch/pytorch#179291


def train_with_defaults(rank: int, folder: str) -> None:
    """Train with the default plugins; rank 1 must neither print nor write."""
    import contextlib
    import io

    from torch import nn

    from hookengine import Runner

    module = nn.Linear(4, 3)
    batch = torch.ones(2, 4), torch.zeros(2, dtype=torch.long)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        runner = Runner(
            module,
            f"{folder}/rank{rank}",
            train_dataloader=[batch] * 3,
            train_cfg=dict(max_epochs=1),
            optim_wrapper=torch.optim.SGD(module.parameters(), lr=0.1),
            loss=nn.functional.cross_entropy,
        )
        with runner:
            runner.train()
            runner.logger.error(f"an error on rank {rank}")
    lines = printed.getvalue().splitlines()
    assert f"an error on rank {rank}" in lines[-1]
    assert len(lines) == (6 if rank == 0 else 1)
    assert runner.run_dir.exists() == (rank == 0)


def evaluate_share(rank: int, folder: str) -> dict[str, float]:
    """Validate with the loss over unequal shares of one dataset."""
    from torch import nn

    from hookengine import Runner

    torch.manual_seed(0)
    module = nn.Linear(4, 3)
    inputs, labels = torch.randn(7, 4), torch.randint(3, (7,))
    with torch.no_grad():
        expected = nn.functional.cross_entropy(module(inputs), labels).item()
    share = slice(0, 5) if rank == 0 else slice(5, 7)
    runner = Runner(
        module,
        folder,
        val_dataloader=[(inputs[share], labels[share])],
        val_cfg=dict(loss=True),
        loss=nn.functional.cross_entropy,
        defaults=(),
    )
    return {**runner.val(), "expected": expected}


@pytest.mark.ranks
def test_over_two_ranks(tmp_path: Path) -> None:
    spawn(2, on_rank, tmp_path, str(tmp_path))

"""The batch norm of the averaged weights is the same on all ranks, of all samples."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from hookengine import Runner, dist
from tests.ranks import on_ranks

pytestmark = pytest.mark.ranks


def train(folder: Path) -> dict[str, Any]:
    data = TensorDataset(torch.arange(64.0).reshape(16, 4).sin(), torch.arange(16) % 3)
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(4, affine=False), nn.Linear(4, 3))
    runner = Runner(
        model,
        folder,
        train_dataloader=DataLoader(data, batch_size=8 // dist_world()),
        train_cfg=dict(max_epochs=4),
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.1)),
        loss=nn.functional.cross_entropy,
        plugins=["swa", "no:progress_bar", dict(type="logging", level="ERROR")],
        device="cpu",
    )
    with runner:
        runner.train()
        averaged = runner.plugins["swa"].averaged.module
        return {"mean": averaged[0].running_mean.clone(), "ranks": dist.get_world_size()}


def dist_world() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def test_the_statistics_are_of_all_samples(tmp_path: Path) -> None:
    alone = train(tmp_path / "one")
    first, second = on_ranks(2, train, tmp_path / "ranks")
    assert (alone["ranks"], first["ranks"]) == (1, 2)
    torch.testing.assert_close(first["mean"], alone["mean"])
    assert torch.equal(first["mean"], second["mean"])

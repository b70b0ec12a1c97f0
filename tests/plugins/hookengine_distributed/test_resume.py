"""Resuming within an epoch on another number of ranks: each sample of the epoch, once."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from hookengine import Plugin, Runner
from tests.ranks import on_ranks

pytestmark = pytest.mark.ranks


class Seen(Plugin, name="seen"):
    """Keeps the samples of the first epoch and the last batch's number; stops after some."""

    def __init__(self, stop_at: int | None) -> None:
        self.stop_at = stop_at
        self.samples: list[float] = []
        self.last = -1

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any) -> None:
        if runner.progress.epoch == 0:
            self.samples += data_batch[0][:, 0].tolist()

    def after_train_iter(self, runner: Any, batch_idx: int) -> None:
        if runner.progress.is_last and runner.progress.epoch == 0:
            self.last = batch_idx

    def safe_point(self, runner: Any) -> None:
        if runner.progress.iter == self.stop_at:
            runner.stop("enough", now=True)


def train(folder: Path, size: int, stop_at: int | None, seeded: bool = True) -> dict[str, Any]:
    """Train for an epoch of 48 samples from where the run was, with batches of a size."""
    inputs = torch.zeros(48, 4)
    inputs[:, 0] = torch.arange(48)
    data = TensorDataset(inputs, torch.zeros(48, dtype=torch.long))
    seen = Seen(stop_at)
    saving = dict(type="checkpoint", every="1 iterations", allow=["world_size", "dataset"])
    runner = Runner(
        nn.Linear(4, 3),
        folder,
        train_dataloader=DataLoader(data, batch_size=size, shuffle=seeded),
        train_cfg=dict(max_epochs=1),
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.0)),
        loss=F.cross_entropy,
        plugins=[saving, seen, "no:progress_bar", *([] if seeded else ["no:seed"])],
        name="run",
        device="cpu",
        resume="auto",
    )
    torch.manual_seed(0)
    with runner:
        runner.train()
        length = runner.progress.epoch_length
        return {"samples": seen.samples, "last": seen.last, "length": length}


def test_each_sample_of_the_epoch_is_trained_once(tmp_path: Path) -> None:
    """Saved by two ranks and by one, continued by one, two or three, with other batches."""
    pairs = tmp_path / "pairs"
    ranks = on_ranks(2, train, pairs, 4, 3)
    before = [n for rank in ranks for n in rank["samples"]]
    assert len(before) == 24
    for world, size in [(1, 5), (3, 6)]:
        folder = tmp_path / f"{world}_{size}"
        shutil.copytree(pairs, folder, symlinks=True)
        ranks = on_ranks(world, train, folder, size, None)
        after = [n for rank in ranks for n in rank["samples"]]
        assert sorted(before + after) == [*range(48)]
        assert all(rank["last"] == rank["length"] - 1 for rank in ranks)

    alone = tmp_path / "alone"
    (rank,) = on_ranks(1, train, alone, 5, 5)
    before = rank["samples"]
    assert len(before) == 25  # which do not divide by two, nor by three
    for world, size in [(2, 8), (3, 16)]:
        folder = tmp_path / f"alone_{world}_{size}"
        shutil.copytree(alone, folder, symlinks=True)
        ranks = on_ranks(world, train, folder, size, None)
        after = [n for rank in ranks for n in rank["samples"]]
        assert sorted(before + after) == [*range(48)]

    folder = tmp_path / "repeated"  # one rank has used a batch more than the other
    shutil.copytree(alone, folder, symlinks=True)
    ranks = on_ranks(2, train, folder, 1, None)
    after = [n for rank in ranks for n in rank["samples"]]
    assert {*before, *after} == {*range(48)}
    assert len(before + after) == 49
    assert "1 samples are trained a second time" in (folder / "printed_0").read_text()


def test_without_the_seed_plugin(tmp_path: Path) -> None:
    before = [n for rank in on_ranks(2, train, tmp_path, 4, 3, False) for n in rank["samples"]]
    ranks = on_ranks(2, train, tmp_path, 5, None, False)
    after = [n for rank in ranks for n in rank["samples"]]
    assert sorted(before + after) == [*range(48)]

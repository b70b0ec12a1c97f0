"""Ranks whose Runner nothing refers to give it back, and train with another one."""

from __future__ import annotations

import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from hookengine import Runner
from tests.hookengine import leaks
from tests.ranks import on_ranks

pytestmark = pytest.mark.ranks


def train(folder: Path) -> weakref.ref[Any]:
    runner = Runner(
        nn.Linear(4, 3),
        folder,
        DataLoader(TensorDataset(torch.randn(16, 4), torch.arange(16) % 3), batch_size=4),
        train_cfg=dict(max_epochs=1),
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.1)),
        loss=nn.functional.cross_entropy,
        device="cpu",
    )
    runner.train()
    return weakref.ref(runner.bare_model)


def sweep(folder: Path) -> dict[str, Any]:
    gone = []
    for number in range(2):
        gone.append(train(folder / str(number)))
        leaks.collect()
    names = [thread.name for thread in threading.enumerate()]
    return {"left": sum(model() is not None for model in gone), "threads": names}


def test_nothing_is_left_of_the_runners_of_a_sweep(tmp_path: Path) -> None:
    for rank in on_ranks(2, sweep, tmp_path):
        assert rank["left"] == 0
        assert not {"watch of ranks", "sink", "checkpoint_0"} & {*rank["threads"]}

"""Averages of a sharded model with a low precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hookengine_checkpoint import export_weights
from torch import nn

from hookengine import Runner
from tests.ranks import on_ranks

pytestmark = pytest.mark.ranks


def train(folder: Path, epochs: int) -> dict[str, Any]:
    """Train a model in bfloat16 up to ``epochs``, from where an earlier run ended."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    batches = [
        (torch.randn(8, 4, generator=generator).bfloat16(), torch.arange(8) % 3) for _ in range(40)
    ]
    runner = Runner(
        nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3)).bfloat16(),
        folder,
        train_dataloader=batches,
        train_cfg=dict(max_epochs=epochs),
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.3)),
        loss=nn.functional.cross_entropy,
        plugins=[
            dict(type="distributed", strategy="fsdp"),
            dict(type="ema", momentum=0.002),
            "no:progress_bar",
        ],
        name="run",
        resume="auto",
        device="cpu",
    )
    with runner:
        runner.train()
        state = runner.state_dict()["ema_state_dict"]
        return {
            "sharded": hasattr(state["module.0.weight"], "to_local"),
            "averages": {n: getattr(v, "full_tensor", lambda v=v: v)() for n, v in state.items()},
        }


def test_they_are_precise_and_resumed_exactly(tmp_path: Path) -> None:
    straight = on_ranks(2, train, tmp_path / "straight", 4)[0]
    on_ranks(2, train, tmp_path / "cut", 2)
    run = tmp_path / "cut" / "run"
    path = export_weights(run, tmp_path / "ema.pth", "ema_state_dict")
    assert torch.load(path, weights_only=True)["0.weight"].dtype == torch.bfloat16
    cut = on_ranks(2, train, tmp_path / "cut", 4)[0]
    assert straight["sharded"]
    for name, value in straight["averages"].items():
        assert value.dtype == (torch.int64 if name == "steps" else torch.float32)
        assert torch.equal(cut["averages"][name], value), name

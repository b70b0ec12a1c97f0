"""A model that FSDP shards over real gloo ranks goes through torch.distributed.checkpoint."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as torch_dist
import torch.multiprocessing as mp
from torch import nn


def train(rank: int, world: int, port: int, folder: str, epochs: int, out: str) -> None:
    """Train a sharded model for some epochs in all, from where it was."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch_dist.init_process_group("gloo", rank=rank, world_size=world)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from hookengine import Plugin, Runner

    mesh = init_device_mesh("cpu", (world,))

    class Shard(Plugin):
        def wrap_model(self, model: nn.Module) -> nn.Module:
            fully_shard(model, mesh=mesh)
            return model

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 3))
    generator = torch.Generator().manual_seed(1)
    data = [
        (torch.randn(8, 6, generator=generator), torch.randint(3, (8,), generator=generator))
        for _ in range(4)
    ]
    runner = Runner(
        model,
        folder,
        train_dataloader=data,
        train_cfg=dict(max_epochs=epochs),
        optim_wrapper=dict(optimizer=dict(type="AdamW", lr=0.01)),
        loss=nn.functional.cross_entropy,
        plugins=[Shard(), dict(type="checkpoint", allow=["world_size"]), "no:progress_bar"],
        name="run",
        resume="auto",
        device="cpu",
    )
    runner.train()
    runner.close()
    weights = torch.cat([p.full_tensor().detach().flatten() for p in model.parameters()])
    states = runner.optim_wrapper.optimizer.state.values()
    moments = torch.cat([s["exp_avg"].full_tensor().flatten() for s in states])
    if rank == 0:
        torch.save([weights, moments], out)
    torch_dist.barrier()
    torch_dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads can abort a Python that finalizes: pytorch/pytorch#179291


def spawn(world: int, folder: Path, epochs: int) -> list[Any]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out = folder / "end.pth"
    folder.mkdir(exist_ok=True)
    mp.spawn(train, (world, port, str(folder), epochs, str(out)), nprocs=world)
    loaded: list[Any] = torch.load(out, weights_only=True)
    return loaded


@pytest.fixture(scope="module")
def straight(tmp_path_factory: Any) -> list[Any]:
    return spawn(2, tmp_path_factory.mktemp("straight"), 3)


def test_it_goes_on_bit_for_bit_and_at_another_number_of_ranks(
    tmp_path: Path, straight: list[Any]
) -> None:
    spawn(2, tmp_path / "two", 1)
    (saved,) = (tmp_path / "two" / "run" / "checkpoints").glob("epoch_*")
    files = {path.name for path in saved.iterdir()}
    assert files == {".metadata", "__0_0.distcp", "__1_0.distcp", "state.pth", "manifest.json"}
    rest = torch.load(saved / "state.pth", weights_only=True)
    assert rest["state_dict"]["0.weight"]["shape"] == [16, 6]  # in the shards, not here
    assert len(rest["ranks"]) == 2
    shutil.copytree(tmp_path / "two", tmp_path / "one", symlinks=True)
    for one, other in zip(spawn(2, tmp_path / "two", 3), straight, strict=True):
        assert torch.equal(one, other)
    for one, other in zip(spawn(1, tmp_path / "one", 3), straight, strict=True):
        assert one.shape == other.shape
        assert torch.isfinite(one).all()

"""Several real gloo ranks: sharded models, saves that fail on one rank, signals to one of them."""

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


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def spawn(world: int, folder: Path, epochs: int) -> list[Any]:
    out = folder / "end.pth"
    folder.mkdir(exist_ok=True)
    mp.spawn(train, (world, free_port(), str(folder), epochs, str(out)), nprocs=world)
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


def fail_to_save(rank: int, port: int, folder: str, fails_at: int) -> None:
    """Two ranks, of which the first one's disk is full for a while."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch_dist.init_process_group("gloo", rank=rank, world_size=2)
    import resource

    from hookengine import Runner

    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ballast = nn.Linear(4, 3)
    ballast.register_buffer("ballast", torch.randn(1 << 19))
    batch = torch.randn(4, 4), torch.zeros(4, dtype=torch.long)
    runner = Runner(
        ballast,
        folder,
        train_dataloader=[batch] * 2,
        train_cfg=dict(max_epochs=3),
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.1)),
        loss=nn.functional.cross_entropy,
        plugins=["no:progress_bar"],
        name="run",
        device="cpu",
    )

    @runner.on("before_train_epoch")
    def fill(runner: Any) -> None:
        full = runner.progress.epoch + 1 >= fails_at
        if rank == 0:
            runner.plugins["checkpoint"].wait(runner)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20 if full else hard, hard))

    try:
        runner.train()
        outcome = "trained"
    except OSError as error:
        outcome = "its last checkpoint could not be saved" * ("last checkpoint" in str(error))
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    Path(folder, f"outcome_{rank}").write_text(outcome)
    torch_dist.barrier()
    torch_dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)


def test_a_save_that_fails_on_one_rank_is_an_error_of_all(tmp_path: Path) -> None:
    mp.spawn(fail_to_save, (free_port(), str(tmp_path), 3), nprocs=2)
    outcomes = [(tmp_path / f"outcome_{rank}").read_text() for rank in range(2)]
    assert outcomes == ["its last checkpoint could not be saved"] * 2
    assert {p.name for p in (tmp_path / "run" / "checkpoints").glob("epoch_*")} == {"epoch_2"}


def end_by_signal(rank: int, port: int, folder: str) -> None:
    """Two ranks that agree at each safe point; the second one gets a signal."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch_dist.init_process_group("gloo", rank=rank, world_size=2)
    import signal

    from hookengine import Plugin, Runner

    class Agree(Plugin):
        def agree(self, requests: Any) -> dict[str, str]:
            everybody: list[Any] = [None, None]
            torch_dist.all_gather_object(everybody, dict(requests))
            return {key: text for one in everybody for key, text in one.items()}

    batch = torch.randn(4, 4), torch.zeros(4, dtype=torch.long)
    runner = Runner(
        nn.Linear(4, 3),
        folder,
        train_dataloader=[batch] * 4,
        train_cfg=dict(max_epochs=3),
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.1)),
        loss=nn.functional.cross_entropy,
        plugins=["no:progress_bar", Agree()],
        name="run",
        device="cpu",
    )

    @runner.on("after_train_iter")
    def kick(runner: Any) -> None:
        if rank == 1 and runner.progress.iter == 6:
            signal.raise_signal(signal.SIGTERM)

    code: Any = None
    try:
        runner.train()
    except SystemExit as end:
        code = end.code
    Path(folder, f"outcome_{rank}").write_text(f"{code} {runner.progress.iter}")
    torch_dist.barrier()
    torch_dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)


def test_a_signal_to_one_rank_ends_all_together(tmp_path: Path) -> None:
    mp.spawn(end_by_signal, (free_port(), str(tmp_path)), nprocs=2)
    assert [(tmp_path / f"outcome_{rank}").read_text() for rank in range(2)] == ["75 6"] * 2
    (saved,) = (tmp_path / "run" / "checkpoints").glob("iter_*")
    state = torch.load(saved / "state.pth", weights_only=True)
    assert (saved.name, len(state["ranks"])) == ("iter_6", 2)

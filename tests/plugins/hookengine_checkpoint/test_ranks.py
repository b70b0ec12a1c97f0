"""Several real gloo ranks: sharded models, saves that fail on one rank, signals to one of them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed as torch_dist
from hookengine_checkpoint import export_weights
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from hookengine.dist import get_rank
from hookengine.model import load_weights
from tests.ranks import on_ranks, spawn

pytestmark = pytest.mark.ranks


def train(folder: Path, epochs: int, options: dict[str, Any]) -> dict[str, Any]:
    """Train a sharded model for some epochs in all, from where it was."""
    from hookengine import Runner

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 3))
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(
        torch.randn(32, 6, generator=generator), torch.randint(3, (32,), generator=generator)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    runner = Runner(
        model,
        folder,
        train_dataloader=DataLoader(data, batch_size=4, shuffle=True),
        train_cfg=dict(max_epochs=epochs),
        optim_wrapper=optimizer,
        loss=nn.functional.cross_entropy,
        plugins=[
            dict(type="distributed", strategy="fsdp"),
            dict(type="checkpoint", allow=["world_size"]),
            dict(type="ema", momentum=0.1),
            "no:progress_bar",
        ],
        name="run",
        device="cpu",
        **options,
    )

    def whole(tensor: Any) -> Any:
        return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor

    def tensors() -> Any:
        moments = [s[name] for s in optimizer.state.values() for name in ("exp_avg", "step")]
        averages = [*runner.plugins["ema"].averaged.module.parameters()]
        found = [whole(t).detach().flatten() for t in (*model.parameters(), *averages, *moments)]
        return torch.cat(found).clone()

    with runner:
        begin = {"tensors": tensors(), "epoch": runner.progress.epoch}
        runner.train()
        return {"begin": begin, "end": tensors(), "sharded": hasattr(model[0].weight, "to_local")}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return on_ranks(2, train, tmp_path_factory.mktemp("straight"), 3, {})[0]["end"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A run of two ranks that ended after one epoch, and what it ended with."""
    folder = tmp_path_factory.mktemp("saved")
    return folder, on_ranks(2, train, folder, 1, {})[0]["end"]


def test_a_sharded_run_goes_on_bit_for_bit(
    tmp_path: Path, saved: tuple[Path, Any], straight: Any
) -> None:
    (checkpoint,) = (saved[0] / "run" / "checkpoints").glob("epoch_*")
    files = {path.name for path in checkpoint.iterdir()}
    assert files == {".metadata", "__0_0.distcp", "__1_0.distcp", "state.pth", "manifest.json"}
    rest = torch.load(checkpoint / "state.pth", weights_only=True)
    assert rest["state_dict"]["0.weight"]["shape"] == [16, 6]  # in the shards, not here
    assert len(rest["ranks"]) == 2
    shutil.copytree(saved[0], tmp_path, symlinks=True, dirs_exist_ok=True)
    for rank in on_ranks(2, train, tmp_path, 3, dict(resume="auto")):
        assert torch.equal(rank["begin"]["tensors"], saved[1])
        assert torch.equal(rank["end"], straight)
        assert rank["sharded"]


@pytest.mark.parametrize("world", [1, 4])
def test_it_goes_on_at_another_number_of_ranks(
    tmp_path: Path, saved: tuple[Path, Any], world: int
) -> None:
    shutil.copytree(saved[0], tmp_path, symlinks=True, dirs_exist_ok=True)
    for rank in on_ranks(world, train, tmp_path, 2, dict(resume="auto")):
        assert rank["begin"]["epoch"] == 1
        assert torch.equal(rank["begin"]["tensors"], saved[1])
        assert not torch.equal(rank["end"], saved[1])
        assert rank["sharded"] == (world > 1)


def test_a_run_of_one_process_goes_on_sharded(tmp_path: Path) -> None:
    alone = train(tmp_path, 1, {})
    assert not alone["sharded"]
    for rank in on_ranks(2, train, tmp_path, 2, dict(resume="auto")):
        assert rank["begin"]["epoch"] == 1
        assert torch.equal(rank["begin"]["tensors"], alone["end"])
        assert rank["sharded"]


def test_a_sharded_checkpoint_is_exported_and_begun_with(
    tmp_path: Path, saved: tuple[Path, Any]
) -> None:
    run = saved[0] / "run"
    out = tmp_path / "weights.safetensors"
    command = [sys.executable, "-m", "hookengine_checkpoint", str(run), str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    weights = safetensors.torch.load_file(out)
    names = ["0.weight", "0.bias", "3.weight", "3.bias"]
    assert torch.equal(torch.cat([weights[name].flatten() for name in names]), saved[1][:163])
    averages = export_weights(run, tmp_path / "ema.pth", "ema_state_dict")
    loaded = torch.load(averages, weights_only=True)
    kept = [loaded[name].flatten() for name in names]
    assert torch.equal(torch.cat(kept), saved[1][163:326])
    with pytest.raises(KeyError, match=r"has no 'swa_state_dict'.*ema_state_dict"):
        export_weights(run, out, "swa_state_dict")
    with pytest.raises(ValueError, match=r"not as 'weights\.bin'"):
        export_weights(run, tmp_path / "weights.bin")
    module: Any = nn.ModuleDict({"0": nn.Linear(6, 16), "3": nn.Linear(16, 3)})
    load_weights(module, run)  # in a single process, like the export
    assert torch.equal(module["0"].weight, weights["0.weight"])
    begun = train(tmp_path / "begun", 1, dict(load_from=run))["begin"]
    assert begun["epoch"] == 0
    assert torch.equal(begun["tensors"][:163], saved[1][:163])


def save_badly(folder: Path) -> dict[str, Any]:
    """Sharded saves: one that rank 0 cannot prepare, one with a weight that is not a number."""
    from hookengine import Plugin, Runner

    class Odd(Plugin):
        def state_dict(self) -> dict[str, Any]:
            return {"kept": kept}

        def load_state_dict(self, state: Any) -> None: ...

        def after_train_epoch(self, runner: Any) -> None:
            kept[0] = object() if runner.progress.epoch == 2 and get_rank() == 0 else 0
            if runner.progress.epoch == 4:
                with torch.no_grad():
                    model[1].weight.to_local()[-1, 0] = float("nan")  # each rank in its shard

    kept: list[Any] = [0]
    model = nn.Sequential(nn.Linear(6, 16), nn.Linear(16, 3))
    runner = Runner(
        model,
        folder,
        train_dataloader=[(torch.randn(8, 6), torch.zeros(8, dtype=torch.long))] * 2,
        train_cfg=dict(max_epochs=4),
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.1)),
        loss=nn.functional.cross_entropy,
        plugins=[dict(type="distributed", strategy="fsdp"), Odd(), "no:progress_bar"],
        name="run",
        device="cpu",
    )

    runner.train()
    checkpoint = runner.plugins["checkpoint"]
    names = sorted(path.name for path in (runner.run_dir / "checkpoints").glob("epoch_*"))
    runner.close()
    return {"names": names, "written": checkpoint.written}


def test_a_sharded_save_fails_on_all_ranks_and_tells_what_is_not_finite(tmp_path: Path) -> None:
    first, second = on_ranks(2, save_badly, tmp_path)
    assert first == second
    assert first["names"] == ["epoch_3", "epoch_4"]  # the last good one is kept
    folder = tmp_path / "run" / "checkpoints"
    manifest = json.loads((folder / "epoch_4" / "manifest.json").read_text())
    assert manifest["finite"] is False
    assert (folder / "latest").resolve().name == "epoch_3"
    log = (tmp_path / "run" / "run.log").read_text()
    assert "saving failed (the state" in log
    assert "the weights in epoch_4 are not finite (1.weight)" in log


def fill_the_disk(folder: Path, full: int) -> dict[str, Any]:
    """Sharded saves, while the files of one rank may not grow."""
    import resource

    from hookengine import Runner

    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    runner = Runner(
        nn.Sequential(nn.Linear(200, 400), nn.Linear(400, 3)),
        folder,
        train_dataloader=[(torch.randn(8, 200), torch.zeros(8, dtype=torch.long))] * 2,
        train_cfg=dict(max_epochs=4),
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.1)),
        loss=nn.functional.cross_entropy,
        plugins=[dict(type="distributed", strategy="fsdp"), "no:progress_bar"],
        name="run",
        device="cpu",
    )

    @runner.on("before_train_epoch")
    def limit(runner: Any) -> None:
        runner.plugins["checkpoint"].wait(runner)
        small = runner.progress.epoch == 1 and get_rank() == full
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14 if small else hard, hard))

    with runner:
        runner.train()
        checkpoints = runner.run_dir / "checkpoints"
        return {
            "epoch": runner.progress.epoch,
            "names": sorted(p.name for p in checkpoints.iterdir()),
        }


@pytest.mark.parametrize("full", [0, 1])
def test_a_full_disk_of_one_rank_does_not_end_sharded_training(tmp_path: Path, full: int) -> None:
    for rank in on_ranks(2, fill_the_disk, tmp_path, full):
        assert rank["epoch"] == 4
        assert "epoch_4" in rank["names"]
    assert "checkpoint: saving failed" in (tmp_path / "run" / "run.log").read_text()


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
    spawn(2, fail_to_save, tmp_path, str(tmp_path), 3)
    outcomes = [(tmp_path / f"outcome_{rank}").read_text() for rank in range(2)]
    assert outcomes == ["its last checkpoint could not be saved"] * 2
    assert {p.name for p in (tmp_path / "run" / "checkpoints").glob("epoch_*")} == {"epoch_2"}


def end_by_signal(rank: int, port: int, folder: str) -> None:
    """Two ranks, of which the second one gets a signal."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch_dist.init_process_group("gloo", rank=rank, world_size=2)
    import signal

    from hookengine import Runner

    batch = torch.randn(4, 4), torch.zeros(4, dtype=torch.long)
    runner = Runner(
        nn.Linear(4, 3),
        folder,
        train_dataloader=[batch] * 2000,
        train_cfg=dict(max_epochs=3),
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.1)),
        loss=nn.functional.cross_entropy,
        plugins=["no:progress_bar"],
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
    spawn(2, end_by_signal, tmp_path, str(tmp_path))
    first, second = ((tmp_path / f"outcome_{rank}").read_text() for rank in range(2))
    code, _, iteration = first.partition(" ")
    assert first == second
    assert code == "75"
    assert 6 <= int(iteration) < 1000  # within the epoch
    (saved,) = (tmp_path / "run" / "checkpoints").glob("iter_*")
    state = torch.load(saved / "state.pth", weights_only=True)
    assert (saved.name, len(state["ranks"])) == (f"iter_{iteration}", 2)

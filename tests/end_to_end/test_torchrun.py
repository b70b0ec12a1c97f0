"""The same script under torchrun: as it is; a rank fails, is killed, or loses its machine."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import forks
from tests.ranks import free_port, on_ranks

pytestmark = pytest.mark.ranks

ROOT = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]

JOB = """
import os, signal, sys
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from hookengine import Runner, dist

folder, epochs, kill_at, what = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
torch.set_num_threads(1)
data = TensorDataset(torch.randn(64, 6, generator=torch.Generator().manual_seed(0)),
                     torch.arange(64) % 3)
runner = Runner(
    lambda: nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.2), nn.Linear(8, 3)),
    folder,
    train_dataloader=DataLoader(data, batch_size=4, shuffle=True),
    train_cfg=dict(max_epochs=epochs),
    optim_wrapper=dict(optimizer=dict(type="AdamW", lr=0.01)),
    loss=nn.functional.cross_entropy,
    plugins=[dict(type="seed", seed=5), "no:progress_bar",
             dict(type="checkpoint", every="3 iterations", allow=["world_size"])],
    resume="auto",
    device="cpu",
)

@runner.on("after_train_iter")
def kill(runner):
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    if what == "kill" and attempt < 2 and runner.progress.iter == kill_at + 5 * attempt:
        if dist.get_rank() == attempt % 2:
            os.kill(os.getpid(), signal.SIGKILL)
    elif runner.progress.iter == kill_at:
        if what == "error" and dist.get_rank() == 1:
            raise LookupError("no such thing in batch 7")
        if what == "node" and os.environ["MACHINE"] == "lost":
            os.killpg(os.getpgid(os.getppid()), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)

runner.train()
weights = torch.cat([p.detach().flatten() for p in runner.bare_model.parameters()])
print(f"end of rank {dist.get_rank()} of {dist.get_world_size()}, iteration "
      f"{runner.progress.iter}: {weights.sum().item().hex()}", flush=True)
runner.close()
"""
EXAMPLE = """
import os, runpy, sys
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
END = """
sys.stdout.flush()
os._exit(0)  # gloo's threads can abort a Python that finalizes: pytorch/pytorch#179291
"""


def run(command: list[Any], timeout: float = 120, **options: Any) -> tuple[int, str]:
    """The exit code, and all that was printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        env=environment,
        **options,
    )
    return done.returncode, done.stdout


def run_job(folder: Path, *arguments: str) -> None:
    """Run the job on a rank that torchrun has not started."""
    os.environ["TORCHELASTIC_RESTART_COUNT"] = "0"
    sys.argv = ["job.py", *arguments]
    exec(JOB, {"__name__": "__main__"})


@pytest.fixture
def job(tmp_path: Path) -> Path:
    path = tmp_path / "job.py"
    path.write_text(JOB + END)
    return path


def ends(printed: str) -> list[str]:
    return sorted(
        re.findall(r"end of rank \d of \d, iteration \d+: -?0x[0-9a-f.]+p[-+]\d+", printed)
    )


def test_the_quickstart_on_two_processes_is_as_good_as_on_one(tmp_path: Path) -> None:
    example = ROOT / "examples" / "quickstart.py"
    alone = forks.run_file(example, str(tmp_path / "alone"))
    (tmp_path / "script.py").write_text(EXAMPLE + END)
    launcher = [*TORCHRUN, "--standalone", "--nproc-per-node=2", tmp_path / "script.py"]
    accuracies = []
    for code, printed in (
        (alone.returncode, alone.stdout + alone.stderr),
        run([*launcher, example, tmp_path / "ranks"]),
    ):
        assert code == 0, printed
        (table,) = re.findall(r"│ 8 +│ +\d+ +│ +([\d.]+) +│ +([\d.]+) %", printed)  # by one rank
        accuracies.append(float(table[1]))
    assert min(accuracies) > 98.5
    assert abs(accuracies[0] - accuracies[1]) <= 0.6  # two of 360 images


def test_an_error_of_one_rank_ends_all_and_is_named_by_all(tmp_path: Path, job: Path) -> None:
    launcher = [*TORCHRUN, "--standalone", "--nproc-per-node=2"]
    code, printed = run([*launcher, job, tmp_path / "work", 9, 7, "error"])
    assert code == 1
    assert ends(printed) == []
    first, second = re.findall(r"ERROR run ends with (.*)", printed)
    if first.startswith("RuntimeError"):
        first, second = second, first
    assert first.startswith("LookupError: no such thing in batch 7 (")
    assert "on rank 1 of 2" in first
    assert "rank 1: LookupError: no such thing in batch 7" in second  # the other's reason
    assert "on rank 0 of 2" in second


def test_ranks_killed_twice_are_started_again_and_end_where_they_would_have(
    tmp_path: Path, job: Path
) -> None:
    launcher = [*TORCHRUN, "--standalone", "--nproc-per-node=2", "--max-restarts=2"]
    on_ranks(2, run_job, tmp_path, str(tmp_path / "straight"), "2", "0", "nothing")
    straight = "".join((tmp_path / f"printed_{rank}").read_text() for rank in range(2))
    code, killed = run([*launcher, job, tmp_path / "killed", 2, 7, "kill"])
    assert code == 0, killed
    assert killed.count("resuming from") == 2
    assert ends(killed) == ends(straight)
    assert len(ends(killed)) == 2


@pytest.fixture
def two_machines() -> Iterator[list[tuple[list[str], str, dict[str, str]]]]:
    """Two machines: how to start something on each, its address, and its environment.

    They are network namespaces; where there can be none, both are on the loopback device.
    """
    names = [f"hook{os.getpid()}{letter}" for letter in "ab"]  # of a namespace and its device
    first, second = names
    commands = [f"ip netns add {name}" for name in names]
    commands.append(
        f"ip link add {first} netns {first} type veth peer name {second} netns {second}"
    )
    for number, name in enumerate(names, 1):
        commands.append(f"ip -n {name} addr add 10.213.7.{number}/24 dev {name}")
        commands += [f"ip -n {name} link set {device} up" for device in (name, "lo")]
    try:
        try:
            for command in commands:
                subprocess.run(command.split(), capture_output=True, check=True)
        except (FileNotFoundError, subprocess.CalledProcessError):
            yield [([], "127.0.0.1", {"GLOO_SOCKET_IFNAME": "lo"})] * 2
        else:
            yield [
                (["ip", "netns", "exec", n], f"10.213.7.{i}", {"GLOO_SOCKET_IFNAME": n})
                for i, n in enumerate(names, 1)
            ]
    finally:
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                subprocess.run(["ip", "netns", "del", name], capture_output=True)


def test_two_machines_of_which_one_is_lost(tmp_path: Path, job: Path, two_machines: Any) -> None:
    port = free_port()
    address = two_machines[0][1]
    started = []
    for (prefix, own, environment), name in zip(two_machines, ("kept", "lost"), strict=True):
        command = [
            *prefix,
            *TORCHRUN,
            "--nnodes=1:2",
            "--nproc-per-node=1",
            "--max-restarts=3",
            "--rdzv-id=job",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={address}:{port}",
            "--rdzv-conf=last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=3,"
            f"join_timeout=60,is_host={name == 'kept'}",
            f"--local-addr={own}",
            *map(str, (job, tmp_path / "work", 4, 11, "node")),
        ]
        environment = {**os.environ, **environment, "MACHINE": name, "PYTHONPATH": str(ROOT)}
        with (tmp_path / name).open("w") as out:
            process = subprocess.Popen(
                command,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**environment, "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )
        started.append(process)
    try:
        codes = [process.wait(timeout=120) for process in started]
    finally:
        for process in started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    kept, lost = ((tmp_path / name).read_text() for name in ("kept", "lost"))
    assert codes == [0, -signal.SIGKILL], kept + lost
    assert "2 ranks" in kept + lost  # they met
    assert "resuming from" in kept
    (end,) = ends(kept)
    assert end.startswith("end of rank 0 of 1")

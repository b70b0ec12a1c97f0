"""What works on a platform without the modules and functions that only POSIX has."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import os, pkgutil, signal, sys
import torch, torch.distributed, wandb, PIL.Image, rich.console, matplotlib  # they may use them
from torch.utils.tensorboard import SummaryWriter

for module in ("resource", "fcntl", "termios", "pwd", "grp", "tty", "pty"):
    sys.modules[module] = None
for name in ("SIGUSR1", "SIGUSR2", "SIGHUP", "pthread_sigmask"):
    if hasattr(signal, name):
        delattr(signal, name)
for name in ("fork", "nice", "getuid", "register_at_fork", "killpg", "sched_getaffinity"):
    if hasattr(os, name):
        delattr(os, name)

def refuse(*arguments, **options):
    raise OSError(1314, "a required privilege is not held by the client")

os.symlink = os.link = refuse

import hookengine
packages = [p.name for p in pkgutil.iter_modules() if p.name.split("_")[0] == "hookengine"]
for package in packages:
    __import__(package)
    for module in pkgutil.walk_packages(sys.modules[package].__path__, package + "."):
        if not module.name.endswith("__main__"):
            __import__(module.name)
assert len(packages) > 15

from tests.fixtures import Toy, ToyAccuracy, toy_data
from torch.utils.data import DataLoader

def run(**options):
    torch.manual_seed(0)
    return hookengine.Runner(
        Toy(),
        sys.argv[1],
        train_dataloader=DataLoader(toy_data(), batch_size=4),
        train_cfg=dict(max_epochs=2),
        val_dataloader=DataLoader(toy_data(), batch_size=4),
        val_evaluator=ToyAccuracy(),
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.1)),
        plugins=["tensorboard", "ema", dict(type="checkpoint", keep_best="accuracy")],
        name="run",
        **options,
    )

with run() as runner:
    runner.train()
with run(resume="auto") as again:
    assert again.progress.epoch == 2
records = list(hookengine.read_records(runner.run_dir))
assert {record.phase for record in records} == {"train", "val"}
assert not any("memory" in record.scalars for record in records)
"""


@pytest.mark.process
def test_a_run_needs_nothing_that_only_posix_has(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stdout + done.stderr

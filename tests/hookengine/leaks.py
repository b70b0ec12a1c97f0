"""What a process holds, for tests of what Runners give back."""

from __future__ import annotations

import gc
import multiprocessing
import os
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from hookengine import Runner
from hookengine.abandoned import wait_until_closed
from tests.fixtures import Toy, ToyAccuracy, toy_data

Gone = weakref.ref[Any]


def held() -> dict[str, list[str]]:
    """Return the names of the threads, files and child processes of this process."""
    files = []
    for number in os.listdir("/proc/self/fd"):
        try:
            files.append(os.readlink(f"/proc/self/fd/{number}"))
        except OSError:  # of the listing itself
            continue
    return {
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "files": sorted(file for file in files if not file.startswith("/proc/")),
        "processes": sorted(str(child.pid) for child in multiprocessing.active_children())
        + sorted(children()),
    }


def children() -> list[str]:
    """Return the numbers of all child processes."""
    lists = Path("/proc/self/task").glob("*/children")
    return [child for file in lists for child in file.read_text().split()]


def collect() -> None:
    """Collect garbage, and wait until the Runners that it held are closed."""
    gc.collect()
    wait_until_closed()
    gc.collect()


def abandon(folder: Path, use: Callable[[Runner], object] = Runner.train, **options: Any) -> Gone:
    """Use a Runner that nothing refers to afterwards, and return a weak reference to its model."""
    options.setdefault("train_dataloader", DataLoader(toy_data(), batch_size=4))
    options.setdefault("defaults", ())
    options.setdefault("optim_wrapper", dict(optimizer=dict(type="SGD", lr=0.1)))
    runner = Runner(
        options.pop("model", None) or Toy(),
        folder,
        train_cfg=dict(max_epochs=2),
        val_dataloader=DataLoader(toy_data(10, seed=1), batch_size=4),
        val_evaluator=ToyAccuracy(),
        test_dataloader=DataLoader(toy_data(10, seed=1), batch_size=4),
        test_evaluator=ToyAccuracy(),
        **options,
    )
    use(runner)
    return weakref.ref(runner.bare_model)

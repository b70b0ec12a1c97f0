"""Kill a run again and again, resume it each time, and compare its end with that of one left alone.

    python tests/soak/killing.py --kills 200                # at moments and by the clock
    python tests/soak/killing.py --kills 200 --workers 2

The run has dropout, random augmentation, AMP in float16, accumulation, clipping, an average, a
schedule and keep_best. Each attempt is a process of its own, forked from one that has imported
torch already, and is killed by SIGKILL: at the n-th call of some hook, at the n-th file operation
of a save (seen by an audit hook), or, with ``--clock``, after a random time.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from hookengine import BaseMetric, BaseModel, Plugin, Runner

TIMES = ("time", "data_time", "samples_per_second", "memory", "eta", "seconds", "timestamp")
FILE_OPERATIONS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink")


class Digits(Dataset[Any]):
    """Random vectors with augmentation out of all three random states."""

    def __init__(self, samples: int) -> None:
        generator = torch.Generator().manual_seed(samples)
        self.inputs = torch.randn(samples, 8, generator=generator)
        self.labels = (self.inputs[:, 0] > 0).long()

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        noise = torch.randn(8) * 0.1 + random.random() * 0.1 + float(np.random.rand()) * 0.1
        return self.inputs[index] + noise, self.labels[index], index


class Classifier(BaseModel):
    """With dropout and batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 2)
        )

    def forward(self, inputs: Tensor, labels: Tensor, index: Tensor, mode: str) -> Any:
        scores = self.net(inputs)
        if mode == "loss":
            return {"loss": nn.functional.cross_entropy(scores, labels)}
        return scores, labels


class Accuracy(BaseMetric):
    """Share of right predictions."""

    def process(self, data_batch: Any, data_samples: Any) -> None:
        scores, labels = data_samples
        self.results.append(((scores.argmax(1) == labels).sum().item(), len(labels)))

    def compute_metrics(self, results: list[Any]) -> dict[str, Any]:
        return {"accuracy": sum(r[0] for r in results) / sum(r[1] for r in results)}


class Order(Plugin):
    """Keeps the order of the samples; changes in the last hook before a save."""

    def __post_init__(self) -> None:
        self.seen: list[int] = []

    def after_train_iter(self, data_batch: Any) -> None:
        self.seen += data_batch[2].tolist()

    def state_dict(self) -> dict[str, Any]:
        return {"seen": list(self.seen)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = list(state["seen"])


def build(folder: Path, workers: int) -> Runner:
    """The run, which goes on where there is something to go on from."""
    options: dict[str, Any] = dict(batch_size=4, num_workers=workers)
    return Runner(
        Classifier,
        folder,
        train_dataloader=DataLoader(Digits(44), shuffle=True, **options),
        train_cfg=dict(max_epochs=4),
        optim_wrapper=dict(optimizer=dict(type="AdamW", lr=0.01)),
        val_dataloader=DataLoader(Digits(12), **options),
        val_cfg=dict(loss=True),
        val_evaluator=Accuracy(),
        plugins=[
            dict(type="seed", seed=5),
            dict(type="logging", interval=4),
            dict(type="checkpoint", every="4 iterations", keep_best="accuracy", keep_last=2),
            dict(type="amp", dtype="float16", growth_interval=3),
            dict(type="accumulate", steps=3),
            dict(type="clip", max_norm=1.0),
            dict(type="ema", momentum=0.1, evaluate="both"),
            dict(type="schedule", scheduler="CosineAnnealingLR", by_epoch=False),
            Order(),
            "no:progress_bar",
        ],
        name="run",
        resume="auto",
    )


class Moments:
    """Counts hook calls and file operations, and kills the process at one of them.

    Args:
        label: An event, or a file operation; None to count only.
        number: At which of them.
    """

    def __init__(self, label: str | None, number: int) -> None:
        self.label = label
        self.left = number
        self.counts: collections.Counter[str] = collections.Counter()
        sys.addaudithook(self._audit)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in FILE_OPERATIONS and "checkpoints" in str(arguments[0]):
            self.reach(event)

    def observe(self, event: str, implementation: Any, call: Callable[..., Any]) -> Any:
        """An observer of the plugin manager: before each call of an implementation."""

        def counted(*arguments: Any) -> Any:
            self.reach(event)
            return call(*arguments)

        return counted

    def reach(self, label: str) -> None:
        """Come to a moment."""
        self.counts[label] += 1
        if label == self.label:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)


def attempt(folder: Path, workers: int, label: str | None, number: int) -> None:
    """Run until the end or the moment; leaves the final state in ``final.pth``."""
    moments = Moments(label, number)
    with build(folder, workers) as runner:
        runner.plugins.observe(moments.observe)
        runner.train()
        state = runner.state_dict()
        state["plugins"].pop("logging")  # its clocks
        torch.save(state, folder / "final.pth")
    (folder / "moments.json").write_text(json.dumps(moments.counts))


def in_child(call: Callable[[], None], folder: Path, kill_after: float | None = None) -> int:
    """Run ``call`` in a forked process; returns its status as ``os.waitpid`` does."""
    pid = os.fork()
    if pid == 0:
        for stream, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        code = 1
        try:
            call()
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1]


def differences(one: Any, other: Any, path: str = "") -> list[str]:
    """Where two states differ, in the last bit."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        same = one.dtype == other.dtype and torch.equal(one, other)
        return [] if same else [path]
    if isinstance(one, dict) and isinstance(other, dict):
        if one.keys() != other.keys():
            return [f"{path}: {one.keys() ^ other.keys()}"]
        return [d for key in one for d in differences(one[key], other[key], f"{path}/{key}")]
    if isinstance(one, (list, tuple)) and len(one) != len(other):
        return [f"{path}: {len(one)} and {len(other)} items"]
    if isinstance(one, (list, tuple)):
        pairs = enumerate(zip(one, other, strict=True))
        return [d for i, (a, b) in pairs for d in differences(a, b, f"{path}/{i}")]
    return [] if one == other else [f"{path}: {one} != {other}"]


def history(folder: Path) -> list[dict[str, Any]]:
    """The records of a run, times aside."""
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def compare(reference: Path, folder: Path) -> list[str]:
    """What differs between the ends of two runs: state and records."""
    states = [torch.load(f / "final.pth", weights_only=True) for f in (reference, folder)]
    return differences(*states) + differences(history(reference), history(folder), "metrics.jsonl")


def campaign(kills: int, workers: int, seed: int, clock: bool = False) -> collections.Counter[str]:
    """Kill so many times; every run that comes to its end is compared.

    Returns:
        How often it was killed at what.

    Raises:
        AssertionError: an end differs, or a process ended by itself before it.
    """
    choice = random.Random(seed)
    killed: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as name:
        reference = Path(name) / "reference"
        reference.mkdir()
        start = time.perf_counter()
        assert in_child(lambda: attempt(reference, workers, None, 0), reference) == 0
        duration = time.perf_counter() - start
        counts: dict[str, int] = json.loads((reference / "moments.json").read_text())
        labels = sorted(counts)
        ended = 0
        folder = Path(name) / f"run{ended}"
        folder.mkdir()
        done = False
        while not (done and killed.total() >= kills):
            done = False
            label: str | None = None
            number, wait = 0, None
            if killed.total() < kills and clock:
                label, wait = None, choice.uniform(0, 0.6 * duration)
            elif killed.total() < kills:
                label = labels[killed.total() % len(labels)]
                number = choice.randint(1, max(1, counts[label] // 3))
            status = in_child(lambda: attempt(folder, workers, label, number), folder, wait)  # noqa: B023
            if status == signal.SIGKILL:
                killed[label or "the clock"] += 1
                continue
            assert status == 0, f"status {status}:\n{(folder / 'stderr').read_text()}"
            found = compare(reference, folder)
            assert not found, f"after kills at {killed}: {found}"
            shutil.rmtree(folder)
            ended, done = ended + 1, True
            folder = Path(name) / f"run{ended}"
            folder.mkdir()
    killed["runs that came to their end"] = ended
    return killed


def main() -> None:
    """Kill as often as was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--clock", action="store_true", help="at random times instead of moments")
    options = parser.parse_args()
    torch.set_num_threads(1)
    killed = campaign(options.kills, options.workers, options.seed, options.clock)
    for label, number in sorted(killed.items()):
        print(f"{number:5}  {label}")


if __name__ == "__main__":
    main()

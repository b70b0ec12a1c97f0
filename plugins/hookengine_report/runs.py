"""A run, read off its folder."""

from __future__ import annotations

import json
import math
from array import array
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hookengine import Histogram, Image, Record, Table, read_records

Medium = Image | Histogram | Table | str


@dataclass
class Curve:
    """One scalar over the iterations, as it was logged; NaN and infinities included."""

    iterations: array[float] = field(default_factory=lambda: array("d"))
    values: array[float] = field(default_factory=lambda: array("d"))

    def add(self, iteration: float, value: float) -> None:
        """Put one value at the end."""
        self.iterations.append(iteration)
        self.values.append(value)

    @property
    def last(self) -> float:
        """The last value."""
        return self.values[-1]


@dataclass
class Run:
    """What is known of a run.

    Attributes:
        folder: Where it lies.
        info: The content of ``run.json``; empty where there is none.
        curves: By phase and name.
        epoch_ends: The last iteration of each epoch that has a record.
        media: The last image, histogram, table or text of each name and phase, with its iteration.
        checkpoints: The manifests behind ``best`` and ``latest``, where there are any.
        first: When the first record was made, in seconds since 1970; NaN without records.
        latest: When the last one was made.
        name: What it is called in the report.
    """

    folder: Path
    info: Mapping[str, Any]
    curves: dict[tuple[str, str], Curve] = field(default_factory=dict)
    epoch_ends: dict[int, int] = field(default_factory=dict)
    media: dict[tuple[str, str], tuple[int, Medium]] = field(default_factory=dict)
    checkpoints: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    first: float = math.nan
    latest: float = math.nan
    name: str = ""

    def phase(self, phase: str) -> dict[str, Curve]:
        """The curves of a phase, by name, in the order in which they were logged."""
        return {name: curve for (own, name), curve in self.curves.items() if own == phase}

    def section(self, name: str) -> dict[str, Any]:
        """A mapping in ``run.json``; empty where there is none."""
        value = self.info.get(name)
        return value if isinstance(value, dict) else {}

    @property
    def status(self) -> str:
        """``running``, ``finished``, ``stopped: why`` or ``failed: why``; or ``unknown``."""
        return str(self.info.get("status", "unknown"))

    @property
    def by_epoch(self) -> bool:
        """Whether its limit is a number of epochs."""
        return self.section("train_cfg").get("max_epochs") is not None

    @property
    def iterations(self) -> int:
        """The last iteration that has a record."""
        return max(self.epoch_ends.values(), default=0)

    def epoch_of(self, iteration: float) -> int:
        """The epoch that an iteration belongs to."""
        later = (epoch for epoch, end in self.epoch_ends.items() if end >= iteration)
        return min(later, default=max(self.epoch_ends, default=0))

    def time(self, name: str) -> float:
        """``started`` or ``ended``, in seconds since 1970; NaN where it is not known."""
        value = self.info.get(name)
        try:
            return float(value) if isinstance(value, (int, float)) else math.nan
        except OverflowError:
            return math.nan


def is_run(folder: Path) -> bool:
    """Whether a folder holds what a run leaves."""
    return any((folder / name).is_file() for name in ("metrics.jsonl", "run.json"))


def find_runs(path: str | Path, every: bool = False) -> list[Path]:
    """The run in a folder: itself, or the newest one of a ``work_dir``.

    Args:
        path: The folder of a run, or a ``work_dir``.
        every: All runs of a ``work_dir``, oldest first.

    Raises:
        FileNotFoundError: there is none.
    """
    path = Path(path)
    if is_run(path):
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is no folder: give that of a run, or a work_dir")
    found = sorted(filter(is_run, path.iterdir()), key=_written)
    if not found:
        raise FileNotFoundError(
            f"{path} is neither the folder of a run (with a metrics.jsonl or run.json) nor one of "
            "runs"
        )
    return found if every else found[-1:]


def _written(folder: Path) -> tuple[float, str]:
    files = (folder / "metrics.jsonl", folder / "run.json")
    return max(file.stat().st_mtime for file in files if file.is_file()), folder.name


def read_run(folder: str | Path) -> Run:
    """Read a run; files that are missing or damaged are left out.

    Raises:
        FileNotFoundError: the folder has neither metrics.jsonl nor run.json.
    """
    folder = Path(folder)
    if not is_run(folder):
        raise FileNotFoundError(
            f"there is no run to draw in {folder}: it needs the metrics.jsonl and run.json that "
            "the plugin 'logging' writes"
        )
    info = dict(_mapping(folder / "run.json"))
    if "ranks" in info:  # what runs before 0.1 called it
        info.setdefault("world_size", info.pop("ranks"))
    run = Run(folder, info, name=str(info.get("name") or folder.resolve().name))
    if (folder / "metrics.jsonl").is_file():
        for record in read_records(folder):
            _add(run, record)
    for name in ("best", "latest"):
        if manifest := _mapping(folder / "checkpoints" / name / "manifest.json"):
            run.checkpoints[name] = manifest
    return run


def distinguished(runs: list[Run]) -> list[Run]:
    """Runs of the same name get that of the folder above before it, or a number behind it."""
    names = Counter(run.name for run in runs)
    for run in runs:
        if names[run.name] > 1:
            run.name = f"{run.folder.resolve().parent.name}/{run.name}"
    seen: Counter[str] = Counter()
    for run in runs:
        seen[run.name] += 1
        run.name += f" ({seen[run.name]})" * (seen[run.name] > 1)
    return runs


def _add(run: Run, record: Record) -> None:
    if record.phase not in ("train", "val", "test"):
        return
    for name, value in record.scalars.items():
        curve = run.curves.get((record.phase, name))
        if curve is None:
            curve = run.curves[record.phase, name] = Curve()
        curve.add(record.iter, value)
    for name, medium in record.media.items():
        run.media[record.phase, name] = record.iter, medium
    run.epoch_ends[record.epoch] = max(record.iter, run.epoch_ends.get(record.epoch, 0))
    if math.isnan(run.first):
        run.first = record.timestamp
    run.latest = record.timestamp


def _mapping(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}

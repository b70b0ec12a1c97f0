"""A run, read from its folder."""

from __future__ import annotations

import json
import math
from array import array
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hookengine import Histogram, Image, Record, RunFolder, Table, read_records

Medium = Image | Histogram | Table | str


@dataclass
class Curve:
    """One scalar over the iterations, as it was logged, including NaN and infinities."""

    iterations: array[float] = field(default_factory=lambda: array("d"))
    values: array[float] = field(default_factory=lambda: array("d"))

    def add(self, iteration: float, value: float) -> None:
        """Append a value."""
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
        folder: The folder of the run.
        info: The content of ``run.json``; empty if there is none.
        curves: The curves by phase and name.
        epoch_ends: The last iteration of each epoch that has a record.
        media: The last image, histogram, table or text of each name and phase, with its iteration.
        checkpoints: The manifests behind ``best`` and ``latest``, if they exist.
        first: The time of the first record, in seconds since 1970; NaN without records.
        latest: The time of the last record.
        name: The name of the run in the report.
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
        """Return the curves of a phase by name, in the order in which they were logged."""
        return {name: curve for (own, name), curve in self.curves.items() if own == phase}

    def section(self, name: str) -> dict[str, Any]:
        """Return a mapping in ``run.json``, or an empty one if it is missing."""
        value = self.info.get(name)
        return value if isinstance(value, dict) else {}

    @property
    def status(self) -> str:
        """``running``, ``finished``, ``stopped: why`` or ``failed: why``; or ``unknown``."""
        return str(self.info.get("status", "unknown"))

    @property
    def by_epoch(self) -> bool:
        """Whether the limit of the run is a number of epochs."""
        return self.section("train_cfg").get("max_epochs") is not None

    @property
    def iterations(self) -> int:
        """The last iteration that has a record."""
        return max(self.epoch_ends.values(), default=0)

    def epoch_of(self, iteration: float) -> int:
        """Return the epoch that an iteration belongs to."""
        later = (epoch for epoch, end in self.epoch_ends.items() if end >= iteration)
        return min(later, default=max(self.epoch_ends, default=0))

    def time(self, name: str) -> float:
        """Return ``started`` or ``ended`` in seconds since 1970, or NaN if it is unknown."""
        value = self.info.get(name)
        try:
            return float(value) if isinstance(value, (int, float)) else math.nan
        except OverflowError:
            return math.nan


def is_run(folder: Path) -> bool:
    """Return whether a folder holds the files of a run."""
    return any(file.is_file() for file in _files(RunFolder(folder)))


def _files(folder: RunFolder) -> tuple[Path, Path]:
    return folder.metrics, folder.description


def find_runs(path: str | Path, every: bool = False) -> list[Path]:
    """Find the run in a folder: the folder itself, or the newest run of a ``work_dir``.

    Args:
        path: The folder of a run, or a ``work_dir``.
        every: Whether to return all runs of a ``work_dir``, oldest first.

    Raises:
        FileNotFoundError: The folder does not exist or holds no run.
    """
    path = Path(path).expanduser()
    if is_run(path):
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is not a folder. Pass the folder of a run, or a work_dir")
    found = sorted(filter(is_run, path.iterdir()), key=_written)
    if not found:
        raise FileNotFoundError(
            f"{path} is neither the folder of a run (with metrics.jsonl or run.json) nor a folder "
            "of runs"
        )
    return found if every else found[-1:]


def _written(folder: Path) -> tuple[float, str]:
    files = _files(RunFolder(folder))
    return max(file.stat().st_mtime for file in files if file.is_file()), folder.name


def read_run(folder: str | Path) -> Run:
    """Read a run; skip files that are missing or damaged.

    Raises:
        FileNotFoundError: The folder has neither metrics.jsonl nor run.json.
    """
    folder = Path(folder).expanduser()
    if not is_run(folder):
        raise FileNotFoundError(
            f"{folder} holds no run to draw. It needs the metrics.jsonl or run.json that the "
            "plugin 'logging' writes"
        )
    files = RunFolder(folder)
    info = dict(_mapping(files.description))
    if "ranks" in info:  # its name in runs before 0.1
        info.setdefault("world_size", info.pop("ranks"))
    run = Run(folder, info, name=str(info.get("name") or folder.resolve().name))
    if files.metrics.is_file():
        for record in read_records(folder):
            _add(run, record)
    for name in ("best", "latest"):
        if manifest := _mapping(files.manifest(files.checkpoints / name)):
            run.checkpoints[name] = manifest
    return run


def distinguished(runs: list[Run]) -> list[Run]:
    """Make names of runs unique, by the parent folder before them or a number after them."""
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

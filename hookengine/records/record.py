"""Records: what sinks write, and the lines of ``metrics.jsonl`` that store them."""

from __future__ import annotations

import json
import math
import re
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hookengine.records.media import Histogram, Image, Medium, Table
from hookengine.records.run_folder import RunFolder, absolute_path

_FIELDS = frozenset(("phase", "epoch", "iter", "step", "timestamp", "media"))
_OWN = re.compile(f"(value/)*({'|'.join(sorted(_FIELDS))})")
"""Match the field names of a record, and the same names escaped with ``value/`` prefixes."""

MEASURED = frozenset(("time", "data_time", "samples_per_second", "memory", "eta", "seconds"))
"""Values that are measured: they differ whenever a run is repeated."""


@dataclass(frozen=True, slots=True)
class Record:
    """One line of a run's history, after averaging. Every sink receives it.

    Attributes:
        phase: ``train``, ``val`` or ``test``.
        epoch: The epoch of the last iteration, counted from 1.
        iter: Finished iterations.
        step: Optimizer steps taken.
        scalars: Python floats by name, including NaN and infinities.
        media: Images, histograms, tables and texts by name.
        timestamp: When the record was made, in seconds since 1970, or NaN if that is unknown.
    """

    phase: str
    epoch: int
    iter: int
    step: int
    scalars: Mapping[str, float]
    media: Mapping[str, Medium] = field(default_factory=dict)
    timestamp: float = field(default_factory=time.time)

    def repeats(self, other: Record) -> bool:
        """Return whether this is ``other`` again: the same but for times and other measurements."""
        if _place(self) != _place(other) or self.media.keys() != other.media.keys():
            return False
        names = self.scalars.keys() - MEASURED
        return (
            names == other.scalars.keys() - MEASURED
            and all(_same(self.scalars[name], other.scalars[name]) for name in names)
            and all(
                _content(one) == _content(other.media[name]) for name, one in self.media.items()
            )
        )

    def digest(self) -> int:
        """Return a number that is the same for records with the same values, times aside."""
        values = sorted((n, str(v)) for n, v in self.scalars.items() if n not in MEASURED)
        return zlib.crc32(json.dumps([*_place(self), values]).encode())

    def to_line(self, image_files: Mapping[str, str]) -> str:
        """Return the record as one line of JSON, without the newline.

        Numbers that JSON cannot represent are written as strings: ``"nan"``, ``"inf"`` or
        ``"-inf"``. A value with the same name as a field of the record is written as
        ``"value/NAME"``.

        Args:
            image_files: The path of each image by name, relative to the file that will hold the
                line. An image without a path is left out.
        """
        fields: dict[str, Any] = {
            "phase": self.phase,
            "epoch": self.epoch,
            "iter": self.iter,
            "step": self.step,
        }
        if not math.isnan(self.timestamp):
            fields["timestamp"] = round(self.timestamp, 3)
        for name, value in self.scalars.items():
            taken = name in _FIELDS or (name.startswith("value/") and _OWN.fullmatch(name))
            key = f"value/{name}" if taken else name
            fields[key] = value if math.isfinite(value) else str(value)
        if self.media:
            packed = {name: _pack(one, image_files.get(name)) for name, one in self.media.items()}
            fields["media"] = {name: one for name, one in packed.items() if one is not None}
        return json.dumps(fields)

    @classmethod
    def from_line(cls, line: str | bytes, folder: Path) -> Record:
        """Return the record stored in a line of JSON.

        Args:
            line: A line written by ``to_line``.
            folder: The folder of the file that holds the line. Missing images are left out.

        Raises:
            ValueError: If ``line`` does not hold a record.
        """
        try:
            fields = json.loads(line)
            counters = (fields.pop(name) for name in ("phase", "epoch", "iter", "step"))
            phase, epoch, iteration, step = counters
            timestamp = float(fields.pop("timestamp", math.nan))
            packed = fields.pop("media", {})
            media = {name: _unpack(one, folder) for name, one in packed.items()}
            scalars = {_plain(name): float(value) for name, value in fields.items()}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not a record: {line[:80]!r} ({error})") from error
        there = {name: one for name, one in media.items() if one is not None}
        return cls(phase, epoch, iteration, step, scalars, there, timestamp)


@dataclass(frozen=True)
class RecordHistory:
    """The history that a resumed run continues: what the event ``history`` returns.

    Iterating over it yields the records that still belong to the run.

    Attributes:
        kept: The records up to where the run resumes, oldest first. Each iteration starts over.
        later: The records after that, which training cuts off. It may repeat them exactly.
        path: The file that holds every record of the run, which messages name; None if no file
            holds all of them.
    """

    kept: Iterable[Record]
    later: Sequence[Record] = ()
    path: Path | None = None

    def __iter__(self) -> Iterator[Record]:
        return iter(self.kept)


def read_records(run_dir: str | Path) -> Iterator[Record]:
    """Yield the records in a run's ``metrics.jsonl``, oldest first, one at a time.

    Incomplete lines, such as one that a killed run cut short, are skipped.

    Args:
        run_dir: The folder of the run, ``runner.run_dir``.

    Raises:
        FileNotFoundError: If the folder has no ``metrics.jsonl``.
    """
    path = RunFolder(absolute_path(run_dir)).metrics
    with path.open("rb") as file:
        for line in file:
            try:
                record = Record.from_line(line, path.parent)
            except ValueError:
                continue
            yield record


def _place(record: Record) -> tuple[str, int, int, int]:
    return record.phase, record.epoch, record.iter, record.step


def _same(one: float, other: float) -> bool:
    return one == other or (math.isnan(one) and math.isnan(other))


def _content(medium: Medium) -> Any:
    return medium.png if isinstance(medium, Image) else _pack(medium, None)


def _plain(name: str) -> str:
    return name.removeprefix("value/") if _OWN.fullmatch(name) else name


def _pack(medium: Medium, file: str | None) -> dict[str, Any] | None:
    if isinstance(medium, Image):
        if file is None:
            return None
        caption = {} if medium.caption is None else {"caption": medium.caption}
        return {"image": file, **caption}
    if isinstance(medium, Histogram):
        return {"histogram": {"counts": medium.counts, "edges": medium.edges}}
    if isinstance(medium, Table):
        rows = [[_json_cell(cell) for cell in row] for row in medium.rows]
        return {"table": {"columns": medium.columns, "rows": rows}}
    return {"text": medium}


def _json_cell(cell: Any) -> Any:
    return str(cell) if isinstance(cell, float) and not math.isfinite(cell) else cell


def _unpack(packed: Mapping[str, Any], folder: Path) -> Medium | None:
    if "image" in packed:
        path = (folder / packed["image"]).resolve()
        if not path.is_relative_to(folder.resolve()) or not path.is_file():
            return None
        return Image.from_file(path, packed.get("caption"))
    if "histogram" in packed:
        return Histogram.counted(packed["histogram"]["counts"], packed["histogram"]["edges"])
    if "table" in packed:
        return Table(packed["table"]["columns"], packed["table"]["rows"])
    return str(packed["text"])


def check_logged(values: Any, phase: Any) -> None:
    """Check the arguments of ``runner.log``.

    Raises:
        TypeError: ``values`` is not a dict.
        ValueError: ``phase`` is no phase.
    """
    if not isinstance(values, Mapping):
        raise TypeError(
            "runner.log takes a dict of values by name, as in runner.log({'loss': 0.5}), got "
            f"{values!r}"
        )
    if phase not in ("train", "val", "test"):
        raise ValueError(f"phase must be 'train', 'val' or 'test', got {phase!r}")

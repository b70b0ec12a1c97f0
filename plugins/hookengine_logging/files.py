"""``metrics.jsonl``: the complete local history of a run."""

from __future__ import annotations

import json
import math
import os
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any

from hookengine import Record


class MetricsFile:
    """Records as JSON lines, each in the file before the next event.

    Where the disk fails, training goes on: what could not be written is kept, said once, and
    tried again with the next record. A number that JSON does not have is written as a string,
    ``"nan"``, ``"inf"`` or ``"-inf"``; a value that has the name of one of the record's own fields
    is written as ``"value/NAME"``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: FileIO | None = None
        self._end = 0
        self._waiting: list[bytes] = []
        self._warned = False
        self._closed = False
        self.count = len(self._whole_lines())
        """How many records it holds, those included that wait to be written."""

    def begin(self) -> Path | None:
        """Begin the history of a run in a folder that may hold that of another.

        Returns:
            Where the records of another run are now, or None where there are none.
        """
        if not self.path.exists() or self.path.stat().st_size == 0:
            return None
        number = 1
        while (aside := self.path.with_name(f"metrics_{number}.jsonl")).exists():
            number += 1
        self.path.rename(aside)
        self.count = 0
        return aside

    def append(self, record: Record, logger: Any) -> None:
        """Write one record."""
        fields = {
            "phase": record.phase,
            "epoch": record.epoch,
            "iter": record.iter,
            "step": record.step,
        }
        for name, value in record.scalars.items():
            key = f"value/{name}" if name in fields else name
            fields[key] = value if math.isfinite(value) else str(value)
        self._waiting.append(json.dumps(fields).encode() + b"\n")
        self.count += 1
        if not self._closed:
            self._write(logger)

    def _write(self, logger: Any) -> None:
        try:
            if self._file is None:
                self._open()
            while self._waiting:
                self._write_whole(self._waiting[0])
                self._waiting.pop(0)
        except OSError as error:
            self._drop_partial_line()
            if not self._warned:
                self._warned = True
                logger.warning(
                    f"cannot write {self.path}: {error.strerror}. Training goes on; make room or "
                    "mend the folder: what is missing is kept and written with the next record"
                )

    def _open(self) -> None:
        self._file = FileIO(self.path, "a+")
        self._end = self._file.seek(0, os.SEEK_END)
        if self._end:  # a kill may have left half a line
            self._file.seek(-1, os.SEEK_END)
            if self._file.read(1) != b"\n":
                self._write_whole(b"\n")

    def _write_whole(self, line: bytes) -> None:
        if self._file is None:
            raise OSError(f"{self.path} is not open")
        written = 0
        while written < len(line):
            written += self._file.write(line[written:])
        self._end += len(line)

    def _drop_partial_line(self) -> None:
        if self._file is not None:
            with suppress(OSError):
                self._file.truncate(self._end)
            self._close_file()

    def mend(self) -> None:
        """Drop a line that a kill has cut short."""
        if self.path.exists() and len(self.path.read_bytes().splitlines()) > self.count:
            self._rewrite(self._whole_lines())

    def drop(self, count: int, phase: str, iteration: int) -> None:
        """Drop the records of a phase and an iteration, after the first ``count`` of all."""

        def stays(number: int, line: bytes) -> bool:
            record = json.loads(line)
            again = record["phase"] == phase and record["iter"] == iteration
            return number < count or not again

        lines = self._whole_lines()
        kept = [line for number, line in enumerate(lines) if stays(number, line)]
        if len(kept) < len(lines):
            self._rewrite(kept)

    def cut_back(self, count: int) -> None:
        """Keep the first records, up to where a resumed run goes on; it repeats the later ones.

        Args:
            count: How many.
        """
        self._waiting.clear()
        if self.path.exists():
            self._rewrite(self._whole_lines()[:count])

    def _whole_lines(self) -> list[bytes]:
        lines = self.path.read_bytes().splitlines() if self.path.exists() else []
        return [line for line in lines if _is_whole(line)]

    def _rewrite(self, lines: list[bytes]) -> None:
        self._close_file()
        self.count = len(lines) + len(self._waiting)
        temporary = self.path.with_suffix(".tmp")
        with temporary.open("wb") as file:
            file.writelines(line + b"\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path)

    def close(self, logger: Any) -> None:
        """Write what waits, and close for good."""
        if self._waiting:
            self._write(logger)
        if self._waiting:
            logger.error(f"{len(self._waiting)} records could not be written to {self.path}")
        self._close_file()
        self._closed = True

    def _close_file(self) -> None:
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
            self._file = None


def _is_whole(line: bytes) -> bool:
    """Whether it is a record; a kill may have cut one short."""
    try:
        json.loads(line)
    except ValueError:
        return False
    return True

"""``metrics.jsonl``: the records of a run, one JSON object per line."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any

from hookengine import Image, Record, keep_open
from hookengine_logging.images import ImageFolder


class MetricsFile:
    """Write each record to the file before the next event.

    If the disk fails, training continues: records that cannot be written are kept in memory,
    reported once, and written before the next record.

    Args:
        path: The file ``metrics.jsonl`` in the run's folder; it is opened with the first record.

    Attributes:
        path: The same.
        count: How many records it holds, including those not written yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._images = ImageFolder(path.parent)
        self._file: FileIO | None = None
        self._end = 0
        self._unwritten: list[bytes] = []
        self._warned = False
        self._closed = False
        self.count = len(self._complete_lines())
        self._last_digest: int | None = None

    def begin(self) -> Path | None:
        """Start a new history; move that of an earlier run to ``metrics_1.jsonl``, ``_2``, ...

        Returns:
            Where the earlier records are now, or None if there were none.
        """
        if not self.path.exists() or self.path.stat().st_size == 0:
            return None
        number = 1
        while (moved := self.path.with_name(f"metrics_{number}.jsonl")).exists():
            number += 1
        self._close_file()
        self.path.rename(moved)
        self.count, self._last_digest = 0, None
        return moved

    def append(self, record: Record, logger: Any) -> None:
        """Write one record, and its images beside it."""
        line = record.to_line(self._images.save(record, logger) if record.media else {})
        self._unwritten.append(line.encode() + b"\n")
        self.count, self._last_digest = self.count + 1, record.digest()
        if not self._closed:
            self._write(logger)

    def _write(self, logger: Any) -> None:
        try:
            if self._file is None:
                self._open()
            while self._unwritten:
                self._write_all(self._unwritten[0])
                self._unwritten.pop(0)
        except OSError as error:
            self._cut_partial_line()
            if not self._warned:
                self._warned = True
                logger.warning(
                    f"cannot write {self.path}: {error.strerror}. Training continues. Free some "
                    "space or repair the folder: unwritten records are kept in memory and written "
                    "with the next one"
                )

    @property
    def has_unwritten(self) -> bool:
        """Whether the disk lacks records, because it has failed."""
        return bool(self._unwritten)

    def _open(self) -> None:
        self._file = keep_open(FileIO(self.path, "a+"))
        self._end = self._file.seek(0, os.SEEK_END)
        if self._end:  # a kill may have left half a line
            self._file.seek(-1, os.SEEK_END)
            if self._file.read(1) != b"\n":
                self._write_all(b"\n")

    def _write_all(self, line: bytes) -> None:
        if self._file is None:
            raise OSError(f"{self.path} is not open")
        written = 0
        while written < len(line):
            written += self._file.write(line[written:])
        self._end += len(line)

    def _cut_partial_line(self) -> None:
        if self._file is not None:
            with suppress(OSError):
                self._file.truncate(self._end)
            self._close_file()

    def remove_incomplete_lines(self) -> None:
        """Remove the line that a kill has cut short, if there is one."""
        if self.path.exists() and len(self.path.read_bytes().splitlines()) > self.count:
            self._rewrite(self._complete_lines())

    def remove_repeated(self, count: int, phase: str, iteration: int) -> None:
        """Remove the records of a phase and an iteration, except among the first ``count``."""

        def stays(number: int, line: bytes) -> bool:
            record = json.loads(line)
            repeated = record["phase"] == phase and record["iter"] == iteration
            return number < count or not repeated

        lines = self._complete_lines()
        kept = [line for number, line in enumerate(lines) if stays(number, line)]
        if len(kept) < len(lines):
            self._rewrite(kept)

    def last_digest(self) -> int:
        """Return the digest of the last record, or 0 without records."""
        if self._last_digest is None:
            self._last_digest = self.digest_of(self.count) or 0
        return self._last_digest

    def digest_of(self, number: int) -> int | None:
        """Return the digest of a record, counted from 1, or None if there is none."""
        lines = [*self._complete_lines(), *self._unwritten][:number]
        if len(lines) < number or not lines:
            return None
        return Record.from_line(lines[-1], self.path.parent).digest()

    def records_after(self, count: int) -> list[Record]:
        """Return the records after the first ``count``, with their images as they are now."""
        later = [*self._complete_lines(), *self._unwritten][count:]
        records = [Record.from_line(line, self.path.parent) for line in later]
        for record in records:
            for medium in record.media.values():
                if isinstance(medium, Image):
                    len(medium.png)  # the file may be replaced by that of a repeated iteration
        return records

    def cut_back(self, count: int) -> None:
        """Keep the first ``count`` records; a resumed run repeats the later ones."""
        self._unwritten.clear()
        if self.path.exists():
            self._rewrite(self._complete_lines()[:count])

    def _complete_lines(self) -> list[bytes]:
        lines = self.path.read_bytes().splitlines() if self.path.exists() else []
        return [line for line in lines if _is_complete(line)]

    def _rewrite(self, lines: list[bytes]) -> None:
        self._close_file()
        self.count, self._last_digest = len(lines) + len(self._unwritten), None
        temporary = self.path.with_suffix(".tmp")
        with temporary.open("wb") as file:
            file.writelines(line + b"\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path)

    def close(self, logger: Any) -> None:
        """Write what is still unwritten, and open the file no more."""
        if self._unwritten:
            self._write(logger)
        if self._unwritten:
            logger.error(f"{len(self._unwritten)} records could not be written to {self.path}")
        self._close_file()
        self._closed = True

    def _close_file(self) -> None:
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
            self._file = None


def _is_complete(line: bytes) -> bool:
    """Tell whether a line is a record; a kill may have cut one short."""
    try:
        json.loads(line)
    except ValueError:
        return False
    return True

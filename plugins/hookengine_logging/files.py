"""``metrics.jsonl``, the whole local history of a run; ``run.json``, what it consists of."""

from __future__ import annotations

import json
import os
import re
import time
import zlib
from collections.abc import Mapping
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any

from hookengine import Image, Record


class MetricsFile:
    """Records as JSON lines, each in the file before the next event.

    Images are PNG files in the folder ``media`` beside it. Where the disk fails, training goes on:
    what could not be written is kept, said once, and tried again with the next record.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: FileIO | None = None
        self._end = 0
        self._waiting: list[bytes] = []
        self._warned = self._images_warned = False
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
        self._close_file()
        self.path.rename(aside)
        self.count = 0
        return aside

    def append(self, record: Record, logger: Any) -> None:
        """Write one record."""
        line = record.to_line(self._save_images(record, logger) if record.media else {})
        self._waiting.append(line.encode() + b"\n")
        self.count += 1
        if not self._closed:
            self._write(logger)

    def _save_images(self, record: Record, logger: Any) -> dict[str, str]:
        """Where the images are now, by name; a repeated iteration replaces its own."""
        saved = {}
        for name, medium in record.media.items():
            if not isinstance(medium, Image):
                continue
            file = f"media/{record.phase}_{record.iter:06}_{_file_name(name)}.png"
            try:
                (self.path.parent / "media").mkdir(exist_ok=True)
                (self.path.parent / file).write_bytes(medium.png)
                saved[name] = file
            except OSError as error:
                if not self._images_warned:
                    self._images_warned = True
                    logger.warning(
                        f"cannot write {file}: {error.strerror}. Training goes on, and images that "
                        "cannot be written are left out of metrics.jsonl"
                    )
        return saved

    def _warn(self, error: OSError, logger: Any) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                f"cannot write {self.path}: {error.strerror}. Training goes on; make room or mend "
                "the folder: what is missing is kept and written with the next record"
            )

    def _write(self, logger: Any) -> None:
        try:
            if self._file is None:
                self._open()
            while self._waiting:
                self._write_whole(self._waiting[0])
                self._waiting.pop(0)
        except OSError as error:
            self._drop_partial_line()
            self._warn(error, logger)

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


class RunFile:
    """``run.json``: what a run consists of, and how it ended.

    Args:
        path: Of the file.
        description: Plain values.
    """

    def __init__(self, path: Path, description: Mapping[str, Any]) -> None:
        self._path = path
        self._fields = {**description, "started": round(time.time(), 3)}

    def write(self, status: str, **more: Any) -> None:
        """Write it anew, whole or not at all.

        Args:
            status: ``running``, or how the run ended.
            more: Further fields, plain values.
        """
        fields = {**self._fields, "status": status, **more}
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(json.dumps(fields, indent=2) + "\n")
        temporary.replace(self._path)


def history_of(folder: Path) -> str | None:
    """Which history the records in a run's folder belong to; None where that is not known."""
    try:
        history = json.loads((folder / "run.json").read_text()).get("history")
    except (OSError, ValueError, AttributeError):
        return None
    return str(history) if history is not None else None


def _file_name(name: str) -> str:
    """A name as a part of a file's; two names never give the same one."""
    plain = re.sub(r"[^A-Za-z0-9_.-]", "_", name)[:80]
    return plain if plain == name else f"{plain}_{zlib.crc32(name.encode()):08x}"


def _is_whole(line: bytes) -> bool:
    """Whether it is a record; a kill may have cut one short."""
    try:
        json.loads(line)
    except ValueError:
        return False
    return True

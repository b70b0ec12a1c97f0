"""``metrics.jsonl``: the complete local history of a run."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from hookengine import Record


class MetricsFile:
    """Records as JSON lines, each flushed as it is written.

    Where the disk fails, training goes on: what could not be written is kept, said once, and
    tried again with the next record.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: TextIO | None = None
        self._waiting: list[str] = []
        self._warned = False

    def append(self, record: Record, logger: Any) -> None:
        """Write one record."""
        line = {
            "phase": record.phase,
            "epoch": record.epoch,
            "iter": record.iter,
            "step": record.step,
            **record.scalars,
        }
        self._waiting.append(json.dumps(line) + "\n")
        self._write(logger)

    def _write(self, logger: Any) -> None:
        try:
            if self._file is None:
                self._file = self.path.open("a", encoding="utf-8")
            while self._waiting:
                self._file.write(self._waiting[0])
                self._file.flush()
                self._waiting.pop(0)
        except OSError as error:
            self._file = None
            if not self._warned:
                self._warned = True
                logger.warning(
                    f"cannot write {self.path}: {error.strerror}. Training goes on; make room or "
                    "mend the folder: what is missing is kept and written with the next record"
                )

    def cut_back(self, progress: Any) -> None:
        """Drop the records after ``progress``, which a resumed run writes again."""
        if not self.path.exists():
            return
        self._close_file()
        kept = list(self._until(progress))
        temporary = self.path.with_suffix(".tmp")
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(kept)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path)

    def _until(self, progress: Any) -> Iterator[str]:
        with self.path.open(encoding="utf-8") as file:
            for line in file:
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:
                    continue  # a line that was cut short by a kill
                later = record["iter"] > progress.iter or record["epoch"] > progress.epoch
                owed = record["phase"] == "val" and progress.val_due
                if not later and not (owed and record["iter"] == progress.iter):
                    yield line if line.endswith("\n") else line + "\n"

    def close(self, logger: Any) -> None:
        """Write what waits, and close."""
        if self._waiting:
            self._write(logger)
        if self._waiting:
            logger.error(f"{len(self._waiting)} records could not be written to {self.path}")
        self._close_file()

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

"""The records of a run in its folder: which belong to it, and where a resumed run continues."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from hookengine import Record, RecordHistory, RunFolder, read_records
from hookengine_logging.metrics_file import MetricsFile
from hookengine_logging.run_file import history_id


class History:
    """Keep ``metrics.jsonl`` in step with the run, however often it is resumed.

    Every history has a random ID, which run.json and each checkpoint hold. A run that loads a
    checkpoint of the history in its folder continues it: training cuts back the records written
    after the checkpoint. A run that loads a checkpoint of another history begins a new one; so does
    a run that loads one whose last record was replaced, by a run that resumed from an earlier one.

    Attributes:
        id: The ID of the history to which the run's records belong.
    """

    def __init__(self) -> None:
        self.id = uuid.uuid4().hex
        self._file: MetricsFile | None = None  # only on rank 0, once a run has begun
        self._loaded: Mapping[str, Any] = {"records": 0}
        self._other = False  # whether the folder holds another history than the loaded state
        self._resumed_at: int | None = None  # records; until training cuts the later ones
        self._later: list[Record] = []

    @property
    def is_open(self) -> bool:
        """Whether this process writes records."""
        return self._file is not None

    def open(self, folder: RunFolder, *, fresh: bool) -> Path | None:
        """Start writing to a run's folder.

        Args:
            folder: The run's folder.
            fresh: Whether the run has not trained yet, so that records in the folder are those of
                another run.

        Returns:
            Where the records of another run are now, or None if there were none.
        """
        self._file = MetricsFile(folder.metrics)
        if not fresh and not self._other:
            return None
        moved = self._file.begin()
        self._other = False
        return moved

    def start_training(self) -> None:
        """Cut the records back to where the run resumes; it repeats the later ones."""
        count, self._resumed_at = self._resumed_at, None
        self._later = []
        if self._file is not None and self._other:
            self._file.begin()
        elif self._file is not None and count is not None:
            self._file.cut_back(count)
        self._other = False

    def append(self, record: Record, logger: Any) -> None:
        """Write a record; one of a repeated evaluation replaces the earlier one."""
        assert self._file is not None
        if self._resumed_at is not None:
            self._file.remove_repeated(self._resumed_at, record.phase, record.iter)
        self._file.append(record, logger)

    def read(self, folder: RunFolder) -> RecordHistory | None:
        """Read the records up to where the run resumes; None if the folder has none of them."""
        if self._other or not folder.metrics.exists():
            return None
        complete = self._file is not None and not self._file.has_unwritten
        path = folder.metrics if complete else None
        return RecordHistory(Lines(folder.path, self._resumed_at), self._later, path)

    def close(self, logger: Any) -> None:
        """Write what is still unwritten."""
        if self._file is not None:
            self._file.close(logger)

    def state_dict(self) -> dict[str, Any]:
        """Return the number of records, the digest of the last one, and the ID of their history."""
        count, last = (0, 0) if self._file is None else (self._file.count, self._file.last_digest())
        return {"records": count, "last": last, "history": self.id}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over where to resume; ``resume`` compares it with the folder."""
        self._loaded = state

    def resume(self, folder: RunFolder) -> None:
        """Continue the history in the folder, if it is the one that led to the loaded state."""
        count, loaded = self._loaded["records"], self._loaded.get("history")
        path, self._resumed_at = folder.metrics, None
        present = self.id if self._file is not None else history_id(folder)
        self._other = path.exists() and None not in (loaded, present) and loaded != present
        if self._other or not path.exists():
            return
        file = self._file or MetricsFile(path)
        last, known = self._loaded.get("last"), file.digest_of(count)
        self._other = None not in (last, known) and last != known
        if not self._other:
            self._resumed_at = count
            self.id = loaded or self.id
            file.remove_incomplete_lines()
            self._later = file.records_after(count)


@dataclass(frozen=True)
class Lines:
    """The first ``count`` records of a run, or all of them; they are read each time."""

    run_dir: Path
    count: int | None

    def __iter__(self) -> Iterator[Record]:
        return islice(read_records(self.run_dir), self.count)

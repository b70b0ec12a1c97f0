"""The event files in a run's folder."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event, SourceMetadata
from tensorboard.summary.writer.record_writer import RecordWriter

from hookengine import keep_open

_WRITER = "hookengine"
_UNFINISHED = "unfinished-events"  # TensorBoard reads files whose names contain "tfevents"


class EventFiles:
    """Read and write event files in a folder. Files of other programs are left alone.

    Args:
        folder: The run's folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path: Path | None = None
        self._writer: RecordWriter | None = None

    def all(self) -> list[Path]:
        """Return all event files in the folder, in the order in which TensorBoard reads them."""
        return sorted(self._folder.glob("events.out.tfevents.*"))

    def _own(self) -> list[Path]:
        return [file for file in self.all() if _is_own(file)]

    def events(self) -> Iterator[Event]:
        """Yield the events in the files of this plugin."""
        for file in self._own():
            yield from LegacyEventFileLoader(str(file)).Load()

    def move_aside(self) -> None:
        """Move all event files to a new folder, ``tensorboard_1`` or a later number."""
        self.close()
        self._path = None
        number = 1
        while (aside := self._folder / f"tensorboard_{number}").exists():
            number += 1
        files = self.all()
        if files:
            aside.mkdir()
        for file in files:
            file.rename(aside / file.name)

    def add(self, event: Event) -> None:
        """Write an event to the file of this start, which the first event creates."""
        if self._writer is None:
            self._writer = self._open()
        self._writer.write(event.SerializeToString())
        self._writer.flush()

    def _open(self) -> RecordWriter:
        if self._path is not None:
            return RecordWriter(keep_open(self._path.open("ab")))
        self._path = self._new_path()
        return _started(self._path)

    def cut(self, stays: Callable[[Event], bool]) -> None:
        """Remove events, so that each program that reads the files sees only the others.

        The log of a restart, which TensorBoard offers for this, is not enough: TensorBoard's data
        server ignores it, and TensorBoard itself ignores the first one. So the events that stay are
        copied into one file, which replaces the others.
        """
        self.close()
        files, temporary = self._own(), self._folder / _UNFINISHED
        writer = _started(temporary)
        for event in self.events():
            if not event.HasField("file_version") and stays(event):
                writer.write(event.SerializeToString())
        writer.close()
        self._path = self._new_path()
        for file in files:  # killed in between, the next start writes the history again
            file.unlink()
        temporary.rename(self._path)

    def close(self) -> None:
        """Close the file. A later event opens it again."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _new_path(self) -> Path:
        """Name a new file so that TensorBoard reads it last: it reads files in order of names."""
        stamp = int(time.time())
        for file in self.all():
            taken = file.name.split(".")[3]
            if taken.isdecimal() and int(taken) >= stamp:
                stamp = int(taken) + 1
        name = f"events.out.tfevents.{stamp}.{socket.gethostname()}.{os.getpid()}.0"
        return self._folder / name


def _started(path: Path) -> RecordWriter:
    """Create an event file with the event that each file begins with."""
    writer = RecordWriter(keep_open(path.open("wb")))
    first = Event(
        wall_time=time.time(),
        file_version="brain.Event:2",
        source_metadata=SourceMetadata(writer=_WRITER),
    )
    writer.write(first.SerializeToString())
    writer.flush()
    return writer


def _is_own(file: Path) -> bool:
    """Return whether this plugin has written a file; early versions did not sign theirs."""
    first = next(LegacyEventFileLoader(str(file)).Load(), None)
    return first is None or first.source_metadata.writer in ("", _WRITER)

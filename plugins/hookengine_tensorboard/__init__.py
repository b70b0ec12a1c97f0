"""TensorBoard: write the records of a run as event files into its folder."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from hookengine import Record, RunInfo, Runner, Sink
from hookengine_tensorboard.summaries import START, hyperparameters, session_end, summary_of

__all__ = ["TensorBoard"]


class TensorBoard(Sink, name="tensorboard"):
    """Write records where ``tensorboard --logdir work_dir`` finds them, one run per folder.

    A value is named ``PHASE/NAME`` and belongs to the iteration of its record. Images, figures,
    histograms, tables and texts passed to ``runner.log`` are written too, and the description of
    the run becomes its hyperparameters. A record is one event, which is read completely or not at
    all, so a killed run resumes without a gap or a repetition. The event files of an earlier run
    that started in the same folder are moved to ``tensorboard_1``.
    """

    _failed = False

    def open(self, runner: RunInfo) -> None:
        """Read what the folder already holds, and start another file."""
        self._described = self._had_failed = False
        self._hyperparameters: dict[str, Any] | None = None
        folder = runner.run_dir
        files = sorted(folder.glob("events.out.tfevents.*"))
        if self.continues:
            for file in files:
                self._read(file)
        elif files:
            _move_aside(folder, files)
        self._writer = RecordWriter(_new_file(folder).open("wb"))
        self._add(Event(wall_time=time.time(), file_version="brain.Event:2"))
        description = runner.describe()
        self._had_failed = str(description.get("status")).startswith("failed")  # of a replayed run
        self._hyperparameters = None if self._described else description

    def _read(self, file: Path) -> None:
        for event in LegacyEventFileLoader(str(file)).Load():
            for value in event.summary.value:
                phase = value.tag.partition("/")[0]
                self._described |= value.tag == START
                self.held[phase] = max(event.step, self.held.get(phase, -1))

    def write(self, runner: RunInfo, record: Record) -> None:
        """Write a record as one event."""
        if self._hyperparameters is not None and record.phase != "train":
            self._describe(
                record.timestamp, [f"{record.phase}/{n}" for n in record.scalars if n != "seconds"]
            )
        self._add(_event(summary_of(record), record.timestamp, record.iter))

    def _describe(self, timestamp: float, metrics: list[str]) -> None:
        """Write the hyperparameters, as soon as the metrics that judge them are known."""
        assert self._hyperparameters is not None
        for summary in hyperparameters(self._hyperparameters, metrics):
            self._add(_event(summary, timestamp, 0))
        self._hyperparameters = None

    def _add(self, event: Event) -> None:
        self._writer.write(event.SerializeToString())
        self._writer.flush()

    def on_exception(self, error: BaseException) -> None:
        """Remember that the run has failed."""
        self._failed = True

    def before_run(self, runner: Runner) -> None:
        """Forget the failure of an earlier run."""
        self._failed = False

    def close(self, runner: RunInfo) -> None:
        """Write how the run ended, after the hyperparameters if it was never evaluated."""
        if self._hyperparameters is not None:
            self._describe(time.time(), [])
        self._add(_event(session_end(failed=self._failed or self._had_failed), time.time(), 0))
        self._writer.close()


def _event(summary: Summary, timestamp: float, step: int) -> Event:
    return Event(wall_time=timestamp, step=step, summary=summary)


def _new_file(folder: Path) -> Path:
    """Name a new file so that TensorBoard reads it last: it reads files in the order of names."""
    end = f"{socket.gethostname()}.{os.getpid()}"
    number = 0
    while (file := folder / f"events.out.tfevents.{time.time():.0f}.{end}.{number}").exists():
        number += 1
    return file


def _move_aside(folder: Path, files: list[Path]) -> None:
    number = 1
    while (aside := folder / f"tensorboard_{number}").exists():
        number += 1
    aside.mkdir()
    for file in files:
        file.rename(aside / file.name)

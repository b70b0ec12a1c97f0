"""TensorBoard: write the records of a run as event files into its folder."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary

from hookengine import Record, RunInfo, Runner, Sink
from hookengine_tensorboard.event_files import EventFiles
from hookengine_tensorboard.summaries import START, hyperparameters, session_end, summary_of

__all__ = ["TensorBoard"]

PHASES = ("train", "val", "test")


class TensorBoard(Sink, name="tensorboard"):
    """Write records where ``tensorboard --logdir work_dir`` finds them, one run per folder.

    A value is named ``PHASE/NAME`` and belongs to the iteration of its record. Images, figures,
    histograms, tables and texts passed to ``runner.log`` are written too, and the description of
    the run becomes its hyperparameters. A record is one event, which is read completely or not at
    all, so a killed run resumes without a gap or a repetition. A run that resumes from an older
    checkpoint removes the events after it. The event files of an earlier run that started in the
    same folder are moved to ``tensorboard_1``.
    """

    _failed = False

    def open(self, runner: RunInfo) -> None:
        """Read what the folder already holds, and start another file."""
        self._description = runner.describe()
        self._hyperparameters: dict[str, Any] | None = self._description
        self._had_failed = str(self._description.get("status")).startswith("failed")  # if replayed
        self._files = EventFiles(runner.run_dir)
        if self.continues:
            self._read()
        else:
            self._files.move_aside()

    def _read(self) -> None:
        for event in self._files.events():
            for value in event.summary.value:
                phase, _, name = value.tag.partition("/")
                if value.tag == START:
                    self._hyperparameters = None
                if phase not in PHASES:
                    continue
                if event.step > self.held.get(phase, -1):
                    self.held[phase], self.held_values[phase] = event.step, {}
                if value.HasField("simple_value"):
                    values = {**self.held_values[phase], name: value.simple_value}
                    self.held_values[phase] = values

    def cut(self, runner: RunInfo, kept: Mapping[str, int]) -> None:
        """Remove the events of records that the run has left."""
        if kept:
            self._files.cut(
                lambda event: all(_stays(event, v.tag, kept) for v in event.summary.value)
            )
            runner.logger.info(
                f"tensorboard: removed the records after iteration {max(kept.values())}, where the "
                "run has resumed"
            )
        else:
            self._files.move_aside()
            self._hyperparameters = self._description

    def write(self, runner: RunInfo, record: Record) -> None:
        """Write a record as one event."""
        if self._hyperparameters is not None and record.phase != "train":
            self._describe(
                record.timestamp, [f"{record.phase}/{n}" for n in record.scalars if n != "seconds"]
            )
        self._files.add(_event(summary_of(record), record.timestamp, record.iter))

    def _describe(self, timestamp: float, metrics: list[str]) -> None:
        """Write the hyperparameters, as soon as the metrics that judge them are known."""
        assert self._hyperparameters is not None
        for summary in hyperparameters(self._hyperparameters, metrics):
            self._files.add(_event(summary, timestamp, 0))
        self._hyperparameters = None

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
        self._files.add(
            _event(session_end(failed=self._failed or self._had_failed), time.time(), 0)
        )
        self._files.close()


def _stays(event: Event, tag: str, kept: Mapping[str, int]) -> bool:
    phase = tag.partition("/")[0]
    return phase not in PHASES or bool(event.step <= kept.get(phase, -1))


def _event(summary: Summary, timestamp: float, step: int) -> Event:
    return Event(wall_time=timestamp, step=step, summary=summary)

"""Logging: readable lines on the console, the run's log, and its metrics as JSON lines.

A run's folder holds ``metrics.jsonl``, the whole history, one record per line, with its images in
``media``; ``run.log``, every line of the console and the warnings of Python and torch; and
``run.json``: the model, the options of every plugin, the order in which hooks are called, the
environment, and how the run ended.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from hookengine import (
    OptimWrapper,
    Phase,
    Plugin,
    Record,
    RecordHistory,
    RunFolder,
    Runner,
    dist,
    hookimpl,
    log_context,
)
from hookengine_logging.announcements import (
    announce_error,
    announce_run,
    announce_unrecorded,
    describe_end,
)
from hookengine_logging.captured import CapturedWarnings
from hookengine_logging.evaluation import Evaluation
from hookengine_logging.history import History
from hookengine_logging.images import keep_encodable
from hookengine_logging.line import line
from hookengine_logging.logger import check_levels, make_logger
from hookengine_logging.losses import RecentLosses
from hookengine_logging.meter import Medium, Meter, Rejections
from hookengine_logging.output import Output
from hookengine_logging.run_file import RunFile
from hookengine_logging.training import TrainingInterval
from hookengine_logging.untrained import UntrainedParameters

__all__ = ["Logging"]

Level = Literal["DEBUG", "INFO", "WARNING", "ERROR"]


class Logging(Plugin, name="logging"):
    """Write to the console and to the run's folder what happens in a run.

    The outputs of ``train_step`` and the values passed to ``runner.log`` stay as they are (tensors
    on their device). Every ``interval`` iterations and at the end of an epoch they are averaged:
    the outputs over the samples of the batches that they come from, logged values over iterations,
    and both over ranks. Nothing in between synchronizes the device. Only rank 0 writes.

    If a loss is NaN or infinite, the next record, or the next checkpoint if that comes first, ends
    the run with an error that names the iteration and the terms of the loss. A warning names
    parameters that get gradients, but are in no optimizer.
    """

    interval: int = Field(default=50, gt=0, description="iterations between two training records")
    level: Level = Field(
        default="INFO", description="lowest level shown on the console and in run.log"
    )
    levels: dict[str, Level] = Field(
        default_factory=dict, description="level of individual plugins, by plugin name"
    )
    renderer: Literal["console", "json"] = Field(
        default="console",
        description="lines to read, or JSON objects with run, epoch, iteration, plugin",
    )

    nonfinite: Literal["stop", "warn"] = Field(
        default="stop", description="what a NaN or infinite loss leads to: an error, or one warning"
    )

    def configure(self, runner: Runner) -> None:
        """Give the Runner its logger; the files are opened when a run begins."""
        self._main = dist.is_main_process()
        self._by_epoch = True
        self._error: BaseException | None = None
        self._rejections = Rejections(runner)
        self._meters = {phase: Meter(self._rejections) for phase in ("train", "val", "test")}
        self._losses = RecentLosses(self.nonfinite)
        self._training = TrainingInterval(self._meters["train"], self._losses)
        self._untrained = UntrainedParameters()
        self._evaluation = Evaluation(self._meters)
        self._history = History()
        self._run_file: RunFile | None = None
        self._output = Output(self._main, self.renderer == "json")
        logger = make_logger(self._output, log_context(runner), self.level, self.levels)
        self._previous_logger = runner.use_logger(logger)
        self._captured = CapturedWarnings(runner, self._main)
        self._captured.start()
        check_levels(self.levels, runner.plugins)  # last: after an error all of it is undone

    @hookimpl(tryfirst=True)  # what other plugins say goes into the files
    def before_run(self, runner: Runner) -> None:
        """Open the files, and describe the run in them."""
        self._error = None
        self._captured.take_over()
        first = self._main and not self._history.is_open
        moved = self._open_files(runner) if first else None
        if self._run_file is not None:
            self._run_file.describe(runner.describe())
            self._run_file.write("running", runner.logger)
        if first:
            announce_run(runner, moved)

    def _open_files(self, runner: Runner) -> Path | None:
        folder = RunFolder(runner.make_run_dir())
        moved = self._history.open(folder, fresh=runner.progress.iter == 0)
        self._output.open(folder.log)
        description = {**runner.describe(), "history": self._history.id}
        self._run_file = RunFile(folder.description, description)
        return moved

    def after_run(self, runner: Runner) -> None:
        """Write to ``run.json`` how the run ended."""
        if self._run_file is not None:
            self._run_file.describe(runner.describe())
            status = describe_end(runner.progress, self._error)
            self._run_file.write(status, runner.logger, ended=round(time.time(), 3))

    def unconfigure(self, runner: Runner) -> None:
        """Close the files, and restore the previous logger."""
        if self._main and self._error is None:
            announce_unrecorded(runner.logger, self._meters)
        self._captured.stop()
        self._history.close(runner.logger)
        runner.use_logger(self._previous_logger)
        self._output.close()

    # -- training -------------------------------------------------------------------------------

    def before_train(self, runner: Runner) -> None:
        """Start the clock; cut the history back to where the run resumes."""
        self._history.start_training()
        self._training.start(runner)
        self._by_epoch = runner.progress.max_epochs is not None

    def before_train_epoch(self) -> None:
        """Leave the time between epochs out of the time of iterations."""
        self._training.stopwatch.mark = perf_counter()

    def before_train_iter(self) -> None:
        """Measure how long the iteration waited for its batch."""
        clock = self._training.stopwatch
        clock.data_seconds += perf_counter() - clock.mark

    @hookimpl(after="*")  # after plugins that set the rate of this step
    def before_optim_step(self, optim_wrapper: OptimWrapper) -> None:
        """Keep the learning rate of this step, which a schedule is about to change."""
        rate = optim_wrapper.param_groups[0]["lr"]
        rate = rate.clone() if isinstance(rate, Tensor) else rate
        self._training.rates[optim_wrapper.name] = rate

    # Last, so that the record includes what other plugins log in these events.

    @hookimpl(after="*")
    def after_train_iter(self, runner: Runner, data_batch: Any, outputs: Any) -> None:
        """Collect the outputs; write a record every ``interval`` iterations."""
        progress = runner.progress
        self._training.add_iteration(progress.iter, data_batch, outputs)
        count = progress.batch if self._by_epoch else progress.iter
        if count % self.interval == 0 or (progress.is_last and self._by_epoch):
            self._write_training(runner)

    @hookimpl(after="*")
    def after_train_epoch(self, runner: Runner) -> None:
        """Write the rest of an epoch whose length was not known."""
        if self._by_epoch:
            self._write_training(runner)

    @hookimpl(after="*")
    def after_train(self, runner: Runner) -> None:
        """Write the rest when the limit is reached or the run was stopped."""
        self._write_training(runner)
        if self._main:
            self._untrained.check(runner, now=True)

    @hookimpl(tryfirst=True)  # nothing is saved after a bad loss
    def before_save_checkpoint(self, runner: Runner) -> None:
        """Look at the losses not read yet, before the weights they led to are saved."""
        self._training.check_losses(runner)

    def on_exception(self, runner: Runner, error: BaseException) -> None:
        """Write the rest, and log the error."""
        self._error = error
        try:
            if self._training.stopwatch.iterations:
                scalars, media, _ = self._training.finish(runner, this_rank_only=True)
                self._write(runner, "train", scalars, media)
        finally:
            announce_error(runner, error)

    def _write_training(self, runner: Runner) -> None:
        if self._training.stopwatch.iterations:
            if self._main:
                self._untrained.check(runner)
            scalars, media, problem = self._training.finish(runner)
            self._write(runner, "train", scalars, media)
            if problem is not None:
                self._losses.report(problem, runner.logger)

    # -- evaluation -----------------------------------------------------------------------------

    def before_val(self, runner: Runner) -> None:
        """Write the iterations before the validation first; start the clock."""
        self._write_training(runner)
        self._evaluation.start()

    def before_test(self) -> None:
        """Start the clock."""
        self._evaluation.start()

    @hookimpl(after="*")
    def after_val_epoch(self, metrics: Mapping[str, Any]) -> None:
        """Collect the metrics."""
        self._evaluation.add_metrics("val", metrics)

    @hookimpl(after="*")
    def after_test_epoch(self, metrics: Mapping[str, Any]) -> None:
        """Collect the metrics."""
        self._evaluation.add_metrics("test", metrics)

    # In a later event, so that the record includes what hooks log in the one before.

    @hookimpl(after="*")
    def after_val(self, runner: Runner) -> None:
        """Write the metrics; leave the validation out of the time of iterations."""
        self._write(runner, "val", *self._evaluation.finish("val"))
        self._training.stopwatch.mark = perf_counter()

    @hookimpl(after="*")
    def after_test(self, runner: Runner) -> None:
        """Write the metrics."""
        self._write(runner, "test", *self._evaluation.finish("test"))

    # -- records --------------------------------------------------------------------------------

    def log(self, phase: Phase, values: Mapping[str, Any]) -> None:
        """Collect values for the next record of their phase."""
        self._meters[phase].add(values)

    def history(self, runner: Runner) -> RecordHistory | None:
        """Return the records in ``metrics.jsonl``, up to where the run resumes."""
        return self._history.read(RunFolder(runner.run_dir)) if self._main else None

    def _write(
        self, runner: Runner, phase: Phase, scalars: dict[str, float], media: dict[str, Medium]
    ) -> None:
        if not self._history.is_open:
            return
        progress = runner.progress
        counters = progress.current_epoch, progress.iter, progress.step
        media = keep_encodable(media, self._rejections)
        record = Record(phase, *counters, scalars, media)
        self._history.append(record, runner.logger)
        runner.hooks.write(runner, record)
        runner.logger.info(line(record, progress), plugin=self.plugin_name, record=record)

    # -- state ----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the values not recorded yet, so that a resumed run writes the same record."""
        meters = {phase: meter.state_dict() for phase, meter in self._meters.items()}
        return {
            "meters": {phase: numbers for phase, numbers in meters.items() if numbers},
            **self._training.state_dict(),
            **self._history.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        for phase, meter in self._meters.items():
            meter.load_state_dict(state["meters"].get(phase, {}))
        self._training.load_state_dict(state)
        self._history.load_state_dict(state)

    @hookimpl(tryfirst=True)  # sinks read the history in this event
    def after_load_checkpoint(self, runner: Runner) -> None:
        """Find out whether the history in the folder leads to the loaded state."""
        if self._main:
            self._history.resume(RunFolder(runner.make_run_dir()))

"""Logging: readable lines on the console, the run's log, and its metrics as JSON lines.

In the run's folder: ``metrics.jsonl``, one record per line, the complete local history, with its
images in ``media``; ``run.log``, every line of the console, and the warnings of Python and torch;
``run.json``, the model, the options of every plugin, the order in which the hooks are called, the
environment, and how the run ended.
"""

from __future__ import annotations

import functools
import time
import traceback
import uuid
from collections.abc import Iterable, Mapping
from itertools import islice
from math import isfinite
from time import perf_counter
from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from hookengine import (
    EVENTS,
    PLUGINS,
    Image,
    Plugin,
    Record,
    batch_size,
    did_you_mean,
    dist,
    hookimpl,
    log_context,
    read_records,
)
from hookengine_logging.captured import CapturedWarnings
from hookengine_logging.files import MetricsFile, RunFile, history_of
from hookengine_logging.line import line
from hookengine_logging.meters import Medium, Meters, Stopwatch, memory
from hookengine_logging.output import Output, make_logger

__all__ = ["Logging"]

Level = Literal["DEBUG", "INFO", "WARNING", "ERROR"]


class Logging(Plugin, name="logging"):
    """Write what happens to the console and to the run's folder.

    What ``train_step`` returns, and what ``runner.log`` is given, is kept as it is (tensors on
    their device) and averaged once per ``interval`` iterations and at the end of an epoch, over
    all ranks: the iterations between never synchronise the device. Only rank 0 writes.

    Where the values are read, and before a state is saved, a loss that is NaN or infinite ends
    the run with an error that names the iteration and the terms of the loss.
    """

    interval: int = Field(50, gt=0, description="iterations between two records of training")
    level: Level = Field("INFO", description="what is shown on the console and in run.log")
    levels: dict[str, Level] = Field(
        default_factory=dict, description="another level for the lines of a plugin, by its name"
    )
    renderer: Literal["console", "json"] = Field(
        "console", description="lines to read, or JSON objects with run, epoch, iteration, plugin"
    )

    nonfinite: Literal["stop", "warn"] = Field(
        "stop", description="what a NaN or infinite loss leads to: an error, or one warning"
    )

    def configure(self, runner: Any) -> None:
        """Take over ``runner.logger``; the files are opened when the run begins."""
        self._meters = Meters(functools.partial(self._refuse, runner))
        self._stopwatch = Stopwatch()
        self._main = dist.is_main_process()
        self._metrics: MetricsFile | None = None
        self._by_epoch = True
        self._run_file: RunFile | None = None
        self._error: BaseException | None = None
        self._refused: set[str] = set()
        self._losses: list[tuple[int, dict[str, Any]]] = []  # by iteration, since the last record
        self._names: list[str] = []
        self._rates: dict[str, Any] = {}
        self._nonfinite_told = False
        self._history_id = uuid.uuid4().hex  # tells the records of this run from those of others
        self._foreign = False  # a state of another history was loaded, since the last training
        self._loaded: tuple[int, str | None] = 0, None
        self._records: int | None = None  # that a run goes on from, while it has not trained yet
        self._evaluation_began = self._evaluation_took = 0.0
        self._check_levels(runner.plugins)
        self._output = Output(self._main, self.renderer == "json")
        self._previous_logger = runner.logger
        context = log_context(runner)
        runner.logger = make_logger(self._output, context, self.level, self.levels)
        self._captured = CapturedWarnings(runner, self._main)
        self._captured.start()

    def _check_levels(self, plugins: Iterable[str]) -> None:
        for name in self.levels:
            if name not in (known := [*plugins, *PLUGINS.names()]):
                hint = did_you_mean(name, known)
                raise ValueError(f"logging: levels names {name!r}, which is no plugin.{hint}")

    @hookimpl(tryfirst=True)
    def before_run(self, runner: Any) -> None:
        """Open the files; write down what the run consists of."""
        self._error = None
        self._captured.take_over()
        if self._run_file is not None:
            self._write_run_file(runner, "running")
        if not self._main or self._metrics is not None:
            return
        folder = runner.make_run_dir()
        self._metrics = MetricsFile(folder / "metrics.jsonl")
        aside = None
        if runner.progress.iter == 0 or self._foreign:
            aside = self._metrics.begin()
            self._foreign = False
        self._output.open(folder / "run.log")
        description = {**runner.describe(), "history": self._history_id}
        self._run_file = RunFile(folder / "run.json", description)
        self._write_run_file(runner, "running")
        blocked = f" (blocked: {', '.join(runner.plugins.blocked)})" * bool(runner.plugins.blocked)
        runner.logger.info(
            f"run {runner.name}: files in {folder}, device {runner.device}, plugins "
            f"{', '.join(runner.plugins)}{blocked}"
        )
        if aside is not None:
            runner.logger.info(f"the records of an earlier run in this folder are now in {aside}")
        for event, names in runner.plugins.replacements().items():
            value = EVENTS[event].kind.argument
            if EVENTS[event].subject == "build":
                continue  # most plugins leave the model or the dataloader alone in the end
            runner.logger.info(f"{event}: {', then '.join(names)} replace the {value}")

    def after_run(self, runner: Any) -> None:
        """Write down how it ended."""
        if self._run_file is not None:
            stopped = runner.progress.stopped
            status = "finished" if stopped is None else f"stopped: {stopped}"
            if self._error is not None:
                status = f"failed: {type(self._error).__name__}: {self._error}"
            self._write_run_file(runner, status, ended=round(time.time(), 3))

    def _write_run_file(self, runner: Any, status: str, **more: Any) -> None:
        try:
            assert self._run_file is not None
            self._run_file.write(status, **more)
        except OSError as error:
            runner.logger.warning(f"cannot write {error.filename}: {error.strerror}")

    def unconfigure(self, runner: Any) -> None:
        """Close the files and give the logger back."""
        if self._main and self._error is None:
            for phase, names in self._meters.waiting().items():
                runner.logger.warning(
                    f"logged after the last record of {phase}, and in none: {', '.join(names)}"
                )
        self._captured.stop()
        if self._metrics is not None:
            self._metrics.close(runner.logger)
        runner.logger = self._previous_logger
        self._output.close()

    # -- training -------------------------------------------------------------------------------

    def before_train(self, runner: Any) -> None:
        """Start the clocks; cut the history back to where the run goes on from."""
        records, self._records = self._records, None
        if self._metrics is not None and self._foreign:
            self._metrics.begin()
        elif self._metrics is not None and records is not None:
            self._metrics.cut_back(records)
        self._foreign = False
        self._stopwatch.restart()
        self._by_epoch = runner.progress.max_epochs is not None

    def before_train_epoch(self) -> None:
        """What lies between epochs is not an iteration's time."""
        self._stopwatch.mark = perf_counter()

    def before_train_iter(self) -> None:
        """The wait for the batch ends."""
        clock = self._stopwatch
        clock.data_seconds += perf_counter() - clock.mark

    @hookimpl(trylast=True)
    def before_optim_step(self, optim_wrapper: Any) -> None:
        """Keep the learning rate that is used, which a schedule is about to change."""
        rate = optim_wrapper.param_groups[0]["lr"]
        self._rates[optim_wrapper.name] = rate.clone() if isinstance(rate, Tensor) else rate

    # Last, so that what other plugins log in these events is part of the record.

    @hookimpl(trylast=True)
    def after_train_iter(self, runner: Any, data_batch: Any, outputs: Any) -> None:
        """Keep the outputs; every ``interval`` iterations, reduce and write them."""
        clock, progress = self._stopwatch, runner.progress
        now = perf_counter()
        clock.seconds += now - clock.mark
        clock.mark = now
        clock.iterations += 1
        clock.samples += batch_size(data_batch)
        if isinstance(outputs, dict):
            self._names = [*outputs]
            self._losses.append((progress.iter, self._meters.add_outputs(outputs)))
        count = progress.batch if self._by_epoch else progress.iter
        if count % self.interval == 0 or (progress.is_last and self._by_epoch):
            self._write_training(runner)

    @hookimpl(trylast=True)
    def after_train_epoch(self, runner: Any) -> None:
        """Write what is left, where the epoch's length was not known."""
        if self._by_epoch:
            self._write_training(runner)

    @hookimpl(trylast=True)
    def after_train(self, runner: Any) -> None:
        """Write what is left at the limit or after a stop."""
        self._write_training(runner)

    def on_exception(self, runner: Any, error: BaseException) -> None:
        """Write what is left, and the error."""
        self._error = error
        try:
            if self._stopwatch.iterations:
                self._write_interval(runner, alone=True)
        finally:
            self._tell_error(runner, error)

    def _tell_error(self, runner: Any, error: BaseException) -> None:
        progress = runner.progress
        where = f"in epoch {progress.current_epoch}, after iteration {progress.iter}"
        if isinstance(error, KeyboardInterrupt):
            runner.logger.warning(f"interrupted {where}")
        else:
            notes = "; ".join(getattr(error, "__notes__", ()))
            details = f" ({notes})" if notes else ""
            text = f"run ends with {type(error).__name__}: {error}{details}"
            where = "".join(traceback.format_exception(error)).rstrip()
            runner.logger.error(text, run_log=f"{text}\n{where}")

    def _write_training(self, runner: Any) -> None:
        if self._stopwatch.iterations == 0:
            return
        problem = self._write_interval(runner)
        if problem is not None:
            self._report_nonfinite(runner, problem)

    def _write_interval(self, runner: Any, alone: bool = False) -> str | None:
        """Write the record; returns what is wrong with the loss, if something is."""
        clock, progress = self._stopwatch, runner.progress
        values, media = self._meters.reduce("train")
        finite = all(isfinite(value) for name, value in values.items() if "loss" in name)
        problem = None if finite else self._nonfinite_loss(progress)
        if not alone:
            values = _mean_over_ranks(values)
        outputs = {name: values.pop(name) for name in self._names if name in values}
        values = {**outputs, **values}  # the losses first
        self._losses.clear()
        scalars = _learning_rates(runner.optim_wrapper, self._rates)
        scalars["time"] = clock.seconds / clock.iterations
        scalars["data_time"] = clock.data_seconds / clock.iterations
        samples = clock.samples * dist.get_world_size()  # of all ranks, which have as many
        scalars["samples_per_second"] = samples / clock.seconds if clock.seconds else 0.0
        scalars["memory"] = memory(runner.device)
        if progress.max_iters is not None:
            left = max(progress.max_iters - progress.iter, 0)
            scalars["eta"] = left * clock.seconds_per_iteration
        clock.start_interval()
        own = {name: value for name, value in scalars.items() if name not in values}
        self._write(runner, "train", {**values, **own}, media)
        return problem

    def _nonfinite_loss(self, progress: Any) -> str | None:
        """Since when, and which terms of the loss are not finite; None where all are."""
        if self._nonfinite_told:
            return None
        for iteration, losses in self._losses:
            values = {name: float(value) for name, value in losses.items()}
            bad = [f"{name} {value}" for name, value in values.items() if not isfinite(value)]
            if bad:
                good = [f"{name} {v:.4g}" for name, v in values.items() if isfinite(v)]
                beside = f" ({', '.join(good)})" if good else ""
                ago = progress.iter - iteration
                epoch = progress.current_epoch - (ago >= progress.batch > 0)
                return (
                    f"the loss is not finite in iteration {iteration}, epoch {epoch}: "
                    f"{', '.join(bad)}{beside}"
                )
        return None

    def _report_nonfinite(self, runner: Any, problem: str) -> None:
        if self.nonfinite == "warn":
            self._nonfinite_told = True
            runner.logger.warning(problem)
            return
        raise FloatingPointError(
            f"{problem}. The weights may be spoilt. Look at that batch and at the step before it, "
            "lower the learning rate or clip the gradients; dict(type='logging', "
            "nonfinite='warn') goes on all the same"
        )

    @hookimpl(tryfirst=True)
    def before_save_checkpoint(self, runner: Any) -> None:
        """Look at the losses that were not read yet, before their weights are saved."""
        names = {name for _, losses in self._losses for name in losses}
        if not self._meters.are_finite(names):
            problem = self._nonfinite_loss(runner.progress)
            if problem is not None:
                self._report_nonfinite(runner, problem)

    def before_val(self, runner: Any) -> None:
        """What was trained before a validation stands before it in the history."""
        self._write_training(runner)
        self._evaluation_began = perf_counter()

    def before_test(self) -> None:
        """Start the clock."""
        self._evaluation_began = perf_counter()

    # -- evaluation -----------------------------------------------------------------------------

    @hookimpl(trylast=True)
    def after_val_epoch(self, metrics: Mapping[str, Any]) -> None:
        """Keep the metrics."""
        self._keep_metrics("val", metrics)

    @hookimpl(trylast=True)
    def after_test_epoch(self, metrics: Mapping[str, Any]) -> None:
        """Keep the metrics."""
        self._keep_metrics("test", metrics)

    def _keep_metrics(self, phase: str, metrics: Mapping[str, Any]) -> None:
        self._meters.add(metrics, phase)
        self._evaluation_took = perf_counter() - self._evaluation_began

    # Later, so that what hooks log in these events is part of the record.

    @hookimpl(trylast=True)
    def after_val(self, runner: Any) -> None:
        """Write the metrics; what a validation takes is no iteration's time."""
        self._write_metrics(runner, "val")
        self._stopwatch.mark = perf_counter()

    @hookimpl(trylast=True)
    def after_test(self, runner: Any) -> None:
        """Write the metrics."""
        self._write_metrics(runner, "test")

    def _write_metrics(self, runner: Any, phase: str) -> None:
        scalars, media = self._meters.reduce(phase)
        scalars.setdefault("seconds", self._evaluation_took)
        self._write(runner, phase, scalars, media)

    # -- records --------------------------------------------------------------------------------

    def log(self, runner: Any, phase: str, values: Mapping[str, Any]) -> None:
        """Keep values until the next record of their phase."""
        self._meters.add(values, phase)

    def history(self, runner: Any) -> Iterable[Record] | None:
        """What ``metrics.jsonl`` holds, up to where the run goes on from."""
        here = (runner.run_dir / "metrics.jsonl").exists()
        if not self._main or not here or self._foreign:
            return None
        return islice(read_records(runner.run_dir), self._records)

    def _refuse(self, runner: Any, name: str, text: str) -> None:
        if name not in self._refused:
            self._refused.add(name)
            runner.logger.warning(f"{name!r} {text}")

    def _write(
        self, runner: Any, phase: str, scalars: dict[str, float], media: dict[str, Medium]
    ) -> None:
        if self._metrics is None:
            return
        progress = runner.progress
        counters = progress.current_epoch, progress.iter, progress.step
        record = Record(phase, *counters, scalars, self._encoded(runner, media) if media else media)
        if self._records is not None:  # who evaluates a run again replaces what it had
            self._metrics.drop(self._records, phase, progress.iter)
        self._metrics.append(record, runner.logger)
        runner.hooks.write(runner, record)
        runner.logger.info(line(record, progress), plugin=self.plugin_name, record=record)

    def _encoded(self, runner: Any, media: dict[str, Medium]) -> dict[str, Medium]:
        """Those that can be encoded."""
        good: dict[str, Medium] = {}
        for name, medium in media.items():
            try:
                if isinstance(medium, Image):
                    len(medium.png)
                good[name] = medium
            except Exception as error:
                self._refuse(runner, name, f"({medium!r}) is left out of the records: {error}")
        return good

    # -- state ----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The values that wait for their record, so that a resumed run writes the same one."""
        return {
            "meters": self._meters.state_dict(),
            "stopwatch": self._stopwatch.state_dict(),
            "rates": dict(self._rates),
            "records": 0 if self._metrics is None else self._metrics.count,
            "history": self._history_id,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back."""
        self._losses.clear()
        self._rates = dict(state["rates"])
        self._loaded = state["records"], state.get("history")
        self._meters.load_state_dict(state["meters"])
        self._stopwatch.load_state_dict(state["stopwatch"])

    @hookimpl(tryfirst=True)
    def after_load_checkpoint(self, runner: Any) -> None:
        """From here on ``metrics.jsonl`` is repeated, as soon as training goes on."""
        self._records, history = self._loaded
        if not self._main:
            return
        folder = runner.make_run_dir()
        there = self._history_id if self._metrics is not None else history_of(folder)
        exists = (folder / "metrics.jsonl").exists()
        self._foreign = exists and None not in (history, there) and history != there
        if self._foreign or not exists:  # no records here that led to the state
            self._records = None
        else:
            self._history_id = history or self._history_id
            (self._metrics or MetricsFile(folder / "metrics.jsonl")).mend()


def _mean_over_ranks(values: dict[str, float]) -> dict[str, float]:
    """The means of what several ranks have logged, each of those that have logged it."""
    if dist.get_world_size() == 1:
        return values
    ranks = dist.all_gather_objects(values)
    names = dict.fromkeys(name for rank in ranks for name in rank)
    by_name = {name: [rank[name] for rank in ranks if name in rank] for name in names}
    return {name: sum(logged) / len(logged) for name, logged in by_name.items()}


def _learning_rates(optim_wrapper: Any, used: Mapping[str, Any]) -> dict[str, float]:
    """``lr`` of the first parameter group; ``NAME/lr`` where there are several optimizers.

    Args:
        optim_wrapper: Of the Runner.
        used: That of the last step, by optimizer; before the first one it is the present one.
    """
    wrappers = optim_wrapper.by_name()
    several = len(wrappers) > 1
    rates = {name: used.get(name, wrapper.get_lr()[0]) for name, wrapper in wrappers.items()}
    return {f"{n}/lr" if several else "lr": float(rate) for n, rate in rates.items()}

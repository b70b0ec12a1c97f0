"""Report: one HTML page and one picture of a run, or of several runs side by side.

When a run ends, ``report.html`` and ``report.png`` are written into its folder. To draw any runs on
demand, call ``python -m hookengine_report RUN...``. Both are drawn from files in the run's folder:
``metrics.jsonl``, ``run.json`` and ``checkpoints``.
"""

from __future__ import annotations

import functools
from pathlib import Path

from pydantic import Field

from hookengine import Record, RunInfo, Runner, Sink, dist, hookimpl
from hookengine_report.runs import is_run
from hookengine_report.write import write_report

__all__ = ["Report", "write_report"]


class Report(Sink, name="report"):
    """Draw ``report.html`` and ``report.png`` into the run's folder when it ends, however it ends.

    As a sink, it draws on its own thread and may fail without affecting training. Only rank 0
    draws.
    """

    every: int | None = Field(
        default=None,
        gt=0,
        description="also draw after this many validations, to watch a run in progress; by default "
        "only at the end",
    )

    def configure(self, runner: Runner) -> None:
        """Reset the counters, and allow a drawing more time than a record."""
        self.flush_timeout = 60.0
        self._validations = 0
        self._waiting = False

    def write(self, runner: RunInfo, record: Record) -> None:
        """Do nothing: the run's folder has the records when it is time to draw."""

    @hookimpl(after="logging")  # the record of the validation is written
    def after_val(self, runner: Runner) -> None:
        """Draw a run in progress, unless the previous drawing is unfinished."""
        self._validations += 1
        if self.every is not None and self._validations % self.every == 0 and not self._waiting:
            self._draw(runner)

    @hookimpl(after="logging", before="checkpoint")  # run.json is complete, the process still runs
    def after_run(self, runner: Runner) -> None:
        """Draw the run."""
        self._draw(runner)

    def _draw(self, runner: Runner) -> None:
        # Without records there are no files to draw, and a warning has said so.
        has_files = "log" in runner.plugins.calls() or is_run(runner.run_dir)
        if dist.is_main_process() and has_files:
            self._waiting = True
            self.enqueue(functools.partial(self._draw_folder, runner, runner.run_dir))

    def _draw_folder(self, runner: Runner, folder: Path) -> None:
        try:
            page, _ = write_report([folder], folder)
            runner.logger.info(f"report: {page}", plugin=self.plugin_name)
        finally:
            self._waiting = False

"""Report: one HTML page and one picture of a run, or of several runs beside each other.

At the end of a run ``report.html`` and ``report.png`` lie in its folder; on demand
``python -m hookengine_report RUN...`` draws them of any runs. Both are read off the run's folder:
``metrics.jsonl``, ``run.json`` and ``checkpoints``.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from pydantic import Field

from hookengine import Record, Sink, dist, hookimpl
from hookengine_report.write import write_report

__all__ = ["Report", "write_report"]


class Report(Sink, name="report"):
    """Draw a run into its folder when it ends, however it ends: ``report.html``, ``report.png``.

    It is a sink: it draws on a thread of its own, and may fail without harm. Only rank 0 draws.
    """

    every: int | None = Field(
        default=None,
        gt=0,
        description="also after this many validations, to look at a run that goes on; None: at the "
        "end only",
    )

    def configure(self, runner: Any) -> None:
        """Nothing is drawn yet; a drawing may take longer than a record."""
        self.flush_timeout = 60.0
        self._validations = 0
        self._waiting = False

    def write(self, runner: Any, record: Record) -> None:
        """Nothing: the run's folder has the records when it is time to draw."""

    def after_val(self, runner: Any) -> None:
        """Draw a run that goes on, unless the last drawing is not done yet."""
        self._validations += 1
        if self.every is not None and self._validations % self.every == 0 and not self._waiting:
            self._draw(runner)

    @hookimpl(trylast=True)
    def after_run(self, runner: Any) -> None:
        """Draw it, after ``logging`` has written how it ended."""
        self._draw(runner)

    def _draw(self, runner: Any) -> None:
        if dist.is_main_process():
            self._waiting = True
            self.enqueue(functools.partial(self._draw_folder, runner, runner.run_dir))

    def _draw_folder(self, runner: Any, folder: Path) -> None:
        try:
            page, _ = write_report([folder], folder)
            runner.logger.info(f"report: {page}", plugin=self.plugin_name)
        finally:
            self._waiting = False

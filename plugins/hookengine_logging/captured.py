"""Warnings of Python and of torch, captured for the run's log."""

from __future__ import annotations

import logging
import os
import threading
import warnings
import weakref
from typing import Any, TextIO

from hookengine import Runner


class CapturedWarnings:
    """Log what ``warnings.warn`` and torch's loggers emit, from ``start`` to ``stop``.

    Python's warnings become lines of the log instead of going to stderr; code that records them
    (``warnings.catch_warnings(record=True)``, ``pytest.warns``) still gets them. If there are
    several Runners, the one that ran last gets them. torch's loggers still print on rank 0, so
    their lines go to run.log only.

    Args:
        runner: Whose logger gets the lines; this object does not keep it alive.
        prints: Whether this process may print more than errors.
    """

    def __init__(self, runner: Runner, prints: bool) -> None:
        self._runner = weakref.ref(runner)
        self._prints = prints
        self._handler = _Handler(self)
        self._errors_only = _ErrorsOnly()
        self._loggers: list[logging.Logger] = []
        self._silenced: list[logging.Handler] = []

    @property
    def logger(self) -> Any:
        """The run's logger, or None once the Runner is gone."""
        runner = self._runner()
        return None if runner is None else runner.logger

    def start(self) -> None:
        """Start capturing."""
        _HOOK.add(self)
        self._loggers = _torch_loggers()
        for logger in self._loggers:
            if not self._prints and "TORCH_LOGS" not in os.environ:
                for handler in logger.handlers:
                    handler.addFilter(self._errors_only)
                    self._silenced.append(handler)
            logger.addHandler(self._handler)

    def take_over(self) -> None:
        """Get Python's warnings from now on, instead of any other Runner."""
        _HOOK.take_over(self)

    def stop(self) -> None:
        """Stop capturing, and restore everything as it was."""
        _HOOK.remove(self)
        for logger in self._loggers:
            logger.removeHandler(self._handler)
        for handler in self._silenced:
            handler.removeFilter(self._errors_only)
        self._loggers, self._silenced = [], []


class _Hook:
    """Replace ``warnings.showwarning`` while at least one Runner captures."""

    def __init__(self) -> None:
        self._listeners: list[CapturedWarnings] = []
        self._previous: Any = None
        self._speaking = threading.local()

    def add(self, listener: CapturedWarnings) -> None:
        if not self._listeners:
            self._previous, warnings.showwarning = warnings.showwarning, self.show
        self._listeners.append(listener)

    def take_over(self, listener: CapturedWarnings) -> None:
        self._listeners.remove(listener)
        self._listeners.append(listener)

    def remove(self, listener: CapturedWarnings) -> None:
        if listener in self._listeners:
            self._listeners.remove(listener)
            if not self._listeners and warnings.showwarning == self.show:
                warnings.showwarning = self._previous

    def show(
        self,
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        logger = self._listeners[-1].logger if self._listeners else None
        again = getattr(self._speaking, "now", False)  # a warning from writing a line
        if logger is not None and not again:
            self._speaking.now = True
            try:
                where = f"{filename}:{lineno}"
                logger.warning(f"{category.__name__}: {message}", where=where)
            finally:
                self._speaking.now = False
        if again:  # or the previous function calls this one
            _ORIGINAL(message, category, filename, lineno, file, line)
        elif logger is None or file is not None or _are_recorded():
            self._speaking.now = True
            try:
                self._previous(message, category, filename, lineno, file, line)
            finally:
                self._speaking.now = False


_ORIGINAL: Any = getattr(warnings, "_showwarning_orig", warnings.showwarning)
_HOOK = _Hook()


def _are_recorded() -> bool:
    """Tell whether a ``catch_warnings(record=True)`` is open, which appends to a list."""
    show = getattr(warnings, "_showwarnmsg_impl", None)
    return isinstance(getattr(show, "__self__", None), list)


class _Handler(logging.Handler):
    """Pass the lines of a standard logger to the run's logger, for run.log only."""

    def __init__(self, captured: CapturedWarnings) -> None:
        super().__init__(logging.WARNING)
        self._captured = captured

    def emit(self, record: logging.LogRecord) -> None:
        try:
            level = "error" if record.levelno >= logging.ERROR else "warning"
            text = f"{record.name}: {record.getMessage()}"
            if (logger := self._captured.logger) is not None:
                getattr(logger, level)(text, console=False, exc_info=record.exc_info)
        except Exception:
            self.handleError(record)


def _torch_loggers() -> list[logging.Logger]:
    """Return torch's logger, and those below it that do not propagate their lines to it."""
    known = [name for name in logging.root.manager.loggerDict if name.startswith("torch.")]
    below = [logger for logger in map(logging.getLogger, known) if not logger.propagate]
    return [logging.getLogger("torch"), *below]


class _ErrorsOnly(logging.Filter):
    """Let only errors pass. Each Runner has its own filter, so that it removes no other's."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR

"""Warnings of Python and of torch, on their way into the run's log."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable
from typing import Any, TextIO


class CapturedWarnings:
    """While it is on, what ``warnings.warn`` and torch's loggers say is part of the run's log.

    Python's warnings are lines of the log, in place of what would go to stderr; whoever records
    them (``warnings.catch_warnings(record=True)``, ``pytest.warns``) gets them all the same.
    torch's loggers go on printing by themselves, on rank 0, so their lines are for the file alone.

    Args:
        logger: Returns the run's logger.
        prints: Whether this process may print more than errors.
    """

    def __init__(self, logger: Callable[[], Any], prints: bool) -> None:
        self._logger = logger
        self._prints = prints
        self._active = False
        self._handler = _Handler(logger)
        self._loggers: list[logging.Logger] = []
        self._silenced: list[logging.Handler] = []

        def is_error(record: logging.LogRecord) -> bool:
            return record.levelno >= logging.ERROR

        self._is_error = is_error  # one of its own, to be taken away alone

    def start(self) -> None:
        """Begin to listen."""
        self._active = True
        _listening.append(self)
        self._previous, warnings.showwarning = warnings.showwarning, self._show
        self._loggers = _torch_loggers()
        for logger in self._loggers:
            if not self._prints and "TORCH_LOGS" not in os.environ:
                for handler in logger.handlers:
                    handler.addFilter(self._is_error)
                    self._silenced.append(handler)
            logger.addHandler(self._handler)

    def stop(self) -> None:
        """Leave everything as it was."""
        if not self._active:
            return
        self._active = False
        _listening.remove(self)
        if isinstance(_owner(warnings.showwarning), CapturedWarnings):
            warnings.showwarning = _without_the_stopped(warnings.showwarning)
        for logger in self._loggers:
            logger.removeHandler(self._handler)
        for handler in self._silenced:
            handler.removeFilter(self._is_error)
        self._loggers, self._silenced = [], []

    def take_over(self) -> None:
        """Of several that listen, be the one that gets Python's warnings."""
        _listening.remove(self)
        _listening.append(self)

    def _show(
        self,
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if not self._active:
            self._previous(message, category, filename, lineno, file, line)
            return
        where = f"{filename}:{lineno}"
        _listening[-1]._logger().warning(f"{category.__name__}: {message}", where=where)
        if file is not None or _somebody_records():
            _below(self._previous)(message, category, filename, lineno, file, line)


_listening: list[CapturedWarnings] = []


def _owner(show: Any) -> Any:
    return getattr(show, "__self__", None)


def _without_the_stopped(show: Any) -> Any:
    """What is to be ``warnings.showwarning`` when some that were started have been stopped."""
    while isinstance(owner := _owner(show), CapturedWarnings) and not owner._active:
        show = owner._previous
    return show


def _below(show: Any) -> Any:
    """What shows a warning where no run does."""
    while isinstance(owner := _owner(show), CapturedWarnings):
        show = owner._previous
    return show


def _somebody_records() -> bool:
    """Whether a ``catch_warnings(record=True)`` is open, which appends to a list."""
    show = getattr(warnings, "_showwarnmsg_impl", None)
    return isinstance(getattr(show, "__self__", None), list)


class _Handler(logging.Handler):
    """Hands a line of a standard logger to the run's, for the file alone."""

    def __init__(self, logger: Callable[[], Any]) -> None:
        super().__init__(logging.WARNING)
        self._logger = logger

    def emit(self, record: logging.LogRecord) -> None:
        level = "error" if record.levelno >= logging.ERROR else "warning"
        try:
            text = f"{record.name}: {record.getMessage()}"
        except Exception:  # of a message that its values do not fit
            self.handleError(record)
        else:
            getattr(self._logger(), level)(text, console=False)


def _torch_loggers() -> list[logging.Logger]:
    """torch's logger, and those below it that keep their lines to themselves."""
    known = [name for name in logging.root.manager.loggerDict if name.startswith("torch.")]
    below = [logger for logger in map(logging.getLogger, known) if not logger.propagate]
    return [logging.getLogger("torch"), *below]

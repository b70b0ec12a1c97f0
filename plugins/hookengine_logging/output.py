"""Where the lines of ``runner.logger`` go: the console and ``run.log``."""

from __future__ import annotations

import logging
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

import structlog
from structlog.typing import EventDict


class Output:
    """The console, and a file beside it.

    Each line is printed to what ``sys.stdout`` is at that moment, so that a progress bar that has
    put itself there can place the line above itself. Until the file is opened its lines are kept.
    An event may come with ``run_log="..."``: the text that the file gets in its stead, where the
    whole is too long for the console.

    Args:
        console: Whether this process prints all lines; without, it prints errors only.
    """

    def __init__(self, console: bool) -> None:
        self._console = console
        self._file: TextIO | None = None
        self._early: list[str] | None = []

    def open(self, path: Path) -> None:
        """Open the file, and write what was kept for it."""
        self._file = path.open("a", encoding="utf-8")
        early, self._early = self._early or [], None
        for text in early:
            self._write(text)

    def line(self, event: EventDict) -> None:
        """Write one event."""
        level = event.pop("level").upper()
        timestamp = event.pop("timestamp")
        text = str(event.pop("event"))
        whole = str(event.pop("run_log", text))
        exception = event.pop("exception", None)
        mark = "" if level == "INFO" else f"{level} "
        details = "".join(f"  {key}={value}" for key, value in event.items())
        details += f"\n{exception}" if exception else ""
        if self._console or level in ("ERROR", "CRITICAL"):
            self._print(f"{timestamp[11:]}  {mark}{text}{details}")
        self._write(f"{timestamp}  {mark}{whole}{details}")

    def _print(self, text: str) -> None:
        try:
            print(f"{text}\n", end="", flush=True)  # in one write, beside other ranks
        except (OSError, ValueError) as error:  # a full disk behind it, or it was closed
            self._console = False
            with suppress(OSError, ValueError):
                print(f"cannot print any more, see run.log: {error}", file=sys.stderr)

    def _write(self, text: str) -> None:
        """Write to the file; a disk that fails costs the line, not the run."""
        if self._early is not None:
            self._early.append(text)
        if self._file is None:
            return
        try:
            self._file.write(text + "\n")
            self._file.flush()
        except OSError as error:
            self._file = None
            self._print(f"cannot write run.log any more: {error.strerror}")

    def close(self) -> None:
        """Close the file; later lines go to the console alone."""
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
            self._file = None


class _Logger:
    """What structlog calls last: one method per level, each of which writes the event."""

    def __init__(self, output: Output) -> None:
        self._output = output

    def _write(self, **event: Any) -> None:
        self._output.line(event)

    debug = info = warning = warn = error = err = critical = fatal = exception = msg = _write


def make_logger(output: Output, level: str) -> Any:
    """A structlog logger that writes to ``output`` from ``level`` up."""
    return structlog.wrap_logger(
        _Logger(output),
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="%Y-%m-%d %H:%M:%S", utc=False),
            structlog.processors.format_exc_info,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelName(level)),
    )

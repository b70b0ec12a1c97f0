"""Where the lines of ``runner.logger`` go: the console and ``run.log``."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from contextlib import suppress
from math import isfinite
from pathlib import Path
from typing import Any, TextIO

from structlog.typing import EventDict

from hookengine import Record, keep_open

_CONTEXT = ("run", "epoch", "iteration", "plugin")


class Output:
    """Write lines to the console and to a file.

    Each line is printed to the current ``sys.stdout``, so that a progress bar that has replaced it
    can print the line above itself. Lines that come before the file is opened are kept for it.

    Three keys of an event change where it goes: ``run_log="..."`` is a longer text for the file, to
    which the console refers unless its own text is the beginning of it; ``console=False`` keeps
    the event off the console; ``record=...`` is the record that the text shows, whose values become
    fields in JSON.

    Args:
        console: Whether this process prints all lines; if False, it prints errors only.
        json: Whether to write JSON objects with run, epoch, iteration and plugin.
    """

    def __init__(self, console: bool, json: bool = False) -> None:
        self._console = console
        self._json = json
        self._file: TextIO | None = None
        self._early: list[str] | None = [] if console else None

    def open(self, path: Path) -> None:
        """Open the file, and write the lines kept for it."""
        self._file = keep_open(path.open("a", encoding="utf-8", errors="backslashreplace"))
        early, self._early = self._early or [], None
        for text in early:
            self._write(text)

    def line(self, event: EventDict) -> None:
        """Write one event."""
        level = event["level"].upper()
        prints = event.pop("console", True) and (self._console or level in ("ERROR", "CRITICAL"))
        text = str(event.pop("event"))
        whole = str(event.pop("run_log", text))
        record = event.pop("record", None)
        if self._json:
            values = {}
            if record is not None:
                text = whole = record.phase
                values = _values(record)
            texts = [_json_line({"event": e, **event}, values) for e in (text, whole)]
        else:
            texts = _plain_lines(event, text, whole)
            if self._has_file and not whole.startswith(text):
                texts[0] += f"{chr(10) if chr(10) in text else ''}  (in full in run.log)"
        if prints:
            self._print(texts[0])
        self._write(texts[1])

    def _print(self, text: str) -> None:
        try:
            try:
                print(
                    f"{text}\n", end="", flush=True
                )  # in one write, so that lines of ranks do not mix
            except UnicodeEncodeError as error:  # this console lacks a character
                plain = text.encode(error.encoding, "backslashreplace").decode(error.encoding)
                print(f"{plain}\n", end="", flush=True)
        except (OSError, ValueError) as error:  # its disk is full, or it is closed
            self._console = False
            with suppress(OSError, ValueError):
                where = ", see run.log" if self._has_file else ""
                print(f"can no longer print to the console{where}: {error}", file=sys.stderr)

    @property
    def _has_file(self) -> bool:
        """Whether lines are written to the file, or kept until it is opened."""
        return self._file is not None or self._early is not None

    def _write(self, text: str) -> None:
        """Write to the file; if the disk fails, lines are lost, but the run continues."""
        if self._early is not None:
            self._early.append(text)
        if self._file is None:
            return
        try:
            self._file.write(text + "\n")
            self._file.flush()
        except OSError as error:
            self.close()
            self._print(f"can no longer write run.log: {error.strerror}")

    def close(self) -> None:
        """Close the file; later lines go to the console only."""
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
            self._file = None


def _values(record: Record) -> dict[str, Any]:
    values: dict[str, Any] = {"phase": record.phase, "step": record.step}
    return values | {f"value/{n}" if n in values else n: v for n, v in record.scalars.items()}


def _json_line(event: Mapping[str, Any], values: Mapping[str, Any]) -> str:
    """Return one JSON object; a value whose name the event uses itself is ``value/NAME``."""
    fields = {**{f"value/{k}" if k in event else k: v for k, v in values.items()}, **event}
    texts = (f"{json.dumps(name)}: {_json(value)}" for name, value in fields.items())
    return "{" + ", ".join(texts) + "}"


def _json(value: Any) -> str:
    """Return a value as JSON; one that JSON cannot hold, as its ``repr``."""
    if isinstance(value, float) and not isfinite(value):
        return json.dumps(str(value))
    try:
        return json.dumps(value, allow_nan=False, default=repr)
    except (TypeError, ValueError):  # NaN or itself within it, or keys that are not texts
        return json.dumps(repr(value))


def _plain_lines(event: EventDict, text: str, whole: str) -> list[str]:
    """Return the line for the console and the line for the file."""
    timestamp, level = event.pop("timestamp"), event.pop("level").upper()
    exception = event.pop("exception", None)
    mark = "" if level == "INFO" else f"{level} "
    details = "".join(f"  {k}={value}" for k, value in event.items() if k not in _CONTEXT)
    details += f"\n{exception}" if exception else ""
    return [f"{timestamp[11:]}  {mark}{text}{details}", f"{timestamp}  {mark}{whole}{details}"]

"""A ``Session`` in a process of its own, as if it were here."""

from __future__ import annotations

import json
import select
import subprocess
import sys
from pathlib import Path
from typing import Any, Protocol


class SessionLike(Protocol):
    """What a session can be asked to do; see ``hookengine_wandb.session``."""

    def begin(
        self,
        folder: str,
        continues: bool,
        mode: str | None,
        by_epoch: bool,
        options: dict[str, Any],
        settings: dict[str, Any],
    ) -> dict[str, Any]: ...
    def log(self, line: str) -> None: ...
    def summarize(self, values: dict[str, Any]) -> None: ...
    def upload(self, path: str, aliases: list[str], metadata: dict[str, Any]) -> None: ...
    def finish(self, exit_code: int, files: list[str]) -> dict[str, Any]: ...
    def abort(self) -> None: ...


class SessionProcess:
    """Starts the process, and hands each call to it.

    Ctrl-C does not reach it; when the training is gone, it ends the run and itself.

    Args:
        log: A file for what the process prints.

    Raises:
        OSError: it could not be started, or is gone. RuntimeError: what went wrong there, which
        for calls without an answer may be told by a later call.
    """

    def __init__(self, log: Path) -> None:
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("session.py"))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                start_new_session=True,
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        self._failures: list[str] = []

    def begin(
        self,
        folder: str,
        continues: bool,
        mode: str | None,
        by_epoch: bool,
        options: dict[str, Any],
        settings: dict[str, Any],
    ) -> dict[str, Any]:
        """Begin, and wait for the answer."""
        run = {"folder": folder, "continues": continues, "mode": mode, "by_epoch": by_epoch}
        self._send("begin", {**run, "options": options, "settings": settings})
        return self._answer()

    def log(self, line: str) -> None:
        """Add a row."""
        self._send("log", {"line": line})
        self._complain()

    def summarize(self, values: dict[str, Any]) -> None:
        """Put values into the summary."""
        self._send("summarize", {"values": values})
        self._complain()

    def upload(self, path: str, aliases: list[str], metadata: dict[str, Any]) -> None:
        """Make an artifact."""
        self._send("upload", {"path": path, "aliases": aliases, "metadata": metadata})
        self._complain()

    def finish(self, exit_code: int, files: list[str]) -> dict[str, Any]:
        """End, and wait for the answer."""
        try:
            self._send("finish", {"exit_code": exit_code, "files": files})
            answer = self._answer()
        except Exception:
            self.abort()
            raise
        with self._process:  # closes the pipes, and waits
            return {**answer, "failures": self._failures}

    def abort(self) -> None:
        """End the process, as it is."""
        self._process.kill()
        with self._process:
            pass

    def _send(self, name: str, arguments: dict[str, Any]) -> None:
        self._stdin.write(json.dumps({"do": name, **arguments}) + "\n")
        self._stdin.flush()

    def _complain(self) -> None:
        """Raise what an earlier call has led to, if it is known by now."""
        while select.select([self._stdout], [], [], 0)[0]:
            self._failures.append(self._read()["failed"])
        if self._failures:
            raise RuntimeError(self._failures.pop(0))

    def _answer(self) -> dict[str, Any]:
        while "failed" in (line := self._read()):
            self._failures.append(line["failed"])
        if "error" in line:
            raise RuntimeError(line["error"])
        answer: dict[str, Any] = line["answer"]
        return answer

    def _read(self) -> dict[str, Any]:
        line = self._stdout.readline()
        if not line:
            raise OSError(f"the process that speaks with W&B has ended ({self._process.wait()})")
        read: dict[str, Any] = json.loads(line)
        return read

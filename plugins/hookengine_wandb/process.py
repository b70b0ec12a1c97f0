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
        self._send("finish", {"exit_code": exit_code, "files": files})
        try:
            return self._answer()
        finally:
            with self._process:  # closes the pipes, and waits
                pass

    def _send(self, name: str, arguments: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": name, **arguments}) + "\n")
        self._process.stdin.flush()

    def _complain(self) -> None:
        assert self._process.stdout is not None
        if select.select([self._process.stdout], [], [], 0)[0]:
            self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise OSError(f"the process that speaks with W&B has ended ({self._process.wait()})")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

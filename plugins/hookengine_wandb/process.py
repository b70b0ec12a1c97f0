"""Run a ``Session`` in another process, with the same methods."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol


class SessionLike(Protocol):
    """The methods of a session; see ``hookengine_wandb.session``."""

    def begin(self, how: dict[str, Any]) -> dict[str, Any]: ...
    def log(self, line: str) -> None: ...
    def summarize(self, values: dict[str, Any]) -> None: ...
    def upload(self, path: str, aliases: list[str], metadata: dict[str, Any]) -> None: ...
    def rest(self, seconds: float, exit_code: int, files: list[str]) -> None: ...
    def wake(self) -> object: ...
    def finish(self, exit_code: int, files: list[str]) -> dict[str, Any]: ...
    def abort(self) -> None: ...


class SessionProcess:
    """Start the process, and pass each call to it.

    Ctrl-C does not reach the process. When training is gone, it finishes the W&B run and exits. It
    also does so after ``rest``; by then, neither a thread nor a pipe of it is left here.

    Args:
        log: The file for what the process prints.

    Raises:
        OSError: The process could not be started, or has ended.
        RuntimeError: A call failed in the process. If the call has no answer, a later call raises
            the error.
    """

    def __init__(self, log: Path) -> None:
        self._log = log
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
        self._resting = False
        self._rested: dict[str, Any] | None = None
        self._lines: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, name="wandb answers", daemon=True)
        self._reader.start()

    def begin(self, how: dict[str, Any]) -> dict[str, Any]:
        """Start the W&B run, and wait for the answer."""
        self._send("begin", {"how": how})
        return self._answer()

    def log(self, line: str) -> None:
        """Log a row."""
        self._send("log", {"line": line})
        self._complain()

    def summarize(self, values: dict[str, Any]) -> None:
        """Update the summary."""
        self._send("summarize", {"values": values})
        self._complain()

    def upload(self, path: str, aliases: list[str], metadata: dict[str, Any]) -> None:
        """Upload a checkpoint as an artifact."""
        self._send("upload", {"path": path, "aliases": aliases, "metadata": metadata})
        self._complain()

    def rest(self, seconds: float, exit_code: int, files: list[str]) -> None:
        """Let the process finish the W&B run and exit, unless ``wake`` is called in time.

        Args:
            seconds: How long to wait for ``wake``.
            exit_code: See ``Session.finish``.
            files: See ``Session.finish``.
        """
        arguments = {"seconds": seconds, "exit_code": exit_code, "files": files}
        self._send("rest", arguments)
        self._resting = True
        self._complain()

    def wake(self) -> bool:
        """End the rest; return whether the W&B run is still open. Call it before another command.

        The process confirms it, so that no command can reach a process that is about to exit.
        """
        if not self._resting:
            return self._rested is None
        self._resting = False
        with suppress(OSError):  # it has ended
            self._send("wake", {})
        while (line := self._lines.get()) is not None:
            if "answer" in line:
                return True
            if "rested" in line:
                self._rested = line["rested"]
                self._end()
                return False
            self._failures.append(line["failed"])
        error = self._gone()
        self.abort()
        raise error

    def finish(self, exit_code: int, files: list[str]) -> dict[str, Any]:
        """Finish the W&B run, and wait for the answer, unless it has finished after ``rest``."""
        if not self.wake():
            return {**(self._rested or {}), "failures": self._failures}
        try:
            self._send("finish", {"exit_code": exit_code, "files": files})
            answer = self._answer()
        except Exception:
            self.abort()
            raise
        self._end()
        return {**answer, "failures": self._failures}

    def abort(self) -> None:
        """Kill the process."""
        self._process.kill()
        self._end()

    def _end(self) -> None:
        self._process.wait()
        self._reader.join()
        self._close_pipes()

    def _close_pipes(self) -> None:
        with suppress(BrokenPipeError), self._process:
            pass

    def _send(self, name: str, arguments: dict[str, Any]) -> None:
        try:
            self._stdin.write(json.dumps({"do": name, **arguments}) + "\n")
            self._stdin.flush()
        except (BrokenPipeError, ValueError) as error:
            raise self._gone() from error

    def _gone(self) -> OSError:
        self._lines.put(None)  # wakes the next call: W&B's own process may keep the pipe open
        code = self._process.wait()
        return OSError(
            f"the process that logs to W&B has ended with exit code {code}. See {self._log}"
        )

    def _read(self) -> None:
        """Read answers on a separate thread, so that the process never waits for us."""
        for line in self._stdout:
            self._lines.put(json.loads(line))
        self._lines.put(None)
        if self._resting:  # no other call may follow, so this thread releases everything
            self._process.wait()
            self._close_pipes()

    def _complain(self) -> None:
        """Raise the error of an earlier call, if it is known by now."""
        while not self._lines.empty():
            line = self._lines.get()
            if line is None:
                raise self._gone()
            self._failures.append(line["failed"])
        if self._failures:
            raise RuntimeError(self._failures.pop(0))

    def _answer(self) -> dict[str, Any]:
        while (line := self._lines.get()) is not None:
            if "error" in line:
                raise RuntimeError(line["error"])
            if "answer" in line:
                answer: dict[str, Any] = line["answer"]
                return answer
            self._failures.append(line["failed"])
        raise self._gone()

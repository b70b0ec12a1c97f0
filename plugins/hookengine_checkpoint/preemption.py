"""Signals that end a run with a checkpoint, on all ranks together."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from types import FrameType
from typing import Any

from hookengine import Runner, dist

EXIT_CODE = 75
"""``EX_TEMPFAIL`` of sysexits.h: the run ended early and can be started again."""


class Signals:
    """Handles signals during a run: the first one is a request, a second one ends the process.

    Handlers that were installed before are called, too, and can be restored.

    Args:
        names: Such as ``SIGTERM``. Signals that the platform lacks are skipped, and ignored signals
            stay ignored. Outside the main thread, which alone can handle signals, all are skipped.
        request: Called with the name of the first signal.

    Attributes:
        received: The name of the first signal, or None.
    """

    def __init__(self, names: Iterable[str], request: Callable[[str], None]) -> None:
        self.received: str | None = None
        self._request = request
        self._since = 0.0
        self._previous: dict[int, Any] = {}
        if threading.current_thread() is not threading.main_thread():
            return
        for name in names:
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        # A launcher may turn one Ctrl-C into two different signals; these count as one request.
        at_once = time.monotonic() - self._since < 1 and name != self.received
        if self.received is not None and at_once:
            return
        if self.received is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.received, self._since = name, time.monotonic()
        self._request(self.received)
        previous = self._previous.get(number)
        if callable(previous) and previous is not signal.default_int_handler:
            previous(number, frame)

    def restore(self) -> None:
        """Restore the previous handlers, except where somebody has replaced ours since."""
        for number, previous in self._previous.items():
            if signal.getsignal(number) == self._handle and previous is not None:
                signal.signal(number, previous)
        self._previous.clear()


class Preemption:
    """Ends training early when a signal asks for it, on all ranks at the same safe point.

    Args:
        runner: The Runner that trains.
        names: The signals to handle, see ``Signals``.
    """

    def __init__(self, runner: Runner, names: Iterable[str]) -> None:
        self._runner = runner
        self._signals = Signals(names, self._request)
        self._agreed: str | None = None

    def _request(self, name: str) -> None:
        """Request a checkpoint and the end of training."""
        self._runner.requests["preempt"] = name
        self._runner.stop(name)

    def note(self, agreed: Mapping[str, str]) -> None:
        """Note whether preemption is among the requests that all ranks have agreed on."""
        self._agreed = agreed.get("preempt", self._agreed)

    def agree(self) -> None:
        """Agree on a signal that arrived too late for the last safe point; all ranks call it."""
        if self._agreed is None:
            received = dist.all_gather_objects(self._signals.received)
            self._agreed = next((name for name in received if name is not None), None)

    def restore_handlers(self) -> None:
        """Restore the signal handlers that were installed before."""
        self._signals.restore()

    def finish(self) -> None:
        """Restore the signal handlers, and end the process if a signal has asked for it.

        Raises:
            KeyboardInterrupt: After Ctrl-C at an interactive prompt.
            SystemExit: After any other signal, with ``EXIT_CODE``.
        """
        self._signals.restore()
        alone = dist.get_world_size() == 1
        received = self._agreed or (self._signals.received if alone else None)
        if received == "SIGINT" and hasattr(sys, "ps1"):
            raise KeyboardInterrupt  # the user at the prompt wants to stay there
        if received is not None:
            self._runner.logger.warning(
                f"ended by {received} with exit code {EXIT_CODE}; resume='auto' resumes from here"
            )
            raise SystemExit(EXIT_CODE)

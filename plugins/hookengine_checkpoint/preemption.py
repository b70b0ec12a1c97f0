"""Signals that ask for the end of a run, and a second one that does not ask."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

EXIT_CODE = 75
"""``EX_TEMPFAIL`` of sysexits.h: ended before its time, start it again."""


class Signals:
    """Takes signals while a run goes on; what was there before is called too, and put back.

    Args:
        names: ``SIGTERM`` and the like; those that the platform lacks are left out, and those that
            are ignored stay so.
        request: Told the name of the first one.
    """

    def __init__(self, names: Iterable[str], request: Callable[[str], None]) -> None:
        self.received: str | None = None
        self._request = request
        self._since = 0.0
        self._before: dict[int, Any] = {}
        if threading.current_thread() is not threading.main_thread():
            return  # only there can signals be taken
        for name in names:
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        # A launcher may turn one Ctrl-C into two signals: those are one wish.
        at_once = time.monotonic() - self._since < 1 and name != self.received
        if self.received is not None and at_once:
            return
        if self.received is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.received, self._since = name, time.monotonic()
        self._request(self.received)
        before = self._before.get(number)
        if callable(before) and before is not signal.default_int_handler:
            before(number, frame)

    def restore(self) -> None:
        """Put back what was there before, unless somebody has taken the signal meanwhile."""
        for number, before in self._before.items():
            if signal.getsignal(number) == self._handle and before is not None:
                signal.signal(number, before)
        self._before.clear()

"""The life cycle of a Runner: how runs begin and end, and how the Runner closes exactly once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

from hookengine.abandoned import close_later, forget, remember
from hookengine.events.hookspecs import HookSpecs
from hookengine.events.manager import PluginManager


class Life:
    """Give the Runner ``close``, the ``with`` statement and the events that begin and end a run.

    Attributes:
        closed: Whether the Runner is closed and its plugins have released their resources.
        built: Whether construction has finished.
    """

    hooks: HookSpecs
    plugins: PluginManager
    requests: dict[str, str]
    logger: Any
    closed = False
    built = False
    _process: int | None = None
    _depth = 0

    def close(self) -> None:
        """Have the plugins release their resources, and close the Runner permanently.

        Further calls do nothing.

        Raises:
            RuntimeError: If a run is in progress.
        """
        if self.closed:
            return
        if self._depth:
            raise RuntimeError("close() was called during a run. Call stop() to end the run first")
        self.closed = True
        forget(self)
        try:
            with self._errors_blamed():
                self.plugins.unconfigure()
        finally:
            self._leave_run()
            self._let_go()

    def _leave_run(self) -> None:
        """Discard the position at which an interrupted run would resume."""

    def _let_go(self) -> None:
        """Remove the hooks from objects that may outlive the Runner."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
        else:
            self._also(error, self.close)

    def __del__(self) -> None:
        if self._process == os.getpid() and not self.closed:  # a forked process has a copy
            close_later(self)

    def _check_open(self) -> None:
        if self.closed:
            raise RuntimeError("this Runner is closed. Create a new one")

    @contextmanager
    def _building(self) -> Iterator[None]:
        """Wrap the construction of the Runner, and close the Runner if construction fails."""
        self._process = os.getpid()
        remember(self)
        with self._errors_blamed(close=True):
            yield
        self.built = True

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Wrap a call of train(), val() or test(): emit before_run and, at the end, after_run.

        A validation that a plugin starts during a run is part of that run.
        """
        if self._depth:
            yield
            return
        self._depth = 1
        try:
            with self._errors_blamed():
                try:
                    with self.plugins.opened("before_run"):
                        self.hooks.before_run(self.hooks.runner)
                        yield
                except BaseException as error:
                    self._leave_run()
                    self.plugins.blame(error)
                    self._also(error, self.hooks.on_exception, self.hooks.runner, error)
                    self._also(error, self.hooks.after_run, self.hooks.runner)
                    raise
                self.hooks.after_run(self.hooks.runner)
        finally:
            self._depth = 0
            self.requests.clear()

    def _also(self, error: BaseException, call: Callable[..., None], *arguments: Any) -> None:
        """Call a closing step after ``error``; note what it raises without hiding ``error``."""
        try:
            call(*arguments)
        except BaseException as other:  # including a second Ctrl-C
            self.plugins.blame(other)
            notes = "; ".join(getattr(other, "__notes__", []))
            error.add_note(f"and then {type(other).__name__}: {other} ({notes})")

    @contextmanager
    def _errors_blamed(self, close: bool = False) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self.plugins.blame(error)
            if close:
                self._also(error, self.close)
            raise

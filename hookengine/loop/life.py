"""The life of a Runner: runs that begin and end, and a close that comes once, whatever happens."""

from __future__ import annotations

import atexit
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

from hookengine.events.hookspecs import HookSpecs
from hookengine.events.manager import PluginManager


class Life:
    """What the Runner inherits: ``close``, ``with``, and the events that open and end a run.

    Attributes:
        closed: Whether the plugins have given back what they took.
        built: Whether the construction is over.
    """

    hooks: HookSpecs
    plugins: PluginManager
    requests: dict[str, str]
    logger: Any
    closed = False
    built = False
    _begun = False
    _depth = 0

    def close(self) -> None:
        """Let the plugins give back what they took; the Runner cannot be used afterwards."""
        if self.closed:
            return
        if self._depth:
            raise RuntimeError("close() was called within a run that goes on: call stop() there")
        self.closed = True
        _open_lives.discard(self)
        try:
            with self._errors_blamed():
                self.plugins.unconfigure()
        finally:
            self._leave_run()
            self._let_go()

    def _leave_run(self) -> None:
        """Drop what a run that was left in the middle would go on with."""

    def _let_go(self) -> None:
        """Take the hooks from what may live longer than the Runner."""

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
        if self._begun and not self.closed:
            _close_quietly(self)

    def _check_open(self) -> None:
        if self.closed:
            raise RuntimeError("this Runner is closed: make another one")

    @contextmanager
    def _building(self) -> Iterator[None]:
        """The construction: one that fails is closed."""
        self._begun = True
        _open_lives.add(self)
        with self._errors_blamed(close=True):
            yield
        self.built = True

    @contextmanager
    def _running(self) -> Iterator[None]:
        """One call of train(), val() or test(): before_run, and on the way out after_run.

        A validation that a plugin starts within a run is a part of it.
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
        """Run a closing event after ``error``; what it raises is noted and does not hide it."""
        try:
            call(*arguments)
        except BaseException as other:  # a second Ctrl-C, too
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


_open_lives: weakref.WeakSet[Life] = weakref.WeakSet()


def _close_quietly(life: Life) -> None:
    try:
        life.close()
    except Exception as error:
        life.logger.error(f"closing failed: {error!r}")


@atexit.register
def _close_all() -> None:
    for life in list(_open_lives):
        _close_quietly(life)

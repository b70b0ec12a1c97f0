"""Ending all ranks after an error on one of them; each rank reports whose error it was."""

from __future__ import annotations

import os
import sys
import threading
import uuid
import weakref
from contextlib import suppress

import structlog
from torch.distributed.distributed_c10d import _get_default_store

from hookengine import Runner, dist

POLL_SECONDS = 0.5
GRACE_SECONDS = 10.0


class RankError(RuntimeError):
    """Another rank has failed."""


class Watch:
    """Reports errors to the other ranks, and watches for errors that they report.

    All ranks create one together.

    The store through which the ranks have found each other keeps the reports, and a thread on each
    rank checks it. A rank that waits for a failed one usually notices that when the connection
    breaks. If it has not ended after a while, the thread ends the process.

    Args:
        runner: The Runner, whose logger logs the errors of other ranks.

    Attributes:
        failure: The error that another rank has reported, or None.
        told: Whether this rank has reported an error.
    """

    def __init__(self, runner: Runner) -> None:
        self.failure: str | None = None
        self.told = False
        self._rank = dist.get_rank()
        # The store may outlive the processes: torchrun keeps it when it restarts them.
        self._key = f"hookengine/{dist.broadcast_object(uuid.uuid4().hex)}/failure"
        self._runner = weakref.ref(runner)  # the thread must not keep it alive
        self._over = threading.Event()
        store = _get_default_store()
        self._store = store.clone() if hasattr(store, "clone") else store
        self._thread = threading.Thread(target=self._look, name="watch of ranks", daemon=True)
        self._thread.start()

    def tell(self, error: BaseException) -> None:
        """Report an error to the other ranks, and add a note to it if another rank failed first."""
        if self.told:
            return
        self.told = True
        self._over.set()
        text = f"{type(error).__name__}: {error}"[:2000]
        first = self._first(f"rank {self._rank}: {text}")
        error.add_note(f"on rank {self._rank} of {dist.get_world_size()}")
        lost = "closed by peer" in str(error) or "reset by peer" in str(error)
        if first is not None and not first.endswith(text):
            error.add_note(f"another rank failed first, which may be the cause: {first}")
            self._error(f"rank {self._rank} ends because another failed: {first}")
        elif lost and (gone := self._ended()):
            error.add_note(
                f"rank {gone[0]} has already closed its Runner. All ranks must make the same calls "
                "of train(), val() and test()"
            )
        elif lost:
            error.add_note("another rank ended unexpectedly: was it killed, or out of memory?")

    def _ended(self) -> list[int]:
        """Return the ranks that have closed their Runner."""
        ranks = range(dist.get_world_size())
        with suppress(Exception):  # the process that keeps the store is gone
            return [r for r in ranks if self._store.check([f"{self._key}/closed/{r}"])]
        return []

    def _first(self, text: str) -> str | None:
        try:
            told: bytes = self._store.compare_set(self._key, "", text)
        except Exception:  # the process that keeps the store is gone
            return self.failure
        return told.decode(errors="replace")

    def check(self) -> None:
        """Raise if a rank has failed.

        Raises:
            RankError: This rank or another one has failed.
        """
        if self.failure is not None:
            raise RankError(self.failure)
        if self.told:
            raise RankError(
                f"rank {self._rank} has already failed, and the others have ended. Restart them all"
            )

    def stop(self) -> None:
        """Stop watching, because the Runner is closed."""
        if not self.told:
            with suppress(Exception):
                self._store.set(f"{self._key}/closed/{self._rank}", "closed")
        self._over.set()
        self._thread.join()

    def _error(self, text: str) -> None:
        runner = self._runner()
        logger = structlog.get_logger("hookengine") if runner is None else runner.logger
        logger.error(text)

    def _look(self) -> None:
        while not self._over.wait(POLL_SECONDS):
            try:
                if not self._store.check([self._key]):
                    continue
                self.failure = self._store.get(self._key).decode(errors="replace")
            except Exception:  # torchrun, or rank 0 at its end, keeps the store and is gone
                if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
                    return
                self.failure = "torchrun has ended"
            break
        if self.failure is None or self._over.wait(GRACE_SECONDS):
            return
        self._error(
            f"{self.failure}; rank {self._rank} is still waiting after {GRACE_SECONDS:g} s, so its "
            "process is terminated"
        )
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)

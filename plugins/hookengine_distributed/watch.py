"""An error of one rank ends all of them, and each says whose it was."""

from __future__ import annotations

import os
import sys
import threading
import uuid
from contextlib import suppress
from typing import Any

from torch.distributed.distributed_c10d import _get_default_store

from hookengine import dist

POLL_SECONDS = 0.5
GRACE_SECONDS = 10.0


class RankError(RuntimeError):
    """Another rank has failed."""


class Watch:
    """Tells the other ranks of an error, and looks whether one of them has told of one.

    All ranks make one together.

    What a rank tells is kept by the store in which the ranks have found each other. A thread of
    each looks there. A rank that waits for one that failed mostly learns of it when the connection
    breaks; one that has not ended after a while is ended by the thread.

    Args:
        runner: Its logger is told of the error of another rank.

    Attributes:
        failure: What another rank has told, or None.
        told: Whether this one has told of an error.
    """

    def __init__(self, runner: Any) -> None:
        self.failure: str | None = None
        self.told = False
        self._rank = dist.get_rank()
        # The store may outlive the processes: torchrun's does when it starts them again.
        self._key = f"hookengine/{dist.broadcast_object(uuid.uuid4().hex)}/failure"
        self._runner = runner
        self._over = threading.Event()
        store = _get_default_store()
        self._store = store.clone() if hasattr(store, "clone") else store
        self._thread = threading.Thread(target=self._look, name="watch of ranks", daemon=True)
        self._thread.start()

    def tell(self, error: BaseException) -> None:
        """Tell the others; where one of them was the first, the error gets a note that says so."""
        if self.told:
            return
        self.told = True
        self._over.set()
        text = f"{type(error).__name__}: {error}"[:2000]
        first = self._first(f"rank {self._rank}: {text}")
        error.add_note(f"on rank {self._rank} of {dist.get_world_size()}")
        lost = "closed by peer" in str(error) or "reset by peer" in str(error)
        if first is not None and not first.endswith(text):
            error.add_note(f"another rank failed before, which may be why: {first}")
            self._runner.logger.error(f"rank {self._rank} ends, since another failed: {first}")
        elif lost and (gone := self._ended()):
            error.add_note(
                f"rank {gone[0]} has closed its Runner already: all ranks must call train(), val() "
                "and test() alike"
            )
        elif lost:
            error.add_note("another rank ended without a word: was it killed, or out of memory?")

    def _ended(self) -> list[int]:
        """The ranks that have closed their Runner."""
        ranks = range(dist.get_world_size())
        with suppress(Exception):  # who keeps the store is gone
            return [r for r in ranks if self._store.check([f"{self._key}/closed/{r}"])]
        return []

    def _first(self, text: str) -> str | None:
        try:
            told: bytes = self._store.compare_set(self._key, "", text)
        except Exception:  # who keeps the store is gone
            return self.failure
        return told.decode(errors="replace")

    def check(self) -> None:
        """Raise if a rank has failed.

        Raises:
            RankError: one has.
        """
        if self.failure is not None:
            raise RankError(self.failure)
        if self.told:
            raise RankError(
                f"rank {self._rank} has failed before, and the others have ended: start all anew"
            )

    def stop(self) -> None:
        """Look no more; the Runner is closed."""
        if not self.told:
            with suppress(Exception):
                self._store.set(f"{self._key}/closed/{self._rank}", "closed")
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(POLL_SECONDS):
            try:
                if not self._store.check([self._key]):
                    continue
                self.failure = self._store.get(self._key).decode(errors="replace")
            except Exception:  # who keeps the store is gone: torchrun, or rank 0 at its end
                if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
                    return
                self.failure = "torchrun has ended"
            break
        if self.failure is None or self._over.wait(GRACE_SECONDS):
            return
        self._runner.logger.error(
            f"{self.failure}; rank {self._rank} still waits after {GRACE_SECONDS:g} s, and its "
            "process is ended"
        )
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)

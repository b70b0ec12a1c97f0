"""Combining the requests of all ranks to stop or to save."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
import torch.distributed as torch_dist

SECONDS = 1.0
MOST = 100


class Agreement:
    """Asks all ranks, about once a second, whether one of them has a request.

    This takes one all-reduce of two numbers in a separate process group, which runs during training
    until the next question. The ranks exchange their requests only if one of them has any.

    Args:
        group: A process group on the CPU that nothing else uses.
    """

    def __init__(self, group: torch_dist.ProcessGroup) -> None:
        self._group = group
        self._asked: torch.Tensor | None = None
        self._work: torch_dist.Work | None = None
        self._interval = 1
        self._left = 0
        self._since = time.perf_counter()
        self._points = 0

    def settle(self, requests: Mapping[str, str], at_once: bool) -> dict[str, str]:
        """Return what all ranks agree on at this safe point; all must call it at the same ones.

        Args:
            requests: The requests of this rank.
            at_once: Whether to ask now and wait for the answer.
        """
        self._points += 1
        self._left -= 1
        if at_once:
            self._answer()
            self._ask(bool(requests))
        elif self._left > 0:
            return {}
        wanted = self._answer()
        agreed = self._exchange(requests) if wanted else {}
        if not at_once:
            self._ask(bool(requests) and not wanted)
        return agreed

    def _ask(self, wanted: bool) -> None:
        now = time.perf_counter()
        seconds = (now - self._since) / max(self._points, 1)
        self._since, self._points = now, 0
        self._asked = torch.tensor([float(wanted), seconds], dtype=torch.float64)
        self._work = torch_dist.all_reduce(
            self._asked, torch_dist.ReduceOp.MAX, group=self._group, async_op=True
        )

    def _answer(self) -> bool:
        """Return whether any rank had a request when asked, and schedule the next question."""
        if self._work is None or self._asked is None:
            return False
        self._work.wait()
        wanted, seconds = self._asked.tolist()
        self._work = self._asked = None
        self._interval = min(max(round(SECONDS / max(seconds, 1e-9)), 1), MOST)
        self._left = self._interval
        return bool(wanted)

    def _exchange(self, requests: Mapping[str, str]) -> dict[str, str]:
        everybody: list[dict[str, str]] = [{}] * self._group.size()
        torch_dist.all_gather_object(everybody, dict(requests), group=self._group)
        agreed: dict[str, str] = {}
        for wanted in everybody:
            for request, reason in wanted.items():
                agreed.setdefault(request, reason)
        return agreed

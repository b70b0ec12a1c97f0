"""The learning rates while weights are averaged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import SWALR

from hookengine import OptimWrapper


class Rates:
    """The learning rates of one optimizer while weights are averaged.

    A parameter group that is added in between moves from its learning rate to the constant one too,
    and has that one at once if the others have reached it.

    Args:
        optim_wrapper: The wrapper of the optimizer.
        scheduler: The scheduler that changes the learning rates.
    """

    def __init__(self, optim_wrapper: OptimWrapper, scheduler: SWALR) -> None:
        self.optim_wrapper = optim_wrapper
        self.scheduler = scheduler
        self._rates = optim_wrapper.get_lr()

    def restore(self) -> None:
        """Set the learning rates, overriding what other code has set."""
        self._fit()
        for group, lr in zip(self.optim_wrapper.param_groups, self._rates, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    def step(self) -> None:
        """Advance the learning rates by one epoch."""
        self.restore()
        # torch only sees steps in this process, which may have taken none yet after a resume.
        self.optim_wrapper.optimizer._opt_called = True  # type: ignore[attr-defined]
        self.scheduler.step()
        self._rates = self.optim_wrapper.get_lr()

    def _fit(self) -> None:
        """Include parameter groups that were added to the optimizer.

        Raises:
            ValueError: Groups were removed.
        """
        groups, known = self.optim_wrapper.param_groups, len(self._rates)
        if len(groups) < known:
            raise ValueError(
                f"swa: the optimizer {self.optim_wrapper.name!r} had {known} parameter groups and "
                f"now has {len(groups)}. Keep the groups; to stop training some parameters, use "
                "requires_grad_(False)"
            )
        for group in groups[known:]:
            if isinstance(group["lr"], Tensor):
                # A group that was added without a rate shares the tensor of the others, which
                # has been changed since.
                shared = [g for g in groups[:known] if g["lr"] is group["lr"]]
                first = shared[0]["initial_lr"] if shared else group["lr"]
                group["lr"] = torch.as_tensor(first).to(group["lr"], copy=True)
            group["swa_lr"] = groups[0]["swa_lr"]
            ended = self.scheduler.last_epoch >= self.scheduler.anneal_epochs
            self._rates.append(float(group["swa_lr"] if ended else group["lr"]))

    def state_dict(self) -> dict[str, Any]:
        """Return the state in plain containers."""
        self._fit()
        return {"scheduler": self.scheduler.state_dict(), "rates": self._rates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the learning rates saved by ``state_dict``."""
        self.scheduler.load_state_dict(state["scheduler"])
        # A resume may start the optimizer over, with other groups.
        self._rates = list(state["rates"])[: len(self.optim_wrapper.param_groups)]
        self.restore()

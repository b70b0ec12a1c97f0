"""The options of ``train_cfg``, ``val_cfg`` and ``test_cfg``."""

from __future__ import annotations

from typing import Self

import pydantic
from pydantic import Field, model_validator


class TrainCfg(pydantic.BaseModel):
    """Set the limit of training and how often to validate.

    Pass either ``max_epochs`` or ``max_iters``. ``val_interval`` and ``val_begin`` count epochs in
    the first case and iterations in the second. Validation also runs after the last epoch or
    iteration.
    """

    model_config = pydantic.ConfigDict(extra="forbid")

    by_epoch: bool | None = Field(
        default=None, description="unit; by default inferred from the limit"
    )
    max_epochs: int | None = Field(default=None, gt=0)
    max_iters: int | None = Field(default=None, gt=0)
    val_interval: int | None = Field(
        default=None, gt=0, description="default 1 epoch or 1000 iterations"
    )
    val_begin: int = Field(
        default=1, ge=0, description="no validation before this epoch or iteration"
    )

    @model_validator(mode="after")
    def _one_unit(self) -> Self:
        if self.max_epochs is not None and self.max_iters is not None:
            raise ValueError(
                f"max_epochs={self.max_epochs} and max_iters={self.max_iters} are both set. "
                "Set only one of them"
            )
        if self.by_epoch is None:
            self.by_epoch = self.max_iters is None
        limit = "max_epochs" if self.by_epoch else "max_iters"
        if getattr(self, limit) is None:
            raise ValueError(
                f"by_epoch={self.by_epoch} needs {limit}, as in train_cfg=dict({limit}=10)"
            )
        if self.val_interval is None:
            self.val_interval = 1 if self.by_epoch else 1000
        return self

    @property
    def limit(self) -> int:
        """The limit in effect: ``max_epochs`` or ``max_iters``."""
        return self.max_epochs or self.max_iters or 0

    @property
    def unit(self) -> str:
        """The unit of the limit: ``epochs`` or ``iters``."""
        return "epochs" if self.by_epoch else "iters"

    def validates_at(self, count: int) -> bool:
        """Return whether validation runs once ``count`` epochs (or iterations) are finished."""
        if count < self.val_begin:
            return False
        return count % (self.val_interval or 1) == 0 or count == self.limit


class EvalCfg(pydantic.BaseModel):
    """Set the options of validation and testing."""

    model_config = pydantic.ConfigDict(extra="forbid")

    loss: bool = Field(default=False, description="also report the losses of forward(mode='loss')")

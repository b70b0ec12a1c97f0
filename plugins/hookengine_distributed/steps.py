"""The steps that a wrapper forwards to its model."""

from __future__ import annotations

from typing import Any


class ModelSteps:
    """Forward ``val_step``, ``test_step`` and ``loss_step`` to ``self.module``.

    With DDP, no rank waits for another in these steps. If the model is sharded, all ranks must call
    them equally often.
    """

    module: Any

    def val_step(self, data: Any) -> Any:
        """Return the predictions of the model."""
        return self.module.val_step(data)

    def test_step(self, data: Any) -> Any:
        """Return the predictions of the model, like ``val_step``."""
        return self.module.test_step(data)

    def loss_step(self, data: Any) -> Any:
        """Return the losses of the model without updating it."""
        return self.module.loss_step(data)

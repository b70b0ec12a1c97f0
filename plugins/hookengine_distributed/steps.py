"""What a wrapper hands on to the model in it."""

from __future__ import annotations

from typing import Any


class ModelSteps:
    """``val_step``, ``test_step`` and ``loss_step`` of ``self.module``.

    In DDP no rank waits for another in them; a sharded model needs all ranks equally often.
    """

    module: Any

    def val_step(self, data: Any) -> Any:
        """The predictions of the model."""
        return self.module.val_step(data)

    def test_step(self, data: Any) -> Any:
        """The predictions of the model, as ``val_step``."""
        return self.module.test_step(data)

    def loss_step(self, data: Any) -> Any:
        """The losses of the model, without an update."""
        return self.module.loss_step(data)

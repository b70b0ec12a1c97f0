"""MixUp and CutMix, as torchvision has them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pydantic import Field
from torchvision.transforms import v2

from hookengine import Plugin

__all__ = ["Mixup"]


class Mixup(Plugin, name="mixup"):
    """Mix the samples of each training batch, and their labels.

    MixUp (arXiv:1710.09412) blends two images, CutMix (arXiv:1905.04899) pastes a part of one
    into the other; where both are on, one of them is drawn for each batch. The labels become
    probabilities, a tensor of shape (N, classes), which ``F.cross_entropy`` takes. Batches of
    validation and testing stay as they are.

    A batch is (images, labels) or a dict with ``labels``: float images of shape (N, C, H, W), and
    class indices of shape (N,) or probabilities.
    """

    mixup: float = Field(
        default=0.2, ge=0, description="alpha of the Beta distribution; 0 for no MixUp"
    )
    cutmix: float = Field(
        default=0.0, ge=0, description="alpha of the Beta distribution; 0 for no CutMix"
    )
    num_classes: int | None = Field(
        default=None, gt=0, description="needed where labels are indices"
    )
    prob: float = Field(default=1.0, gt=0, le=1, description="share of the batches that are mixed")
    switch_prob: float = Field(
        default=0.5, ge=0, le=1, description="share of CutMix among them, where both are on"
    )
    labels: str | Callable[[Any], Any] | None = Field(
        default=None, description="key of the labels in a dict, or a function of the batch"
    )

    def __post_init__(self) -> None:
        """Make the transforms."""
        if not (self.mixup or self.cutmix):
            raise TypeError("mixup=0 and cutmix=0 leave nothing to do: drop the plugin")
        labels = self.labels
        getter = (lambda batch: batch[labels]) if isinstance(labels, str) else labels or "default"
        kinds = ((v2.MixUp, self.mixup), (v2.CutMix, self.cutmix))
        self._transforms = [
            kind(alpha=alpha, num_classes=self.num_classes, labels_getter=getter)
            for kind, alpha in kinds
            if alpha
        ]

    def before_train_iter(self, data_batch: Any) -> Any:
        """The mixed batch, or None where this one stays as it is."""
        if self.prob < 1 and torch.rand(()).item() >= self.prob:
            return None
        transform = self._transforms[0]
        if len(self._transforms) > 1 and torch.rand(()).item() < self.switch_prob:
            transform = self._transforms[1]
        try:
            return transform(data_batch)
        except (ValueError, TypeError, KeyError, IndexError, RuntimeError) as error:
            error.add_note(
                "mixup takes (images, labels), or a dict with labels=KEY: float images of shape "
                "(N, C, H, W) and class indices of shape (N,), with num_classes"
            )
            raise

"""MixUp and CutMix, with the transforms of torchvision."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from pydantic import Field
from torchvision.transforms import v2

from hookengine import Plugin

__all__ = ["Mixup"]


class Mixup(Plugin, name="mixup"):
    """Mix the samples of each training batch, and their labels.

    MixUp (arXiv:1710.09412) blends two images, CutMix (arXiv:1905.04899) pastes a part of one into
    the other. If both are enabled, one of them is drawn for each batch. The labels become
    probabilities, a tensor of shape (N, classes), which ``F.cross_entropy`` accepts. Batches for
    validation and testing are not changed.

    A batch is (images, labels) or a mapping with ``labels``: float images of shape (N, C, H, W),
    and class indices of shape (N,) or probabilities.
    """

    mixup: float = Field(
        default=0.2, ge=0, description="alpha of the Beta distribution; 0 disables MixUp"
    )
    cutmix: float = Field(
        default=0.0, ge=0, description="alpha of the Beta distribution; 0 disables CutMix"
    )
    num_classes: int | None = Field(
        default=None, gt=0, description="required if the labels are indices"
    )
    prob: float = Field(default=1.0, gt=0, le=1, description="the fraction of batches to mix")
    switch_prob: float = Field(
        default=0.5, ge=0, le=1, description="the fraction of them for CutMix, if both are enabled"
    )
    labels: str | Callable[[Any], Any] | None = Field(
        default=None, description="the key of the labels in a dict, or a function of the batch"
    )

    def __post_init__(self) -> None:
        """Create the transforms."""
        if not (self.mixup or self.cutmix):
            raise TypeError("mixup=0 and cutmix=0 leave nothing to do. Disable the plugin")
        labels = self.labels
        getter = (lambda batch: batch[labels]) if isinstance(labels, str) else labels or "default"
        kinds = ((v2.MixUp, self.mixup), (v2.CutMix, self.cutmix))
        self._transforms = [
            kind(alpha=alpha, num_classes=self.num_classes, labels_getter=getter)
            for kind, alpha in kinds
            if alpha
        ]

    def before_train_iter(self, data_batch: Any) -> Any:
        """Return the mixed batch, or None to leave it unchanged."""
        if self.prob < 1 and torch.rand(()).item() >= self.prob:
            return None
        if isinstance(data_batch, Mapping):
            data_batch = dict(data_batch)  # torchvision looks into no other mapping
        transform = self._transforms[0]
        if len(self._transforms) > 1 and torch.rand(()).item() < self.switch_prob:
            transform = self._transforms[1]
        try:
            return transform(data_batch)
        except (ValueError, TypeError, KeyError, IndexError, RuntimeError) as error:
            error.add_note(
                "mixup expects (images, labels), or a dict with labels=KEY: float images of shape "
                "(N, C, H, W) and class indices of shape (N,), with num_classes"
            )
            raise

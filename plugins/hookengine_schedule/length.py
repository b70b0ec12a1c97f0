"""The length of a run, in optimizer steps and in epochs."""

from __future__ import annotations

import math

from hookengine import Progress


def total_steps(progress: Progress, window_length: int) -> int | None:
    """Return the number of optimizer steps of the whole run, or None if its length is unknown.

    A window of accumulated gradients ends with the epoch, so each epoch rounds up.
    """
    if progress.max_iters is None:
        return None
    if progress.epoch_length is None:
        return math.ceil(progress.max_iters / window_length)
    epochs, rest = divmod(progress.max_iters, progress.epoch_length)
    return epochs * math.ceil(progress.epoch_length / window_length) + math.ceil(
        rest / window_length
    )


def total_epochs(progress: Progress) -> int | None:
    """Return the epochs of the whole run, including a partial last one, or None if unknown."""
    if progress.max_epochs is not None:
        return progress.max_epochs
    if progress.max_iters is None or progress.epoch_length is None:
        return None
    return math.ceil(progress.max_iters / progress.epoch_length)

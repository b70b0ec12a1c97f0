"""What the plugin looks at in a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hookengine_checkpoint import files


def ask_to_end(runner: Any, name: str) -> None:
    """Ask for a checkpoint and the end of training, on behalf of a signal."""
    runner.requests["preempt"] = name
    runner.stop(name)


def steps(runner: Any) -> list[int]:
    """The steps of all optimizers."""
    return [wrapper.steps for wrapper in runner.optim_wrapper.by_name().values()]


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The metrics that are numbers."""
    return {name: float(v) for name, v in metrics.items() if isinstance(v, (int, float))}


def position(progress: Any) -> tuple[Any, ...]:
    """Where a run stands: two saves at one position would be the same."""
    return progress.epoch, progress.iter, progress.batch, progress.val_due


def ends(runner: Any) -> bool:
    """Whether this is the last safe point of training."""
    progress = runner.progress
    may_end = progress.batch == 0 or progress.iter == progress.max_iters
    return may_end and bool(runner.train_loop.done)


def is_checkpoint(path: Path) -> bool:
    """Whether a path of weights is one of our checkpoints, or a folder of them."""
    return path.is_dir() or (path.parent / files.MANIFEST).is_file()


def nonfinite(state: Mapping[str, Any], names: list[str]) -> list[str]:
    """The parameters with NaN or infinite values."""
    tensors = {name: state.get(name) for name in names}
    return [
        name
        for name, tensor in tensors.items()
        if isinstance(tensor, Tensor)
        and (tensor.is_floating_point() or tensor.is_complex())
        and not torch.isfinite(tensor.sum())  # which a large sum can be too
        and not bool(torch.isfinite(tensor).all())
    ]

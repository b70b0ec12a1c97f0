"""The weights of a checkpoint alone, as one file, also of a model that was sharded."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from hookengine import did_you_mean
from hookengine_checkpoint import files
from hookengine_checkpoint.find import Found, at
from hookengine_checkpoint.integrity import DamagedError


def export_weights(
    checkpoint: str | os.PathLike[str],
    path: str | os.PathLike[str],
    weights: str = "state_dict",
) -> Path:
    """Write the weights of a checkpoint as one ``.safetensors`` (or ``.pth``), on one process.

    Args:
        checkpoint: As ``Runner(resume=...)`` takes it: a checkpoint, or the folder of a run.
        path: The file to write.
        weights: ``state_dict``, or averaged ones, under the same names: ``ema_state_dict``,
            ``swa_state_dict``.

    Returns:
        The path.

    Raises:
        ValueError: another suffix; or the checkpoint is damaged. KeyError: it has no such weights.
        FileNotFoundError: there is no checkpoint. OSError: the file cannot be written.
    """
    path = Path(path)
    if path.suffix not in (".safetensors", ".pth", ".pt"):
        raise ValueError(f"weights are exported as .safetensors or .pth, not as {path.name!r}")
    state = _read(at(Path(checkpoint), print), weights)
    tensors = {n: v.clone().contiguous() for n, v in state.items() if isinstance(v, Tensor)}
    if weights != "state_dict":  # an average holds a copy of the model, and a count
        inner = {n.removeprefix("module."): v for n, v in tensors.items() if n[:7] == "module."}
        tensors = inner or tensors
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            safetensors.torch.save_file(tensors, path)
        else:
            torch.save(tensors, path)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        raise OSError(f"{path} cannot be written: {error}") from error
    return path


def weights_at(path: Path, tell: Callable[[str], None]) -> Any:
    """What ``load_weights`` takes of a checkpoint: its file, or of a sharded one its weights."""
    found = at(path, tell)
    sharded = found.saved is not None and (found.path / files.METADATA).exists()
    return _read(found, "state_dict") if sharded else found.state


def _read(found: Found, weights: str) -> Any:
    state = files.read_state(found.state)
    if not isinstance(state, dict):
        raise DamagedError(f"{found.path} is no state of a Runner")
    if weights not in state:
        known = [name for name in state if name.endswith("state_dict")]
        near = did_you_mean(weights, known)
        there = ", ".join(known) or "none: it is no checkpoint"
        raise KeyError(f"{found.path} has no {weights!r}.{near} It has {there}")
    if not (found.path / files.METADATA).exists():
        return state[weights]
    from hookengine_checkpoint import sharded  # takes a while, and few need it

    return sharded.assemble(found.path, state[weights])

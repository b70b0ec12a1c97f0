"""The weights of a checkpoint as one file, whether the model was sharded or not."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import Tensor

from hookengine import did_you_mean, original_names, save_weights
from hookengine_checkpoint.files import read_state
from hookengine_checkpoint.find import Found, at


def export_weights(
    checkpoint: str | os.PathLike[str],
    path: str | os.PathLike[str],
    weights: str = "state_dict",
) -> Path:
    """Write the weights of a checkpoint as one ``.safetensors`` or ``.pth`` file, in one process.

    Args:
        checkpoint: A checkpoint or the folder of a run, as for ``Runner(resume=...)``.
        path: The file to write.
        weights: ``state_dict``; or averaged weights, which are written under the names of the raw
            ones: ``ema_state_dict`` or ``swa_state_dict``.

    Returns:
        The path of the file.

    Raises:
        ValueError: The suffix is another one, or the checkpoint is damaged.
        KeyError: The checkpoint has no such weights.
        FileNotFoundError: There is no checkpoint.
        OSError: The file cannot be written.
    """
    path = save_weights({}, path, write=False)
    state = original_names(read_weights(at(Path(checkpoint).expanduser(), print), weights))
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    if weights != "state_dict":  # an averaged model has the weights as module.*, and a count
        inner = {n.removeprefix("module."): v for n, v in tensors.items() if n[:7] == "module."}
        tensors = inner or tensors
    return save_weights(tensors, path)


def read_weights(found: Found, weights: str = "state_dict") -> Any:
    """Read the weights of a checkpoint, sharded ones without any other rank.

    Args:
        found: The checkpoint.
        weights: See ``export_weights``.

    Raises:
        KeyError: The checkpoint has no such weights.
        DamagedError: The checkpoint cannot be read.
    """
    state = read_state(found.state)
    if weights not in state:
        known = [name for name in state if name.endswith("state_dict")]
        near = did_you_mean(weights, known)
        there = ", ".join(known) or "none: it is not a checkpoint"
        raise KeyError(f"{found.path} has no {weights!r}.{near} Its weights: {there}")
    if not found.is_sharded:
        return state[weights]
    from hookengine_checkpoint import sharded  # slow to import, and rarely needed

    return sharded.assemble(found.path, state[weights])

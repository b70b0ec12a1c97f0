"""The weights of a checkpoint as one file, whether the model was sharded or not."""

from __future__ import annotations

import os
from collections.abc import Mapping
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
        weights: ``state_dict``; or averaged weights, which are written under the names and with the
            dtypes of the raw ones: ``ema_state_dict`` or ``swa_state_dict``.

    Returns:
        The path of the file.

    Raises:
        ValueError: The suffix is another one, the checkpoint is damaged, or the average of these
            weights has not begun.
        KeyError: The checkpoint has no such weights.
        FileNotFoundError: There is no checkpoint.
        OSError: The file cannot be written.
    """
    path = save_weights({}, path, write=False)
    found = at(Path(checkpoint).expanduser(), print)
    state = original_names(read_weights(found, weights))
    if weights != "state_dict":
        raw = original_names(read_weights(found))
        state = _averages(state, raw, f"{weights} of {found.path}")
    return save_weights({n: v for n, v in state.items() if isinstance(v, Tensor)}, path)


def _averages(state: Mapping[str, Any], raw: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Return averaged weights with the names and the dtypes of the raw ones.

    An averaged model has its weights as ``module.*``, in float32 if the model's dtype is shorter,
    and counts its updates.
    """
    steps = state.get("steps")
    if isinstance(steps, Tensor) and not steps.any():
        raise ValueError(
            f"{what} has averaged nothing yet: it holds the initial weights. Export a later "
            "checkpoint, or the raw weights (state_dict)"
        )
    inner = {name[7:]: value for name, value in state.items() if name[:7] == "module."}
    inner = inner or dict(state)
    for name, value in inner.items():
        like = raw.get(name)
        if isinstance(like, Tensor) and like.is_floating_point() and value.is_floating_point():
            inner[name] = value.to(like.dtype)
    return inner


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

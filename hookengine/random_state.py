"""The random states of Python, NumPy and torch on all devices, as plain containers."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def _accelerator() -> Any:
    """Return the module of the accelerator in use, such as ``torch.cuda``, or None.

    The check does not initialize an accelerator.
    """
    for name in ("cuda", "xpu"):
        module = getattr(torch, name, None)
        if module is not None and getattr(module, "is_initialized", lambda: False)():
            return module
    return None


def get_random_state() -> dict[str, Any]:
    """Return the current states as tensors and plain containers.

    ``torch.load(weights_only=True)`` can load them.
    """
    version, internal, gauss = random.getstate()
    state: dict[str, Any] = {
        "python": [version, list(internal), gauss],
        "torch": torch.get_rng_state(),
    }
    if (numpy := sys.modules.get("numpy")) is not None:
        name, keys, *rest = numpy.random.get_state(legacy=True)
        state["numpy"] = [name, keys.tolist(), *rest]
    if (accelerator := _accelerator()) is not None:
        state["accelerator"] = accelerator.get_rng_state_all()
    elif torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Restore the states returned by ``get_random_state``."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    torch.set_rng_state(state["torch"])
    if "numpy" in state and (numpy := sys.modules.get("numpy")) is not None:
        name, keys, *rest = state["numpy"]
        numpy.random.set_state((name, numpy.array(keys, dtype=numpy.uint32), *rest))
    if "accelerator" in state and (accelerator := _accelerator()) is not None:
        accelerator.set_rng_state_all(state["accelerator"])
    if "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Restore the random states when the block ends, even if it raises."""
    state = get_random_state()
    try:
        yield
    finally:
        set_random_state(state)

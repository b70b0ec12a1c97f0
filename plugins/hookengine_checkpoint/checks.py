"""Checks of a state before it is written: whether it can be read safely, whether it is finite."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hookengine import Runner, not_plain


def check_plain(state: Any, where: str) -> None:
    """Refuse values that ``torch.load(weights_only=True)`` would not read.

    Args:
        state: Nested containers.
        where: What the message calls the state.

    Raises:
        TypeError: The state holds such a value; the message names its place and the fix.
    """
    for path, value in not_plain(state, where):
        numpy = type(value).__module__.startswith("numpy")
        fix = "float(x), int(x) or torch.tensor(x)" if numpy else "numbers, strings and tensors"
        raise TypeError(
            f"{path} is a {type(value).__module__}.{type(value).__qualname__}, which a checkpoint "
            f"cannot hold because reading it would run code: keep {fix} in the state instead"
        )


def warn_of_later_changes(runner: Runner, saving: object) -> None:
    """Warn of plugins that are called after ``saving`` at a safe point: their changes are lost."""
    called = runner.plugins.calls()["safe_point"]
    own_name = next(name for name in called if runner.plugins[name] is saving)
    for name in called[called.index(own_name) + 1 :]:
        runner.logger.warning(
            f"checkpoint: the plugin {name!r} is called after a checkpoint is saved, so the "
            "checkpoint lacks what it changes in safe_point, and a resumed run may differ. "
            f"Declare @hookimpl(before={own_name!r}) on its safe_point"
        )


def nonfinite(state: Mapping[str, Any], names: list[str]) -> list[str]:
    """Return the names of tensors with NaN or infinite values.

    Args:
        state: Tensors by name.
        names: The names to check; names without a tensor are skipped.
    """
    tensors = {name: state.get(name) for name in names}
    return [
        name
        for name, tensor in tensors.items()
        if isinstance(tensor, Tensor)
        and (tensor.is_floating_point() or tensor.is_complex())
        and not torch.isfinite(tensor.sum())  # cheap, but a large sum of finite values overflows
        and not bool(torch.isfinite(tensor).all())
    ]

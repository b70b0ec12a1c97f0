"""Checks of a state before it is written: whether it can be read safely, whether it is finite."""

from __future__ import annotations

from collections.abc import Mapping, Set
from enum import Enum
from inspect import signature
from numbers import Number
from pathlib import PurePath
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from hookengine import Runner, as_plain, not_plain


class UnsavableError(TypeError):
    """A state holds something that no checkpoint can hold. The message names its place."""


_NAMES = {
    "state_dict": "the state of the model",
    "optimizer": "the state of the optimizer",
    "plugins": "the state of plugins",
}


def check_state(state: Mapping[str, Any], added_by: str) -> None:
    """Refuse values that ``torch.load(weights_only=True)`` would not read.

    Args:
        state: What ``runner.state_dict()`` returns, or a part of it, with the states of ranks.
        added_by: The plugins that may have added an entry to it.

    Raises:
        UnsavableError: The state holds such a value; the message names its place and the fix.
    """
    for key, part in state.items():
        if key == "ranks":
            for rank, own in enumerate(part):
                _check(own["plugins"], f"on rank {rank}, the state of plugins")
        elif key in _NAMES or key in ("progress", "metrics", "meta"):
            _check(part, _NAMES.get(key, f"the state[{key!r}]"))
        else:
            _check(part, f"checkpoint[{key!r}]", f", which {added_by} adds,")


def _check(state: Any, where: str, origin: str = "") -> None:
    for path, value in not_plain(state, where):
        if isinstance(value, Tensor):
            if where == _NAMES["state_dict"] and is_lazy(value):
                continue  # it is left out of the checkpoint
            kind = "is a nested tensor" if value.is_nested else "is a tensor without values"
            raise UnsavableError(
                f"{path}{origin} {kind}, which cannot be copied into a checkpoint. Keep "
                f"{'its parts' if value.is_nested else 'a tensor with values'} in the state instead"
            )
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        raise UnsavableError(
            f"{path}{origin} is a {kind}, which a checkpoint cannot hold because reading it would "
            f"run code: {_fix(value)}"
        )


def _fix(value: Any) -> str:
    """Return what to do about a value that cannot be saved."""
    if isinstance(value, Enum):
        return "keep its .value in the state instead"
    if isinstance(value, Number):
        return "keep float(x) or int(x) in the state instead"
    if type(value).__module__.startswith("numpy"):
        return "keep x.tolist() or torch.from_numpy(x) in the state instead"
    if isinstance(value, PurePath):
        return "keep str(x) in the state instead"
    if isinstance(value, dict):
        return "keep dict(x) in the state instead, which must not contain itself"
    if isinstance(value, (tuple, list, Set)):
        return "keep list(x) in the state instead, which must not contain itself"
    return "keep numbers, strings and tensors in the state instead"


def check_before_training(runner: Runner) -> None:
    """Refuse a run that could not save a checkpoint.

    Only the states of the model, the optimizers and the plugins are collected, and nothing is
    copied.

    Raises:
        UnsavableError: As ``check_state``.
    """
    state = {"plugins": as_plain(runner.plugins.state_dict())}
    parts = {"state_dict": runner.bare_model, "optimizer": runner.optim_wrapper}
    for key, part in parts.items():
        try:
            state[key] = as_plain(part.state_dict())
        except Exception as error:
            whose = _NAMES[key].removeprefix("the state of ")
            error.add_note(f"raised by {whose}, method 'state_dict'")  # not by this plugin
            raise
    check_state(state, "")
    _check(as_plain(runner.plugins.rank_state_dict()), "the state of plugins")


def check_additions(runner: Runner) -> None:
    """Refuse a run with a plugin that adds something to checkpoints that they cannot hold.

    Hooks of ``before_save_checkpoint`` that take the argument ``checkpoint`` are called for that. A
    hook that raises an exception is left to the first save: it may need a validation, say.

    Raises:
        UnsavableError: As ``check_state``.
    """
    checkpoint: dict[str, Any] = {
        "plugins": runner.plugins.state_dict(),
        "state_dict": runner.bare_model.state_dict(),
        "progress": runner.progress.state_dict(),
        "optimizer": runner.optim_wrapper.state_dict(),
        "metrics": {},
        "meta": {},
    }
    arguments = {"runner": runner, "checkpoint": checkpoint}
    for name in adding_plugins(runner):
        hook = runner.plugins[name].before_save_checkpoint
        try:
            hook(**{n: arguments[n] for n in signature(hook).parameters})
        except Exception:
            continue
        check_state(as_plain(checkpoint), f"the plugin {name!r}")


def adding_plugins(runner: Runner) -> list[str]:
    """Return the plugins that can add entries to a checkpoint, as they are called."""
    called = runner.plugins.calls().get("before_save_checkpoint", ())
    return [
        name
        for name in called
        if "checkpoint" in signature(runner.plugins[name].before_save_checkpoint).parameters
    ]


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

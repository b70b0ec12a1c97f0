"""Batch norm over the joint batch of all ranks: SyncBatchNorm, and back again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from hookengine import Plugin, dist

__all__ = ["SyncBN", "convert_sync_batchnorm", "revert_sync_batchnorm"]


class SyncBN(Plugin, name="syncbn"):
    """Replace batch norm by torch's SyncBatchNorm where several ranks train on GPUs.

    Inert on one rank. torch has no SyncBatchNorm for the CPU.
    """

    def convert_model(self, runner: Any, model: nn.Module) -> nn.Module | None:
        """Convert, and say how many layers there were."""
        ranks = dist.get_world_size()
        if ranks == 1:
            return None
        layers = sum(isinstance(layer, _BatchNorm) for layer in model.modules())
        if runner.device.type == "cpu" and layers:
            raise ValueError(
                f"syncbn: torch's SyncBatchNorm does not run on the CPU, where {ranks} ranks train "
                f"this model with {layers} batch-norm layers: leave syncbn out, or train on GPUs"
            )
        runner.logger.info(
            f"syncbn: {layers} batch-norm layers are synchronised over {ranks} ranks"
        )
        return convert_sync_batchnorm(model)


CONTENTS = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")


class BatchNormXd(_BatchNorm):
    """Batch norm of inputs of any number of dimensions: a SyncBatchNorm whose origin is unknown."""

    def _check_input_dim(self, input: torch.Tensor) -> None:
        """Any will do."""


def convert_sync_batchnorm(module: nn.Module, implementation: str = "torch") -> nn.Module:
    """Replace every batch-norm layer of a module by a SyncBatchNorm.

    The new layers have the parameters and buffers of the old ones, the same objects, and their
    mode. InstanceNorm, which has no batch statistics, stays.

    Args:
        module: The module; its children are replaced in place.
        implementation: ``"torch"``.

    Returns:
        The module, or where it is a batch-norm layer itself, what replaces it.

    Raises:
        ValueError: another implementation; or a layer that SyncBatchNorm cannot stand for, with a
            forward of its own, parametrized, or not initialised.
    """
    if implementation != "torch":
        raise ValueError(
            f"implementation={implementation!r}: only torch's SyncBatchNorm is known here "
            "(MMCV's needs its own build of CUDA extensions)"
        )
    return _replace(module, _to_sync)


def revert_sync_batchnorm(module: nn.Module) -> nn.Module:
    """Replace every SyncBatchNorm of a module by the batch norm that it was made from.

    One that ``convert_sync_batchnorm`` made becomes the class that it was; another one a batch norm
    for inputs of any number of dimensions. Parameters, buffers and mode are kept.

    Args:
        module: The module; its children are replaced in place.

    Returns:
        The module, or where it is a SyncBatchNorm itself, what replaces it.
    """
    return _replace(module, _from_sync)


def _replace(module: nn.Module, make: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """Replace a module and everything within by what ``make`` makes of it, each once."""
    made: dict[nn.Module, nn.Module] = {}

    def replaced(layer: nn.Module) -> nn.Module:
        if layer not in made:
            made[layer] = make(layer)
            for name, child in [*layer._modules.items()]:
                if child is None:
                    continue
                new = replaced(child)
                if new is not child:
                    setattr(layer, name, new)
        return made[layer]

    return replaced(module)


def _to_sync(layer: nn.Module) -> nn.Module:
    if not isinstance(layer, _BatchNorm) or isinstance(layer, nn.SyncBatchNorm):
        return layer
    kind = type(layer)
    problem = None
    if kind.forward is not _BatchNorm.forward:
        problem = "has a forward of its own, which SyncBatchNorm would not run"
    elif is_parametrized(layer):
        problem = "is parametrized, which SyncBatchNorm cannot be"
    elif any(map(is_lazy, layer.parameters())) or any(map(is_lazy, layer.buffers())):
        problem = "is not initialised yet: run one batch through the model first"
    if problem is not None:
        raise ValueError(f"the batch norm {kind.__module__}.{kind.__name__} {problem}")
    sync = nn.SyncBatchNorm(
        layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats
    )
    sync.__dict__["made_from"] = layer  # as it is, and no child of it
    return _with_contents_of(layer, sync)


def _from_sync(layer: nn.Module) -> nn.Module:
    if not isinstance(layer, nn.SyncBatchNorm):
        return layer
    original = layer.__dict__.get("made_from")
    if not isinstance(original, nn.Module):
        original = BatchNormXd(
            layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats
        )
    return _with_contents_of(layer, original)


def _with_contents_of(old: nn.Module, new: nn.Module) -> nn.Module:
    """``new`` with what ``old`` holds: parameters, buffers, children, hooks; and its mode."""
    for name, value in old.__dict__.items():
        if name in CONTENTS or name.endswith(
            ("_hooks", "_hooks_with_kwargs", "_hooks_always_called")
        ):
            new.__dict__[name] = value
    new.training = old.training
    return new

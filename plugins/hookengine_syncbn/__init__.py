"""Batch norm over the joint batch of all ranks: SyncBatchNorm, and back again."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from hookengine import Plugin, Runner, dist

__all__ = ["SyncBN", "convert_sync_batchnorm", "revert_sync_batchnorm"]


class SyncBN(Plugin, name="syncbn"):
    """Replace batch norm with torch's SyncBatchNorm if several ranks train on GPUs.

    The plugin does nothing on one rank. torch has no SyncBatchNorm for the CPU.
    """

    def convert_model(self, runner: Runner, model: nn.Module) -> nn.Module | None:
        """Convert the batch-norm layers, and log how many there are."""
        ranks = dist.get_world_size()
        if ranks == 1:
            return None
        layers = sum(isinstance(layer, _BatchNorm) for layer in model.modules())
        if runner.device.type == "cpu" and layers:
            raise ValueError(
                f"syncbn: torch's SyncBatchNorm does not run on the CPU, where {ranks} ranks train "
                f"this model with {layers} batch-norm layers. Remove syncbn, or train on GPUs"
            )
        runner.logger.info(
            f"syncbn: {layers} batch-norm layers are synchronized over {ranks} ranks"
        )
        return convert_sync_batchnorm(model)


CONTENTS = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")


class BatchNormXd(_BatchNorm):
    """Batch norm for any number of dimensions, replacing a SyncBatchNorm of unknown origin."""

    def _check_input_dim(self, input: torch.Tensor) -> None:
        """Accept any number of dimensions."""


def convert_sync_batchnorm(module: nn.Module, implementation: str = "torch") -> nn.Module:
    """Replace every batch-norm layer of a module with a SyncBatchNorm.

    The new layers hold the same parameter and buffer objects as the old ones, and have their mode.
    InstanceNorm layers, which have no batch statistics, are left unchanged.

    Args:
        module: The module; its children are replaced in place.
        implementation: Only ``"torch"`` is supported.

    Returns:
        The module or, if it is a batch-norm layer itself, its replacement.

    Raises:
        ValueError: ``implementation`` is not supported, or SyncBatchNorm cannot replace a layer
            because it has its own forward, is parametrized, or is not initialized.
    """
    if implementation != "torch":
        raise ValueError(
            f"implementation={implementation!r} is not supported. Use 'torch' (MMCV's needs its "
            "own build of CUDA extensions)"
        )
    return _replace(module, _to_sync)


def revert_sync_batchnorm(module: nn.Module) -> nn.Module:
    """Replace every SyncBatchNorm of a module with the batch norm that it was made from.

    A layer that ``convert_sync_batchnorm`` has made becomes its former class again. Any other layer
    becomes a batch norm for inputs with any number of dimensions. Parameters, buffers and mode are
    kept.

    Args:
        module: The module; its children are replaced in place.

    Returns:
        The module or, if it is a SyncBatchNorm itself, its replacement.
    """
    return _replace(module, _from_sync)


def _replace(module: nn.Module, make: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """Replace a module and everything in it with what ``make`` returns, called once for each."""
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
        problem = "has its own forward, which SyncBatchNorm would not run"
    elif is_parametrized(layer):
        problem = "is parametrized, which SyncBatchNorm does not support"
    elif any(map(is_lazy, layer.parameters())) or any(map(is_lazy, layer.buffers())):
        problem = "is lazy and has no shape yet. Run one batch through the model first"
    if problem is not None:
        raise ValueError(f"the batch norm {kind.__module__}.{kind.__name__} {problem}")
    sync = nn.SyncBatchNorm(
        layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats
    )
    sync.__dict__["made_from"] = layer  # not as a child module
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
    """Return ``new`` with the parameters, buffers, children, hooks and mode of ``old``."""
    for name, value in old.__dict__.items():
        if name in CONTENTS or name.endswith(
            ("_hooks", "_hooks_with_kwargs", "_hooks_always_called")
        ):
            new.__dict__[name] = value
    new.training = old.training
    return new

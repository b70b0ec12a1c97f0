"""The initializers as functions, each for one module without its children."""

from __future__ import annotations

import torch
from torch import nn

from hookengine_init.initializers import (
    BaseInit,
    Caffe2XavierInit,
    ConstantInit,
    KaimingInit,
    NormalInit,
    Number,
    TruncNormalInit,
    UniformInit,
    XavierInit,
)


def _init_one(initializer: BaseInit, module: nn.Module) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"expected a module whose weight and bias to initialize, got {type(module).__name__}"
        )
    with torch.no_grad():
        initializer.init_layer(module)


def constant_init(module: nn.Module, val: Number, bias: Number = 0) -> None:
    """Fill ``module.weight`` with ``val`` and ``module.bias`` with ``bias``, if they exist."""
    _init_one(ConstantInit(val, bias=bias), module)


def xavier_init(
    module: nn.Module, gain: Number = 1, bias: Number = 0, distribution: str = "normal"
) -> None:
    """Fill ``module.weight`` as ``XavierInit`` does and ``module.bias`` with ``bias``."""
    _init_one(XavierInit(gain, distribution, bias=bias), module)


def normal_init(module: nn.Module, mean: Number = 0, std: Number = 1, bias: Number = 0) -> None:
    """Fill ``module.weight`` as ``NormalInit`` does and ``module.bias`` with ``bias``."""
    _init_one(NormalInit(mean, std, bias=bias), module)


def trunc_normal_init(
    module: nn.Module,
    mean: float = 0,
    std: float = 1,
    a: float = -2,
    b: float = 2,
    bias: float = 0,
) -> None:
    """Fill ``module.weight`` as ``TruncNormalInit`` does and ``module.bias`` with ``bias``."""
    _init_one(TruncNormalInit(mean, std, a, b, bias=bias), module)


def uniform_init(module: nn.Module, a: Number = 0, b: Number = 1, bias: Number = 0) -> None:
    """Fill ``module.weight`` as ``UniformInit`` does and ``module.bias`` with ``bias``."""
    _init_one(UniformInit(a, b, bias=bias), module)


def kaiming_init(
    module: nn.Module,
    a: Number = 0,
    mode: str = "fan_out",
    nonlinearity: str = "relu",
    bias: Number = 0,
    distribution: str = "normal",
) -> None:
    """Fill ``module.weight`` as ``KaimingInit`` does and ``module.bias`` with ``bias``."""
    _init_one(KaimingInit(a, mode, nonlinearity, distribution, bias=bias), module)


def caffe2_xavier_init(module: nn.Module, bias: Number = 0) -> None:
    """Fill ``module.weight`` as ``Caffe2XavierInit`` does and ``module.bias`` with ``bias``."""
    _init_one(Caffe2XavierInit(bias=bias), module)

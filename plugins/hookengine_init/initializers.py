"""The initializers: classes for ``init_cfg``, and functions for one module.

The numbers are those of MMEngine 0.10.7 under the same random state.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from hookengine_init.layers import check_layers
from hookengine_init.record import writing

Number = int | float


def bias_init_with_prob(prior_prob: float) -> float:
    """The bias with which a sigmoid gives a probability (arXiv:1708.02002, section 4.1).

    Raises:
        ValueError: ``prior_prob`` is not between 0 and 1.
    """
    if not 0 < prior_prob < 1:
        raise ValueError(f"a prior probability lies between 0 and 1, got {prior_prob!r}")
    return float(-math.log((1 - prior_prob) / prior_prob))


class BaseInit:
    """Base class of initializers: ``fill`` the weights, set the biases.

    A subclass of one's own implements ``fill``, or ``__call__`` where weights and biases of layers
    are not all there is. Register it with ``@WEIGHT_INITIALIZERS.register_module()``.

    Args:
        bias: What the biases become.
        bias_prob: In its place a probability, of which they become the log odds.
        layer: Class names of the layers to initialise, their own or a direct base class's
            (``"_BatchNorm"``).

    Raises:
        TypeError: an argument of another type. ValueError: both ``bias`` and ``bias_prob``.
    """

    wholemodule: bool = False
    """Initialise every layer, whatever its class: set for an ``override``."""

    def __init__(
        self,
        *,
        bias: Number = 0,
        bias_prob: float | None = None,
        layer: str | list[str] | None = None,
    ) -> None:
        if isinstance(bias, bool) or not isinstance(bias, (int, float)):
            raise TypeError(f"bias must be a number, got {bias!r}")
        if bias_prob is not None:
            if not isinstance(bias_prob, float):
                raise TypeError(f"bias_prob must be a float between 0 and 1, got {bias_prob!r}")
            if bias != 0:
                raise ValueError(
                    f"bias={bias!r} and bias_prob={bias_prob!r} both say what the bias is: give one"
                )
            bias = bias_init_with_prob(bias_prob)
        names = [layer] if isinstance(layer, str) else [] if layer is None else layer
        if not isinstance(names, (list, tuple)) or not all(isinstance(n, str) for n in names):
            raise TypeError(
                "layer takes the name of a class, as in layer='Conv2d', or a list of names, got "
                f"{layer!r}"
            )
        self.bias = bias
        self.layer = list(names)

    def matches(self, module: nn.Module) -> bool:
        """Whether ``layer`` names the module's class or a direct base of it."""
        cls = type(module)
        return cls.__name__ in self.layer or any(b.__name__ in self.layer for b in cls.__bases__)

    def fill(self, weight: Tensor) -> None:
        """Fill a weight in place."""
        raise NotImplementedError(f"{type(self).__name__} implements neither fill nor __call__")

    def __call__(self, module: nn.Module) -> None:
        """Initialise the layers of ``module`` that match; children come before parents.

        Raises:
            ValueError: none does.
        """
        write = writing(module, self._get_init_info())
        known: dict[type, bool] = {}

        def init(layer: nn.Module) -> None:
            cls = type(layer)
            matched = known.get(cls)
            if matched is None:
                matched = known[cls] = self.wholemodule or self.matches(layer)
            if matched:
                self.init_layer(layer, write)

        module.apply(init)
        if not self.wholemodule and (len(self.layer) > 1 or True not in known.values()):
            check_layers(self.layer, module)

    def init_layer(
        self, layer: nn.Module, write: Callable[[Tensor, Number | None], None] | None = None
    ) -> None:
        """Initialise ``weight`` and ``bias`` of one layer, where it has them."""
        weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
        if weight is not None and is_lazy(weight):
            raise ValueError(
                f"{type(layer).__name__} does not know its shape yet: run a batch through the "
                "model before its weights are initialised"
            )
        if weight is not None:
            self.fill(weight)
            if write is not None:
                write(weight, self.constant)
        if bias is not None:
            nn.init.constant_(bias, self.bias)
            if write is not None:
                write(bias, self.bias)

    @property
    def constant(self) -> Number | None:
        """The value that ``fill`` gives to every element, where there is such a value."""
        return None

    def _get_init_info(self) -> str:
        """What the report says of a parameter that this initializer has changed."""
        return f"{type(self).__name__}, bias={self.bias}"


class ConstantInit(BaseInit):
    """Fill the weights with ``val``.

    Args:
        val: The value.
        **kwargs: ``bias``, ``bias_prob``, ``layer``; see ``BaseInit``.
    """

    def __init__(self, val: Number, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.val = val

    @property
    def constant(self) -> Number:
        return self.val

    def fill(self, weight: Tensor) -> None:
        nn.init.constant_(weight, self.val)

    def _get_init_info(self) -> str:
        return f"{type(self).__name__}: val={self.val}, bias={self.bias}"


def _check_distribution(distribution: str) -> str:
    if distribution not in ("uniform", "normal"):
        raise ValueError(f"distribution is 'uniform' or 'normal', got {distribution!r}")
    return distribution


class XavierInit(BaseInit):
    """Keep the variance of activations and gradients (Glorot and Bengio, AISTATS 2010, eq. 16).

    Args:
        gain: Factor of the standard deviation.
        distribution: ``"normal"`` or ``"uniform"``.
        **kwargs: ``bias``, ``bias_prob``, ``layer``; see ``BaseInit``.
    """

    def __init__(self, gain: Number = 1, distribution: str = "normal", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.gain = gain
        self.distribution = _check_distribution(distribution)

    def fill(self, weight: Tensor) -> None:
        uniform = self.distribution == "uniform"
        fill = nn.init.xavier_uniform_ if uniform else nn.init.xavier_normal_
        fill(weight, gain=self.gain)

    def _get_init_info(self) -> str:
        return (
            f"{type(self).__name__}: gain={self.gain}, distribution={self.distribution}, "
            f"bias={self.bias}"
        )


class NormalInit(BaseInit):
    """Draw the weights from N(mean, std²).

    Args:
        mean: Mean.
        std: Standard deviation.
        **kwargs: ``bias``, ``bias_prob``, ``layer``; see ``BaseInit``.
    """

    def __init__(self, mean: Number = 0, std: Number = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.mean = mean
        self.std = std

    def fill(self, weight: Tensor) -> None:
        nn.init.normal_(weight, self.mean, self.std)

    def _get_init_info(self) -> str:
        return f"{type(self).__name__}: mean={self.mean}, std={self.std}, bias={self.bias}"


class TruncNormalInit(BaseInit):
    """Draw the weights from N(mean, std²), restricted to [a, b].

    By the inverse of the distribution function from one uniform draw each, as MMEngine does; the
    ``torch.nn.init.trunc_normal_`` of newer versions draws other numbers, by rejection.

    Args:
        mean: Mean before the restriction.
        std: Standard deviation before the restriction.
        a: Lower bound.
        b: Upper bound.
        **kwargs: ``bias``, ``bias_prob``, ``layer``; see ``BaseInit``.
    """

    def __init__(
        self, mean: float = 0, std: float = 1, a: float = -2, b: float = 2, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.mean = mean
        self.std = std
        self.a = a
        self.b = b

    def fill(self, weight: Tensor) -> None:
        mean, std, a, b = self.mean, self.std, self.a, self.b
        if mean < a - 2 * std or mean > b + 2 * std:
            warnings.warn(
                f"mean={mean} is more than 2 std={std} away from [{a}, {b}]: the distribution of "
                "the weights may be wrong",
                stacklevel=2,
            )
        lower, upper = ((1 + math.erf((x - mean) / std / math.sqrt(2))) / 2 for x in (a, b))
        with torch.no_grad():
            weight.uniform_(2 * lower - 1, 2 * upper - 1).erfinv_()
            weight.mul_(std * math.sqrt(2)).add_(mean).clamp_(min=a, max=b)

    def _get_init_info(self) -> str:
        return (
            f"{type(self).__name__}: a={self.a}, b={self.b}, mean={self.mean}, std={self.std}, "
            f"bias={self.bias}"
        )


class UniformInit(BaseInit):
    """Draw the weights from U(a, b).

    Args:
        a: Lower bound.
        b: Upper bound.
        **kwargs: ``bias``, ``bias_prob``, ``layer``; see ``BaseInit``.
    """

    def __init__(self, a: Number = 0, b: Number = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.a = a
        self.b = b

    def fill(self, weight: Tensor) -> None:
        nn.init.uniform_(weight, self.a, self.b)

    def _get_init_info(self) -> str:
        return f"{type(self).__name__}: a={self.a}, b={self.b}, bias={self.bias}"


class KaimingInit(BaseInit):
    """Keep the variance through rectifiers (He et al., arXiv:1502.01852, eqs. 10 and 14).

    Args:
        a: Negative slope of the rectifier after the layer, for ``"leaky_relu"``.
        mode: ``"fan_out"`` keeps the gradients' variance, ``"fan_in"`` the activations'.
        nonlinearity: The rectifier: ``"relu"`` or ``"leaky_relu"``.
        distribution: ``"normal"`` or ``"uniform"``.
        **kwargs: ``bias``, ``bias_prob``, ``layer``; see ``BaseInit``.
    """

    def __init__(
        self,
        a: Number = 0,
        mode: str = "fan_out",
        nonlinearity: str = "relu",
        distribution: str = "normal",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.a = a
        self.mode = mode
        self.nonlinearity = nonlinearity
        self.distribution = _check_distribution(distribution)

    def fill(self, weight: Tensor) -> None:
        uniform = self.distribution == "uniform"
        fill: Callable[..., Tensor] = (
            nn.init.kaiming_uniform_ if uniform else nn.init.kaiming_normal_
        )
        fill(weight, a=self.a, mode=self.mode, nonlinearity=self.nonlinearity)

    def _get_init_info(self) -> str:
        return (
            f"{type(self).__name__}: a={self.a}, mode={self.mode}, "
            f"nonlinearity={self.nonlinearity}, distribution={self.distribution}, "
            f"bias={self.bias}"
        )


class Caffe2XavierInit(KaimingInit):
    """Caffe2's ``XavierFill``: U(-sqrt(3 / fan_in), sqrt(3 / fan_in)).

    Args:
        **kwargs: ``bias``, ``bias_prob``, ``layer``; see ``BaseInit``.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(
            a=1, mode="fan_in", nonlinearity="leaky_relu", distribution="uniform", **kwargs
        )


# -- functions, for one module without its children --------------------------------------------


def constant_init(module: nn.Module, val: Number, bias: Number = 0) -> None:
    """Fill ``module.weight`` with ``val`` and ``module.bias`` with ``bias``, where they are."""
    ConstantInit(val, bias=bias).init_layer(module)


def xavier_init(
    module: nn.Module, gain: Number = 1, bias: Number = 0, distribution: str = "normal"
) -> None:
    """``XavierInit`` for ``module.weight``, a constant for ``module.bias``."""
    XavierInit(gain, distribution, bias=bias).init_layer(module)


def normal_init(module: nn.Module, mean: Number = 0, std: Number = 1, bias: Number = 0) -> None:
    """``NormalInit`` for ``module.weight``, a constant for ``module.bias``."""
    NormalInit(mean, std, bias=bias).init_layer(module)


def trunc_normal_init(
    module: nn.Module,
    mean: float = 0,
    std: float = 1,
    a: float = -2,
    b: float = 2,
    bias: float = 0,
) -> None:
    """``TruncNormalInit`` for ``module.weight``, a constant for ``module.bias``."""
    TruncNormalInit(mean, std, a, b, bias=bias).init_layer(module)


def uniform_init(module: nn.Module, a: Number = 0, b: Number = 1, bias: Number = 0) -> None:
    """``UniformInit`` for ``module.weight``, a constant for ``module.bias``."""
    UniformInit(a, b, bias=bias).init_layer(module)


def kaiming_init(
    module: nn.Module,
    a: Number = 0,
    mode: str = "fan_out",
    nonlinearity: str = "relu",
    bias: Number = 0,
    distribution: str = "normal",
) -> None:
    """``KaimingInit`` for ``module.weight``, a constant for ``module.bias``."""
    KaimingInit(a, mode, nonlinearity, distribution, bias=bias).init_layer(module)


def caffe2_xavier_init(module: nn.Module, bias: Number = 0) -> None:
    """``Caffe2XavierInit`` for ``module.weight``, a constant for ``module.bias``."""
    Caffe2XavierInit(bias=bias).init_layer(module)

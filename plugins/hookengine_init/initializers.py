"""The initializers that ``init_cfg`` names.

With the same random state, they produce the same numbers as MMEngine 0.10.7.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from hookengine_init.layers import check_filled, check_layers, hand_back
from hookengine_init.record import Write, ignore, writing

Number = int | float


def bias_init_with_prob(prior_prob: float) -> float:
    """Return the bias for which a sigmoid gives a probability (arXiv:1708.02002, section 4.1).

    Raises:
        ValueError: ``prior_prob`` is not between 0 and 1.
    """
    if not 0 < prior_prob < 1:
        raise ValueError(f"prior_prob must be between 0 and 1, got {prior_prob!r}")
    return float(-math.log((1 - prior_prob) / prior_prob))


class BaseInit:
    """Base class of initializers: ``fill`` the weights, set the biases.

    A subclass implements ``fill``, or ``__call__`` if it initializes more than the weights and
    biases of layers. Register your own with ``@WEIGHT_INITIALIZERS.register_module()``.

    Args:
        bias: The value of the biases.
        bias_prob: Instead of ``bias``, a probability whose log odds are the value of the biases.
        layer: Class names of the layers to initialize, their own or that of a direct base class
            (``"_BatchNorm"``).

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: Both ``bias`` and ``bias_prob`` are set.
    """

    wholemodule: bool = False
    """Whether to initialize every layer, whatever its class; set for an ``override``."""
    strict: bool = False
    """Whether it is an error if nothing matches; set for an ``init_cfg``, where that is a mistake.

    ``model.apply(ConstantInit(...))`` calls an initializer with each module of the model, most of
    which do not match.
    """

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
                    f"bias={bias!r} and bias_prob={bias_prob!r} both set the bias. Pass only one "
                    "of them"
                )
            bias = bias_init_with_prob(bias_prob)
        names = [layer] if isinstance(layer, str) else [] if layer is None else layer
        if not isinstance(names, (list, tuple)) or not all(isinstance(n, str) for n in names):
            raise TypeError(
                "layer must be a class name, as in layer='Conv2d', or a list of class names, got "
                f"{layer!r}"
            )
        self.bias = bias
        self.layer = list(names)

    def matches(self, module: nn.Module) -> bool:
        """Return whether ``layer`` names the module's class or a direct base class."""
        cls = type(module)
        return cls.__name__ in self.layer or any(b.__name__ in self.layer for b in cls.__bases__)

    def fill(self, weight: Tensor) -> Tensor | None:
        """Fill a weight in place; gradients are disabled during the call."""
        raise NotImplementedError(f"{type(self).__name__} implements neither fill nor __call__")

    def __call__(self, module: nn.Module) -> None:
        """Initialize the matching layers of ``module``, children before parents.

        Raises:
            ValueError: With ``strict``: no layer matches, or the parameters of those that do are
                named neither ``weight`` nor ``bias``.
        """
        write = writing(module, self._get_init_info())
        matched: dict[type, bool] = {}
        filled: set[type] = set()

        def init(layer: nn.Module) -> None:
            cls = type(layer)
            if cls not in matched:
                matched[cls] = self.wholemodule or self.matches(layer)
            if matched[cls] and self.init_layer(layer, write) is not False:
                filled.add(cls)

        with torch.no_grad() if torch.is_grad_enabled() else nullcontext():
            module.apply(init)
        if not self.strict:
            return
        if not self.wholemodule and (len(self.layer) > 1 or True not in matched.values()):
            check_layers(self.layer, module)
        if not filled:
            check_filled(module, [cls for cls, matches in matched.items() if matches])

    def init_layer(self, layer: nn.Module, write: Write = ignore) -> bool:
        """Initialize ``weight`` and ``bias`` of one layer, if it has them.

        Args:
            layer: The layer; its children are left unchanged.
            write: Called with each tensor that is written, and the constant that fills it or None.

        Returns:
            Whether the layer has a weight or a bias.
        """
        own = layer._parameters  # looked up first: getattr would get to them last
        weight = own["weight"] if "weight" in own else getattr(layer, "weight", None)
        bias = own["bias"] if "bias" in own else getattr(layer, "bias", None)
        try:
            if isinstance(weight, Tensor):
                result = self.fill(weight)
                if result is not None and result is not weight:
                    raise TypeError(
                        f"{type(self).__name__}.fill returned a new tensor. It must fill the given "
                        "tensor in place, as weight.copy_(...) does"
                    )
                write(weight, self._constant())
                if "weight" not in own:
                    hand_back(layer, "weight", weight, write)
            if isinstance(bias, Tensor):
                nn.init.constant_(bias, self.bias)
                write(bias, self.bias)
                if "bias" not in own:
                    hand_back(layer, "bias", bias, write)
        except Exception as error:
            if any(p is not None and is_lazy(p) for p in own.values()):
                raise ValueError(
                    f"{type(layer).__name__} does not know its shape yet, because it is lazy. Run "
                    "one batch through the model before its weights are initialized"
                ) from error
            error.add_note(f"at the layer {layer}")
            raise
        return isinstance(weight, Tensor) or isinstance(bias, Tensor)

    def _constant(self) -> Number | None:
        """Return the value that ``fill`` gives to every element, or None if they differ."""
        return None

    def _get_init_info(self) -> str:
        """Describe this initializer for the report on a parameter that it has changed."""
        hidden = ("bias", "layer", "strict", "wholemodule")
        options = [f"{name}={value}, " for name, value in vars(self).items() if name not in hidden]
        return f"{type(self).__name__}{': ' if options else ', '}{''.join(options)}bias={self.bias}"


class ConstantInit(BaseInit):
    """Fill the weights with ``val``.

    Args:
        val: The value.
        **kwargs: ``bias``, ``bias_prob``, ``layer``; see ``BaseInit``.
    """

    def __init__(self, val: Number, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.val = val

    def _constant(self) -> Number | None:
        return self.val if type(self).fill is ConstantInit.fill else None

    def fill(self, weight: Tensor) -> None:
        nn.init.constant_(weight, self.val)


def _check_distribution(distribution: str) -> str:
    if distribution not in ("uniform", "normal"):
        raise ValueError(f"distribution must be 'uniform' or 'normal', got {distribution!r}")
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


class TruncNormalInit(BaseInit):
    """Draw the weights from N(mean, std²), restricted to [a, b].

    Each weight is computed from one uniform draw, by the inverse of the distribution function, as
    in MMEngine. ``torch.nn.init.trunc_normal_`` of newer versions draws other numbers, by
    rejection.

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
        if not (std > 0 and a < b):
            raise ValueError(f"std must be positive and a below b, got std={std}, a={a}, b={b}")
        self.a = a
        self.b = b
        self.mean = mean
        self.std = std

    def fill(self, weight: Tensor) -> None:
        mean, std, a, b = self.mean, self.std, self.a, self.b
        if mean < a - 2 * std or mean > b + 2 * std:
            warnings.warn(
                f"mean={mean} is more than 2 std (std={std}) outside [{a}, {b}]. The distribution "
                "of the weights may be incorrect",
                stacklevel=2,
            )
        lower, upper = ((1 + math.erf((x - mean) / std / math.sqrt(2))) / 2 for x in (a, b))
        weight.uniform_(2 * lower - 1, 2 * upper - 1).erfinv_()
        weight.mul_(std * math.sqrt(2)).add_(mean).clamp_(min=a, max=b)


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


class Caffe2XavierInit(KaimingInit):
    """Caffe2's ``XavierFill``: U(-sqrt(3 / fan_in), sqrt(3 / fan_in)).

    Args:
        **kwargs: ``bias``, ``bias_prob``, ``layer``; see ``BaseInit``.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(
            a=1, mode="fan_in", nonlinearity="leaky_relu", distribution="uniform", **kwargs
        )

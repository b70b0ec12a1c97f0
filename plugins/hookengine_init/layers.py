"""Find layers by class name, and check that initializers have something to fill."""

from __future__ import annotations

import warnings
from collections import Counter

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from hookengine import did_you_mean
from hookengine_init.record import Write


def check_layers(layers: list[str], module: nn.Module) -> None:
    """Check that ``layer=`` matches something; warn about a name that may be misspelled.

    Raises:
        ValueError: No name is given, or none matches a layer of ``module``.
    """
    if not layers:
        raise ValueError(
            "neither 'layer' nor 'override' is set, so nothing would be initialized. Add layer=, "
            f"the class names of layers; {type(module).__name__} has {_present(module)}"
        )
    classes = {type(m) for m in module.modules()}
    found = {c.__name__ for cls in classes for c in (cls, *cls.__bases__)}
    missing = [name for name in layers if name not in found]
    if len(missing) == len(layers):
        raise ValueError(
            f"layer={layers if len(layers) > 1 else layers[0]!r} matches nothing in "
            f"{type(module).__name__}, which has {_present(module)}."
            f"{did_you_mean(missing[0], found)}"
        )
    for name in missing:  # a list may name absent layers; names unknown to torch may be typos
        hint = "" if hasattr(nn, name) else did_you_mean(name, found, cutoff=0.8)
        if hint:
            warnings.warn(
                f"layer {name!r} matches nothing in {type(module).__name__}.{hint}", stacklevel=2
            )


def _present(module: nn.Module) -> str:
    """Count the layers that can be initialized, by class."""
    layers = (m for m in module.modules() if {"weight", "bias"} & m._parameters.keys())
    counted = Counter(type(layer).__name__ for layer in layers)
    return (
        ", ".join(f"{name} ({count})" for name, count in counted.items())
        or "no layer with a weight or bias"
    )


def check_filled(module: nn.Module, classes: list[type]) -> None:
    """Warn that the layers of these classes, all that matched, have no weight and no bias.

    Raises:
        ValueError: They have parameters with other names.
    """
    layers = [m for m in module.modules() if type(m) in classes]
    others = {name: type(m).__name__ for m in layers for name in m._parameters}
    if others and not {"weight", "bias"} & others.keys():
        raise ValueError(
            f"{', '.join(dict.fromkeys(others.values()))} has neither 'weight' nor 'bias', which "
            f"initializers fill, but {', '.join(others)}. Give it its own init_weights()"
        )
    names = ", ".join(dict.fromkeys(type(m).__name__ for m in layers))
    warnings.warn(
        f"nothing was initialized in {type(module).__name__}: {names} has no weight and no bias",
        stacklevel=2,
    )


def hand_back(layer: nn.Module, name: str, value: Tensor, write: Write) -> None:
    """Make a filled value take effect that is not one of the layer's own parameters.

    The value of a parametrized tensor is assigned to its parametrization. A buffer, or a tensor
    that a property finds elsewhere, already holds it. If the tensor is computed from other
    parameters and cannot be inverted, the user is warned.
    """
    if is_parametrized(layer, name):
        try:
            setattr(layer, name, value.detach())
        except RuntimeError:  # it has no right_inverse
            counts = False
        else:
            counts = True
            for parameter in layer.parametrizations[name].parameters():  # type: ignore[index,union-attr]
                write(parameter, None)
    else:
        counts = name not in vars(layer) and torch.equal(getattr(layer, name), value)
    if not counts:
        warnings.warn(
            f"{type(layer).__name__} computes its {name} from other parameters, so it was not "
            "initialized. Give the layer its own init_weights()",
            stacklevel=2,
        )

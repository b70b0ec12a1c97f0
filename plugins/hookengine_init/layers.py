"""Layers by the names of their classes."""

from __future__ import annotations

import warnings
from collections import Counter

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from hookengine import did_you_mean
from hookengine_init.record import Write


def check_layers(layers: list[str], module: nn.Module) -> None:
    """Refuse ``layer=`` where it matches nothing; warn of a name that may be misspelt.

    Raises:
        ValueError: no layer of ``module`` is of one of the classes, or none is given.
    """
    if not layers:
        raise ValueError(
            "without 'layer' and 'override' nothing is initialised: add layer=, the class names of "
            f"layers; {type(module).__name__} has {_present(module)}"
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
    for name in missing:  # a list may name more than there is, but not what torch has never had
        hint = "" if hasattr(nn, name) else did_you_mean(name, found, cutoff=0.8)
        if hint:
            warnings.warn(
                f"layer {name!r} matches nothing in {type(module).__name__}.{hint}", stacklevel=2
            )


def _present(module: nn.Module) -> str:
    """The layers that can be initialised, by class."""
    layers = (m for m in module.modules() if {"weight", "bias"} & m._parameters.keys())
    counted = Counter(type(layer).__name__ for layer in layers)
    return ", ".join(f"{name} ({count})" for name, count in counted.items()) or "no such layers"


def check_filled(module: nn.Module, classes: list[type]) -> None:
    """Say that the layers of these classes, all that matched, have nothing to initialise.

    Raises:
        ValueError: they have parameters, of other names.
    """
    layers = [m for m in module.modules() if type(m) in classes]
    others = {name: type(m).__name__ for m in layers for name in m._parameters}
    if others and not {"weight", "bias"} & others.keys():
        raise ValueError(
            f"{', '.join(dict.fromkeys(others.values()))} has neither 'weight' nor 'bias', which "
            f"initializers fill, but {', '.join(others)}: give it an init_weights() of its own"
        )
    names = ", ".join(dict.fromkeys(type(m).__name__ for m in layers))
    warnings.warn(
        f"nothing was initialised in {type(module).__name__}: {names} has no weight and no bias",
        stacklevel=2,
    )


def hand_back(layer: nn.Module, name: str, value: Tensor, write: Write) -> None:
    """Make a filled value count that is no parameter of the layer itself.

    That of a parametrization is handed to it. A buffer, or what a property finds elsewhere, is
    there already. What is computed from other parameters, and not to be inverted, is warned of.
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
            f"{type(layer).__name__} computes its {name} from other parameters, so that it was not "
            "initialised: give the layer an init_weights() of its own",
            stacklevel=2,
        )

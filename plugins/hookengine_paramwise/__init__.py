"""Parameter groups: learning rate and weight decay by name, layer and kind of parameter."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from hookengine import did_you_mean

__all__ = ["param_groups"]

NORM_LAYERS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
)

Multipliers = tuple[float, float]
"""The multipliers of the learning rate and of the weight decay."""


def param_groups(
    module: nn.Module,
    *,
    lr: float | None = None,
    weight_decay: float | None = None,
    custom_keys: Mapping[str, Mapping[str, float]] | None = None,
    layers: Mapping[str, Mapping[str, float]] | None = None,
    bias_lr_mult: float | None = None,
    bias_decay_mult: float | None = None,
    norm_decay_mult: float | None = None,
    flat_decay_mult: float | None = None,
) -> list[dict[str, Any]]:
    """Group the parameters of a module for an optimizer of ``torch.optim``.

    Each multiplier of a parameter comes from the first of these that sets it: ``custom_keys`` (the
    longest match first), the multipliers for biases, those for norm layers, ``layers`` (the nearest
    class first), those for flat parameters. Otherwise, it is 1. Parameters with the same
    multipliers share a group. Frozen parameters (``requires_grad=False``) are in their groups too:
    optimizers skip them until you unfreeze them.

    ::

        SGD(param_groups(model, lr=0.1, weight_decay=1e-4, norm_decay_mult=0), lr=0.1)

    Args:
        module: The model.
        lr: The learning rate to multiply.
        weight_decay: The weight decay to multiply.
        custom_keys: ``{part of a name: dict(lr_mult=..., decay_mult=...)}``.
        layers: ``{class name of a layer: dict(lr_mult=..., decay_mult=...)}``, base classes
            included.
        bias_lr_mult: For parameters named ``bias``, except those of norm layers.
        bias_decay_mult: For the same parameters as ``bias_lr_mult``.
        norm_decay_mult: For all parameters of norm layers: torch's, and classes whose name
            contains ``Norm``.
        flat_decay_mult: For parameters with one dimension or none.

    Returns:
        Groups with ``params``, ``lr`` and ``weight_decay`` (if these were given), and
        ``group_name``, which states their multipliers. The group without any comes first.

    Raises:
        ValueError: A key matches nothing, a multiplier is invalid or has nothing to multiply, the
            module has no parameters, or the names of one parameter (tied weights) get different
            multipliers.
        TypeError: A rule is not a dict of multipliers.
    """
    scalars = {
        "bias_lr_mult": bias_lr_mult,
        "bias_decay_mult": bias_decay_mult,
        "norm_decay_mult": norm_decay_mult,
        "flat_decay_mult": flat_decay_mult,
    }
    for name, value in scalars.items():
        if value is not None:
            _check_multiplier(name, value)
    keys = _checked("custom_keys", custom_keys)
    classes = _checked("layers", layers)
    rules = _Rules(keys, classes, bias_lr_mult, bias_decay_mult, norm_decay_mult, flat_decay_mult)
    chosen: dict[nn.Parameter, tuple[str, Multipliers]] = {}
    for name, parameter, owner in _parameters(module):
        multipliers = rules.of(name, parameter, owner)
        first, others = chosen.setdefault(parameter, (name, multipliers))
        if others != multipliers:
            raise ValueError(
                f"paramwise: {first!r} and {name!r} are the same parameter (tied weights), but get "
                f"different multipliers, {_describe(others)} and {_describe(multipliers)}. Give "
                "both names the same rule in custom_keys"
            )
    rules.check_used(module)
    groups: dict[Multipliers, dict[str, Any]] = {}
    for parameter, (_, multipliers) in chosen.items():
        if multipliers not in groups:
            groups[multipliers] = {"params": [], **_options(multipliers, lr, weight_decay)}
        groups[multipliers]["params"].append(parameter)
    if not groups:
        raise ValueError(f"paramwise: {type(module).__name__} has no parameters")
    # The group without multipliers comes first: its learning rate is read as the optimizer's.
    return [groups[key] for key in sorted(groups, key=lambda pair: (pair[0] != 1, pair[1] != 1))]


class _Rules:
    """The rules that give a parameter its multipliers, and which of their keys have matched."""

    def __init__(
        self,
        keys: Mapping[str, Mapping[str, float]],
        classes: Mapping[str, Mapping[str, float]],
        bias_lr: float | None,
        bias_decay: float | None,
        norm_decay: float | None,
        flat_decay: float | None,
    ) -> None:
        self.keys = {key: keys[key] for key in sorted(keys, key=len, reverse=True)}
        self.classes = classes
        self.bias = {"lr_mult": bias_lr, "decay_mult": bias_decay}
        self.norm = {"decay_mult": norm_decay}
        self.flat = {"decay_mult": flat_decay}
        self.used: set[str] = set()

    def of(self, name: str, parameter: nn.Parameter, owner: nn.Module) -> Multipliers:
        """Return the multipliers of a parameter."""
        rules: list[Mapping[str, float | None]] = []
        for key, rule in self.keys.items():
            if key in name:
                self.used.add(key)
                rules.append(rule)
        if _is_norm(owner):
            rules.append(self.norm)
        elif name.rpartition(".")[2] == "bias":
            rules.append(self.bias)
        for cls in type(owner).__mro__:
            if cls.__name__ in self.classes:
                self.used.add(cls.__name__)
                rules.append(self.classes[cls.__name__])
        if self.flat["decay_mult"] is not None and _dim(name, parameter) <= 1:
            rules.append(self.flat)
        return _first(rules, "lr_mult"), _first(rules, "decay_mult")

    def check_used(self, module: nn.Module) -> None:
        """Raise a ValueError if a key has matched nothing."""
        names = {part for name, _ in module.named_parameters() for part in name.split(".")}
        kinds = {type(owner).__name__ for _, _, owner in _parameters(module)}
        for what, keys, known in (
            ("custom_keys", self.keys, names),
            ("layers", self.classes, kinds),
        ):
            for key in keys:
                if key not in self.used:
                    raise ValueError(
                        f"paramwise: {key!r} in {what} matches no parameter of "
                        f"{type(module).__name__}.{did_you_mean(key, known)}"
                    )


def _dim(name: str, parameter: nn.Parameter) -> int:
    if is_lazy(parameter):
        raise ValueError(
            f"paramwise: {name} has no shape yet, because its layer is lazy, so flat_decay_mult "
            "cannot tell whether it is flat. Run one batch through the model before you create "
            "the Runner"
        )
    return parameter.dim()


def _first(rules: list[Mapping[str, float | None]], name: str) -> float:
    return next((value for rule in rules if (value := rule.get(name)) is not None), 1.0)


def _parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter, nn.Module]]:
    """Yield (name, parameter, layer that owns it); tied parameters under each of their names."""
    for prefix, owner in module.named_modules(remove_duplicate=False):
        for name, parameter in owner.named_parameters(recurse=False, remove_duplicate=False):
            yield (f"{prefix}.{name}" if prefix else name), parameter, owner


def _is_norm(layer: nn.Module) -> bool:
    return isinstance(layer, NORM_LAYERS) or bool(re.search("Norm", type(layer).__name__))


def _checked(name: str, given: Any) -> Mapping[str, Mapping[str, float]]:
    """Return the rules; raise an error unless they are a dict of dicts of multipliers."""
    rules = {} if given is None else given
    example = "'backbone': dict(lr_mult=0.1)" if name == "custom_keys" else "'Embedding': ..."
    if not isinstance(rules, Mapping):
        raise TypeError(f"paramwise: {name} takes a dict such as {{{example}}}, got {given!r}")
    for key, rule in rules.items():
        if not isinstance(key, str) or not isinstance(rule, Mapping) or not rule:
            raise TypeError(
                f"paramwise: {name}[{key!r}] takes dict(lr_mult=..., decay_mult=...), got {rule!r}"
            )
        for option, value in rule.items():
            if option not in ("lr_mult", "decay_mult"):
                hint = did_you_mean(option, ("lr_mult", "decay_mult"))
                raise TypeError(
                    f"paramwise: {name}[{key!r}] has no option {option!r}.{hint} It takes lr_mult "
                    "and decay_mult"
                )
            _check_multiplier(f"{name}[{key!r}]: {option}", value)
    return rules


def _check_multiplier(name: str, value: Any) -> None:
    if not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ValueError(
            f"paramwise: {name}={value!r} is not a valid multiplier; expected a finite "
            "number of 0 or more"
        )


def _options(
    multipliers: Multipliers, lr: float | None, weight_decay: float | None
) -> dict[str, Any]:
    """Return the options of a group, besides its parameters."""
    options: dict[str, Any] = {"group_name": _describe(multipliers)}
    base = {"lr": lr, "weight_decay": weight_decay}
    for (name, value), multiplier in zip(base.items(), multipliers, strict=True):
        if value is not None:
            options[name] = value * multiplier
        elif multiplier != 1:
            raise ValueError(
                f"paramwise: a multiplier of {name} needs the optimizer's {name}. Set it"
            )
    return options


def _describe(multipliers: Multipliers) -> str:
    lr, decay = multipliers
    return f"lr x {lr:g}, decay x {decay:g}"

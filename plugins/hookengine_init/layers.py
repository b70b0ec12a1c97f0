"""Layers by the names of their classes."""

from __future__ import annotations

import difflib
import warnings
from collections import Counter
from collections.abc import Iterable

from torch import nn


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
        near = _nearest(missing[0], found, cutoff=0.6)
        hint = f" Did you mean {near!r}?" if near else ""
        raise ValueError(
            f"layer={layers if len(layers) > 1 else layers[0]!r} matches nothing in "
            f"{type(module).__name__}, which has {_present(module)}.{hint}"
        )
    for name in missing:  # a list may name more than there is, but not what torch has never had
        near = None if hasattr(nn, name) else _nearest(name, found, cutoff=0.8)
        if near is not None:
            warnings.warn(
                f"layer {name!r} matches nothing in {type(module).__name__}: did you mean "
                f"{near!r}?",
                stacklevel=2,
            )


def _nearest(name: str, known: Iterable[str], cutoff: float) -> str | None:
    folded = {other.casefold(): other for other in known}
    near = difflib.get_close_matches(name.casefold(), folded, n=1, cutoff=cutoff)
    return folded[near[0]] if near else None


def _present(module: nn.Module) -> str:
    """The layers with parameters of their own, by class."""
    counted = Counter(type(m).__name__ for m in module.modules() if m._parameters)
    return ", ".join(f"{name} ({count})" for name, count in counted.items()) or "no parameters"

"""Models with lazy layers, whose tensors have no shape before the first forward pass."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy


def lazy_names(module: nn.Module) -> list[str]:
    """Return the names of the parameters and buffers that have no shape yet."""
    tensors = (*module.named_parameters(), *module.named_buffers())
    return [name for name, tensor in tensors if is_lazy(tensor)]


def count_parameters(module: nn.Module) -> int | None:
    """Return the number of values in a module's parameters, or None if a shape is unknown."""
    parameters = [*module.parameters()]
    return None if any(map(is_lazy, parameters)) else sum(p.numel() for p in parameters)


def without_lazy(state: Any) -> Any:
    """Return a state dict without the tensors that have no values, which no file can hold.

    If there are none, the state dict itself is returned.
    """
    if not any(map(is_lazy, state.values())):
        return state
    return _with_items(state, {n: value for n, value in state.items() if not is_lazy(value)})


def with_lazy(module: nn.Module, state: Any) -> Any:
    """Return a state dict that ``module`` can load although a lazy tensor of it is missing.

    The tensor then stays lazy. If none is missing, the state dict itself is returned.
    """
    own = module.state_dict()
    missing = {n: value for n, value in own.items() if is_lazy(value) and n not in state}
    return _with_items(state, {**state, **missing}) if missing else state


def _with_items(state: Any, items: Mapping[str, Any]) -> Any:
    """Return a state dict with other items and the same versions of modules."""
    changed = OrderedDict(items)
    vars(changed).update(vars(state) if isinstance(state, OrderedDict) else {})
    return changed

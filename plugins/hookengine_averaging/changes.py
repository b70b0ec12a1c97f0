"""Noticing that a module has got other tensors or layers, without looking at all of them."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

_watched: WeakKeyDictionary[nn.Module, WeakSet[Tree]] = WeakKeyDictionary()


def _note(module: nn.Module, name: str, *_: Any) -> None:
    """Note that a parameter, a buffer or a layer was registered or replaced; torch calls this."""
    if name not in module._non_persistent_buffers_set:
        for tree in _watched.get(module, ()):
            tree.changed = True


@functools.cache
def _listen() -> None:
    register_module_parameter_registration_hook(_note)
    register_module_buffer_registration_hook(_note)
    register_module_module_registration_hook(_note)


class Tree:
    """The tensors and children of a module, to detect changes.

    An update does not check all of them: in a training run, a thousand dicts are not in the
    processor's cache, and checking them would take a tenth of the update. torch reports changes.
    Buffers outside the state dict do not count.

    Args:
        module: The module, which may change later.

    Attributes:
        changed: Whether something was registered with one of its modules since the last check.
    """

    def __init__(self, module: nn.Module) -> None:
        _listen()
        self._module = module
        self.changed = False
        self._members = [*_members(module)]
        self._shapes = _shapes(self._members)
        for each in module.modules():
            _watched.setdefault(each, WeakSet()).add(self)
        owned = [(m._buffers, [*state_buffers(m)][:1]) for m in module.modules()]
        self._marks = [(buffers, *first[0]) for buffers, first in owned if first]
        parameters = [*module.parameters()]
        self._kinds = [(p, p.dtype, p.device) for p in parameters[:1] + parameters[-1:]]

    def has_moved(self) -> bool:
        """Return whether buffers were replaced or parameters changed, as by ``module.to()``."""
        for buffers, name, buffer in self._marks:
            if buffers.get(name) is not buffer:
                return True
        return any(p.dtype != dtype or p.device != device for p, dtype, device in self._kinds)

    def is_as_it_was(self) -> bool:
        """Return whether all of them are still the same objects; reset ``changed``."""
        self.changed = False
        members = [*_members(self._module)]
        same = len(members) == len(self._members) and all(map(operator.is_, members, self._members))
        return same and _shapes(members) == self._shapes


def state_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor | None]]:
    """Yield the buffers of one module that are part of its state dict, or will be once set."""
    for name, buffer in module._buffers.items():
        if name not in module._non_persistent_buffers_set:
            yield name, buffer


def _members(module: nn.Module) -> Iterator[Any]:
    for each in module.modules():
        yield from each._parameters.values()
        yield from (buffer for _, buffer in state_buffers(each))
        yield from each._modules.values()


def _shapes(members: list[Any]) -> list[Any]:
    return [(each.shape, each.dtype) for each in members if isinstance(each, Tensor)]

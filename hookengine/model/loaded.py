"""Track which tensors of a module a state dict was loaded into.

A BaseModule notes it by hooks of its own. Other modules are loaded before a BaseModule contains
them, and torch has no hook for all modules, so this file wraps ``nn.Module.load_state_dict``.
"""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

LOADED = "_loaded_names"
"""The attribute of other modules with the names of their own loaded tensors, a frozenset.

Copies and pickles of the module keep it, and do not need hookengine.
"""


class LoadedTensors:
    """A set of weak references to tensors, preserved when a module is copied or pickled."""

    def __init__(self, tensors: Iterable[Tensor] = ()) -> None:
        self._references = {id(tensor): weakref.ref(tensor) for tensor in tensors}

    def add(self, tensor: Tensor) -> None:
        """Add ``tensor`` to the set."""
        self._references[id(tensor)] = weakref.ref(tensor)

    def __iter__(self) -> Iterator[Tensor]:
        for reference in self._references.values():
            if (tensor := reference()) is not None:
                yield tensor

    def __len__(self) -> int:
        return sum(1 for _ in self) if self._references else 0

    def __deepcopy__(self, memo: dict[int, Any]) -> LoadedTensors:
        return LoadedTensors(copy.deepcopy(list(self), memo))

    def __reduce__(self) -> tuple[Any, ...]:
        return LoadedTensors, (list(self),)


def watch_loading(module: nn.Module) -> None:
    """Fill ``module.loaded_tensors`` whenever a state dict is loaded into ``module``.

    This includes loading through any parent module.
    """
    module.register_load_state_dict_pre_hook(_before_loading)  # type: ignore[no-untyped-call]
    module.register_load_state_dict_post_hook(_after_loading)  # type: ignore[no-untyped-call]


def _own_tensors(module: nn.Module) -> Iterator[tuple[Tensor, int]]:
    """Yield the parameters and buffers of ``module``, each with its number of in-place writes.

    Tensors that belong to a watched module inside it are left out.
    """
    waiting: list[nn.Module] = [module]
    while waiting:
        part = waiting.pop()
        for tensor in (*part._parameters.values(), *part._buffers.values()):
            if tensor is not None:
                yield tensor, _writes(tensor)
        waiting.extend(
            child
            for child in part._modules.values()
            if child is not None and "loaded_tensors" not in vars(child)
        )


def _writes(tensor: Tensor) -> int:
    return 0 if is_lazy(tensor) or tensor.is_inference() else tensor._version


_LOADING: WeakKeyDictionary[nn.Module, dict[int, tuple[Tensor, int]]] = WeakKeyDictionary()


def _before_loading(module: nn.Module, *_: Any) -> None:
    # Hold the tensors themselves, so that no new tensor can reuse an id.
    _LOADING[module] = {id(tensor): (tensor, count) for tensor, count in _own_tensors(module)}


def _after_loading(module: nn.Module, *_: Any) -> None:
    before = _LOADING.pop(module, {})
    loaded = cast("LoadedTensors", module.loaded_tensors)
    for tensor, count in _own_tensors(module):
        if before.get(id(tensor), (None, -1))[1] != count:
            loaded.add(tensor)


# -- modules that are no BaseModule -------------------------------------------------------------


def _tensors(part: nn.Module) -> dict[str, tuple[Tensor, int]]:
    """Return the module's own tensors by name, each with its number of in-place writes."""
    members = {**part._parameters, **part._buffers}
    return {name: (t, _writes(t)) for name, t in members.items() if t is not None}


_load_state_dict = nn.Module.load_state_dict


@functools.wraps(_load_state_dict)
def _load_and_note(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    before = {
        part: _tensors(part)
        for part in self.modules()
        if not ("loaded_tensors" in vars(part) or isinstance(part, torch.jit.ScriptModule))
    }
    try:
        return _load_state_dict(self, *args, **kwargs)
    finally:
        for part, known in before.items():
            names = {
                name
                for name, (tensor, count) in _tensors(part).items()
                if name not in known or known[name][0] is not tensor or known[name][1] != count
            }
            if names:
                vars(part)[LOADED] = vars(part).get(LOADED, frozenset()) | names


nn.Module.load_state_dict = _load_and_note  # type: ignore[method-assign]


def loaded_tensors(module: nn.Module) -> list[Tensor]:
    """Return the parameters and buffers in a module that a state dict was loaded into.

    It does not matter whether the state dict was loaded into the module, a part of it or a module
    around it. Modules that were loaded before hookengine was imported are not known.
    """
    found = {}
    for part in module.modules():
        if "loaded_tensors" in vars(part):
            found.update({id(tensor): tensor for tensor in cast("Any", part).loaded_tensors})
        for name in vars(part).get(LOADED, ()):
            tensor = part._parameters.get(name, part._buffers.get(name))
            if tensor is not None:
                found[id(tensor)] = tensor
    return [*found.values()]


def remember_loaded(module: nn.Module) -> Callable[[], None]:
    """Return a function that restores which tensors in a module count as loaded."""
    parts = [*module.modules()]
    names = {part: vars(part).get(LOADED) for part in parts}
    known = [
        (part, copy.copy(part.loaded_tensors)) for part in parts if "loaded_tensors" in vars(part)
    ]

    def restore() -> None:
        for part, before in names.items():
            vars(part).pop(LOADED, None)
            if before is not None:
                vars(part)[LOADED] = before
        for part, tensors in known:
            cast("Any", part).loaded_tensors = tensors

    return restore


def forget_loaded(module: nn.Module) -> None:
    """Make no tensor in a module count as loaded."""
    for part in module.modules():
        vars(part).pop(LOADED, None)
        if "loaded_tensors" in vars(part):
            cast("Any", part).loaded_tensors = LoadedTensors()

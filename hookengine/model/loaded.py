"""Track which tensors of a module a state dict was loaded into."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable, Iterator
from typing import Any, cast
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.nn.parameter import is_lazy


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
                uncounted = is_lazy(tensor) or tensor.is_inference()
                yield tensor, 0 if uncounted else tensor._version
        waiting.extend(
            child
            for child in part._modules.values()
            if child is not None and "loaded_tensors" not in vars(child)
        )


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

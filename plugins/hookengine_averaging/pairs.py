"""The tensors of a copy, paired with those of the model it was made from."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Iterator
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

WHOLE_CHECK = 100
"""Updates between two full checks, for changes that torch does not report (a deleted layer)."""


class Pairs:
    """Lists of tensors, built once: those to average, and those to copy.

    Args:
        module: The copy.
        model: The model.
        average_buffers: Also average the floating-point buffers that are part of the state.

    Attributes:
        averaged: The floating-point tensors of the copy that are averaged.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: The two differ in their parameters or buffers.
    """

    def __init__(self, module: nn.Module, model: nn.Module, average_buffers: bool) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"expected a model, an nn.Module; got {type(model).__name__}")
        self._model = model
        self._asked = 0
        self._trees = _Tree(module), _Tree(model)
        parameters = _match("parameter", module.named_parameters(), model.named_parameters())
        buffers = _match("buffer", module.named_buffers(), model.named_buffers())
        persistent = {*module.state_dict(keep_vars=True)}
        averaged: list[tuple[Tensor, Tensor]] = []
        rest: list[tuple[Tensor, Tensor]] = []
        for pair in parameters.values():
            (averaged if _is_continuous(pair[0]) else rest).append(pair)
        for name, pair in buffers.items():
            own = average_buffers and name in persistent and _is_continuous(pair[0])
            (averaged if own else rest).append(pair)
        averaged = [(_local(average), _local(source)) for average, source in averaged]
        self.averaged = [average for average, _ in averaged]
        self._sources = [source for _, source in averaged]
        self._rest = [average for average, _ in rest], [source for _, source in rest]
        self._alike = all(a.device == s.device and a.dtype == s.dtype for a, s in averaged)

    def are_of(self, model: nn.Module) -> bool:
        """Return whether these are still the tensors of the copy and of ``model``."""
        if model is not self._model:
            return False
        self._asked += 1
        told = any(tree.changed for tree in self._trees)
        if not (told or self._asked % WHOLE_CHECK == 0 or self._trees[1].has_moved()):
            return True
        return not self._trees[1].has_moved() and all(t.is_as_it_was() for t in self._trees)

    def sources(self) -> list[Tensor]:
        """Return the model's values, on the device and of the dtype of the averages."""
        if self._alike:
            return self._sources
        pairs = zip(self.averaged, self._sources, strict=True)
        return [source.to(average) for average, source in pairs]

    def copy_all(self) -> None:
        """Make the copy equal to the model."""
        if self.averaged:
            torch._foreach_copy_(self.averaged, self._sources)
        self.copy_rest()

    def copy_rest(self) -> None:
        """Copy the tensors that are not averaged."""
        if self._rest[0]:
            torch._foreach_copy_(*self._rest)


_watched: WeakKeyDictionary[nn.Module, WeakSet[_Tree]] = WeakKeyDictionary()


def _note(module: nn.Module, *_: Any) -> None:
    """Note that a parameter, a buffer or a layer was registered or replaced; torch calls this."""
    for tree in _watched.get(module, ()):
        tree.changed = True


@functools.cache
def _listen() -> None:
    register_module_parameter_registration_hook(_note)
    register_module_buffer_registration_hook(_note)
    register_module_module_registration_hook(_note)


class _Tree:
    """The tensors and children of a module, to detect changes.

    An update does not check all of them: in a training run, a thousand dicts are not in the
    processor's cache, and checking them would take a tenth of the update. torch reports changes.

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
        for each in module.modules():
            _watched.setdefault(each, WeakSet()).add(self)
        owned = [m._buffers for m in module.modules() if m._buffers]
        self._marks = [(buffers, *next(iter(buffers.items()))) for buffers in owned]
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
        return len(members) == len(self._members) and all(map(operator.is_, members, self._members))


def _is_continuous(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a sharded tensor, which is all that an average needs."""
    to_local = getattr(tensor, "to_local", None)
    part: Tensor = tensor if to_local is None else tensor.detach().to_local()  # type: ignore[attr-defined]
    return part


def _members(module: nn.Module) -> Iterator[Any]:
    for each in module.modules():
        yield from each._parameters.values()
        yield from each._buffers.values()
        yield from each._modules.values()


def _match(
    kind: str,
    averages: Iterable[tuple[str, Tensor]],
    sources: Iterable[tuple[str, Tensor]],
) -> dict[str, tuple[Tensor, Tensor]]:
    mine, theirs = dict(averages), dict(sources)
    problems = [f"it lacks {name}" for name in mine.keys() - theirs.keys()]
    problems += [f"{name} is new" for name in theirs.keys() - mine.keys()]
    problems += [
        f"{name} is {tuple(theirs[name].shape)}, averaged {tuple(mine[name].shape)}"
        for name in mine.keys() & theirs.keys()
        if mine[name].shape != theirs[name].shape
    ]
    if problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(
            f"the model and its average have different {kind}s: "
            f"{'; '.join(sorted(problems)[:3])}{more}. Pass a model of the same architecture (for "
            "a wrapped one, its .module), or create a new averaged model"
        )
    for name in mine:
        parts = _local(mine[name]).shape, _local(theirs[name]).shape
        if parts[0] != parts[1]:
            raise ValueError(
                f"{name} is sharded differently in the model and in the average. Wrap both in the "
                "same way, with runner.wrap(averaged.module, 'average')"
            )
    return {name: (mine[name], theirs[name]) for name in mine}

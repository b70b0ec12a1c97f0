"""The tensors of a copy beside those of the model that it was made from."""

from __future__ import annotations

from collections.abc import Iterable, ValuesView
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

WHOLE_CHECK = 100
"""Updates between two looks at everything."""


class Pairs:
    """Lists of tensors, made once: what is averaged, and what is copied.

    Args:
        module: The copy.
        model: The model.
        average_buffers: Average floating-point buffers that are part of the state, too.

    Attributes:
        averaged: Floating-point tensors of the copy.

    Raises:
        ValueError: the two have not the same parameters and buffers.
    """

    def __init__(self, module: nn.Module, model: nn.Module, average_buffers: bool) -> None:
        self._model = model
        self._asked = 0
        self._trees = _Tree(module), _Tree(model)
        parameters = _match("parameter", module.named_parameters(), model.named_parameters())
        buffers = _match("buffer", module.named_buffers(), model.named_buffers())
        persistent = {*module.state_dict(keep_vars=True)}
        averaged: list[tuple[Tensor, Tensor]] = []
        rest: list[tuple[Tensor, Tensor]] = []
        for pair in parameters.values():
            (averaged if pair[0].is_floating_point() else rest).append(pair)
        for name, pair in buffers.items():
            own = average_buffers and name in persistent and pair[0].is_floating_point()
            (averaged if own else rest).append(pair)
        self.averaged = [average for average, _ in averaged]
        self._sources = [source for _, source in averaged]
        self._rest = [average for average, _ in rest], [source for _, source in rest]
        self._alike = all(a.device == s.device and a.dtype == s.dtype for a, s in averaged)

    def are_of(self, model: nn.Module) -> bool:
        """Whether these are still the tensors of this model, and now and then also of the copy."""
        if model is not self._model or not self._trees[1].is_as_it_was():
            return False
        self._asked += 1
        if self._asked % WHOLE_CHECK:
            return True
        return all(tree.is_as_it_was() and tree.is_whole() for tree in self._trees)

    def sources(self) -> list[Tensor]:
        """The model's values, on the device and of the dtype of the averages."""
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
        """Copy what is not averaged."""
        if self._rest[0]:
            torch._foreach_copy_(*self._rest)


class _Tree:
    """Which tensors and children a module has, looked up again in a few microseconds.

    Args:
        module: The module; also after it has changed.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._views = _views(module)
        self._filled = [view for view in self._views if view]  # live, as views of dicts are
        self._members = self._look()

    def _look(self) -> list[Any]:
        return [*chain.from_iterable(self._filled)]

    def is_as_it_was(self) -> bool:
        """Whether all of them are the same objects.

        Lists compare by identity first. Of tensors that are not the same objects only single
        numbers can be equal, and then it does not matter which of them is copied.
        """
        try:
            return self._look() == self._members
        except RuntimeError:  # tensors of several elements, which have no truth value
            return False

    def is_whole(self) -> bool:
        """Whether it has got no tensors or children where there were none; takes its time."""
        return len(_views(self._module)) == len(self._views) and self._filled == [
            view for view in self._views if view
        ]


def _views(module: nn.Module) -> list[ValuesView[Any]]:
    owned = [(m._parameters, m._buffers, m._modules) for m in module.modules()]
    return [members.values() for each in owned for members in each]


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
            f"the model does not have the {kind}s that are averaged: "
            f"{'; '.join(sorted(problems)[:3])}{more}. Average a model of the same architecture "
            "(of a wrapped one its .module), or make a new averaged model"
        )
    return {name: (mine[name], theirs[name]) for name in mine}

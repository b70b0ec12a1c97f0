"""The tensors of a copy, paired with those of the model it was made from."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from hookengine_averaging.changes import Tree
from hookengine_averaging.dtypes import Dtypes
from hookengine_averaging.match import (
    buffers_of,
    is_averaged_buffer,
    is_continuous,
    match,
    pair,
    parameters_of,
)
from hookengine_averaging.precise import PreciseValues, local

WHOLE_CHECK = 100
"""Updates between two full checks, for changes that torch does not report (a deleted layer)."""
CHUNK = 2**24
"""How many elements are converted at once to the averages' dtype or device: 64 MB in float32."""


class Pairs:
    """Lists of tensors, built once: those to average, and those to copy.

    Buffers outside the state dict (``persistent=False``) are neither: the copy computes its own.

    Args:
        module: The copy. Its buffers become others where the model's have; see ``match.pair``.
        model: The model.
        average_buffers: Also average the floating-point buffers.
        precise: The averages of tensors with a low precision.
        dtypes: The dtypes of the model's tensors at the last time.

    Attributes:
        alike: Whether each average has the device and the dtype of the model's value.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: The two differ in their parameters or buffers; nothing is changed.
    """

    def __init__(
        self,
        module: nn.Module,
        model: nn.Module,
        average_buffers: bool,
        precise: PreciseValues,
        dtypes: Dtypes,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"expected a model, an nn.Module; got {type(model).__name__}")
        self._model = model
        self._asked = 0
        self._precise = precise
        parameters = match("parameter", parameters_of(module), parameters_of(model))
        buffers = match("buffer", buffers_of(module), buffers_of(model))
        matches = {**parameters, **buffers}
        dtypes.follow(model, matches, matches if average_buffers else parameters, precise)
        pairs = pair(matches)
        self._trees = Tree(module), Tree(model)
        self._averages: list[Tensor] = []
        self._sources: list[Tensor] = []
        self._rest: tuple[list[Tensor], list[Tensor]] = [], []
        self._averaged_buffers: list[tuple[Tensor, Tensor]] = []
        self._rounded: dict[str, tuple[Tensor, Tensor]] = {}
        for name, (tensor, source) in pairs.items():
            averaged_buffer = average_buffers and is_averaged_buffer(tensor)
            if not (averaged_buffer if name in buffers else is_continuous(tensor)):
                self._rest[0].append(tensor)
                self._rest[1].append(source)
                continue
            value = precise.of(name, tensor)
            if value is not tensor:
                self._rounded[name] = local(tensor), local(value)
            if name in buffers:
                self._averaged_buffers.append((tensor, source))
            self._averages.append(local(value))
            self._sources.append(local(source))
        both = zip(self._averages, self._sources, strict=True)
        self.alike = all(a.device == s.device and a.dtype == s.dtype for a, s in both)
        self._chunks = [] if self.alike else [*_chunks(self._averages, self._sources)]
        self._dtypes = [source.dtype for source in self._sources]

    def are_of(self, model: nn.Module, closely: bool = False) -> bool:
        """Return whether these are still the tensors of the copy and of ``model``.

        Args:
            model: The model.
            closely: Also compare the dtype of each tensor, which takes longer.
        """
        if model is not self._model or any(a.shape != s.shape for a, s in self._averaged_buffers):
            return False
        if closely and [source.dtype for source in self._sources] != self._dtypes:
            return False
        self._asked += 1
        told = any(tree.changed for tree in self._trees)
        if not (told or self._asked % WHOLE_CHECK == 0 or self._trees[1].has_moved()):
            return True
        return not self._trees[1].has_moved() and all(t.is_as_it_was() for t in self._trees)

    def groups(self) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        """Yield averages and the model's values, on the same device and of the same dtype."""
        if self._rounded:
            self._precise.refresh()
        if self.alike:
            yield self._averages, self._sources
            return
        for averages, sources in self._chunks:
            both = zip(averages, sources, strict=True)
            yield averages, [source.to(average) for average, source in both]

    def copy_all(self) -> None:
        """Make the copy equal to the model."""
        if self._averages:
            torch._foreach_copy_(self._averages, self._sources)
        self.store()
        self.copy_rest()

    def store(self) -> None:
        """Write the averages into the copy where it holds them rounded."""
        if self._rounded:
            self._precise.store(self._rounded)

    def copy_rest(self) -> None:
        """Copy the tensors that are not averaged."""
        if self._rest[0]:
            torch._foreach_copy_(*self._rest)


def _chunks(
    averages: list[Tensor], sources: list[Tensor]
) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Divide two lists so that the tensors of a part have ``CHUNK`` elements, or are one tensor."""
    begin = size = 0
    for index, source in enumerate(sources):
        if index > begin and size + source.numel() > CHUNK:
            yield averages[begin:index], sources[begin:index]
            begin, size = index, 0
        size += source.numel()
    yield averages[begin:], sources[begin:]

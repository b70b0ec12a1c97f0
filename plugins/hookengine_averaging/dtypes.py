"""Giving the tensors of a copy another dtype where the model has changed theirs."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from hookengine_averaging.match import Match, are_alike
from hookengine_averaging.precise import PreciseValues


class Dtypes:
    """The dtypes that the model's tensors had when they were last paired with those of the copy.

    A copy that was converted to another dtype than the model's keeps it.
    """

    def __init__(self) -> None:
        self._model: weakref.ref[nn.Module] | None = None
        self._known: dict[str, torch.dtype] = {}

    def follow(
        self,
        model: nn.Module,
        matches: Mapping[str, Match],
        averaged: Collection[str],
        precise: PreciseValues,
    ) -> None:
        """Convert the tensors of the copy whose dtype the model has changed; keep their averages.

        Args:
            model: The model.
            matches: The tensors of the copy and of the model by name.
            averaged: The names of those that are averaged.
            precise: The averages of tensors with a low precision.
        """
        known = self._known if self._model is not None and self._model() is model else {}
        changed: dict[int, tuple[str, Tensor, torch.dtype]] = {}  # tied ones once
        for name, (slot, source) in matches.items():
            tensor = slot.tensor
            if tensor is None or source is None or not are_alike(tensor, source):
                continue
            if tensor.dtype == known.get(name) != source.dtype:
                changed.setdefault(id(tensor), (name, tensor, source.dtype))
        if changed:
            tensors = {name: tensor for name, tensor, _ in changed.values() if name in averaged}
            before = precise.before_conversion(tensors)
            for _, tensor, dtype in changed.values():
                tensor.data = tensor.data.to(dtype)
            precise.after_conversion(tensors, before)
        self._model = weakref.ref(model)
        self._known = {n: source.dtype for n, (_, source) in matches.items() if source is not None}

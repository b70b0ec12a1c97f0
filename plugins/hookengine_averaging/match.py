"""Matching the tensors of a copy with those of the model by name, as the state dict names them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hookengine_averaging.changes import state_buffers
from hookengine_averaging.memory import shared_memory
from hookengine_averaging.precise import local


class Slot(NamedTuple):
    """A place for a parameter or a buffer in a module.

    Attributes:
        held: The parameters or the buffers of the module, by key.
        key: The key.
        tensor: What is there; None in an empty place.
    """

    held: dict[str, Any]
    key: str
    tensor: Any


Match = tuple[Slot, Any]
"""A place in the copy, and the model's tensor of that name, or None."""


def parameters_of(module: nn.Module) -> dict[str, Slot]:
    """Return the places of the parameters by name; a tied parameter has several."""
    return {
        (f"{prefix}.{key}" if prefix else key): Slot(owner._parameters, key, parameter)
        for prefix, owner in module.named_modules(remove_duplicate=False)
        for key, parameter in owner._parameters.items()
    }


def buffers_of(module: nn.Module) -> dict[str, Slot]:
    """Return the places of the buffers that belong to the state dict by name, also empty ones."""
    return {
        (f"{prefix}.{key}" if prefix else key): Slot(owner._buffers, key, buffer)
        for prefix, owner in module.named_modules(remove_duplicate=False)
        for key, buffer in state_buffers(owner)
    }


def match(kind: str, mine: Mapping[str, Slot], theirs: Mapping[str, Slot]) -> dict[str, Match]:
    """Match the places of a copy with the tensors of the model.

    Args:
        kind: ``parameter`` or ``buffer``.
        mine: The places of the copy.
        theirs: Those of the model.

    Raises:
        ValueError: A name is missing, or a parameter has another shape or is sharded differently.
    """
    lacking = [name for name in mine.keys() - theirs.keys() if mine[name].tensor is not None]
    new = [name for name in theirs.keys() - mine.keys() if theirs[name].tensor is not None]
    problems = [f"it lacks {name}" for name in lacking] + [f"{name} is new" for name in new]
    found = {name: (slot, theirs[name].tensor) for name, slot in mine.items() if name in theirs}
    if kind == "parameter":
        problems += [text for name, pair in found.items() if (text := _misfit(name, *pair))]
    if problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(
            f"the model and its average have different {kind}s: "
            f"{'; '.join(sorted(problems)[:3])}{more}. Pass a model of the same architecture (for "
            "a wrapped one, its .module), or create a new averaged model"
        )
    for name, (slot, source) in found.items():
        if _fits(slot.tensor, source) and local(slot.tensor).shape != local(source).shape:
            raise ValueError(
                f"{name} is sharded differently in the model and in the average. Wrap both in the "
                "same way, with runner.wrap(averaged.module, 'average')"
            )
    return found


def _misfit(name: str, slot: Slot, source: Any) -> str:
    average = slot.tensor
    if (average is None) != (source is None):
        return f"it lacks {name}" if source is None else f"{name} is new"
    if source is not None and average.shape != source.shape:
        return f"{name} is {tuple(source.shape)}, averaged {tuple(average.shape)}"
    return ""


def pair(matches: Mapping[str, Match]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the tensors of the copy and of the model by name, each pair once.

    The copy gets another tensor where its own cannot take the model's values: in an empty
    place, for another shape or kind of number, for tensors that the model no longer ties, and
    where several elements share memory. Where the model's place is empty, the copy's becomes empty.
    """
    devices: dict[torch.device, torch.device] = {}
    for slot, source in matches.values():
        if slot.tensor is not None and source is not None:
            devices.setdefault(source.device, slot.tensor.device)
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    sources: dict[int, Tensor] = {}  # by the id of the copy's tensor
    for name, (slot, source) in matches.items():
        average = slot.tensor
        if source is None:
            slot.held[slot.key] = None
            continue
        if average is not None and sources.get(id(average)) is source:
            continue  # tied
        fits = _fits(average, source)
        if not fits or id(average) in sources:
            device = devices[source.device] if average is None else average.device
            average = (average if fits else source).detach().clone().to(device)
            if isinstance(source, nn.Parameter):
                average = nn.Parameter(average, requires_grad=False)
            slot.held[slot.key] = average
        sources[id(average)] = source
        pairs[name] = average, source
    averages = [average for average, _ in pairs.values()]
    for index in shared_memory(averages):
        averages[index].data = averages[index].data.clone()
    return pairs


def is_continuous(tensor: Tensor) -> bool:
    """Return whether a tensor holds real or complex numbers, so that it can be averaged."""
    return tensor.is_floating_point() or tensor.is_complex()


def is_averaged_buffer(buffer: Tensor) -> bool:
    """Return whether a buffer can be averaged; torch cannot interpolate sparse tensors."""
    return is_continuous(buffer) and buffer.layout == torch.strided


def are_alike(average: Tensor, source: Tensor) -> bool:
    """Return whether both tensors hold real numbers, or both complex ones."""
    continuous = is_continuous(average) and is_continuous(source)
    return continuous and average.is_complex() == source.is_complex()


def _fits(average: Any, source: Any) -> bool:
    """Return whether the copy's tensor can take the values of the model's."""
    if average is None or source is None or average.shape != source.shape:
        return False
    if average.layout != source.layout:
        return False
    return average.dtype == source.dtype or are_alike(average, source)

"""Parameter groups that join a schedule after it has begun."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

Build = Callable[[Optimizer], LRScheduler]
"""Builds the scheduler of a run for an optimizer."""

_PER_GROUP = (
    "base_lrs",
    "max_lrs",
    "lr_lambdas",
    "base_momentums",
    "max_momentums",
)
"""The attributes of torch's schedulers that hold one value per parameter group."""


def set_rate(group: dict[str, Any], lr: float | Tensor) -> None:
    """Set the learning rate of a parameter group; a tensor stays the same tensor."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(lr)
    else:
        group["lr"] = lr


def join(scheduler: LRScheduler, index: int, build: Build | None, adopt: bool = True) -> None:
    """Let a parameter group follow a scheduler as if it had done so from the start.

    The initial learning rate of the group is its ``initial_lr``, or its ``lr`` if it has none. The
    schedule up to now is computed again for this group alone. ``ReduceLROnPlateau`` depends on
    metrics, not on steps: there, the group keeps its learning rate until the next reduction.

    Args:
        scheduler: The scheduler, which does not know the group or an earlier ``initial_lr`` of it.
        index: The place of the group.
        build: Builds the same scheduler, if possible.
        adopt: Whether to set the options of the group; otherwise only the scheduler changes.

    Raises:
        ValueError: The scheduler cannot be built for the group.
    """
    groups = scheduler.optimizer.param_groups
    group = groups[index]
    _separate_rate(group, groups)
    if isinstance(scheduler, ReduceLROnPlateau):
        if scheduler.default_min_lr is None and len(scheduler.min_lrs) < len(groups):
            raise _not_extended(scheduler, index, "Give min_lr as one number")
        return
    if build is None:
        if len(getattr(scheduler, "base_lrs", ())) <= index:
            raise _not_extended(
                scheduler, index, "Pass it as dict(type=..., ...) or as a function of the optimizer"
            )
        return
    alone = _replay(scheduler, group, index, build)
    _extend(scheduler, alone, index)
    _check_length(scheduler, index)
    if adopt:
        for name, value in alone.optimizer.param_groups[0].items():
            if name == "lr":
                set_rate(group, value)
            elif name != "params":
                group[name] = value


def rescale(scheduler: LRScheduler, index: int, factor: float) -> None:
    """Multiply the learning rate of a group whose scheduler cannot be built again."""
    group = scheduler.optimizer.param_groups[index]
    set_rate(group, float(scheduler.get_last_lr()[index]) * factor)
    if index < len(base := getattr(scheduler, "base_lrs", [])):
        base[index] = base[index] * factor


def _separate_rate(group: dict[str, Any], groups: Sequence[dict[str, Any]]) -> None:
    """Copy the learning rate of a group if it is the same tensor as that of another group.

    The optimizer gives its default tensor to all groups without a learning rate.
    """
    for other in groups:
        if other is not group and isinstance(group["lr"], Tensor) and other["lr"] is group["lr"]:
            group["lr"] = group["lr"].detach().clone()
            if "initial_lr" in other:  # the shared tensor has been scheduled since
                group.setdefault("initial_lr", copy.deepcopy(other["initial_lr"]))


def _not_extended(scheduler: LRScheduler, index: int, fix: str) -> ValueError:
    return ValueError(
        f"schedule: the {type(scheduler).__name__} was created before parameter group {index} was "
        f"added, and cannot be extended to it. {fix}, or add all groups before training"
    )


def _check_length(scheduler: LRScheduler, index: int) -> None:
    """Raise a ValueError if a scheduler that is not torch's has no rate for the group.

    It may keep values of each group under names that only it knows.
    """
    if type(scheduler).__module__ == LRScheduler.__module__:
        return
    with warnings.catch_warnings(), suppress(NotImplementedError):
        warnings.simplefilter("ignore")  # torch expects get_lr to be called within step
        try:
            rates = scheduler.get_lr()
        except (IndexError, ValueError) as error:
            raise _not_extended(scheduler, index, _FIX) from error
        if len(rates) != len(scheduler.optimizer.param_groups):
            raise _not_extended(scheduler, index, _FIX)


_FIX = "Let it compute what it needs of each group in get_lr, from base_lrs"


def with_own_groups(
    state: Mapping[str, Any], own: Mapping[str, Any], groups: int
) -> dict[str, Any]:
    """Return a scheduler's saved state, with its own values where the groups differ in number.

    Args:
        state: The saved state.
        own: The state of the scheduler that is going to load it.
        groups: The number of parameter groups.
    """
    kept = dict(state)
    for name in _PER_GROUP:
        if name in own and len(state.get(name) or ()) != groups:
            kept[name] = own[name]
    if "_schedulers" in kept:
        pairs = zip(kept["_schedulers"], own["_schedulers"], strict=True)
        kept["_schedulers"] = [with_own_groups(part, mine, groups) for part, mine in pairs]
    return kept


def _replay(scheduler: LRScheduler, group: dict[str, Any], index: int, build: Build) -> LRScheduler:
    """Build the scheduler for a group alone, and take the steps that were taken so far."""
    options = {
        name: value.detach().clone() if isinstance(value, Tensor) else value
        for name, value in group.items()
        if name != "params"
    }
    options["lr"] = options.pop("initial_lr", options["lr"])
    optimizer = Optimizer([{**options, "params": [torch.zeros(())]}], _defaults(scheduler))
    try:
        alone = build(optimizer)
    except (TypeError, ValueError) as error:
        error.add_note(
            f"while the schedule was extended to parameter group {index}, which was added later. "
            "Give its options one value for all groups, or add all groups before training"
        )
        raise
    if alone.optimizer is not optimizer:
        raise ValueError(
            f"schedule: the function of the optimizer returned the {type(alone).__name__} of "
            "another optimizer. Create a new scheduler in each call of the function"
        )
    optimizer._opt_called = True  # type: ignore[attr-defined]  # torch would miss a step of it
    for _ in range(_steps(scheduler)):
        alone.step()
    return alone


def _defaults(scheduler: LRScheduler) -> dict[str, Any]:
    return getattr(scheduler.optimizer, "defaults", {})  # an optimizer around another may lack it


def _steps(scheduler: Any) -> int:
    while not hasattr(scheduler, "last_epoch"):  # as in ChainedScheduler
        scheduler = scheduler._schedulers[0]
    return int(scheduler.last_epoch)


def _extend(scheduler: Any, alone: Any, index: int) -> None:
    """Copy what a scheduler holds for its only group to that place in another scheduler."""
    for name in _PER_GROUP:
        values = getattr(scheduler, name, None)
        if isinstance(values, list):
            values[index : index + 1] = getattr(alone, name)
    own, others = (getattr(one, "_schedulers", ()) for one in (scheduler, alone))
    for part, part_alone in zip(own, others, strict=True):
        _extend(part, part_alone, index)

"""Parameter groups that join a schedule after it has begun."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
    if isinstance(scheduler, ReduceLROnPlateau):
        return
    group = scheduler.optimizer.param_groups[index]
    if build is None:
        if len(getattr(scheduler, "base_lrs", ())) <= index:
            raise ValueError(
                f"schedule: the {type(scheduler).__name__} was created before parameter group "
                f"{index} was added, and cannot be created again. Pass the scheduler as dict("
                "type=..., ...) or as a function of the optimizer"
            )
        return
    alone = _replay(scheduler, group, index, build)
    _extend(scheduler, alone, index)
    if adopt:
        for name, value in alone.optimizer.param_groups[0].items():
            if name == "lr":
                set_rate(group, value)
            elif name != "params":
                group[name] = value


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
    optimizer = Optimizer([{**options, "params": [torch.zeros(())]}], scheduler.optimizer.defaults)
    try:
        alone = build(optimizer)
    except (TypeError, ValueError) as error:
        error.add_note(
            f"while the schedule was extended to parameter group {index}, which was added later. "
            "Give its options one value for all groups, or add all groups before training"
        )
        raise
    optimizer._opt_called = True  # type: ignore[attr-defined]  # torch would miss a step of it
    for _ in range(_steps(scheduler)):
        alone.step()
    return alone


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

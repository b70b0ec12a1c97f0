"""A scheduler from what the user wrote."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch.optim.lr_scheduler as torch_schedulers
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau, SequentialLR

from hookengine import did_you_mean, greater_is_better, not_plain

# What these schedulers need to know of the length of the run, and how many moves short of it they
# reach their end (OneCycleLR counts its construction as the first step).
LENGTHS = {
    "CosineAnnealingLR": ("T_max", 0),
    "PolynomialLR": ("total_iters", 0),
    "OneCycleLR": ("total_steps", 1),
}
MMENGINES = {"by_epoch", "begin", "end", "convert_to_iter_based"}
BY_STEP = ("OneCycleLR", "CyclicLR")
"""Schedulers whose own text says that they move on after every batch."""


class Built(NamedTuple):
    """A scheduler, and what was made of it.

    Attributes:
        kind: Its class, and those of its parts.
        length: The length of the run that was filled in, or None.
        end: After how many moves it ends then.
    """

    scheduler: LRScheduler
    kind: str
    length: int | None = None
    end: int | None = None


def is_by_step(cfg: Any) -> bool:
    """Whether this is a scheduler that moves on by step, whatever the run counts in."""
    if isinstance(cfg, (list, tuple)):
        return any(map(is_by_step, cfg))
    kind = cfg.get("type") if isinstance(cfg, Mapping) else cfg
    cls = kind if isinstance(kind, type) else type(kind)
    return (kind if isinstance(kind, str) else cls.__name__) in BY_STEP


def build_scheduler(
    cfg: Any,
    optimizer: Optimizer,
    milestones: Sequence[int],
    total: int | None,
    metric: str | None,
) -> Built:
    """Build a scheduler, or several in sequence.

    Args:
        cfg: A name, ``dict(type=NAME or class, ...)``, a scheduler, a function of the optimizer,
            or a list of these.
        optimizer: What it is for.
        milestones: For a list, when each but the first begins.
        total: How often it will move on, if known.
        metric: What ReduceLROnPlateau looks at.

    Raises:
        KeyError: an unknown name. TypeError, ValueError: what does not fit; the message says why.
    """
    if not isinstance(cfg, (list, tuple)):
        if milestones:
            raise TypeError(
                "schedule: milestones are for a list of schedulers; those of MultiStepLR belong in "
                "its dict, scheduler=dict(type='MultiStepLR', milestones=[...])"
            )
        return _build_one(cfg, optimizer, total, metric)
    ends = [*milestones]
    if len(ends) != len(cfg) - 1 or ends != sorted(set(ends)) or (ends and ends[0] < 1):
        raise ValueError(
            f"schedule: {len(cfg)} schedulers in sequence need {len(cfg) - 1} milestones that "
            f"grow, got {ends}"
        )
    lengths = [b - a for a, b in zip([0, *ends], [*ends, None], strict=True) if b is not None]
    last = None if total is None else total - (ends[-1] if ends else 0)
    if last is not None and last < 1:
        raise ValueError(
            f"schedule: the last milestone, {ends[-1]}, lies at or beyond the end of the run, "
            f"{total}"
        )
    built = [
        _build_one(one, optimizer, length, None)
        for one, length in zip(cfg, [*lengths, last], strict=True)
    ]
    scheduler = SequentialLR(optimizer, [one.scheduler for one in built], ends)
    kind = f"SequentialLR({', '.join(one.kind for one in built)})"
    if built[-1].end is None:
        return Built(scheduler, kind)
    return Built(scheduler, kind, total, built[-1].end + (ends[-1] if ends else 0))


def _build_one(cfg: Any, optimizer: Optimizer, total: int | None, metric: str | None) -> Built:
    if isinstance(cfg, LRScheduler):
        if cfg.optimizer is not optimizer:
            raise ValueError(
                f"schedule: the {type(cfg).__name__} belongs to another optimizer; pass a dict"
            )
        return Built(cfg, type(cfg).__name__)
    if isinstance(cfg, str):
        cfg = {"type": cfg}
    if isinstance(cfg, Mapping):
        return _from_dict(cfg, optimizer, total, metric)
    if not callable(cfg):
        raise TypeError(
            "schedule: scheduler takes a name of torch.optim.lr_scheduler, dict(type=..., ...), a "
            f"scheduler, a function of the optimizer, or a list of these; got {cfg!r}"
        )
    scheduler = cfg(optimizer)
    if not isinstance(scheduler, LRScheduler):
        raise TypeError(f"schedule: {cfg!r} must return a scheduler of torch, got {scheduler!r}")
    return Built(scheduler, type(scheduler).__name__)


def _from_dict(
    cfg: Mapping[str, Any], optimizer: Optimizer, total: int | None, metric: str | None
) -> Built:
    arguments = dict(cfg)
    if "type" not in arguments:
        raise KeyError(f"schedule: a scheduler needs a 'type', a name or a class; got {cfg!r}")
    kind = arguments.pop("type")
    factory = _named(kind) if isinstance(kind, str) else kind
    name = getattr(factory, "__name__", "")
    foreign = {*arguments} & MMENGINES - {*inspect.signature(factory).parameters}
    if foreign:
        raise TypeError(
            f"schedule: {', '.join(sorted(foreign))} of {name}: here by_epoch is an option of the "
            "plugin, beside scheduler=; a warm-up is warmup=500 (optimizer steps, whatever the "
            "rest counts in); one scheduler after another is scheduler=[...] with milestones=[...]"
        )
    end = None
    option, short = LENGTHS.get(name, ("", 0))
    if option and option not in arguments and "steps_per_epoch" not in arguments:
        if total is None:
            raise ValueError(
                f"schedule: {name} needs {option}, since the length of the run is not known (the "
                "dataloader does not tell)"
            )
        arguments[option] = total
        end = total - short
    if isinstance(factory, type) and issubclass(factory, ReduceLROnPlateau):
        _choose_mode(arguments, metric)
    try:
        scheduler = factory(optimizer, **arguments)
    except (TypeError, ValueError) as error:
        error.add_note(f"while building the scheduler {dict(cfg)!r}")
        raise
    if not isinstance(scheduler, LRScheduler):
        raise TypeError(f"schedule: {kind!r} is no scheduler of torch, got {scheduler!r}")
    length = None if end is None else total
    return Built(scheduler, type(scheduler).__name__, length, end)


def check_plain(scheduler: LRScheduler) -> None:
    """Refuse a scheduler whose state holds objects that a checkpoint cannot hold.

    Subclasses of plain types, such as NumPy's ``float64``, are left to the plugin that saves.

    Raises:
        TypeError: The state holds such an object; the message names its place.
    """
    for name, value in scheduler.state_dict().items():
        for place, found in not_plain(value, repr(name)):
            if not isinstance(found, (int, float, str, bytes, list, tuple, dict)):
                raise TypeError(
                    f"schedule: {type(scheduler).__name__}.state_dict() holds {found!r} as "
                    f"{place}, which no checkpoint can keep safely: leave it out of state_dict()"
                )


def _named(name: str) -> Any:
    known = {
        key: cls
        for key, cls in vars(torch_schedulers).items()
        if isinstance(cls, type) and issubclass(cls, LRScheduler) and not key.startswith("_")
    }
    del known["LRScheduler"]
    if name not in known:
        hint = did_you_mean(name, known)
        raise KeyError(f"unknown scheduler {name!r}.{hint} Known: {', '.join(sorted(known))}")
    return known[name]


def _choose_mode(arguments: dict[str, Any], metric: str | None) -> None:
    """Fill in whether ReduceLROnPlateau waits for more or for less of the metric."""
    if "mode" in arguments or metric is None:
        return
    greater = greater_is_better(metric)
    if greater is None:
        raise ValueError(
            f"schedule: is more or less of {metric!r} better? Say mode='max' or mode='min' in the "
            "dict of ReduceLROnPlateau"
        )
    arguments["mode"] = "max" if greater else "min"

"""Building a scheduler from the options."""

from __future__ import annotations

import inspect
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch.optim.lr_scheduler as torch_schedulers
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau, SequentialLR

from hookengine import as_plain, did_you_mean, greater_is_better, not_plain

# The argument that tells these schedulers the length of the run, and how many steps before it they
# reach their end (OneCycleLR counts its construction as the first step).
LENGTHS = {
    "CosineAnnealingLR": ("T_max", 0),
    "PolynomialLR": ("total_iters", 0),
    "OneCycleLR": ("total_steps", 1),
}
MMENGINES = {"by_epoch", "begin", "end", "convert_to_iter_based"}
BY_STEP = ("OneCycleLR", "CyclicLR")
"""Schedulers that step after every batch, according to their documentation."""


class Built(NamedTuple):
    """A scheduler, and how it was built.

    Attributes:
        kind: The name of its class, and those of its parts.
        length: The length of the run that was filled in, or None.
        end: The number of steps after which it ends, if a length was filled in.
    """

    scheduler: LRScheduler
    kind: str
    length: int | None = None
    end: int | None = None


def is_by_step(cfg: Any) -> bool:
    """Return whether the scheduler steps per optimizer step, whatever unit the run counts in."""
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
        optimizer: The optimizer to schedule.
        milestones: For a list, when each scheduler but the first starts.
        total: The number of steps that it will take, if known.
        metric: The metric that ReduceLROnPlateau uses.

    Raises:
        KeyError: There is no scheduler of that name.
        TypeError: An argument has the wrong type; the message says which.
        ValueError: An argument has a value that does not fit; the message says why.
    """
    if not isinstance(cfg, (list, tuple)):
        if milestones:
            raise TypeError(
                "schedule: milestones need a list of schedulers, got a single one. Those of "
                "MultiStepLR go into its dict: scheduler=dict(type='MultiStepLR', milestones=[...])"
            )
        return _build_one(cfg, optimizer, total, metric)
    ends = [*milestones]
    if len(ends) != len(cfg) - 1 or ends != sorted(set(ends)) or (ends and ends[0] < 1):
        raise ValueError(
            f"schedule: {len(cfg)} schedulers in sequence need {len(cfg) - 1} increasing, positive "
            f"milestones, got {ends}"
        )
    lengths = [b - a for a, b in zip([0, *ends], [*ends, None], strict=True) if b is not None]
    last = None if total is None else total - (ends[-1] if ends else 0)
    if last is not None and last < 1:
        raise ValueError(
            f"schedule: the last milestone, {ends[-1]}, is at or beyond the end of the run, "
            f"{total}. Use smaller milestones or a longer run"
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
                f"schedule: the {type(cfg).__name__} belongs to another optimizer. Pass a dict"
            )
        return Built(cfg, type(cfg).__name__)
    if isinstance(cfg, str):
        cfg = {"type": cfg}
    if isinstance(cfg, Mapping):
        return _from_dict(cfg, optimizer, total, metric)
    if not callable(cfg):
        raise TypeError(
            "schedule: scheduler must be a name in torch.optim.lr_scheduler, dict(type=..., ...), "
            f"a scheduler, a function of the optimizer, or a list of these; got {cfg!r}"
        )
    scheduler = cfg(optimizer)
    if not isinstance(scheduler, LRScheduler):
        raise TypeError(f"schedule: {cfg!r} must return an LRScheduler, got {scheduler!r}")
    return Built(scheduler, type(scheduler).__name__)


def _from_dict(
    cfg: Mapping[str, Any], optimizer: Optimizer, total: int | None, metric: str | None
) -> Built:
    arguments = dict(cfg)
    if "type" not in arguments:
        raise KeyError(f"schedule: a scheduler dict needs a 'type', a name or a class; got {cfg!r}")
    kind = arguments.pop("type")
    factory = _named(kind) if isinstance(kind, str) else kind
    name = getattr(factory, "__name__", "")
    foreign = {*arguments} & MMENGINES - {*inspect.signature(factory).parameters}
    if foreign:
        raise TypeError(
            f"schedule: {', '.join(sorted(foreign))} cannot be set in the dict of {name}. Set "
            "by_epoch as an option of the plugin, next to scheduler=; use warmup=500 for a warm-up "
            "(always in optimizer steps), and scheduler=[...] with milestones=[...] for a sequence"
        )
    end = None
    option, short = LENGTHS.get(name, ("", 0))
    if option and option not in arguments and "steps_per_epoch" not in arguments:
        if total is None:
            raise ValueError(
                f"schedule: {name} needs {option}, because the length of the run is unknown: the "
                "dataloader has no length"
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
        raise TypeError(f"schedule: {kind!r} must create an LRScheduler, got {scheduler!r}")
    length = None if end is None else total
    return Built(scheduler, type(scheduler).__name__, length, end)


def options_replaced(
    scheduler: Any, own: Mapping[str, Any], saved: Mapping[str, Any], known: Container[str]
) -> Iterator[str]:
    """Describe the options with which a scheduler was created, and which a saved state replaces.

    Args:
        scheduler: The scheduler.
        own: Its state before it loads the other one.
        saved: The state that it loads.
        known: Options to leave out.
    """
    for name in inspect.signature(type(scheduler)).parameters:
        if name in known or name not in own or name not in saved or name == "last_epoch":
            continue
        if own[name] != saved[name]:
            yield f"{name} {saved[name]} instead of {own[name]}"
    if own.get("_milestones") != saved.get("_milestones"):  # of SequentialLR
        yield f"milestones {saved['_milestones']} instead of {own['_milestones']}"
    parts = zip(getattr(scheduler, "_schedulers", ()), own.get("_schedulers", ()), strict=True)
    for (part, mine), theirs in zip(parts, saved.get("_schedulers", ()), strict=True):
        yield from options_replaced(part, mine, theirs, known)


def check_plain(scheduler: LRScheduler) -> None:
    """Reject a scheduler whose state holds objects that a checkpoint cannot hold.

    Scalars of NumPy become Python numbers when they are saved. Subclasses of plain types, such as a
    named tuple, are left to the plugin that saves checkpoints; the items of such containers are
    checked.

    Raises:
        TypeError: The state holds such an object; the message names its place.
    """
    for name, value in scheduler.state_dict().items():
        for place, found in _objects(as_plain(value), repr(name)):
            raise TypeError(
                f"schedule: {type(scheduler).__name__}.state_dict() holds {found!r} as {place}, "
                "which a checkpoint cannot hold safely. Leave it out of state_dict()"
            )


def _objects(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield the parts of a state that are not of a plain type, nor of a subclass of one."""
    for place, found in not_plain(value, path):
        if isinstance(found, dict):
            yield from _objects(dict(found), place)
        elif isinstance(found, (list, tuple)):
            yield from _objects(list(found), place)
        elif not isinstance(found, (int, float, str, bytes)):
            yield place, found


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
    """Set the ``mode`` of ReduceLROnPlateau: whether more or less of the metric is better."""
    if "mode" in arguments or metric is None:
        return
    greater = greater_is_better(metric)
    if greater is None:
        raise ValueError(
            f"schedule: it is unknown whether more or less of {metric!r} is better. Set mode='max' "
            "or mode='min' in the dict of ReduceLROnPlateau"
        )
    arguments["mode"] = "max" if greater else "min"

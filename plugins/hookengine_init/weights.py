"""Weights fitted to a module: all of them that fit, or none."""

from __future__ import annotations

import copy
import os
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from hookengine import BaseModule
from hookengine_init.files import read_weights, weights_in
from hookengine_init.record import console, version_of

LEADING = ("", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.")
"""What DistributedDataParallel and torch.compile put before the names of all weights."""


class Mismatch(NamedTuple):
    """What does not fit between a module and the weights for it; false where all fits."""

    missing: list[str]
    """Names that the module has and the checkpoint lacks."""
    unexpected: list[str]
    """Names that the checkpoint has and the module lacks."""
    misshapen: dict[str, str]
    """Names that both have, with the two shapes."""

    def __bool__(self) -> bool:
        return any(self)

    def __str__(self) -> str:
        return "".join(
            f"\n  {label} ({len(names)}): {', '.join(names)}"
            for label, names in (
                ("missing in the checkpoint", self.missing),
                ("unexpected in the checkpoint", self.unexpected),
                ("of another shape", [f"{n} {shapes}" for n, shapes in self.misshapen.items()]),
            )
            if names
        )


def load_weights(
    module: nn.Module,
    checkpoint: str | os.PathLike[str] | Mapping[str, Any],
    *,
    prefix: str | None = None,
    map_location: Any = "cpu",
    strict: bool = True,
    ignore_mismatched_sizes: bool = False,
    logger: Any = None,
) -> Mismatch:
    """Load weights into a module, all that fit or, with an error, none.

    Host memory for one more copy of the module is needed meanwhile.

    Args:
        module: Any module.
        checkpoint: Path or URL as ``read_weights`` takes it, or a state dict.
        prefix: Load what is below it in the checkpoint, as ``"backbone."`` of a detector.
        map_location: Where tensors are read to, as ``torch.load`` takes it.
        strict: Refuse names that one side lacks; else they are reported in a warning, as long as
            something fits.
        ignore_mismatched_sizes: Leave tensors whose shape differs as they are, a new head say.
        logger: Who gets the warning, by default structlog's.

    Returns:
        What did not fit.

    Raises:
        ValueError: the checkpoint does not fit, or cannot be read.
        FileNotFoundError: there is none.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"load_weights(module, checkpoint) takes a module, got {module!r}")
    if isinstance(checkpoint, Mapping):
        source, weights = "the state dict", weights_in(checkpoint, "the state dict")
    else:
        source, weights = str(checkpoint), read_weights(checkpoint, map_location)
    own = {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}
    state = _named_as(own, weights, prefix, source)
    if any(tensor.is_meta for name, tensor in own.items() if name in state):
        raise ValueError(
            f"{type(module).__name__} is on the meta device and has no memory to load into: call "
            "module.to_empty(device='cpu') first"
        )

    undo = _snapshot(module, own, state)
    try:
        mismatch, loaded = _load(module, own, state, ignore_mismatched_sizes)
        if not loaded:
            raise _MisfitError(_where_it_fits(own, weights), mismatch)
        if strict and (mismatch.missing or mismatch.unexpected):
            raise _MisfitError("strict=False loads what is there.", mismatch)
    except BaseException as error:
        undo()
        if not isinstance(error, _MisfitError):
            raise
        raise ValueError(
            f"{source} does not fit {type(module).__name__}, into which nothing was loaded. {error}"
        ) from error.__cause__
    if mismatch:
        logger = logger if logger is not None else console()
        fits = f"{len(loaded)} of {len(own)} tensors"
        logger.warning(f"{source} fits {type(module).__name__} in {fits}{mismatch}")
    return mismatch


class _MisfitError(Exception):
    """Weights that are not to be loaded: what would do, and what does not fit."""

    def __init__(self, advice: str, mismatch: Mismatch) -> None:
        super().__init__(f"{advice}{mismatch}")


def _load(
    module: nn.Module, own: Mapping[str, Tensor], state: dict[str, Any], ignore: bool
) -> tuple[Mismatch, list[str]]:
    """Load what fits.

    Returns:
        What does not fit, and the names that were loaded.

    Raises:
        _MisfitError: shapes differ, and are not to be ignored.
    """
    misshapen = _differing(own, state)
    adapts = bool(misshapen) and _adapts_in_loading(module)

    def leave_misshapen() -> None:
        if not ignore:
            advice = "Is it of another model? ignore_mismatched_sizes=True loads the other tensors."
            raise _MisfitError(advice, _by_name(own, state, misshapen))
        for name in misshapen:
            del state[name]

    if misshapen and not adapts:
        leave_misshapen()
    try:
        result = module.load_state_dict(state, strict=False)
        misshapen = {} if adapts else misshapen
    except RuntimeError as error:
        if not adapts:
            raise _MisfitError(str(error), _by_name(own, state, misshapen)) from error
        leave_misshapen()
        result = module.load_state_dict(state, strict=False)
    absent = set(result.missing_keys)
    loaded = [n for n in own if n in state or not (n in absent or _is_counter(n))]
    live = dict(module.named_parameters(remove_duplicate=False))
    there = {id(live[name]) for name in loaded if name in live}
    missing = [
        name
        for name in result.missing_keys
        if name not in misshapen
        and not _is_counter(name)
        and id(live.get(name)) not in there  # a tied weight, which is loaded by its other name
    ]
    return Mismatch(missing, list(result.unexpected_keys), misshapen), loaded


def _differing(own: Mapping[str, Tensor], state: Mapping[str, Any]) -> dict[str, str]:
    return {
        name: f"{list(own[name].shape)} here, {list(value.shape)} there"
        for name, value in state.items()
        if name in own
        and isinstance(value, Tensor)
        and not is_lazy(own[name])
        and value.shape != own[name].shape
    }


def _by_name(
    own: Mapping[str, Tensor], state: Mapping[str, Any], misshapen: dict[str, str]
) -> Mismatch:
    """What names and shapes alone tell."""
    missing = [name for name in own if name not in state and not _is_counter(name)]
    unexpected = [name for name in state if name not in own and not name.endswith("_extra_state")]
    return Mismatch(missing, unexpected, misshapen)


def _is_counter(name: str) -> bool:
    """Whether it counts a batch norm's batches: old checkpoints lack that, and torch makes it."""
    return name.endswith("num_batches_tracked")


def _adapts_in_loading(module: nn.Module) -> bool:
    """Whether code of others may change names and shapes while a state dict is loaded."""

    def foreign(function: Any) -> bool:
        home = str(getattr(getattr(function, "hook", function), "__module__", ""))
        return home.split(".")[0] not in ("torch", "hookengine")

    return any(
        foreign(type(part)._load_from_state_dict)
        or any(foreign(hook) for hook in part._load_state_dict_pre_hooks.values())
        for part in module.modules()
    )


def _snapshot(
    module: nn.Module, own: Mapping[str, Tensor], state: Mapping[str, Any]
) -> Callable[[], None]:
    """What gives a module back what loading has changed, and to BaseModules what they know."""
    values = [(t, version_of(t), t.clone()) for t in own.values() if not is_lazy(t)]
    lazy = [(tensor, type(tensor)) for tensor in own.values() if is_lazy(tensor)]
    extra = {k: v for k, v in module.state_dict().items() if k.endswith("_extra_state")}
    parts = [part for part in module.modules() if isinstance(part, BaseModule)]
    known = [(part, copy.copy(part.loaded_tensors)) for part in parts]

    def undo() -> None:
        with torch.no_grad():
            for tensor, version, value in values:
                if version_of(tensor) != version:
                    tensor.copy_(value)
        for tensor, kind in lazy:
            if type(tensor) is not kind:  # the reverse of what its materialize() does
                tensor.data = tensor.data.new_empty(0)
                tensor.__class__ = kind
        if extra.keys() & state.keys():
            module.load_state_dict(extra, strict=False)
        for part, tensors in known:
            part.loaded_tensors = tensors

    return undo


# -- names --------------------------------------------------------------------------------------


def _named_as(
    own: Mapping[str, Tensor], weights: Mapping[str, Any], prefix: str | None, source: str
) -> dict[str, Any]:
    """The weights below ``prefix``, under the module's names: without what wrappers prepend."""
    below = "" if not prefix else prefix.rstrip(".") + "."
    found = None
    for leading in LEADING:
        candidate = _below(weights, leading + below)
        if candidate.keys() & own.keys():
            return candidate
        found = found or candidate
    if not found:
        first = ", ".join(sorted({key.split(".")[0] for key in weights}))
        raise ValueError(
            f"{source} has nothing below prefix={prefix!r}; its names begin with {first}. "
            f"{_where_it_fits(own, weights)}"
        )
    return found


def _below(weights: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """What begins with ``prefix``, without it; the versions that modules save are kept."""
    state = OrderedDict((k[len(prefix) :], v) for k, v in weights.items() if k.startswith(prefix))
    metadata = getattr(weights, "_metadata", None)
    if metadata is not None:
        state._metadata = {  # type: ignore[attr-defined]
            f"{k}."[len(prefix) :].rstrip("."): v
            for k, v in metadata.items()
            if f"{k}.".startswith(prefix)
        }
    return state


def _where_it_fits(own: Mapping[str, Tensor], weights: Mapping[str, Any]) -> str:
    """How weights and module could be brought together, of which no name is the same."""
    if prefix := _common_prefix(weights, own):
        return f"It fits with prefix={prefix!r}."
    if part := _common_prefix(own, weights):
        return (
            f"It fits a part of it: load it into module.get_submodule({part!r}), or in an init_cfg "
            f"by override=dict(type='Pretrained', name={part!r}, checkpoint=...)."
        )
    return "Nothing of it fits: is it of another model?"


def _common_prefix(longer: Mapping[str, Any], shorter: Mapping[str, Any]) -> str:
    """What most names of ``longer`` have before a name of ``shorter``."""
    found = Counter(
        name[: index - 1]
        for name in longer
        for index in range(1, len(name))
        if name[index - 1] == "." and name[index:] in shorter
    )
    return found.most_common(1)[0][0] if found else ""

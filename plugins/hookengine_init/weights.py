"""Load weights into a module: all that fit, or none."""

from __future__ import annotations

import os
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from hookengine import names_as_in, original_names, remember_loaded
from hookengine_init.files import read_weights, weights_in
from hookengine_init.record import console, version_of

LEADING = ("", "module.")
"""Prefixes that DistributedDataParallel adds to the names of all weights."""


class Mismatch(NamedTuple):
    """The differences between a module and the weights for it; false if there are none."""

    missing: list[str]
    """Names that the module has and the checkpoint lacks."""
    unexpected: list[str]
    """Names that the checkpoint has and the module lacks."""
    misshapen: dict[str, str]
    """Names that both have, with the two different shapes."""

    def __bool__(self) -> bool:
        return any(self)

    def __str__(self) -> str:
        return "".join(
            f"\n  {label} ({len(names)}): {', '.join(names)}"
            for label, names in (
                ("missing in the checkpoint", self.missing),
                ("unexpected in the checkpoint", self.unexpected),
                ("of a different shape", [f"{n} {shapes}" for n, shapes in self.misshapen.items()]),
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
    """Load weights into a module: all that fit or, if there is an error, none.

    A second copy of the module's tensors is kept on their device, to undo a failed load.

    Args:
        module: Any module.
        checkpoint: A path or URL, as for ``read_weights``, or a state dict.
        prefix: Load the weights below this prefix, such as ``"backbone."`` of a detector.
        map_location: Where to load the tensors, as in ``torch.load``.
        strict: Raise an error for names that one side lacks. Otherwise they are reported in a
            warning, provided that some tensors fit.
        ignore_mismatched_sizes: Leave tensors of a different shape unchanged, such as a new head.
        logger: Where to log the warning, by default structlog's logger.

    Returns:
        What did not fit.

    Raises:
        ValueError: The checkpoint does not fit or cannot be read.
        FileNotFoundError: The checkpoint does not exist.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"load_weights() expects an nn.Module first, got {module!r}")
    if isinstance(checkpoint, Mapping):
        source, weights = "the state dict", weights_in(checkpoint, "the state dict")
    else:
        source, weights = str(checkpoint), read_weights(checkpoint, map_location)
    weights = original_names(weights)
    own = {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}
    state = names_as_in(module, _named_as(original_names(own), weights, prefix, source))
    if any(tensor.is_meta for name, tensor in own.items() if name in state):
        raise ValueError(
            f"{type(module).__name__} is on the meta device and has no memory to load into. Call "
            "module.to_empty(device='cpu') first"
        )

    undo = _snapshot(module, own, state)
    try:
        mismatch, loaded = _load(module, own, state, ignore_mismatched_sizes)
        if not loaded:
            raise _MisfitError(_where_it_fits(original_names(own), weights), mismatch)
        if strict and (mismatch.missing or mismatch.unexpected):
            raise _MisfitError("strict=False loads the tensors that both have.", mismatch)
    except BaseException as error:
        undo()
        if not isinstance(error, _MisfitError):
            raise
        raise ValueError(
            f"{source} does not fit {type(module).__name__}, so nothing was loaded. {error}"
        ) from error.__cause__
    if mismatch:
        logger = logger if logger is not None else console()
        fits = f"{len(loaded)} of {len(own)} tensors"
        logger.warning(f"loaded {fits} of {type(module).__name__} from {source}{mismatch}")
    return mismatch


class _MisfitError(Exception):
    """Raised if weights must not be loaded: what would help, and what does not fit."""

    def __init__(self, advice: str, mismatch: Mismatch) -> None:
        super().__init__(f"{advice}{mismatch}")


def _load(
    module: nn.Module, own: Mapping[str, Tensor], state: dict[str, Any], ignore: bool
) -> tuple[Mismatch, list[str]]:
    """Load what fits.

    Returns:
        What does not fit, and the names that were loaded.

    Raises:
        _MisfitError: Shapes differ and are not ignored, or torch cannot load the state dict.
    """
    misshapen = _differing(own, state)
    adapts = bool(misshapen) and _adapts_in_loading(module)

    def leave_misshapen() -> None:
        if not ignore:
            advice = (
                "Is it from another model? ignore_mismatched_sizes=True loads the other tensors."
            )
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
        and id(live.get(name)) not in there  # a tied weight, loaded under its other name
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
    """Return the differences that names and shapes alone show."""
    missing = [name for name in own if name not in state and not _is_counter(name)]
    unexpected = [name for name in state if name not in own and not name.endswith("_extra_state")]
    return Mismatch(missing, unexpected, misshapen)


def _is_counter(name: str) -> bool:
    """Return whether it counts a batch norm's batches; torch adds it to old checkpoints."""
    return name.endswith("num_batches_tracked")


def _adapts_in_loading(module: nn.Module) -> bool:
    """Return whether other code may change names and shapes while a state dict is loaded."""

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
    """Return a function that undoes what loading changes in a module."""
    values = [(t, version_of(t), t.clone()) for t in own.values() if not is_lazy(t)]
    lazy = [(tensor, type(tensor)) for tensor in own.values() if is_lazy(tensor)]
    extra = {k: v for k, v in module.state_dict().items() if k.endswith("_extra_state")}
    restore = remember_loaded(module)

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
        restore()

    return undo


# -- names --------------------------------------------------------------------------------------


def _named_as(
    own: Mapping[str, Tensor], weights: Mapping[str, Any], prefix: str | None, source: str
) -> dict[str, Any]:
    """Return the weights below ``prefix`` under the module's names, without wrappers' prefixes."""
    (wanted,) = original_names({(prefix or "").rstrip("."): None})
    below = f"{wanted}." if wanted else ""
    found = None
    for leading in LEADING:
        candidate = _below(weights, leading + below)
        if candidate.keys() & own.keys():
            return candidate
        found = found or candidate
    if not found:
        first = ", ".join(sorted({key.split(".")[0] for key in weights}))
        raise ValueError(
            f"{source} has no weights below prefix={prefix!r}. Its names begin with {first}. "
            f"{_where_it_fits(own, weights)}"
        )
    return found


def _below(weights: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Return what begins with ``prefix``, without it; keep the versions that modules save."""
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
    """Suggest how to make weights and a module fit if they have no name in common."""
    if prefix := _common_prefix(weights, own):
        return f"It fits with prefix={prefix!r}."
    if part := _common_prefix(own, weights):
        return (
            f"It fits a submodule: load it into module.get_submodule({part!r}), or in an init_cfg "
            f"use override=dict(type='Pretrained', name={part!r}, checkpoint=...)."
        )
    return "None of its tensors fits. Is it from another model?"


def _common_prefix(longer: Mapping[str, Any], shorter: Mapping[str, Any]) -> str:
    """Return what most names of ``longer`` have before a name of ``shorter``; may be empty."""
    found = Counter(
        name[: index - 1]
        for name in longer
        for index in range(1, len(name))
        if name[index - 1] == "." and name[index:] in shorter
    )
    return found.most_common(1)[0][0] if found else ""

"""What ``torch.compile`` adds to a model: compile in place instead, and undo the names."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, cast

from torch import nn

State = TypeVar("State", bound=Mapping[str, Any])

INNER = "_orig_mod"
"""The name of the original module within the module that ``torch.compile`` returns."""


def compile_in_place(model: nn.Module) -> nn.Module:
    """Replace the modules that ``torch.compile`` returned by the originals, compiled in place.

    The backend and the options stay the same. Names, methods and classes are then those of the
    original modules, as after ``module.compile()``. A module is left unchanged if the model also
    holds it without compilation, or if hooks are registered with its compiled wrapper.

    Args:
        model: Any module. Its parts are replaced in place.

    Returns:
        The model, or the module within if the model itself came from ``torch.compile``.
    """
    if (original := _original(model)) is not model:
        _compile_like(model, original)
        model = original
    holders = [part for part in model.modules() if not _is_compiled(part)]
    held: dict[int, set[int]] = {}
    for part in holders:
        for child in part._modules.values():
            if child is not None:
                held.setdefault(id(_original(child)), set()).add(id(child))
    for part in holders:
        for name, child in part._modules.items():
            if child is None or (original := _original(child)) is child:
                continue
            if len(held[id(original)]) == 1:
                _compile_like(child, original)
                part._modules[name] = original
    return model


def _original(module: nn.Module) -> nn.Module:
    """Return the module within what ``torch.compile`` returned; any other module unchanged."""
    while _is_compiled(module):
        module = module._modules[INNER]  # type: ignore[assignment]
    return module


def _is_compiled(module: nn.Module) -> bool:
    if INNER not in module._modules or "dynamo_ctx" not in vars(module):
        return False
    return not (module._forward_hooks or module._forward_pre_hooks)


def _compile_like(compiled: Any, original: Any) -> None:
    """Compile a module in place, with the backend and the options of its compiled wrapper."""
    original._compiled_call_impl = compiled.dynamo_ctx(original._call_impl)


def original_names(state: State) -> State:
    """Return a state dict, or anything else by name, without the names that ``torch.compile`` adds.

    ``net._orig_mod.weight`` becomes ``net.weight``. If there is nothing to rename, or if two names
    would become the same, the state dict itself is returned.
    """
    return _renamed(state, {})


def names_as_in(module: nn.Module, state: State) -> State:
    """Return a state dict with the names of ``module``, whichever of the two is compiled."""
    parts = (name for name, _ in module.named_modules(remove_duplicate=False))
    inside = [name for name in (*module.state_dict(), *parts) if INNER in name.split(".")]
    return _renamed(state, {without_inner(name): name for name in inside})


def without_inner(name: str) -> str:
    """Return the name of a parameter or module without those that ``torch.compile`` adds."""
    return ".".join(part for part in name.split(".") if part != INNER) if INNER in name else name


def _renamed(state: State, targets: Mapping[str, str]) -> State:
    names = _new_names(state, targets)
    if names == [*state] or len({*names}) < len(names):
        return state
    renamed = OrderedDict(zip(names, state.values(), strict=True))
    metadata = getattr(state, "_metadata", None)
    if metadata is not None:  # the versions of the modules
        again = zip(_new_names(metadata, targets), metadata.values(), strict=True)
        renamed._metadata = OrderedDict(again)  # type: ignore[attr-defined]
    return cast("State", renamed)


def _new_names(names: Iterable[str], targets: Mapping[str, str]) -> list[str]:
    plain = (without_inner(name) for name in names)
    return [targets.get(name, name) for name in plain]

"""A model initialised from the top down, each part as its own ``init_cfg`` says."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from hookengine import MODELS, BaseModule, did_you_mean, dist
from hookengine_init.init_cfg import Step, as_list, follow, plan
from hookengine_init.record import InitRecord, named_tensors, record_of, recording

INIT = "init_weights"


def init_weights(module: BaseModule) -> None:
    """Initialise a model as its ``init_cfg`` and those of its parts say, and report on it.

    First the module's own ``init_cfg``, then each child (a ``BaseModule`` likewise, at any depth;
    any other direct child by its ``init_weights()`` where it has one), at last what is
    ``Pretrained``: the inner configuration wins over the outer, loaded weights over both. Tensors
    that a state dict was loaded into beforehand stay as they are.

    What ``BaseModule.init_weights`` does. Called again, it warns and does nothing. After an error
    within it, it may be called again.
    """
    record = record_of(module)
    if record is not None:
        _init_module(module, record)
    elif module.is_init:
        _warn_of_second_call(module)
    else:
        record = init_model(module)
        if not _is_base_modules(module.init_weights):
            record.title += ", before what its own init_weights() does after super()"
        if dist.is_main_process():
            record.logger.info(record.table())


def init_model(
    model: BaseModule, keep: Iterable[str] = (), logger: Any = None, user_code: bool = False
) -> InitRecord:
    """Initialise a model.

    Args:
        model: The model.
        keep: Names of submodules to leave as they are.
        logger: Who is told what happens, by default structlog's.
        user_code: Call the model's own ``init_weights``, which may be a subclass's.

    Returns:
        Who initialised what.
    """
    modules = dict(model.named_modules())
    parts = [module for module in modules.values() if isinstance(module, BaseModule)]
    loaded = [(part, copy.copy(part.loaded_tensors)) for part in parts if part.loaded_tensors]
    kept = _kept(model, [tensor for _, tensors in loaded for tensor in tensors], keep)
    initialised = [part for part in parts if part.is_init]
    with recording(model, modules, kept, logger) as record, torch.no_grad():
        try:
            if user_code:
                _call(model, model.init_weights, record)
            elif record.keeps_all_of(model):
                model.is_init = True
            else:
                _init_module(model, record)
        except BaseException:  # so that a second try begins where the first one did
            for part in parts:
                part.is_init = False
            for part in initialised:
                part.is_init = True
            for part, tensors in loaded:
                part.loaded_tensors = tensors
            raise
    return record


def _kept(root: nn.Module, loaded: list[Tensor], keep: Iterable[str]) -> dict[int, str]:
    """By ``id``, the tensors that nothing may initialise, and why."""
    kept = {id(tensor): "loaded before from a state dict: left as it is" for tensor in loaded}
    modules = dict(root.named_modules(remove_duplicate=False)) if keep else {}
    for name in keep:
        if not name or name not in modules:
            raise ValueError(
                f"keep={name!r}: {type(root).__name__} has no such submodule."
                f"{did_you_mean(name, modules)} It has "
                f"{', '.join(n for n, _ in root.named_children())}"
            )
        for _, tensor in named_tensors(modules[name]):
            kept[id(tensor)] = f"kept as it was: keep={name!r}"
    return kept


def _init_module(module: BaseModule, record: InitRecord) -> None:
    if module.is_init:
        _warn_of_second_call(module)
        return
    steps: list[Step] = []
    if module.init_cfg:
        try:
            cfgs = as_list(module.init_cfg, "init_cfg")
        except TypeError as error:
            error.add_note(f"in {type(module).__name__} {record.name_of(module)!r}")
            raise
        steps = plan(module, cfgs)
    follow(module, [step for step in steps if not step.loads])
    _init_children(module, record, direct=True)
    follow(module, [step for step in steps if step.loads])
    object.__setattr__(module, "is_init", True)  # past nn.Module's, which costs as much as a fill


def _init_children(module: nn.Module, record: InitRecord, direct: bool) -> None:
    """Initialise the children; of a plain module, the BaseModules that are somewhere within."""
    for child in module.children():
        if not (child._modules or INIT in vars(child) or hasattr(type(child), INIT)):
            continue  # as most leaves, of which nn.Module's own way to say so is slow
        child = child._modules.get("_orig_mod") or child  # what torch.compile has wrapped
        init = getattr(child, INIT, None)
        if init is None and MODELS.get("is_model_wrapper")(child):
            child = cast("nn.Module", child.module)
            init = getattr(child, INIT, None)
        if not callable(init):
            _init_children(child, record, direct=False)
        elif getattr(child, "is_init", False) is True:
            continue
        elif direct or isinstance(child, BaseModule):
            _call(child, init, record)
        else:
            record.note(
                f"init_weights() of {type(child).__name__} was not called, since it is no direct "
                "child of a BaseModule; in a ModuleList or Sequential of hookengine.model it is",
                child,
            )


def _is_base_modules(init_weights: Any) -> bool:
    """Whether a bound ``init_weights`` is BaseModule's, overridden by nobody."""
    return getattr(init_weights, "__func__", None) is BaseModule.init_weights


def _call(module: nn.Module, init: Callable[[], object], record: InitRecord) -> None:
    """Call ``init_weights()`` of a module, which may be code of others."""
    if record.keeps_all_of(module):
        if isinstance(module, BaseModule):
            module.is_init = True
        return
    if _is_base_modules(init):
        _init_module(cast("BaseModule", module), record)
        return
    cls = type(module).__name__
    with record.watching(module, f"Initialized by user-defined `init_weights` in {cls}"):
        try:
            init()
        except Exception as error:
            error.add_note(f"in init_weights() of {cls} {record.name_of(module)!r}")
            raise
    if isinstance(module, BaseModule):
        module.is_init = True
    else:
        record.note(
            f"initialised by init_weights() of {type(module).__module__}.{cls}; to leave it as it "
            "is, name it in keep=(...) of the plugin 'init'",
            module,
        )


def _warn_of_second_call(module: nn.Module) -> None:
    warnings.warn(
        f"init_weights() of {type(module).__name__} was called before: nothing is initialised. Set "
        "is_init = False to initialise it anew",
        stacklevel=4,
    )

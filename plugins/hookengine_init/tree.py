"""Initialize a model from the top down, each part from its own ``init_cfg``."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from hookengine import (
    MODELS,
    BaseModule,
    did_you_mean,
    dist,
    loaded_tensors,
    remember_loaded,
)
from hookengine_init.init_cfg import Step, as_list, follow, plan
from hookengine_init.record import InitRecord, named_tensors, record_of, recording

INIT = "init_weights"


def init_weights(module: BaseModule, *, init_foreign: bool = True) -> None:
    """Initialize a model from its ``init_cfg`` and those of its parts, and log a report.

    The module's own ``init_cfg`` is applied first. Then each child is initialized: a ``BaseModule``
    in the same way, at any depth; any other direct child by its ``init_weights()``, if it has one.
    ``Pretrained`` weights are loaded last. So the inner configuration overrides the outer one, and
    loaded weights override both. Tensors into which a state dict was loaded beforehand are left
    unchanged, wherever they belong.

    ``BaseModule.init_weights`` does the same. A second call warns and does nothing. After an error,
    it may be called again.

    Args:
        module: The model.
        init_foreign: Whether to call ``init_weights()`` of direct children that are no BaseModules.
    """
    record = record_of(module)
    if record is not None:
        _init_module(module, record)
    elif module.is_init:
        _warn_of_second_call(module)
    else:
        record = init_model(module, init_foreign=init_foreign)
        if not _is_base_modules(module.init_weights):
            record.title += ", before what its own init_weights() does after super()"
        if dist.is_main_process():
            record.logger.info(record.table())


def init_model(
    model: BaseModule,
    keep: Iterable[str] = (),
    logger: Any = None,
    user_code: bool = False,
    init_foreign: bool = True,
) -> InitRecord:
    """Initialize a model, and record how.

    Args:
        model: The model.
        keep: Names of submodules to leave unchanged.
        logger: Where to log messages, by default structlog's logger.
        user_code: Call the model's own ``init_weights``, which a subclass may have overridden.
        init_foreign: See ``init_weights``.

    Returns:
        The record of how each parameter was initialized.
    """
    modules = dict(model.named_modules())
    parts = [module for module in modules.values() if isinstance(module, BaseModule)]
    restore_loaded = remember_loaded(model)
    kept = _kept(model, loaded_tensors(model), keep)
    initialised = [part for part in parts if part.is_init]
    with recording(model, modules, kept, logger) as record, torch.no_grad():
        record.init_foreign = init_foreign
        try:
            if user_code:
                _call(model, model.init_weights, record)
            elif record.keeps_all_of(model):
                model.is_init = True
            else:
                _init_module(model, record)
        except BaseException:  # so that a second call starts where the first one did
            for part in parts:
                part.is_init = False
            for part in initialised:
                part.is_init = True
            restore_loaded()
            raise
    return record


def _kept(root: nn.Module, loaded: list[Tensor], keep: Iterable[str]) -> dict[int, str]:
    """Return the tensors that must not be initialized: the reason by ``id``."""
    kept = {id(tensor): "already loaded from a state dict: left unchanged" for tensor in loaded}
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
    object.__setattr__(module, "is_init", True)  # nn.Module's is as slow as filling a tensor


def _init_children(
    module: nn.Module, record: InitRecord, direct: bool, silent: bool = False
) -> None:
    """Initialize the children; in a plain module, the BaseModules at any depth.

    Args:
        module: The module.
        record: The record.
        direct: Whether the module is a BaseModule.
        silent: Whether the module belongs to one that was passed over, and was noted.
    """
    for child in module.children():
        if not (child._modules or INIT in vars(child) or hasattr(type(child), INIT)):
            continue  # most leaves; nn.Module's own lookup would be slow
        child = child._modules.get("_orig_mod") or child  # the module that torch.compile wraps
        init = getattr(child, INIT, None)
        if init is None and MODELS.own("is_model_wrapper")(child):
            child = cast("nn.Module", child.module)
            init = getattr(child, INIT, None)
        if not callable(init):
            _init_children(child, record, direct=False, silent=silent)
        elif getattr(child, "is_init", False) is True:
            continue
        elif isinstance(child, BaseModule) or (direct and record.init_foreign):
            _call(child, init, record)
        else:
            if not silent:
                _pass_over(child, record, direct)
            _init_children(child, record, direct=False, silent=True)


def _pass_over(child: nn.Module, record: InitRecord, direct: bool) -> None:
    """Note that ``init_weights()`` of a module that is no BaseModule is not called."""
    if record.keeps_all_of(child):
        return
    record.foreign.append((child, record.written(child), direct))
    if direct:
        return
    record.note(
        f"init_weights() of {type(child).__name__} was not called, since it is not a direct child "
        "of a BaseModule; use a ModuleList or Sequential of hookengine.model",
        child,
    )


def _is_base_modules(init_weights: Any) -> bool:
    """Return whether a bound ``init_weights`` is BaseModule's own, not overridden."""
    return getattr(init_weights, "__func__", None) is BaseModule.init_weights


def _call(module: nn.Module, init: Callable[[], object], record: InitRecord) -> None:
    """Call ``init_weights()`` of a module, which may be user code."""
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
            f"initialized by init_weights() of {type(module).__module__}.{cls}; to leave it "
            "unchanged, name it in keep=(...) of the plugin 'init'",
            module,
        )


def _warn_of_second_call(module: nn.Module) -> None:
    warnings.warn(
        f"init_weights() of {type(module).__name__} was called before: nothing is initialized. Set "
        "is_init = False to initialize it again",
        stacklevel=4,
    )

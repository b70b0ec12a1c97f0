"""A model initialised from the top down, each part as its own ``init_cfg`` says."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Iterable
from typing import Any, cast

from torch import nn

from hookengine import MODELS, BaseModule, dist
from hookengine_init.init_cfg import Cfg, as_list, initialize_each
from hookengine_init.pretrained import PretrainedInit
from hookengine_init.record import InitRecord, named_tensors, record_of, recording


def init_weights(module: BaseModule) -> None:
    """Initialise a model as its ``init_cfg`` and those of its parts say, and report on it.

    First the module's own ``init_cfg``, then each child (a ``BaseModule`` likewise, at any depth;
    any other direct child by its ``init_weights()`` where it has one), at last what is
    ``Pretrained``: the inner configuration wins over the outer, loaded weights over both. Tensors
    that a state dict was loaded into beforehand stay as they are.

    What ``BaseModule.init_weights`` does. Called again, it warns and does nothing.
    """
    record = record_of(module)
    if record is not None:
        _init_module(module, record)
    elif module.is_init:
        _warn_of_second_call(module)
    else:
        record = init_model(module)
        if dist.is_main_process():
            record.logger.info(record.table())


def init_model(
    module: BaseModule, keep: Iterable[str] = (), logger: Any = None, user_code: bool = False
) -> InitRecord:
    """Initialise a model.

    Args:
        module: The model.
        keep: Names of submodules to leave as they are.
        logger: Who is told what happens, by default structlog's.
        user_code: Call the model's own ``init_weights``, which may be a subclass's.

    Returns:
        Who initialised what.
    """
    kept = _kept(module, keep)
    if kept and all(id(p) in kept for p in module.parameters()):
        module.is_init = True
        return InitRecord(module, kept, logger)
    with recording(module, kept, logger) as record:
        if user_code:
            _call(module, module.init_weights, record)
        else:
            _init_module(module, record)
    return record


def _kept(root: nn.Module, keep: Iterable[str]) -> dict[int, str]:
    """By ``id``, the tensors that nothing may initialise, and why."""
    kept: dict[int, str] = {}
    for module in root.modules():
        if isinstance(module, BaseModule) and (loaded := module.loaded):
            for name, tensor in named_tensors(module):
                if name in loaded:
                    kept[id(tensor)] = "loaded before from a state dict: left as it is"
    for name in keep:
        try:
            module = root.get_submodule(name)
        except AttributeError as error:
            known = [n for n, _ in root.named_modules() if n]
            near = difflib.get_close_matches(name, known, n=1)
            raise ValueError(
                f"keep={name!r}: {type(root).__name__} has no such submodule"
                + (f"; did you mean {near[0]!r}?" if near else "")
                + f" It has {', '.join(n for n, _ in root.named_children())}"
            ) from error
        for _, tensor in named_tensors(module):
            kept[id(tensor)] = f"kept as it was: keep={name!r}"
    return kept


def _init_module(module: BaseModule, record: InitRecord) -> None:
    if module.is_init:
        _warn_of_second_call(module)
        return
    cfgs = as_list(module.init_cfg, "init_cfg") if module.init_cfg else []
    last = [cfg for cfg in cfgs if _is_pretrained(cfg)]
    initialize_each(module, [cfg for cfg in cfgs if cfg not in last] if last else cfgs)
    _init_children(module, record, direct=True)
    initialize_each(module, last)
    object.__setattr__(module, "is_init", True)  # nn.Module's own way costs as much as a fill


def _is_pretrained(cfg: Cfg) -> bool:
    kind = cfg.get("type")
    return kind == "Pretrained" or (isinstance(kind, type) and issubclass(kind, PretrainedInit))


def _init_children(module: nn.Module, record: InitRecord, direct: bool) -> None:
    """Initialise the children; of a plain module, the BaseModules that are somewhere within."""
    for child in module.children():
        init = getattr(child, "init_weights", None)
        if init is None and not child._modules:
            continue
        if init is None and MODELS.get("is_model_wrapper")(child):
            child = cast("nn.Module", child.module)
            init = getattr(child, "init_weights", None)
        if not callable(init):
            _init_children(child, record, direct=False)
        elif getattr(child, "is_init", False) is True:
            continue
        elif direct or isinstance(child, BaseModule):
            _call(child, init, record)
        else:
            record.foreign.append(
                f"{record.name_of(child)} ({type(child).__name__}) has an init_weights() that was "
                "not called: it is no direct child of a BaseModule"
            )


def _call(module: nn.Module, method: Callable[[], object], record: InitRecord) -> None:
    """Call ``init_weights()`` of a module, which may be code of others."""
    if record.keeps_all_of(module):
        return
    if getattr(method, "__func__", None) is BaseModule.init_weights:
        _init_module(cast("BaseModule", module), record)
        return
    cls = type(module).__name__
    with record.watching(module, f"Initialized by user-defined `init_weights` in {cls}"):
        try:
            method()
        except Exception as error:
            error.add_note(f"in init_weights() of {cls} {record.name_of(module)!r}")
            raise
    if isinstance(module, BaseModule):
        module.is_init = True
    else:
        name = record.name_of(module)
        record.foreign.append(
            f"{name} ({type(module).__module__}.{cls}) was initialised by its own init_weights(); "
            f"the plugin 'init' leaves it alone with keep=({name!r},)"
        )


def _warn_of_second_call(module: nn.Module) -> None:
    warnings.warn(
        f"init_weights() of {type(module).__name__} was called before: this call does nothing. Set "
        "is_init = False to initialise anew",
        stacklevel=4,
    )

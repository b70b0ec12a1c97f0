"""``init_cfg``: initialize one module from a configuration."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn

from hookengine import WEIGHT_INITIALIZERS, did_you_mean
from hookengine_init.initializers import BaseInit
from hookengine_init.layers import check_layers
from hookengine_init.pretrained import PretrainedInit
from hookengine_init.record import record_of

Cfg = Mapping[str, Any]


def initialize(module: nn.Module, init_cfg: Cfg | list[Cfg]) -> None:
    """Initialize a module from a configuration; a list is applied in order.

    ::

        initialize(net, dict(type="Kaiming", layer="Conv2d"))
        initialize(net, [dict(type="Constant", val=1, bias=2, layer="Linear",
                              override=dict(type="Normal", name="head", std=0.01))])

    Args:
        module: Any module.
        init_cfg: One dict or a list of dicts, with these keys:

            - ``type``: A name in ``WEIGHT_INITIALIZERS``, or a class.
            - ``layer``: Class names of the layers to initialize.
            - ``override``: One dict or a list of dicts, each with the ``name`` of a submodule. The
              whole submodule is initialized by the ``type`` and options beside the name, or by
              the outer ones if the name stands alone.

            All other keys are options of the initializer.

    Raises:
        TypeError: A dict was expected, or an option is unknown or has the wrong type.
        KeyError: ``type`` is missing or unknown.
        ValueError: Neither ``layer`` nor ``override`` is set, or one of them matches nothing in
            the module.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"initialize() expects an nn.Module, got {type(module).__name__}")
    follow(module, plan(module, as_list(init_cfg, "init_cfg")))


class Step(NamedTuple):
    """One initializer, and the module that it is called with."""

    cfg: Cfg
    """The configuration that the step comes from."""
    target: nn.Module
    initializer: Any
    loads: bool
    """Whether the step loads weights, or overrides loaded ones."""


def plan(module: nn.Module, cfgs: list[Cfg]) -> list[Step]:
    """Turn configurations of a module into steps, checked as far as possible; change nothing."""
    steps: list[Step] = []
    for cfg in cfgs:
        try:
            steps += _steps(module, cfg)
        except Exception as error:
            _add_note(error, module, cfg)
            raise
    return steps


def follow(module: nn.Module, steps: list[Step]) -> None:
    """Apply the steps planned for a module."""
    for step in steps:
        try:
            _apply(step.initializer, step.target)
        except Exception as error:
            _add_note(error, module, step.cfg)
            raise


def _add_note(error: Exception, module: nn.Module, cfg: Cfg) -> None:
    record = record_of(module)
    name = record.name_of(module) if record is not None else ""
    error.add_note(
        f"in the init_cfg of {type(module).__name__}{f' {name!r}' * bool(name)}: {cfg!r}"
    )


def names_weights(cfg: Cfg) -> bool:
    """Return whether a configuration, or one of its overrides, is ``Pretrained``."""
    override = cfg.get("override")
    parts = (cfg, *as_list(override, "override")) if override is not None else (cfg,)
    return any(part.get("type") in ("Pretrained", PretrainedInit) for part in parts)


def _steps(module: nn.Module, cfg: Cfg) -> list[Step]:
    options = dict(cfg)
    override = options.pop("override", None)
    initializer = _build(options)
    loads = isinstance(initializer, PretrainedInit)
    if override is None:
        return [Step(cfg, module, initializer, loads)]
    steps = []
    if not _fills_layers(initializer) or initializer.layer:
        steps.append(Step(cfg, module, initializer, loads))
    for part in as_list(override, "override"):
        target, own = _override(module, part, options)
        steps.append(Step(cfg, target, own, loads or isinstance(own, PretrainedInit)))
    return steps


def _build(options: Cfg) -> Any:
    if "bias" in options and "bias_prob" in options:
        raise ValueError(
            f"bias={options['bias']!r} and bias_prob={options['bias_prob']!r} both set the bias. "
            "Pass only one of them"
        )
    try:
        initializer = WEIGHT_INITIALIZERS.build(options)
    except TypeError:
        _check_options(options)
        raise
    if isinstance(initializer, BaseInit):
        initializer.strict = True
    if not callable(initializer):
        raise TypeError(
            f"the weight initializer {options['type']!r} must build a callable that takes a "
            f"module, as a subclass of BaseInit does, got {initializer!r}"
        )
    return initializer


def _check_options(options: Cfg) -> None:
    """Raise TypeError for an option that an initializer does not have, or that is missing.

    ``**kwargs`` of a class stand for the options of the next class in its ``__mro__``.
    """
    kind = options.get("type")
    cls = WEIGHT_INITIALIZERS.get(kind) if isinstance(kind, str) else kind
    known: dict[str, bool] = {}
    for base in cls.__mro__ if isinstance(cls, type) else ():
        if "__init__" not in vars(base) or base is object:
            continue
        _, *parameters = inspect.signature(base.__init__).parameters.values()  # type: ignore[misc]
        for parameter in parameters:
            if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                known.setdefault(parameter.name, parameter.default is parameter.empty)
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            break
    given = [name for name in options if name != "type"]
    if known and (wrong := next((name for name in given if name not in known), None)):
        hint = did_you_mean(wrong, known)
        raise TypeError(f"{kind!r} has no option {wrong!r}.{hint} It takes {', '.join(known)}")
    if missing := [name for name, required in known.items() if required and name not in given]:
        raise TypeError(f"{kind!r} needs the option {', '.join(missing)}")


def _fills_layers(initializer: Any) -> bool:
    """Return whether it fills layers as ``BaseInit`` does, and so records what it writes."""
    cls = type(initializer)
    return (
        isinstance(initializer, BaseInit)
        and cls.__call__ is BaseInit.__call__
        and cls.init_layer is BaseInit.init_layer
    )


def _apply(initializer: Any, module: nn.Module) -> None:
    """Call an initializer; for one that is not ours, the record detects what it changed."""
    record = record_of(module)
    if _fills_layers(initializer) or isinstance(initializer, PretrainedInit):
        initializer(module)
        return
    if isinstance(initializer, BaseInit) and initializer.layer and not initializer.wholemodule:
        check_layers(initializer.layer, module)
    if record is None:
        initializer(module)
        return
    describe = getattr(initializer, "_get_init_info", None)
    info = str(describe()) if describe is not None else type(initializer).__name__
    with record.watching(module, info):
        initializer(module)


def _override(module: nn.Module, cfg: Cfg, outer: Cfg) -> tuple[nn.Module, Any]:
    """Return the submodule that an override names, and its initializer."""
    options = dict(cfg)
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise ValueError(f"an override needs the 'name' of a submodule, got {dict(cfg)!r}")
    if options and "type" not in options:
        raise ValueError(
            f"the override of {name!r} has options but no 'type', got {dict(cfg)!r}. Add a type, "
            "or pass the name alone to use the outer type"
        )
    if "layer" in options:
        raise ValueError(
            f"the override of {name!r} initializes the whole submodule. Remove 'layer', or give "
            f"{name!r} its own init_cfg"
        )
    try:
        target = module.get_submodule(name)
    except AttributeError as error:
        raise ValueError(
            f"the override names {name!r}, but {type(module).__name__} has no such submodule"
            f"{' (it is not a module)' * hasattr(module, name)}. It has "
            f"{', '.join(n for n, _ in module.named_children()) or 'none'}"
        ) from error
    initializer = _build(options or {k: v for k, v in outer.items() if k != "layer"})
    initializer.wholemodule = True
    return target, initializer


def as_list(cfg: Any, what: str) -> list[Cfg]:
    """Return one dict or several as a list."""
    if type(cfg) is dict:
        return [cfg]
    cfgs = [cfg] if isinstance(cfg, Mapping) else cfg
    if not isinstance(cfgs, (list, tuple)) or not all(isinstance(c, Mapping) for c in cfgs):
        raise TypeError(f"{what} must be a dict or a list of dicts, got {cfg!r}")
    return list(cfgs)

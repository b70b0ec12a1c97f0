"""Build objects from the arguments of the Runner, and check them."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import pydantic
import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

from hookengine.answers import answer, explain_arguments, explain_validation
from hookengine.evaluator import Evaluator
from hookengine.loop.data import length_of
from hookengine.loop.optim import OptimWrapper, OptimWrapperDict
from hookengine.model.base_model import BaseModel
from hookengine.model.compiled import compile_in_place
from hookengine.model.lazy import lazy_names
from hookengine.model.plain_model import is_plain, parameters_of
from hookengine.param_groups import options_of_groups
from hookengine.records.run_folder import absolute_path
from hookengine.registry import MODEL_WRAPPERS, MODELS, unknown
from hookengine.setup import migration
from hookengine.setup.config import EvalCfg, TrainCfg
from hookengine.setup.dataloaders import check_dataset, check_single, is_used_up
from hookengine.setup.plain import as_plain

if TYPE_CHECKING:
    from hookengine.runner import Runner

Cfg = TypeVar("Cfg", bound=pydantic.BaseModel)
_SOURCES = (Mapping, Optimizer, OptimWrapper)


def build_model(model: Any) -> nn.Module:
    """Build a module from a module, ``dict(type=NAME, ...)``, or a function that returns either.

    What ``torch.compile`` returned is replaced by the module in it, compiled in place.

    Raises:
        TypeError: The result is not a module.
    """
    proxy = hasattr(model, "state_dict") and not isinstance(model, type)
    if callable(model) and not isinstance(model, nn.Module) and not proxy:
        model = model()
    if isinstance(model, Mapping):
        model = MODELS.build(model)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    return compile_in_place(model)


def parse(model: type[Cfg], cfg: Mapping[str, Any] | Cfg, name: str) -> Cfg:
    """Validate ``train_cfg``, ``val_cfg`` or ``test_cfg`` into ``model``.

    Raises:
        TypeError: If ``cfg`` is not a dict.
        ValueError: If ``cfg`` has a bad value or an unknown key.
    """
    if isinstance(cfg, model):
        return cfg
    if not isinstance(cfg, Mapping):
        raise TypeError(f"{name} must be a dict, got {cfg!r}")
    try:
        return model.model_validate(migration.translate_loop(cfg))
    except pydantic.ValidationError as error:
        raise ValueError(f"{name}: {explain_validation(error, model.model_fields)}") from error


def beginning(resume: Any, load_from: Any) -> tuple[str | Path | None, Any]:
    """Return ``(resume_from, load_from)``, with MMEngine's booleans for ``resume`` translated.

    Raises:
        TypeError: One of them has the wrong type.
    """
    if resume is True and isinstance(load_from, (str, os.PathLike)):
        return _as_path(load_from), None
    if resume is True:
        resume = "auto"
    if resume is not None and resume is not False and not isinstance(resume, (str, os.PathLike)):
        raise TypeError(f"resume takes 'auto' or the path of a checkpoint, got {resume!r}")
    if load_from is not None and not isinstance(load_from, (str, os.PathLike, Mapping)):
        raise TypeError(
            f"load_from takes a path, a URL or dict(checkpoint=..., strict=...), got {load_from!r}"
        )
    if isinstance(load_from, Mapping) and "checkpoint" in load_from:
        load_from = {**load_from, "checkpoint": _as_path(load_from["checkpoint"])}
    return resume if resume == "auto" else _as_path(resume or None), _as_path(load_from)


def _as_path(given: Any) -> Any:
    """Make a path independent of the working directory; return URLs and other values unchanged."""
    is_path = isinstance(given, os.PathLike) or (isinstance(given, str) and "://" not in given)
    return str(absolute_path(given)) if is_path else given


def check_loss_step(model: nn.Module, cfg: EvalCfg, phase: str) -> None:
    """Raise a TypeError if the losses of an evaluation are wanted, but the model has none."""
    if cfg.loss and not hasattr(model, "loss_step"):
        raise TypeError(
            f"{type(model).__name__} has no loss_step(data), which {phase}_cfg=dict(loss=True) "
            "needs. Add this method, as in BaseModel, or remove loss=True"
        )


def check_beginning(runner: Runner) -> None:
    """Raise a ValueError if no plugin resumes or loads what the Runner was asked to."""
    asked = {"resume": runner.resume_from, "load_from": runner.load_from}
    given = [f"{name}={value!r}" for name, value in asked.items() if value is not None]
    if given and "resume" not in runner.plugins.calls():
        raise ValueError(
            f"{' and '.join(given)} needs a plugin that implements the event 'resume', but no "
            f"such plugin is enabled. {answer('resume') or ''}"
        )


def check_wrapped(runner: Runner, wrapped: nn.Module, role: str) -> nn.Module:
    """Return a model that plugins may have wrapped, if it has the steps that this Runner calls.

    Args:
        runner: The Runner.
        wrapped: What the event ``wrap_model`` returned.
        role: ``"train"``, or ``"average"`` for a model that is only evaluated.

    Raises:
        TypeError: A step is missing, and a plugin has wrapped the model.
    """
    phases = ("train", "val", "test") if role == "train" else ("val", "test")
    steps = [f"{phase}_step" for phase in phases if getattr(runner, f"{phase}_cfg") is not None]
    missing = [step for step in steps if not hasattr(wrapped, step)]
    if missing and (plugin := runner.hooks.replaced.get("wrap_model")):
        raise TypeError(
            f"plugin {plugin!r} returned a {type(wrapped).__name__} from wrap_model, which has no "
            f"{', '.join(missing)}. Define it in the wrapper, so that it calls that of the model"
        )
    return wrapped


def check_model(model: nn.Module, loss: Callable[..., Any] | None, phases: Sequence[str]) -> None:
    """Check that the model has the methods that the Runner calls, and that ``loss`` fits it.

    Args:
        model: The model.
        loss: The loss that the user passed, or None.
        phases: The phases of the Runner: ``"train"``, ``"val"``, ``"test"``.

    Raises:
        TypeError: A plain module comes without a loss, or a BaseModel with one or in a wrapper, or
            the loss has parameters.
    """
    inner = None if isinstance(model, BaseModel) else _wrapped(model, phases, loss is not None)
    if inner is not None:
        inside, wrapper = type(inner).__name__, type(model).__name__
        raise TypeError(
            f"the model is already wrapped in {wrapper}. Pass the model itself to the Runner: the "
            f"train_step of the {inside} bypasses the wrapper. For several processes, the plugin "
            "'distributed' wraps the model, as in dict(type='distributed', wrapper=..., options="
            f"dict(...)); to change parts of it, use {wrapper} within the {inside}"
        )
    if loss is not None:
        if isinstance(model, BaseModel):
            raise TypeError(
                f"{type(model).__name__} is a BaseModel, which returns its own losses. Remove loss="
            )
        if isinstance(loss, nn.Module) and any(True for _ in loss.parameters()):
            raise TypeError(
                f"the loss {type(loss).__name__} has parameters, which would be neither trained "
                "nor saved. Make the loss part of a hookengine.BaseModel"
            )
        return
    if is_plain(model, loss):
        missing = ["train_step"] if "train" in phases and not _may_return_a_loss(model) else []
    else:
        missing = [f"{phase}_step" for phase in phases if not hasattr(model, f"{phase}_step")]
    if missing:
        raise TypeError(
            f"{type(model).__name__} has no {', '.join(missing)}. Derive it from "
            "hookengine.BaseModel, or pass a plain module together with a loss, as in "
            "Runner(model, loss=F.cross_entropy, ...). A module that returns its own loss from "
            "the inputs alone needs loss=lambda loss, batch: loss"
        )


def _may_return_a_loss(model: nn.Module) -> bool:
    """Return whether a plain module takes more than its inputs, such as labels."""
    takes = parameters_of(model)
    return takes.any_name or max(takes.positional, len(takes.names)) > 1


def _wrapped(model: nn.Module, phases: Sequence[str], has_loss: bool) -> nn.Module | None:
    """Return the model in a wrapper that borrows its methods, or wraps a BaseModel without them."""
    steps = [f"{phase}_step" for phase in phases]
    for name in steps:
        owner = getattr(getattr(model, name, None), "__self__", model)
        borrowed = name not in vars(model) and not hasattr(type(model), name)
        if borrowed and isinstance(owner, nn.Module) and owner is not model:
            return owner
    inner = getattr(model, "module", None)
    while isinstance(inner, nn.Module) and not isinstance(inner, BaseModel):
        inner = getattr(inner, "module", inner._modules.get("_orig_mod"))
    if not isinstance(inner, BaseModel):
        return None
    usable = has_loss or all(hasattr(model, name) for name in steps)
    return None if usable and not isinstance(model, tuple(MODEL_WRAPPERS.objects())) else inner


def build_optimizer(cfg: Any, model: nn.Module, where: str, paramwise: Any = None) -> Optimizer:
    """Build an optimizer over the parameters of ``model``.

    Args:
        cfg: An optimizer, which is returned unchanged, or ``dict(type=NAME or class, lr=...,
            ...)``, where NAME is an optimizer of ``torch.optim``.
        model: The model whose parameters an optimizer from a dict gets.
        where: The argument of the Runner, for messages.
        paramwise: How to group the parameters: the options of the function ``param_groups``, which
            a plugin provides.

    Raises:
        TypeError: ``cfg`` is neither an optimizer nor a dict with ``type``, or an option is bad.
        KeyError: ``torch.optim`` has no optimizer of that name.
        ValueError: ``paramwise`` comes with an optimizer that is already built, or an option is
            bad.
    """
    if isinstance(cfg, Optimizer):
        if paramwise is not None:
            raise ValueError(
                f"paramwise= has no effect on {where}, which is already built. Pass dict(type="
                f"{type(cfg).__name__!r}, ...) instead, or build the optimizer from "
                "hookengine.model.param_groups(model, ...)"
            )
        return cfg
    if not isinstance(cfg, Mapping) or "type" not in cfg:
        raise TypeError(
            f"{where} takes an optimizer or dict(type='SGD', lr=...), got {type(cfg).__name__}: "
            f"{cfg!r}"
        )
    arguments = {name: as_plain(value) for name, value in cfg.items()}
    target = arguments.pop("type")
    if isinstance(target, str):
        known = {
            name: cls
            for name, cls in vars(torch.optim).items()
            if isinstance(cls, type) and issubclass(cls, Optimizer) and cls is not Optimizer
        }
        if target not in known:
            raise KeyError(unknown("optimizer", target, known))
        target = known[target]
    beside = "" if paramwise is None else f" with paramwise={paramwise!r}"
    try:
        parameters = model.parameters()
        if paramwise is not None:
            parameters = _param_groups(model, target, arguments, paramwise)
        optimizer: Optimizer = target(parameters, **arguments)
    except (TypeError, ValueError, KeyError) as error:
        error.add_note(f"while building {where}={dict(cfg)!r}{beside}")
        if (lazy := lazy_names(model)) and lazy[0] not in str(error):
            error.add_note(
                f"{lazy[0]} has no shape yet, because its layer is lazy. If the optimizer needs "
                "the shapes, run one batch through the model before you create the Runner"
            )
        raise
    return optimizer


def _param_groups(
    model: nn.Module, optimizer: Callable[..., Optimizer], arguments: Mapping[str, Any], cfg: Any
) -> Any:
    if not isinstance(cfg, Mapping):
        raise TypeError(f"paramwise takes a dict, got {cfg!r}")
    parameters = inspect.signature(optimizer).parameters
    base = {
        name: arguments.get(name, getattr(parameters.get(name), "default", inspect.Parameter.empty))
        for name in ("lr", "weight_decay")
    }
    given = {name: value for name, value in base.items() if value is not inspect.Parameter.empty}
    param_groups = MODELS.own("param_groups")
    known = [*inspect.signature(param_groups).parameters][1:]
    for option in cfg:
        if option not in known or option in base:
            raise TypeError(f"paramwise: {unknown('option', option, {*known} - {*base})}")
    return param_groups(model, **given, **cfg)


def optimizer_names(cfg: Any) -> tuple[str, ...]:
    """Return the names of the optimizers that ``Runner(optim_wrapper=...)`` will build."""
    if cfg is None:
        return ()
    if isinstance(cfg, OptimWrapper):
        return (cfg.name,)
    by_name = isinstance(cfg, Mapping) and not {"optimizer", "type"} & cfg.keys()
    return tuple(cfg) if by_name or isinstance(cfg, OptimWrapperDict) else ("optimizer",)


def build_optim_wrapper(cfg: Any, model: nn.Module) -> OptimWrapper | OptimWrapperDict:
    """Build the optimizer wrapper from what ``Runner(optim_wrapper=...)`` accepts.

    Options that are NumPy's scalars become Python numbers, as they are after a resume: a
    ``float32`` would make torch compute the steps in that precision.

    Args:
        cfg: A wrapper; an optimizer; ``dict(optimizer=optimizer or dict(type=..., ...))``; or, for
            several optimizers, a dict of these by name. An optimizer from a dict gets the
            parameters of the model's part of that name.
        model: The bare model.
    """
    built = _build_optim_wrapper(cfg, model)
    for wrapper in built.by_name().values():
        optimizer = wrapper.optimizer
        for options in (*optimizer.param_groups, getattr(optimizer, "defaults", {})):
            plain = {name: as_plain(v) for name, v in options.items() if name != "params"}
            options.update(plain)
        wrapper.given = options_of_groups(optimizer.param_groups)
    return built


def _build_optim_wrapper(cfg: Any, model: nn.Module) -> OptimWrapper | OptimWrapperDict:
    if isinstance(cfg, (OptimWrapper, OptimWrapperDict)):
        return cfg
    if isinstance(cfg, Optimizer):
        return OptimWrapper(cfg)
    if not isinstance(cfg, Mapping):
        raise TypeError(
            "optim_wrapper takes an optimizer, dict(optimizer=dict(type='SGD', lr=...)), or a dict "
            f"of these by name, got {type(cfg).__name__}"
        )
    if "optimizer" in cfg:
        return _one(cfg, model, "optim_wrapper")
    if isinstance(kind := cfg.get("type"), str) and (text := answer(kind)):
        raise ValueError(f"optim_wrapper: {text}")
    if not cfg or "type" in cfg or not all(isinstance(v, _SOURCES) for v in cfg.values()):
        raise ValueError(
            "optim_wrapper=dict(...) needs an 'optimizer', as in "
            f"dict(optimizer=dict(type='SGD', lr=0.1)), got {dict(cfg)!r}"
        )
    wrappers = {}
    for name, value in cfg.items():
        if isinstance(value, Mapping) and "optimizer" not in value:
            value = {"optimizer": value}
        where = f"optim_wrapper[{name!r}]"
        wrappers[name] = _one(value, model, where, name) if isinstance(value, Mapping) else value
    return OptimWrapperDict(
        **{n: w if isinstance(w, OptimWrapper) else OptimWrapper(w) for n, w in wrappers.items()}
    )


def _one(
    cfg: Mapping[str, Any], model: nn.Module, where: str, part: str | None = None
) -> OptimWrapper:
    options = dict(cfg)
    kind = options.pop("type", "OptimWrapper")
    name = kind if isinstance(kind, str) else getattr(kind, "__name__", str(kind))
    if name != "OptimWrapper":
        raise ValueError(explain_arguments(where, {"type": name, **options}))
    optimizer = options.pop("optimizer")
    if part is not None and not isinstance(optimizer, Optimizer):
        model = _part(model, part, where)
    paramwise = options.pop("paramwise", None)
    optimizer = build_optimizer(optimizer, model, f"{where}['optimizer']", paramwise)
    return OptimWrapper(optimizer, **options)


def _part(model: nn.Module, name: str, where: str) -> nn.Module:
    """Return the part of the model called ``name``, whose parameters the optimizer gets."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        parts = dict(model.named_children())
        raise KeyError(
            f"{where}: {unknown('part of the model', name, parts)}. An optimizer from a dict gets "
            "the parameters of the part with its name. For other parameters, pass an optimizer "
            "that you built"
        ) from None


def check_optimizers(wrapper: OptimWrapper | OptimWrapperDict, model: nn.Module) -> None:
    """Check that the model's ``train_step`` can use several optimizers, if there are several.

    Raises:
        TypeError: The bare model has the ``train_step`` of BaseModel, which uses one optimizer.
    """
    if not isinstance(wrapper, OptimWrapperDict):
        return
    # The Runner wraps a plain module and its loss, and that wrapper has BaseModel's train_step.
    if getattr(type(model), "train_step", BaseModel.train_step) is BaseModel.train_step:
        raise TypeError(
            f"{type(model).__name__} has the train_step of BaseModel, which cannot choose between "
            f"optimizers by name ({', '.join(wrapper)}). Write a train_step(self, data, "
            "optim_wrapper) that uses optim_wrapper[NAME]"
        )


def point_at_model(wrapper: OptimWrapper, model: nn.Module, names: Mapping[int, str]) -> None:
    """Make an optimizer that was built earlier point at the model's current parameters.

    Args:
        wrapper: The wrapper of the optimizer.
        model: The bare model. Converting or wrapping it may have replaced its parameters.
        names: The names of the model's original parameters, by ``id``.

    Raises:
        ValueError: The optimizer holds a parameter that does not belong to the model.
    """
    current = dict(model.named_parameters())
    known = {**names, **{id(parameter): name for name, parameter in current.items()}}
    optimizer = wrapper.optimizer
    for group in optimizer.param_groups:
        for index, old in enumerate(group["params"]):
            if (new := current.get(known.get(id(old), ""))) is None:
                shape = "unknown shape" if is_lazy(old) else f"shape {tuple(old.shape)}"
                raise ValueError(
                    f"the optimizer {wrapper.name!r} holds a parameter of {shape} "
                    "that does not belong to the model. Build the optimizer "
                    "from model.parameters() of the model that you pass to the Runner"
                )
            if new is not old:
                group["params"][index] = new
                if old in optimizer.state:
                    optimizer.state[new] = optimizer.state.pop(old)


def build_dataloader(dataloader: Any, name: str) -> Iterable[Any]:
    """Build a dataloader from ``dict(dataset=..., ...)``, or return an iterable unchanged.

    Args:
        dataloader: The iterable or dict.
        name: The argument of the Runner, for messages.

    Raises:
        TypeError: The dataloader is not iterable, or it is a dataset, or there are several, or the
            dict has an argument that torch's DataLoader does not accept.
        ValueError: The dataloader is empty, or the dict has no dataset.
    """
    check_single(dataloader, name)
    if isinstance(dataloader, Mapping):
        if "dataset" not in dataloader:
            raise ValueError(
                f"{name}=dict(...) needs a 'dataset', like torch's DataLoader. Pass "
                "dict(dataset=..., batch_size=...)"
            )
        options = migration.translate_dataloader(dataloader, name)
        check_dataset(options["dataset"], options.get("collate_fn"), name)
        count_samples = options.pop("count_samples", None)
        try:
            dataloader = DataLoader(**options)
        except TypeError as error:
            raise TypeError(
                f"{name}: {error}. The dict takes the arguments of torch.utils.data.DataLoader"
            ) from error
        if count_samples is not None:
            dataloader.count_samples = count_samples
    if isinstance(dataloader, Dataset):
        raise TypeError(
            f"{name} is a dataset, which would yield single samples instead of batches. Wrap it, "
            "as in DataLoader(dataset, batch_size=32, shuffle=True) or dict(dataset=..., "
            "batch_size=32)"
        )
    is_iterable = hasattr(dataloader, "__iter__") or hasattr(dataloader, "__getitem__")
    if not is_iterable or isinstance(dataloader, (str, bytes, type)):
        got = repr(dataloader) if isinstance(dataloader, type) else type(dataloader).__name__
        raise TypeError(
            f"{name} must be iterable (a DataLoader, a list of batches) or dict(dataset=..., "
            f"batch_size=...), got {got}"
        )
    if isinstance(dataloader, DataLoader):
        check_dataset(dataloader.dataset, dataloader.collate_fn, name)
    if length_of(dataloader) == 0:
        raise ValueError(
            f"{name} is empty: it has no samples, or fewer than one batch with drop_last=True. "
            "Check the dataset or lower the batch size"
        )
    return cast("Iterable[Any]", dataloader)


def build_evaluator(metrics: Any) -> Evaluator:
    """Return ``metrics`` if it is an Evaluator, and build an Evaluator from it otherwise."""
    return metrics if isinstance(metrics, Evaluator) else Evaluator(metrics)


def default_device() -> torch.device:
    """Return the accelerator that torch finds, or the CPU if there is none."""
    if torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator()
        if device is not None:
            return device
    return torch.device("cpu")


def all_or_none(arguments: Mapping[str, Any], what: str) -> None:
    """Check that the user passed either all of the arguments or none of them.

    Args:
        arguments: The arguments by name; None means that the user did not pass one.
        what: What needs the arguments, for the message.

    Raises:
        ValueError: Some of the arguments are missing.
    """
    missing = [name for name, value in arguments.items() if value is None]
    if missing and len(missing) < len(arguments):
        given = [name for name in arguments if name not in missing]
        raise ValueError(
            f"{what} needs {' and '.join(missing)} in addition to {' and '.join(given)}. Pass all "
            "of these arguments or none"
        )


def train_cfg(cfg: Any) -> TrainCfg | None:
    """Return the options of training, or None if the user passed none."""
    return None if cfg is None else parse(TrainCfg, cfg, "train_cfg")


def eval_cfg(
    phase: str, cfg: Any, dataloader: Any, evaluator: Any, training: TrainCfg | None = None
) -> EvalCfg | None:
    """Return the options of validation or testing, or None if the user passed nothing for it.

    Args:
        phase: ``val`` or ``test``.
        cfg: The options that the user passed.
        dataloader: The dataloader that the user passed.
        evaluator: The metrics that the user passed.
        training: The options of the training that validates.

    Raises:
        TypeError: The dataloader can be used only once, but training validates more often.
        ValueError: A dataloader comes without an evaluator (or ``loss=True``), or an evaluator or
            options come without a dataloader.
    """
    if cfg is None and dataloader is None and evaluator is None:
        return None
    parsed: EvalCfg = parse(EvalCfg, cfg if cfg is not None else {}, f"{phase}_cfg")
    parts = {f"{phase}_dataloader": dataloader, f"{phase}_evaluator": evaluator}
    if dataloader is None and evaluator is None:
        raise ValueError(f"{phase}_cfg has no effect alone. Pass {' and '.join(parts)} as well")
    if dataloader is not None and evaluator is None and not parsed.loss:
        raise ValueError(
            f"{phase}_dataloader has no effect alone. Pass {phase}_evaluator or "
            f"{phase}_cfg=dict(loss=True) as well"
        )
    if dataloader is None:
        all_or_none(parts, "validation" if phase == "val" else "testing")
    times = 0 if training is None else _validations(training)
    if times > 1 and is_used_up(dataloader):
        raise TypeError(
            f"{phase}_dataloader is an iterator ({type(dataloader).__name__}), which can be used "
            f"only once, but this training validates {times} times. Pass an iterable that starts "
            "over each time, such as a DataLoader or a list of batches"
        )
    return parsed


def _validations(cfg: TrainCfg) -> int:
    """Return how often a training from the start to its limit validates."""
    interval = cfg.val_interval or 1
    first = max(-(-cfg.val_begin // interval), 1) * interval
    at_the_end = cfg.limit % interval > 0 and cfg.limit >= cfg.val_begin
    return len(range(first, cfg.limit + 1, interval)) + at_the_end

"""Describe a run: in full for ``run.json``, and in brief for its checkpoints."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import pydantic
from torch import Tensor, nn

from hookengine import dist
from hookengine.loop.data import dataset_size, length_of
from hookengine.model.compiled import without_inner
from hookengine.model.lazy import count_parameters
from hookengine.setup.environment import describe_environment
from hookengine.setup.plain import as_plain

if TYPE_CHECKING:
    from hookengine.loop.optim import OptimWrapper
    from hookengine.runner import Runner


def describe_run(runner: Runner) -> dict[str, Any]:
    """Return a description of a run, as values that JSON can hold.

    It covers the model and its number of parameters (None while the shape of a lazy layer is
    unknown), the optimizers and their options, the configuration, the plugins and their options,
    the order of the hooks, and the environment.
    """
    configured = {f"{p}_cfg": getattr(runner, f"{p}_cfg") for p in ("train", "val", "test")}
    return {
        "name": runner.name,
        "model": _model(runner),
        "parameters": count_parameters(runner.bare_model),
        "optimizers": _optimizers(runner, _options),
        **{name: cfg.model_dump() for name, cfg in configured.items() if cfg is not None},
        "plugins": [
            {"name": name, "source": runner.plugins.source(name), "options": options_of(plugin)}
            for name, plugin in runner.plugins.items()
        ],
        "hooks": {
            event: [{k: v for k, v in place._asdict().items() if v} for place in order]
            for event, order in runner.plugins.order().items()
        },
        "environment": describe_environment(),
        "world_size": dist.get_world_size(),
    }


def describe_in_brief(runner: Runner) -> str:
    """Describe a run in one line, as far as it is built: name, model, progress, plugins, folder."""
    given = vars(runner)  # the Runner may be half built
    parts = [repr(given["name"])] if "name" in given else []
    if given.get("model") is not None:
        parts.append(f"model={_model(runner)}")
    if (progress := given.get("progress")) is not None and given.get("train_cfg") is not None:
        for word in ("epoch", "iter"):
            limit = getattr(progress, f"max_{word}s")
            parts.append(f"{word}={getattr(progress, word)}" + (f"/{limit}" if limit else ""))
    if "plugins" in given:
        parts.append(f"plugins={[*runner.plugins]}")
    if "work_dir" in given and "name" in given:
        parts.append(f"run_dir={str(runner.run_dir)!r}")
    if runner.closed:
        parts.append("closed")
    return f"{type(runner).__name__}({', '.join(parts)})"


def describe_state(runner: Runner) -> dict[str, Any]:
    """Return what a checkpoint must match: model, plugins, optimizers, data, number of ranks."""

    def parameters(wrapper: OptimWrapper) -> dict[str, Any]:
        names = _parameter_names(runner.bare_model, wrapper)
        return {"parameters": names, "given": given_options(wrapper)}

    loops = {"train": runner.train_loop, "val": runner.val_loop}
    return {
        "hookengine": _release(),
        "model": _model(runner),
        "plugins": [*runner.plugins],
        "optimizers": _optimizers(runner, parameters),
        "dataset": {
            phase: {"samples": dataset_size(loop.dataloader), "batches": length_of(loop.dataloader)}
            for phase, loop in loops.items()
            if loop is not None
        },
        "world_size": dist.get_world_size(),
    }


def _model(runner: Runner) -> str:
    return type(runner.bare_model).__name__


def _optimizers(
    runner: Runner, about: Callable[[OptimWrapper], dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    return {
        name: {"type": type(wrapper.optimizer).__name__, **about(wrapper)}
        for name, wrapper in runner.optim_wrappers.items()
    }


def _options(wrapper: OptimWrapper) -> dict[str, Any]:
    """Return the options that all parameter groups share, and under ``groups`` the others."""
    groups = group_options(wrapper.param_groups)
    same = {k: v for k, v in groups[0].items() if all(g.get(k) == v for g in groups)}
    others = [{k: v for k, v in group.items() if k not in same} for group in groups]
    return {**same, **({"groups": others} if any(others) else {})}


def given_options(wrapper: OptimWrapper) -> list[dict[str, Any]]:
    """Return the options that the script gave to each parameter group, including added ones."""
    return group_options([*wrapper.given, *wrapper.param_groups[len(wrapper.given) :]])


def group_options(groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the options of parameter groups, without their tensors, as values for JSON."""
    return [
        {name: as_json(value) for name, value in group.items() if name != "params"}
        for group in groups
    ]


def _parameter_names(model: nn.Module, wrapper: OptimWrapper) -> list[list[str]]:
    """Return the names of an optimizer's parameters, one list per group."""
    names = {id(parameter): without_inner(name) for name, parameter in model.named_parameters()}
    return [[names.get(id(p), "?") for p in group["params"]] for group in wrapper.param_groups]


@functools.cache
def _release() -> str:
    try:
        return version("hookengine")
    except PackageNotFoundError:
        return "unknown"


def options_of(plugin: object) -> dict[str, Any]:
    """Return a plugin's options as values that JSON can hold, or their ``repr`` otherwise."""
    if not dataclasses.is_dataclass(plugin) or isinstance(plugin, type):
        return {}
    values = {f.name: getattr(plugin, f.name) for f in dataclasses.fields(plugin)}
    return {name: as_json(value) for name, value in values.items()}


_ANYTHING = pydantic.TypeAdapter[Any](Any)


def as_json(value: Any) -> Any:
    """Return a value in a form that JSON can hold, or its ``repr`` if there is none."""
    try:
        return _ANYTHING.dump_python(as_plain(value), mode="json", fallback=_other)
    except (ValueError, RecursionError):  # bytes that are not text, or a cycle
        return repr(value)


def _other(value: Any) -> Any:
    """Return a tensor without dimensions, such as a learning rate, as a number; else a text."""
    if not isinstance(value, Tensor):
        return repr(as_plain(value))
    if value.dim() or value.is_meta:
        return f"tensor of shape {tuple(value.shape)}, {value.dtype}"
    return value.item()

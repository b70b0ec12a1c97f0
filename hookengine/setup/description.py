"""What a run consists of, for people and for who compares runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hookengine import dist
from hookengine.events.plugin import as_json, options_of
from hookengine.loop.optim import OptimWrapper
from hookengine.setup.environment import describe_environment

if TYPE_CHECKING:
    from hookengine.runner import Runner


def describe(runner: Runner) -> dict[str, Any]:
    """What a run consists of, as plain values."""
    configured = {f"{p}_cfg": getattr(runner, f"{p}_cfg") for p in ("train", "val", "test")}
    wrappers = {} if runner.optim_wrapper is None else runner.optim_wrapper.by_name()
    return {
        "name": runner.name,
        "model": type(runner.bare_model).__name__,
        "parameters": sum(p.numel() for p in runner.bare_model.parameters()),
        "optimizers": {
            name: {"type": type(wrapper.optimizer).__name__, **_options(wrapper)}
            for name, wrapper in wrappers.items()
        },
        **{name: cfg.model_dump() for name, cfg in configured.items() if cfg is not None},
        "plugins": [
            {"name": name, "source": runner.plugins.source(name), "options": options_of(plugin)}
            for name, plugin in runner.plugins.items()
        ],
        "hooks": runner.plugins.calls(),
        "environment": describe_environment(),
        "ranks": dist.get_world_size(),
    }


def _options(wrapper: OptimWrapper) -> dict[str, Any]:
    """The options of an optimizer: of all its groups together, or a list where they differ."""
    groups = [{k: v for k, v in g.items() if k != "params"} for g in wrapper.param_groups]
    groups = [as_json(group) for group in groups]
    same = {k: v for k, v in groups[0].items() if all(g.get(k) == v for g in groups)}
    others = [{k: v for k, v in group.items() if k not in same} for group in groups]
    return {**same, **({"groups": others} if any(others) else {})}

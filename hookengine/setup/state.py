"""The state of a Runner: collect it, compare it with a Runner, and load it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from hookengine.evaluator import metric_numbers
from hookengine.events.blame import note
from hookengine.loop.optim import OptimWrapper
from hookengine.model.compiled import names_as_in, original_names, without_inner
from hookengine.model.lazy import with_lazy, without_lazy
from hookengine.registry import PLUGINS, unknown
from hookengine.setup.description import describe_state
from hookengine.setup.optimizer_options import load_optimizer
from hookengine.setup.plain import as_plain
from hookengine.setup.position import describe_position, resume_position

if TYPE_CHECKING:
    from hookengine.runner import Runner


_NAMES = ("optimizer", "dataset", "world_size")
_STARTS_OVER = "; if you allow this, the optimizer starts from scratch"


def collect(runner: Runner) -> dict[str, Any]:
    """Return the state that all ranks share: weights, optimizers, counters, metrics, plugins."""
    with _raised_by("the model, method 'state_dict'"):
        weights = runner.bare_model.state_dict()
    checkpoint: dict[str, Any] = {
        "state_dict": original_names(without_lazy(weights)),
        "progress": runner.progress.state_dict(),
        "plugins": runner.plugins.state_dict(),
        "meta": {**describe_state(runner), "position": describe_position(runner)},
    }
    if runner.optim_wrapper is not None:
        with _raised_by("the optimizer, method 'state_dict'"):
            checkpoint["optimizer"] = runner.optim_wrapper.state_dict()
    if runner.val_loop is not None:
        checkpoint["metrics"] = metric_numbers(runner.val_loop.metrics)
    return checkpoint


def as_saved(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return a state as a checkpoint holds it, with NumPy's scalars as Python values."""
    return {key: as_plain(value) for key, value in checkpoint.items()}


@contextmanager
def _raised_by(whose: str) -> Iterator[None]:
    """Note on an error that it is not the fault of the plugin that saves or resumes."""
    try:
        yield
    except BaseException as error:
        note(error, whose)
        raise


def warn_of_open_window(runner: Runner) -> bool:
    """Warn if the state lacks gradients, and return whether it does."""
    if not any(wrapper.window_open for wrapper in runner.optim_wrappers.values()):
        return False
    runner.logger.warning(
        "state_dict() was called between two optimizer steps. It does not hold the gradients since "
        "the last step, so a run cannot be resumed from it exactly. Call it in safe_point"
    )
    return True


def load(runner: Runner, checkpoint: dict[str, Any], allow: Iterable[str] = ()) -> None:
    """Load a state, after comparing all of it with the Runner.

    Args:
        runner: A built Runner.
        checkpoint: What ``collect`` returned.
        allow: What may differ, by the names that ``differences`` yields.

    Raises:
        ValueError: ``checkpoint`` is not the state of a Runner, or it differs in something that
            is not allowed. Nothing is loaded.
        KeyError: ``allow`` has an unknown name.
    """
    allowed = {allow} if isinstance(allow, str) else set(allow)
    needed = {"state_dict", "progress", "plugins"}
    if runner.optim_wrapper is not None:
        needed.add("optimizer")
    if missing := needed - checkpoint.keys():
        raise ValueError(
            f"this is not the state of a Runner: it has no {', '.join(sorted(missing))}. To load "
            "only weights, use Runner(load_from=...) or runner.bare_model.load_state_dict(...)"
        )
    known = {*_NAMES, *runner.plugins, *checkpoint["plugins"], *PLUGINS.names()}
    for name in allowed - known:
        raise KeyError(unknown("name in allow", name, known))
    runner.hooks.before_load_checkpoint(runner, checkpoint)
    found = list(differences(runner, checkpoint))
    refused = [(name, text) for name, text in found if name not in allowed]
    if refused:
        raise ValueError(_report(refused))
    weights = names_as_in(runner.bare_model, checkpoint["state_dict"])
    with _raised_by("the model, method 'load_state_dict'"):
        runner.bare_model.load_state_dict(with_lazy(runner.bare_model, weights))
    differing = {name for name, _ in found}
    if runner.optim_wrapper is not None and "optimizer" not in differing:
        _load_optimizers(runner, checkpoint)
    elif runner.optim_wrapper is not None:
        text = next(text for name, text in found if name == "optimizer")
        text = text.removesuffix(_STARTS_OVER)
        runner.logger.warning(f"the optimizer's state is not loaded, as allowed: {text}")
    runner.progress.load_state_dict(resume_position(runner, checkpoint))
    runner.plugins.load_state_dict(checkpoint["plugins"])
    metrics = checkpoint.get("metrics")
    if runner.val_loop is not None and isinstance(metrics, Mapping):
        runner.val_loop.metrics = dict(metrics)


def _load_optimizers(runner: Runner, checkpoint: Mapping[str, Any]) -> None:
    """Load the states of the optimizers; warn of options that replace those of the script."""
    saved = checkpoint["optimizer"]
    meta = checkpoint.get("meta", {}).get("optimizers", {})
    for name, wrapper in runner.optim_wrappers.items():
        single = runner.optim_wrapper is wrapper
        path = "runner.optim_wrapper" if single else f"runner.optim_wrapper[{name!r}]"
        given = meta.get(name, {}).get("given", [])
        with _raised_by("the optimizer, method 'load_state_dict'"):
            warning = load_optimizer(wrapper, saved if single else saved[name], given, path)
        if warning:
            runner.logger.warning(warning)


def _report(refused: list[tuple[str, str]]) -> str:
    lines = [f"\n  {name}: {text}" for name, text in refused]
    names = [name for name, _ in refused if name != "state_dict"]
    advice = f"\nTo load it anyway, allow these differences: allow={names}" if names else ""
    head = "the state does not fit this Runner; nothing was loaded:"
    return f"{head}{''.join(lines)}{advice}"


def differences(runner: Runner, checkpoint: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield what differs between a Runner and a state: a name, and a sentence about it.

    The names are ``state_dict`` (which cannot be allowed), ``optimizer``, ``dataset``,
    ``world_size``, and the names of plugins.
    """
    meta, here = checkpoint.get("meta", {}), describe_state(runner)
    if text := _weights(runner.bare_model, checkpoint["state_dict"]):
        yield "state_dict", text
    if text := _optimizers(runner, checkpoint, here["optimizers"]):
        yield "optimizer", f"{text}{_STARTS_OVER}"
    yield from _plugins(runner, checkpoint["plugins"], meta.get("plugins", ()))
    ranks, ranks_then = here["world_size"], meta.get("world_size", here["world_size"])
    for phase, then in meta.get("dataset", {}).items():
        now = here["dataset"].get(phase, then)
        if ranks != ranks_then:  # then the number of batches per rank differs too
            now, then = ({"samples": counts["samples"]} for counts in (now, then))
        if now != then:
            yield "dataset", f"{phase} has {_data(now)} here, {_data(then)} in the checkpoint"
    if ranks != ranks_then:
        yield "world_size", f"{ranks} processes here, {ranks_then} in the checkpoint"


def _plugins(
    runner: Runner, states: Mapping[str, Any], were_on: Iterable[str]
) -> Iterator[tuple[str, str]]:
    """Yield the name of each plugin with a state on one side only, and a sentence about it.

    Args:
        runner: The Runner.
        states: The states in the checkpoint, by plugin name.
        were_on: Plugins that were enabled when the state was saved. They may be missing from it if
            they had nothing to save yet.
    """
    for name in sorted({*states} - {*runner.plugins}):
        yield name, f"the checkpoint has a state of {name!r}, which is not enabled: enable it"
    for name in sorted({*runner.plugins.state_dict()} - {*states} - {*were_on}):
        yield name, f"the checkpoint has no state of {name!r}, which is enabled: disable it"


def _data(counts: Mapping[str, Any]) -> str:
    return " in ".join(f"{count} {name}" for name, count in counts.items() if count is not None)


def _weights(model: nn.Module, saved: Mapping[str, Any]) -> str:
    """Compare names and shapes; return "" if a module loads its state in its own way."""
    if any(_adapts(part) for part in model.modules()):
        return ""
    own, saved = original_names(model.state_dict()), original_names(saved)
    missing = [name for name in own if name not in saved and not is_lazy(own[name])]
    unexpected = [name for name in saved if name not in own]
    misshapen = [
        f"{name} {list(value.shape)} here, {list(saved[name].shape)} there"
        for name, value in own.items()
        if isinstance(value, Tensor)
        and isinstance(saved.get(name), Tensor)
        and not is_lazy(value)
        and value.shape != saved[name].shape
    ]
    parts = [
        f"{what}: {_some(names)}"
        for what, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", misshapen),
        )
        if names
    ]
    if not parts:
        return ""
    return (
        f"{'; '.join(parts)}. The state is from another model; to load the weights that fit, use "
        "Runner(load_from=dict(checkpoint=..., strict=False, ignore_mismatched_sizes=True))"
    )


def _some(names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _adapts(part: nn.Module) -> bool:
    home = str(getattr(type(part)._load_from_state_dict, "__module__", ""))
    return home.split(".")[0] not in ("torch", "hookengine")


def _optimizers(runner: Runner, checkpoint: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """Compare the optimizers: their names, types, and the parameters of each group."""
    if runner.optim_wrapper is None:
        return ""
    saved, wrappers = checkpoint["optimizer"], runner.optim_wrappers
    first = next(iter(wrappers.values()))
    several = runner.optim_wrapper is not first
    own_kind = type(first).state_dict is not OptimWrapper.state_dict
    if several or not (own_kind or "param_groups" in saved):
        if saved.keys() != wrappers.keys():
            there = "one" if "param_groups" in saved else ", ".join(sorted(saved))
            return f"the Runner has {', '.join(sorted(wrappers))}, the checkpoint has {there}"
    else:
        saved = dict.fromkeys(wrappers, saved)
    described = checkpoint.get("meta", {}).get("optimizers", {})
    for name in wrappers:
        label = f"{name!r} " if several else ""
        then, now = described.get(name, here[name]), here[name]
        if then["type"] != now["type"]:
            return f"{label}is {now['type']} here, {then['type']} in the checkpoint"
        sizes = [len(group) for group in now["parameters"]]
        if "param_groups" in saved[name]:
            others = [len(group["params"]) for group in saved[name]["param_groups"]]
        else:
            others = [len(group) for group in then["parameters"]]
        if sizes != others:
            return (
                f"{label}has groups of {sizes} parameters here, of {others} in the checkpoint. A "
                "plugin that adds a group during training adds it again in before_load_checkpoint"
            )
        groups = [[without_inner(n) for n in group] for group in then["parameters"]]
        if groups != now["parameters"]:
            return f"{label}has different parameters in its groups, or in a different order"
    return ""

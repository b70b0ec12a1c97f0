"""What MMEngine's users will pass, and what does it here.

The one place where the kernel's text names features: it reads these strings to nobody but a user
who asked for something by its MMEngine name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from hookengine.registry import PLUGINS, unknown

# MMEngine's name -> (the plugin that does it here or None, what to write)
REPLACEMENTS: dict[str, tuple[str | None, str]] = {
    "param_scheduler": ("schedule", "plugins=[dict(type='schedule', ...)]"),
    "default_hooks": (
        None,
        "defaults are plugins: plugins=[dict(type='logging', interval=50), 'no:progress_bar']",
    ),
    "custom_hooks": (None, "plugins=[MyPlugin(...)]: any object with methods named after events"),
    "launcher": ("distributed", "nothing: start the same script with torchrun"),
    "cfg": (None, "the arguments of the Runner themselves: Runner(**cfg) for a dict"),
    "data_preprocessor": (None, "the model's: BaseModel(data_preprocessor=...)"),
    "env_cfg": ("distributed", "plugins=[dict(type='distributed', ...)]"),
    "randomness": ("seed", "plugins=[dict(type='seed', seed=...)]"),
    "log_processor": ("logging", "plugins=[dict(type='logging', interval=...)]"),
    "log_level": ("logging", "plugins=[dict(type='logging', level='WARNING')]"),
    "visualizer": ("wandb", "plugins=['wandb'] or plugins=['tensorboard']"),
    "load_from": (
        "checkpoint",
        "runner.bare_model.load_state_dict(torch.load(path, weights_only=True))",
    ),
    "resume": ("checkpoint", "runner.load_state_dict(torch.load(path, weights_only=True))"),
    "default_scope": (None, "nothing: names are looked up in one registry each"),
    "experiment_name": (None, "Runner(name=...)"),
    "auto_scale_lr": (None, "a learning rate of your own: nothing rescales it silently"),
    "AmpOptimWrapper": ("amp", "plugins=['amp']"),
    "ApexOptimWrapper": ("amp", "plugins=['amp']"),
    "accumulative_counts": ("accumulate", "plugins=[dict(type='accumulate', steps=...)]"),
    "clip_grad": ("clip", "plugins=[dict(type='clip', ...)]"),
    "paramwise_cfg": (None, "parameter groups: optim_wrapper=SGD([dict(params=..., lr=...)])"),
    "constructor": (None, "an optimizer that you build: optim_wrapper=SGD(groups)"),
    "loss_scale": ("amp", "plugins=[dict(type='amp', ...)]"),
    "dtype": ("amp", "plugins=[dict(type='amp', ...)]"),
    "fp16": ("amp", "plugins=['amp'], which holds in validation and testing too"),
    "EpochBasedTrainLoop": (None, "train_cfg=dict(by_epoch=True, max_epochs=...)"),
    "IterBasedTrainLoop": (None, "train_cfg=dict(by_epoch=False, max_iters=...)"),
    "ValLoop": (None, "val_cfg=dict()"),
    "TestLoop": (None, "test_cfg=dict()"),
    "dynamic_intervals": (None, "a plugin that calls runner.val() where you want it"),
}


def answer(name: str) -> str | None:
    """What replaces MMEngine's ``name`` here, or None where that is not known."""
    if name not in REPLACEMENTS:
        return None
    plugin, text = REPLACEMENTS[name]
    missing = (
        f" (this installation has no plugin {plugin!r} yet)"
        if plugin is not None and plugin not in PLUGINS
        else ""
    )
    return f"{name!r} is MMEngine's. Here: {text}{missing}"


def explain(where: str, given: Mapping[str, Any], known: Iterable[str] = ()) -> str:
    """Answer every argument that ``where`` does not take with its replacement."""
    answers = []
    for key, value in given.items():
        name = value if key == "type" and isinstance(value, str) else key
        if (text := answer(name)) is not None:
            answers.append(text)
        elif key != "optimizer":
            answers.append(unknown("argument", key, known))
    return f"{where}: {'; '.join(answers)}"

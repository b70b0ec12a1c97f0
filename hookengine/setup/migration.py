"""What MMEngine's users will pass, and what does it here.

The one place where the kernel's text names features: it reads these strings to nobody but a user
who asked for something by its MMEngine name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hookengine.events.registry import PLUGINS

# MMEngine's name -> (the plugin that does it here, or None; what to write; what does until then)
REPLACEMENTS: dict[str, tuple[str | None, str, str]] = {
    "param_scheduler": (
        "schedule",
        "plugins=[dict(type='schedule', scheduler=dict(type='MultiStepLR', milestones=[8, 11]))], "
        "with the schedulers of torch.optim.lr_scheduler",
        "",
    ),
    "default_hooks": (
        None,
        "defaults are plugins: plugins=[dict(type='logging', interval=50), 'no:progress_bar']",
        "",
    ),
    "custom_hooks": (
        None,
        "plugins=[MyPlugin(...)]: any object with methods named after events",
        "",
    ),
    "launcher": (
        "distributed",
        "nothing: start the same script with torchrun",
        "torch.distributed.init_process_group before the Runner",
    ),
    "cfg": (None, "the arguments of the Runner themselves: Runner(**cfg) for a dict", ""),
    "data_preprocessor": (None, "the model's: BaseModel(data_preprocessor=...)", ""),
    "env_cfg": (
        "distributed",
        "plugins=[dict(type='distributed', backend='gloo', timeout=600)]",
        "torch.distributed.init_process_group before the Runner",
    ),
    "model_wrapper_cfg": (
        "distributed",
        "plugins=[dict(type='distributed', wrapper='MMSeparateDistributedDataParallel', "
        "options=dict(find_unused_parameters=True))]",
        "",
    ),
    "find_unused_parameters": (
        "distributed",
        "plugins=[dict(type='distributed', options=dict(find_unused_parameters=True))]",
        "",
    ),
    "strategy": ("distributed", "plugins=[dict(type='distributed', strategy='fsdp')]", ""),
    "sync_bn": ("syncbn", "plugins=['syncbn']", ""),
    "ddp": ("distributed", "on by default: start the script with torchrun", ""),
    "fsdp": ("distributed", "plugins=[dict(type='distributed', strategy='fsdp')]", ""),
    "randomness": (
        "seed",
        "plugins=[dict(type='seed', seed=...)]",
        "torch.manual_seed before the model is made",
    ),
    "log_processor": ("logging", "plugins=[dict(type='logging', interval=...)]", ""),
    "log_level": ("logging", "plugins=[dict(type='logging', level='WARNING')]", ""),
    "visualizer": (
        "wandb",
        "plugins=['wandb'] or plugins=['tensorboard'], and runner.log(dict(name=image)) in a hook",
        "a Sink of your own",
    ),
    "vis_backends": ("wandb", "plugins=['wandb', 'tensorboard']", "a Sink of your own"),
    "WandbVisBackend": ("wandb", "plugins=[dict(type='wandb', project=...)]", ""),
    "TensorboardVisBackend": ("tensorboard", "plugins=['tensorboard']", ""),
    "LocalVisBackend": ("logging", "metrics.jsonl, run.json and media in the run's folder", ""),
    "resume": (
        "checkpoint",
        "Runner(resume='auto') with the plugin 'checkpoint'",
        "runner.load_state_dict(torch.load(path, weights_only=True))",
    ),
    "experiment_name": (None, "Runner(name=...)", ""),
    "auto_scale_lr": (None, "a learning rate of your own: nothing rescales it silently", ""),
    "AmpOptimWrapper": (
        "amp",
        "plugins=['amp'], or dict(type='amp', dtype='float16') for a loss scale",
        "",
    ),
    "ApexOptimWrapper": ("amp", "plugins=['amp']", ""),
    "accumulative_counts": (
        "accumulate",
        "plugins=[dict(type='accumulate', steps=...)]",
        "",
    ),
    "OptimWrapperDict": (
        None,
        "optim_wrapper=dict(generator=dict(optimizer=...), discriminator=dict(optimizer=...)), by "
        "the names of the model's parts",
        "",
    ),
    "clip_grad": (
        "clip",
        "plugins=[dict(type='clip', max_norm=1.0)], or clip_value=...",
        "",
    ),
    "paramwise_cfg": (
        None,
        "optim_wrapper=dict(optimizer=dict(type='AdamW', ...), paramwise=dict(custom_keys=..., "
        "norm_decay_mult=0))",
        "",
    ),
    "constructor": (None, "an optimizer that you build: optim_wrapper=SGD(groups)", ""),
    "loss_scale": ("amp", "plugins=[dict(type='amp', dtype='float16', init_scale=...)]", ""),
    "dtype": ("amp", "plugins=[dict(type='amp', dtype='float16')]", ""),
    "fp16": ("amp", "plugins=['amp'], which holds in validation too", ""),
    "optimizer": (None, "optim_wrapper=dict(optimizer=...), or the optimizer itself", ""),
    "EMAHook": ("ema", "plugins=[dict(type='ema', momentum=0.0002)]", ""),
    "CheckpointHook": ("checkpoint", "plugins=[dict(type='checkpoint', ...)]", ""),
    "LoggerHook": ("logging", "plugins=[dict(type='logging', interval=...)]", ""),
    "ParamSchedulerHook": ("schedule", "plugins=[dict(type='schedule', scheduler=...)]", ""),
    "priority": (None, "after = ('other',) or before = ('other',) on the class", ""),
    "EarlyStoppingHook": ("early_stop", "dict(type='early_stop', metric=..., patience=...)", ""),
    "monitor": (None, "the option metric", ""),
    "compile": ("compile", "plugins=['compile'] or dict(type='compile', mode=...)", ""),
    "dynamic_intervals": (None, "a plugin that calls runner.val() where you want it", ""),
    "InfiniteSampler": (
        None,
        "shuffle=True: train_cfg=dict(max_iters=...) starts anew by itself",
        "",
    ),
    "pseudo_collate": (
        None,
        "a collate_fn of your own: a function that takes a list of samples",
        "",
    ),
    "before_epoch": (None, "before_train_epoch, before_val_epoch, before_test_epoch", ""),
    "after_epoch": (None, "after_train_epoch, after_val_epoch, after_test_epoch", ""),
    "before_iter": (None, "before_train_iter, before_val_iter, before_test_iter", ""),
    "after_iter": (None, "after_train_iter, after_val_iter, after_test_iter", ""),
    "runner.epoch": (None, "runner.progress.epoch", ""),
    "runner.iter": (None, "runner.progress.iter", ""),
    "runner.max_epochs": (None, "runner.progress.max_epochs", ""),
    "runner.max_iters": (None, "runner.progress.max_iters", ""),
    "runner.train_dataloader": (None, "runner.train_loop.dataloader", ""),
    "runner.val_dataloader": (None, "runner.val_loop.dataloader", ""),
    "runner.visualizer": (None, "runner.log(dict(loss=0.5, samples=image))", ""),
    "runner.message_hub": (None, "runner.log(dict(name=value))", ""),
    "runner.register_hook": (None, "runner.plugins.add(plugin)", ""),
    "runner.call_hook": (None, "runner.hooks.EVENT(runner, ...)", ""),
    "runner.from_cfg": (None, "Runner(**cfg)", ""),
    "runner.save_checkpoint": (
        "checkpoint",
        "the plugin does it",
        "torch.save(runner.state_dict())",
    ),
    "runner.load_checkpoint": (
        "checkpoint",
        "Runner(load_from=path)",
        "hookengine.model.load_weights(runner.bare_model, path)",
    ),
}


def drop_neutral(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Without what MMEngine's configurations carry along and what asks for nothing."""
    neutral = (None, False, "none")
    return {
        name: value
        for name, value in arguments.items()
        if name != "default_scope"
        and not (name in REPLACEMENTS and any(value is n or value == n for n in neutral))
    }


def answer(name: str) -> str | None:
    """What replaces MMEngine's ``name`` here, or None where that is not known."""
    if name not in REPLACEMENTS:
        return None
    plugin, text, until_then = REPLACEMENTS[name]
    if plugin is not None and plugin not in PLUGINS:
        text += f" (this installation has no plugin {plugin!r} yet"
        text += f"; until then: {until_then})" if until_then else ")"
    return f"{name!r} is MMEngine's. Here: {text}"


def translate_dataloader(options: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The arguments of torch's DataLoader, from those that MMEngine's configurations give.

    Raises:
        ValueError: a sampler or collate function that has no counterpart.
    """
    translated = dict(options)
    dataset = translated.get("dataset")
    if isinstance(dataset, Mapping) and callable(dataset.get("type")):
        arguments = dict(dataset)
        translated["dataset"] = arguments.pop("type")(**arguments)
    sampler, collate = translated.get("sampler"), translated.get("collate_fn")
    if isinstance(sampler, Mapping) and sampler.get("type") == "DefaultSampler":
        del translated["sampler"]
        translated["shuffle"] = sampler.get("shuffle", True)
    if isinstance(collate, Mapping) and collate.get("type") == "default_collate":
        del translated["collate_fn"]
    for name in ("dataset", "sampler", "batch_sampler", "collate_fn"):
        if isinstance(value := translated.get(name), Mapping) and "type" in value:
            text = answer(str(value["type"])) or "pass the object itself"
            raise ValueError(f"{where}: {name}={dict(value)!r} cannot be built here: {text}")
    return translated

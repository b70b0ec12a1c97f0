"""Arguments and names of MMEngine, and what replaces them in hookengine.

Users see these messages only if they use a name from MMEngine. This module may name the plugins
that provide a feature; the kernel must not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hookengine.registry import PLUGINS

# MMEngine's name -> (the plugin that replaces it, or None; what to do instead, as a clause that
# follows "In hookengine, "; what to do if that plugin is not installed)
REPLACEMENTS: dict[str, tuple[str | None, str, str]] = {
    "param_scheduler": (
        "schedule",
        "use plugins=[dict(type='schedule', scheduler=dict(type='MultiStepLR', milestones=[8, "
        "11]))], with any scheduler of torch.optim.lr_scheduler",
        "",
    ),
    "default_hooks": (
        None,
        "the defaults are plugins: use plugins=[dict(type='logging', interval=50), "
        "'no:progress_bar']",
        "",
    ),
    "custom_hooks": (
        None,
        "use plugins=[MyPlugin(...)]; a plugin is any object with methods named after events",
        "",
    ),
    "launcher": (
        "distributed",
        "omit it and start the same script with torchrun",
        "call torch.distributed.init_process_group before you create the Runner",
    ),
    "cfg": (None, "pass the arguments to the Runner directly, as in Runner(**cfg)", ""),
    "data_preprocessor": (
        None,
        "it belongs to the model: use BaseModel(data_preprocessor=...)",
        "",
    ),
    "env_cfg": (
        "distributed",
        "use plugins=[dict(type='distributed', backend='gloo', timeout=600)]",
        "call torch.distributed.init_process_group before you create the Runner",
    ),
    "model_wrapper_cfg": (
        "distributed",
        "use plugins=[dict(type='distributed', wrapper='MMSeparateDistributedDataParallel', "
        "options=dict(find_unused_parameters=True))]",
        "",
    ),
    "find_unused_parameters": (
        "distributed",
        "use plugins=[dict(type='distributed', options=dict(find_unused_parameters=True))]",
        "",
    ),
    "strategy": ("distributed", "use plugins=[dict(type='distributed', strategy='fsdp')]", ""),
    "sync_bn": ("syncbn", "use plugins=['syncbn']", ""),
    "ddp": ("distributed", "DDP is on by default: start the script with torchrun", ""),
    "fsdp": ("distributed", "use plugins=[dict(type='distributed', strategy='fsdp')]", ""),
    "randomness": (
        "seed",
        "use plugins=[dict(type='seed', seed=...)]",
        "call torch.manual_seed before you create the model",
    ),
    "log_processor": ("logging", "use plugins=[dict(type='logging', interval=...)]", ""),
    "log_level": ("logging", "use plugins=[dict(type='logging', level='WARNING')]", ""),
    "visualizer": (
        "wandb",
        "use plugins=['wandb'] or plugins=['tensorboard'], and call runner.log(dict(name=image)) "
        "in a hook",
        "write your own Sink",
    ),
    "vis_backends": ("wandb", "use plugins=['wandb', 'tensorboard']", "write your own Sink"),
    "WandbVisBackend": ("wandb", "use plugins=[dict(type='wandb', project=...)]", ""),
    "TensorboardVisBackend": ("tensorboard", "use plugins=['tensorboard']", ""),
    "LocalVisBackend": (
        "logging",
        "use metrics.jsonl, run.json and media in the run's folder",
        "",
    ),
    "resume": (
        "checkpoint",
        "use Runner(resume='auto') with the plugin 'checkpoint'",
        "call runner.load_state_dict(torch.load(path, weights_only=True))",
    ),
    "experiment_name": (None, "use Runner(name=...)", ""),
    "auto_scale_lr": (
        None,
        "set the learning rate yourself: it is never rescaled silently",
        "",
    ),
    "AmpOptimWrapper": (
        "amp",
        "use plugins=['amp'], or dict(type='amp', dtype='float16') for a loss scale",
        "",
    ),
    "ApexOptimWrapper": ("amp", "use plugins=['amp']", ""),
    "accumulative_counts": (
        "accumulate",
        "use plugins=[dict(type='accumulate', steps=...)]",
        "",
    ),
    "OptimWrapperDict": (
        None,
        "use optim_wrapper=dict(generator=dict(optimizer=...), discriminator=dict(optimizer=...)), "
        "with the names of the model's parts",
        "",
    ),
    "clip_grad": (
        "clip",
        "use plugins=[dict(type='clip', max_norm=1.0)], or clip_value=...",
        "",
    ),
    "paramwise_cfg": (
        None,
        "use optim_wrapper=dict(optimizer=dict(type='AdamW', ...), paramwise=dict(custom_keys=..., "
        "norm_decay_mult=0))",
        "",
    ),
    "constructor": (None, "build the optimizer yourself: use optim_wrapper=SGD(groups)", ""),
    "loss_scale": ("amp", "use plugins=[dict(type='amp', dtype='float16', init_scale=...)]", ""),
    "dtype": ("amp", "use plugins=[dict(type='amp', dtype='float16')]", ""),
    "fp16": ("amp", "use plugins=['amp'], which also applies to validation", ""),
    "optimizer": (None, "use optim_wrapper=dict(optimizer=...), or pass the optimizer itself", ""),
    "EMAHook": ("ema", "use plugins=[dict(type='ema', momentum=0.0002)]", ""),
    "CheckpointHook": ("checkpoint", "use plugins=[dict(type='checkpoint', ...)]", ""),
    "LoggerHook": ("logging", "use plugins=[dict(type='logging', interval=...)]", ""),
    "ParamSchedulerHook": ("schedule", "use plugins=[dict(type='schedule', scheduler=...)]", ""),
    "priority": (None, "set after = ('other',) or before = ('other',) on the class", ""),
    "EarlyStoppingHook": (
        "early_stop",
        "use plugins=[dict(type='early_stop', metric=..., patience=...)]",
        "",
    ),
    "monitor": (None, "use the option metric", ""),
    "compile": ("compile", "use plugins=['compile'] or dict(type='compile', mode=...)", ""),
    "dynamic_intervals": (None, "write a plugin that calls runner.val() when you need it", ""),
    "InfiniteSampler": (
        None,
        "use shuffle=True: with train_cfg=dict(max_iters=...), the dataloader restarts by itself",
        "",
    ),
    "pseudo_collate": (
        None,
        "pass your own collate_fn, a function that takes a list of samples",
        "",
    ),
    "before_epoch": (None, "use before_train_epoch, before_val_epoch or before_test_epoch", ""),
    "after_epoch": (None, "use after_train_epoch, after_val_epoch or after_test_epoch", ""),
    "before_iter": (None, "use before_train_iter, before_val_iter or before_test_iter", ""),
    "after_iter": (None, "use after_train_iter, after_val_iter or after_test_iter", ""),
    "runner.epoch": (None, "use runner.progress.epoch", ""),
    "runner.iter": (None, "use runner.progress.iter", ""),
    "runner.max_epochs": (None, "use runner.progress.max_epochs", ""),
    "runner.max_iters": (None, "use runner.progress.max_iters", ""),
    "runner.train_dataloader": (None, "use runner.train_loop.dataloader", ""),
    "runner.val_dataloader": (None, "use runner.val_loop.dataloader", ""),
    "runner.visualizer": (None, "use runner.log(dict(loss=0.5, samples=image))", ""),
    "runner.message_hub": (None, "use runner.log(dict(name=value))", ""),
    "runner.register_hook": (None, "use runner.plugins.add(plugin)", ""),
    "runner.call_hook": (None, "use runner.hooks.EVENT(runner, ...)", ""),
    "runner.from_cfg": (None, "use Runner(**cfg)", ""),
    "runner.save_checkpoint": (
        "checkpoint",
        "the plugin 'checkpoint' saves for you",
        "call torch.save(runner.state_dict(), path)",
    ),
    "runner.load_checkpoint": (
        "checkpoint",
        "use Runner(load_from=path)",
        "call hookengine.model.load_weights(runner.bare_model, path)",
    ),
}


def drop_neutral(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``arguments`` without those of MMEngine that have no effect."""
    neutral = (None, False, "none")
    return {
        name: value
        for name, value in arguments.items()
        if name != "default_scope"
        and not (name in REPLACEMENTS and any(value is n or value == n for n in neutral))
    }


def answer(name: str) -> str | None:
    """Return a sentence that says what replaces MMEngine's ``name``, or None if it is unknown."""
    if name not in REPLACEMENTS:
        return None
    plugin, text, without = REPLACEMENTS[name]
    if plugin is not None and plugin not in PLUGINS:
        text += f" (this installation has no plugin {plugin!r}"
        text += f"; without it, {without})" if without else ")"
    return f"{name!r} comes from MMEngine. In hookengine, {text}"


def translate_loop(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Translate the ``type`` of an MMEngine loop in ``train_cfg``, ``val_cfg`` or ``test_cfg``."""
    kept = {key: value for key, value in cfg.items() if key != "type"}
    match cfg.get("type"):
        case "EpochBasedTrainLoop" | "IterBasedTrainLoop" as loop:
            return {"by_epoch": loop == "EpochBasedTrainLoop", **kept}
        case "ValLoop" | "TestLoop":
            return kept
    return dict(cfg)


def translate_dataloader(options: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Translate the arguments of an MMEngine dataloader to those of torch's DataLoader.

    Args:
        options: The arguments in the MMEngine configuration.
        where: The name of the dataloader, for messages.

    Raises:
        ValueError: A sampler or collate function has no counterpart.
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
            text = answer(str(value["type"])) or "Pass the object itself"
            raise ValueError(f"{where}: cannot build {name}={dict(value)!r}. {text}")
    return translated

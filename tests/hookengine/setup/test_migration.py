"""Tests of ``hookengine/setup/migration.py``."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from hookengine import Plugin
from tests.fixtures import MakeData, MakeRunner


def test_what_mmengines_users_pass_is_answered(make: MakeRunner) -> None:
    for name in ("param_scheduler", "default_hooks", "custom_hooks", "launcher", "cfg"):
        with pytest.raises(TypeError, match=rf"'{name}' comes from MMEngine. In hookengine, "):
            make(**{name: {"type": "x"}})  # type: ignore[arg-type]
    for name in ("epoch", "max_iters", "message_hub", "register_hook", "save_checkpoint"):
        with pytest.raises(
            AttributeError, match=rf"the Runner has no '{name}': .* In hookengine, "
        ):
            getattr(make(), name)
    options: Any
    for options, answer in [
        (
            dict(type="AmpOptimWrapper"),
            "'AmpOptimWrapper' comes from MMEngine. In hookengine, use plugins=['amp']",
        ),
        (dict(accumulative_counts=4), "dict(type='accumulate', steps=...)"),
        (dict(clip_grad=dict(max_norm=1)), "dict(type='clip', max_norm=1.0)"),
    ]:
        with pytest.raises((TypeError, ValueError), match=re.escape(answer)):
            make(optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.1), **options))
    with pytest.raises(ValueError, match=r"'fp16' comes from MMEngine"):
        make(validate=True, val_cfg=dict(fp16=True))


def test_other_frequent_slips_are_answered(make: MakeRunner) -> None:
    with pytest.raises(TypeError, match=r"Runner: 'optimizer' .*optim_wrapper=dict\(optimizer="):
        make(optimizer=dict(type="SGD", lr=0.1))
    with pytest.raises(ValueError, match=r"optim_wrapper: 'OptimWrapperDict' comes from MMEngine"):
        make(optim_wrapper=dict(type="OptimWrapperDict", a=dict(optimizer=dict(type="SGD"))))
    with pytest.raises(KeyError, match=r"unknown plugin 'LoggerHook'.*dict\(type='logging'"):
        make(plugins=[dict(type="LoggerHook")])

    class Hook(Plugin):
        priority = "LOW"

        def before_run(self) -> None: ...

    with pytest.warns(UserWarning, match="'priority' comes from MMEngine"):
        make(plugins=[Hook()])


def test_an_answer_says_whether_the_plugin_is_here(make: MakeRunner) -> None:
    from hookengine import PLUGINS
    from hookengine.setup.migration import REPLACEMENTS, answer

    for name, (plugin, _, _) in REPLACEMENTS.items():
        text = answer(name)
        assert text is not None
        assert ("no plugin" in text) == (plugin is not None and plugin not in PLUGINS)
    assert answer("anything") is None


def test_what_mmengines_configurations_carry_along_does_no_harm(
    make: MakeRunner, data: MakeData
) -> None:
    class Dataset(torch.utils.data.Dataset[Any]):
        def __init__(self, n: int) -> None:
            self.pairs = data(n)

        def __len__(self) -> int:
            return len(self.pairs)

        def __getitem__(self, index: int) -> Any:
            return self.pairs[index]

    runner = make(
        train_cfg=dict(type="IterBasedTrainLoop", max_iters=3),
        train_dataloader=dict(
            batch_size=4,
            dataset=dict(type=Dataset, n=12),
            sampler=dict(type="DefaultSampler", shuffle=True),
            collate_fn=dict(type="default_collate"),
        ),
        val_cfg=dict(type="ValLoop"),
        validate=True,
        launcher="none",
        load_from=None,
        resume=False,
        visualizer=None,
        default_scope="mmengine",
    )
    assert set(runner.train()) == {"accuracy"}
    assert isinstance(runner.train_loop.dataloader.sampler, torch.utils.data.RandomSampler)
    with pytest.raises(
        ValueError,
        match=r"sampler=.*'InfiniteSampler' comes from MMEngine. In hookengine, use shuffle",
    ):
        make(train_dataloader=dict(dataset=data(), sampler=dict(type="InfiniteSampler")))

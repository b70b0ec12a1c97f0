"""Tests of ``hookengine/loop/progress.py``."""

from __future__ import annotations

from typing import Any

from hookengine import Plugin
from tests.fixtures import MakeRunner


def test_is_last_tells_the_last_batch_of_an_epoch_and_of_the_run(make: MakeRunner) -> None:
    class Watch(Plugin):
        def __post_init__(self) -> None:
            self.before_: list[int] = []
            self.after_: list[int] = []

        def before_train_iter(self, runner: Any) -> None:
            if runner.progress.is_last:
                self.before_.append(runner.progress.iter + 1)

        def after_train_iter(self, runner: Any) -> None:
            if runner.progress.is_last:
                self.after_.append(runner.progress.iter)

    for cfg, expected in ((dict(max_epochs=2), [5, 10]), (dict(max_iters=7), [5, 7])):
        watch = Watch()
        make(train_cfg=cfg, plugins=[watch]).train()
        assert watch.before_ == watch.after_ == expected

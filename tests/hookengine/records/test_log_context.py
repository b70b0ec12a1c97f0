"""Tests of ``hookengine/records/log_context.py``."""

from __future__ import annotations

import sys
from typing import Any

from hookengine import Plugin, log_context
from hookengine.records.log_context import running
from tests.fixtures import MakeRunner


class Speaks(Plugin):
    def before_train_iter(self, runner: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.helper(runner)

    def helper(self, runner: Any) -> None:
        self.line = log_context(runner)(None, "info", {"event": "said"})


def test_a_line_knows_run_epoch_iteration_and_plugin(make: MakeRunner) -> None:
    runner = make(plugins=[speaks := Speaks()], name="spoken")
    runner.train()
    assert speaks.line == {
        "event": "said",
        "run": "spoken",
        "epoch": 1,
        "iteration": 5,  # of the last epoch's first batch
        "plugin": "speaks",
    }


def test_a_function_is_a_plugin_and_the_users_own_code_is_none(make: MakeRunner) -> None:
    runner = make()
    lines: list[Any] = []

    @runner.on("before_run")
    def greet(runner: Any) -> None:
        lines.append(log_context(runner)(None, "info", {}))

    runner.train()
    assert lines[0]["plugin"] == "before_run:greet"
    assert "plugin" not in log_context(runner)(None, "info", {})


def test_what_a_line_was_bound_with_stays(make: MakeRunner) -> None:
    bound = {"run": "other", "plugin": "mine", "iteration": 7}
    line: Any = log_context(make())(None, "info", dict(bound))
    assert {name: line[name] for name in bound} == bound


def test_of_two_plugins_of_one_class_the_one_that_runs_is_named() -> None:
    first, second = Speaks(), Speaks()
    plugins = [("first", first), ("second", second)]

    def within(self: Speaks) -> str | None:
        return running(plugins, sys._getframe(0))

    assert within(second) == "second"
    assert within(first) == "first"
    assert running(plugins, sys._getframe(0)) is None

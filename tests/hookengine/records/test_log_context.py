"""Tests of ``hookengine/records/log_context.py``."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from hookengine import Plugin, Sink, log_context
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


def test_the_text_of_a_line_holds_its_values(
    make: MakeRunner, caplog: pytest.LogCaptureFixture
) -> None:
    runner = make()
    runner.logger.warning("it failed", error="OSError: no disk", iteration=3, run_log="longer")
    (record,) = caplog.records
    assert record.getMessage() == "it failed  error=OSError: no disk"
    runner.logger.warning("100 % of", share="5 %s")
    assert caplog.records[-1].getMessage() == "100 % of  share=5 %s"


def test_a_failed_job_of_a_sink_says_why_without_any_other_plugin(
    make: MakeRunner, caplog: pytest.LogCaptureFixture
) -> None:
    class Working(Sink):
        def write(self) -> None: ...

        def after_train(self) -> None:  # type: ignore[override]
            self.enqueue(lambda: (1 / 0, None)[1])
            self.enqueue(lambda: (1 / 0, None)[1])

    with make(plugins=[Working()]) as runner:
        runner.train()
    assert "'working' failed in a job; training continues  error=ZeroDivision" in caplog.text
    assert "failed 2 times, but lost no records" in caplog.text
    assert "lost records:" not in caplog.text

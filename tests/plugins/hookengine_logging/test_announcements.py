"""What the log says at the start of a run, when it fails, and at its end."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hookengine_logging.replacements import replacements

from hookengine import Plugin
from tests.fixtures import MakeRunner
from tests.plugins.hookengine_logging.runs import logging_runner, written


class Silent(Plugin):
    """Do nothing in an event."""

    def after_train_iter(self) -> None: ...


def test_the_run_is_announced(
    make: MakeRunner, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOOKENGINE_DISABLE", "blocked")

    class Blocked(Silent, name="blocked"): ...

    runner = logging_runner(make, plugins=[Silent(), Blocked()], name="mine", validate=True)
    assert not runner.run_dir.exists()  # building a Runner creates no files
    runner.train()
    assert runner.run_dir.name == "mine"
    run = json.loads((runner.run_dir / "run.json").read_text())
    assert run["name"] == "mine"
    assert torch.__version__.startswith(run["environment"]["packages"]["torch"])
    plugins = {plugin["name"]: plugin for plugin in run["plugins"]}
    assert plugins["logging"]["options"] == {
        "interval": 2,
        "level": "INFO",
        "levels": {},
        "nonfinite": "stop",
        "renderer": "console",
    }
    assert plugins["logging"]["source"].startswith("hookengine ")
    assert run["hooks"]["after_train_iter"] == [
        {"plugin": "silent", "reason": "given order"},
        {"plugin": "logging", "reason": "after all others"},
    ]
    assert (run["model"], run["parameters"]) == ("Toy", 15)
    assert run["train_cfg"]["max_epochs"] == 2
    assert run["val_cfg"] == {"loss": False}
    assert run["optimizers"]["optimizer"]["type"] == "SGD"
    out = capsys.readouterr().out
    assert "run mine: files in" in out
    assert "plugins logging, silent (blocked: blocked)" in out


def test_an_error_and_the_unfinished_interval_are_written(make: MakeRunner) -> None:
    class Broken(Plugin):
        def before_train_iter(self, runner: Any) -> None:
            if runner.progress.iter == 3:
                raise LookupError("no")

    runner = logging_runner(make, plugins=[Broken()])
    with pytest.raises(LookupError):
        runner.train()
    assert [r["iter"] for r in written(runner)] == [2, 3]
    log = (runner.run_dir / "run.log").read_text()
    assert "ERROR run ends with LookupError: no (raised by plugin 'broken'" in log


def test_plugins_that_replace_a_value_are_named_in_order(make: MakeRunner) -> None:
    class Auxiliary(Plugin):
        def after_forward(self, losses: Any) -> Any:
            return {**losses, "loss_aux": losses["loss"] * 0}

    class Halved(Plugin):
        def after_forward(self, losses: Any) -> Any:
            if not losses:
                return None
            return {name: value / 2 for name, value in losses.items()}

    class Looks(Plugin):
        def after_forward(self, losses: Any) -> Any:
            if losses:
                return
            return None

    runner = logging_runner(make, plugins=[Halved(), Looks(), Auxiliary()])
    assert replacements(runner.plugins) == {"after_forward": ["halved", "auxiliary"]}
    runner.train()
    text = (runner.run_dir / "run.log").read_text()
    assert "after_forward: halved, then auxiliary replace the losses" in text
    assert "loss_aux" in written(runner)[0]


def test_values_without_a_record_are_named_at_the_end(
    make: MakeRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    runner = logging_runner(make, validate=True)
    runner.on("after_val")(lambda runner: runner.log({"late": 1.0, "note": "x"}))
    runner.train()
    runner.close()
    out = capsys.readouterr().out
    assert "logged after the last train record, and so not recorded: late, note" in out


def test_the_traceback_is_in_the_runs_log(
    make: MakeRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    runner = logging_runner(make)

    @runner.on("after_train_iter")
    def fail(runner: Any) -> None:
        if runner.progress.iter == 4:
            raise ZeroDivisionError("boom")

    with pytest.raises(ZeroDivisionError):
        runner.train()
    log = (runner.run_dir / "run.log").read_text()
    assert log.index("iter 4/10") < log.index("ERROR run ends with ZeroDivisionError: boom")
    assert 'raise ZeroDivisionError("boom")' in log
    assert "Traceback" not in capsys.readouterr().out

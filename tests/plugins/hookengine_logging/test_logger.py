"""The levels of the log, for all plugins and for individual ones."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest

from hookengine import Plugin
from tests.fixtures import MakeRunner
from tests.plugins.hookengine_logging.runs import LOGGING


def test_the_level_holds_for_console_and_file(
    make: MakeRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    runner = make(defaults=LOGGING, plugins=[dict(type="logging", level="WARNING")])
    runner.logger.info("quiet")
    runner.logger.warning("loud", key=3)
    out = capsys.readouterr().out
    assert "quiet" not in out
    assert "WARNING loud  key=3" in out


class Loud(Plugin):
    """Log a line at every level."""

    def before_train(self, runner: Any) -> None:
        for level in ("debug", "info", "warning", "error"):
            getattr(runner.logger, level)(f"loud {level}")


class Other(Plugin):
    """Log the same lines."""

    def before_train(self, runner: Any) -> None:
        for level in ("debug", "info", "warning", "error"):
            getattr(runner.logger, level)(f"other {level}")


@pytest.mark.parametrize(
    ("own", "heard"),
    [
        ("DEBUG", ["debug", "info", "warning", "error"]),
        ("WARNING", ["warning", "error"]),
        ("ERROR", ["error"]),
    ],
)
def test_a_plugin_may_have_its_own_level(
    make: MakeRunner, capsys: pytest.CaptureFixture[str], own: str, heard: list[str]
) -> None:
    runner = make(plugins=[dict(type="logging", levels={"loud": own}), Loud(), Other()])
    runner.train()
    for text in (capsys.readouterr().out, (runner.run_dir / "run.log").read_text()):
        assert re.findall(r"loud (\w+)", text) == heard
        assert re.findall(r"other (\w+)", text) == ["info", "warning", "error"]


def test_a_level_for_an_unknown_plugin_is_an_error_with_a_hint(
    make: MakeRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    before = warnings.showwarning
    match = r"'chekpoint', which is not a plugin\. Did you mean.*check"
    with pytest.raises(ValueError, match=match) as error:
        make(plugins=[dict(type="logging", levels={"chekpoint": "DEBUG"})])
    assert len(error.value.__notes__) == 1, "closing the Runner adds no error of its own"
    assert warnings.showwarning == before
    with pytest.raises(TypeError, match=r"levels\.clip='loud'"):
        make(plugins=[dict(type="logging", levels={"clip": "loud"})])
    make(
        plugins=[dict(type="logging", levels={"checkpoint": "DEBUG"})]
    )  # installed, but not in use
    assert warnings.showwarning != before  # the last Runner captures them
    assert capsys.readouterr().out == ""

"""Tests of ``hookengine/records/recording.py``."""

from __future__ import annotations

from typing import Any

import pytest

from hookengine import Plugin, Sink, missing_records
from tests.fixtures import MakeRunner


class Recording(Plugin):
    def log(self, values: Any) -> None: ...


class Receiving(Sink):
    def write(self) -> None: ...


def test_whoever_implements_log_makes_records(make: MakeRunner) -> None:
    assert missing_records(make(plugins=["logging"])) == ""
    assert missing_records(make(plugins=[Recording()])) == ""
    text = missing_records(make(defaults=("logging",), plugins=["no:logging"]))
    assert text.endswith("(event 'log'), so they go nowhere. Enable 'logging'")


def test_a_sink_says_once_before_training_that_nothing_makes_records(
    make: MakeRunner, caplog: pytest.LogCaptureFixture
) -> None:
    runner = make(plugins=[Receiving()])
    said: list[int] = []
    runner.on("before_train")(lambda: said.append(caplog.text.count("Enable 'logging'")))
    runner.train()
    runner.train(max_epochs=3)
    assert said == [1, 1]
    assert "sink 'receiving': no enabled plugin makes records" in caplog.text
    caplog.clear()
    make(plugins=[Receiving(), Recording()]).train()
    assert caplog.text == ""

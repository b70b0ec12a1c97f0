"""``run.json`` says how a run ended."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.fixtures import MakeRunner
from tests.plugins.hookengine_logging.runs import logging_runner


def run_json(runner: Any) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads((runner.run_dir / "run.json").read_text())
    return fields


def test_run_json_says_how_the_run_ended(make: MakeRunner) -> None:
    seen = []
    runner = logging_runner(make)
    runner.on("after_train_iter")(lambda runner: seen.append(run_json(runner)))
    runner.train()
    assert {fields["status"] for fields in seen} == {"running"}
    assert "ended" not in seen[0]
    fields = run_json(runner)
    assert fields["status"] == "finished"
    assert fields["ended"] >= fields["started"]

    @runner.on("after_train_iter")
    def stop(runner: Any) -> None:
        runner.stop("it's enough")

    runner.train(max_epochs=3)
    assert run_json(runner)["status"] == "stopped: it's enough"

    @runner.on("after_train_iter")  # type: ignore[no-redef]
    def stop(runner: Any) -> None:  # noqa: F811  (it replaces the other one)
        assert run_json(runner)["status"] == "running"
        raise LookupError("no \ud800")

    with pytest.raises(LookupError):
        runner.train(max_epochs=4)
    assert run_json(runner)["status"] == "failed: LookupError: no \ud800"
    assert run_json(runner)["started"] == fields["started"]

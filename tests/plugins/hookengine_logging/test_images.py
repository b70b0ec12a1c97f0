"""The images of records in the folder ``media``."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.fixtures import MakeRunner
from tests.plugins.hookengine_logging.runs import logging_runner, written


def test_images_that_cannot_be_saved_are_reported_once(
    make: MakeRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    runner = logging_runner(make, name="run")
    runner.run_dir.mkdir(parents=True)
    (runner.run_dir / "media").write_text("in the way")
    kept: list[Any] = []
    runner.on("write")(lambda record: kept.append(dict(record.media)))
    values = {"image": torch.zeros(2, 2), "other": torch.zeros(2, 2), "text": "x"}
    runner.on("after_train_iter")(lambda runner: runner.log(values))
    runner.train()
    assert runner.progress.iter == 10
    assert capsys.readouterr().out.count("WARNING cannot write") == 1
    assert all(record["media"] == {"text": {"text": "x"}} for record in written(runner))
    assert all({*media} == {"image", "other", "text"} for media in kept)  # sinks get all of them


def test_names_never_share_an_image_file(make: MakeRunner) -> None:
    runner = logging_runner(make, train_cfg=dict(max_iters=2))
    names = ["a/b", "a_b", "é" * 100, "e" * 100, "../../up", "."]
    values = {name: torch.full((1, 2), i / 255) for i, name in enumerate(names)}
    runner.on("after_train_iter")(lambda runner: runner.log(values))
    runner.train()
    (record,) = written(runner)
    paths = [record["media"][name]["image"] for name in names]
    assert len(set(paths)) == len(names)
    for path in paths:
        assert (runner.run_dir / path).resolve().parent == runner.run_dir / "media"

"""How records hold values of every kind."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import pytest
import torch

from tests.fixtures import MakeRunner, Toy
from tests.plugins.hookengine_logging.runs import logging_runner, written


def test_values_passed_to_runner_log_join_the_next_record(make: MakeRunner) -> None:
    runner = logging_runner(make, validate=True)

    @runner.on("after_train_iter")
    def note(runner: Any) -> None:
        kept = torch.tensor(float(runner.progress.iter), requires_grad=True) * 2
        runner.log({"double": kept, "count": 1, "text": "x", "image": torch.zeros(2, 2)})

    @runner.on("after_val_iter")
    def note_val(runner: Any) -> None:
        runner.log({"seen": 1.0}, phase="val")

    media = []
    runner.on("write")(lambda record: media.append(dict(record.media)))
    runner.train()
    first = written(runner, "train")[0]
    assert first["double"] == 3.0
    assert first["count"] == 1.0
    assert "text" not in first
    assert media[0]["text"] == "x"
    assert media[0]["image"].png.startswith(b"\x89PNG")
    assert first["media"]["text"] == {"text": "x"}
    assert (runner.run_dir / first["media"]["image"]["image"]).read_bytes() == media[0]["image"].png
    assert written(runner, "val")[0]["seen"] == 1.0


def test_values_of_every_kind_are_recorded(
    make: MakeRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    runner = logging_runner(make, train_cfg=dict(max_iters=2))
    values = {
        "nan": float("nan"),
        "inf": torch.tensor(float("inf")),
        "huge": 10**400,
        "numpy": np.float32(0.5),
        "array": np.array([0.1, 0.2]),
        "one": torch.ones(1),
        "epoch": 99.5,
        "lr": 7.0,
    }
    runner.on("after_train_iter")(lambda runner: runner.log(values))
    runner.train()
    (record,) = written(runner)
    assert (record["nan"], record["inf"]) == ("nan", "inf")
    assert (record["numpy"], record["one"], record["lr"]) == (0.5, 1.0, 7.0)
    assert (record["epoch"], record["value/epoch"]) == (1, 99.5)
    assert record["huge"] == "inf"
    assert sum(record["media"]["array"]["histogram"]["counts"]) == 2
    with pytest.raises(ValueError, match="phase must be"):
        runner.log(values, phase="eval")


def test_names_and_values_of_every_kind(
    make: MakeRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    runner = logging_runner(make, train_cfg=dict(max_iters=4))
    values: dict[Any, Any] = {
        "a\nb\x00c\x1b[31m": 1.0,
        "\ud800": 2.0,
        "": 3.0,
        7: 4.0,
        ("x", 1): 5.0,
        "é\u2028": 6.0,
        "huge": -(10**400),
        "whole": torch.tensor(2**24 + 1),
        "true": torch.tensor(True),
        "one": np.ones(1),
        "half": torch.tensor(0.5, dtype=torch.bfloat16),
        "none": None,
        "list": [1, 2],
        "complex": torch.tensor(1 + 2j),
        "sparse": torch.eye(3).to_sparse(),
        "wrong": torch.zeros(5, 5, 5),
        "no values": torch.zeros(0),
        "of\nlines": object(),
        "text": "\ud800 \x1b",
    }
    runner.on("after_train_iter")(lambda runner: runner.log(values))
    runner.train()
    for record in written(runner):
        assert record["a_b_c_[31m"] == 1.0
        assert (record["_"], record["7"], record["('x', 1)"]) in [(2.0, 4.0, 5.0), (3.0, 4.0, 5.0)]
        assert record["é_"] == 6.0
        assert (record["huge"], record["whole"], record["true"]) == ("-inf", 2**24 + 1, 1.0)
        assert (record["one"], record["half"]) == (1.0, 0.5)
        assert record["media"] == {"text": {"text": "\ud800 \x1b"}}
    out = capsys.readouterr().out
    rejected = ("none", "list", "complex", "sparse", "wrong", "no values", "of\nlines")
    for name in rejected:
        assert out.count(f"WARNING {name!r} (") == 1, name
    assert out.count("is left out of the records") == len(rejected)
    assert "\x1b" not in out
    assert "\x00" not in out


def test_outputs_that_are_not_numbers_are_neither_kept_nor_losses(
    make: MakeRunner,
) -> None:
    images: list[Any] = []

    class Shows(Toy):
        def train_step(self, data: Any, optim_wrapper: Any) -> Any:
            outputs = super().train_step(data, optim_wrapper)
            image = torch.zeros(4, 4)
            images.append(weakref.ref(image))
            broken = torch.tensor(float("nan") if len(images) == 7 else 1.0)
            return {**outputs, "loss_map": image, "loss_kind": "focal", "loss_b": broken}

    alive = []
    runner = logging_runner(make, model=Shows(), interval=50)
    runner.on("after_train_iter")(lambda: alive.append(sum(i() is not None for i in images)))
    with pytest.raises(FloatingPointError, match="iteration 7, epoch 2: loss_b nan"):
        runner.train()
    assert max(alive) <= 2

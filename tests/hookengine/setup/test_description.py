"""Tests of ``hookengine/setup/description.py``."""

from __future__ import annotations

import json
from typing import Any

import torch

from hookengine.setup.description import describe_run, describe_state
from tests.fixtures import MakeRunner, Toy


def test_a_run_is_described_as_json_holds_it(make: MakeRunner) -> None:
    runner = make(validate=True, plugins=[dict(type="clip", max_norm=2.0)], name="described")
    described = json.loads(json.dumps(describe_run(runner)))
    assert described["name"] == "described"
    assert (described["model"], described["parameters"]) == ("Toy", 15)
    assert described["optimizers"]["optimizer"]["type"] == "SGD"
    assert described["optimizers"]["optimizer"]["lr"] == 0.1
    assert described["train_cfg"]["max_epochs"] == 2
    assert "test_cfg" not in described
    (clip,) = described["plugins"]
    assert clip["name"] == "clip"
    assert clip["source"].startswith("hookengine ")
    assert clip["options"]["max_norm"] == 2.0
    (place,) = described["hooks"]["before_optim_step"]
    assert place == {"plugin": "clip", "reason": "trylast"}
    assert described["world_size"] == 1
    assert described["environment"]["packages"]["torch"] == torch.__version__.partition("+")[0]


def test_options_that_differ_between_groups_stand_apart(make: MakeRunner, toy: type[Toy]) -> None:
    model = toy()
    groups: list[dict[str, Any]] = [
        dict(params=[model.net.weight], lr=0.5),
        dict(params=[model.net.bias]),
    ]
    runner = make(model=model, optim_wrapper=torch.optim.SGD(groups, lr=0.1))
    described = describe_run(runner)["optimizers"]["optimizer"]
    assert [group["lr"] for group in described["groups"]] == [0.5, 0.1]
    assert "lr" not in described
    assert described["momentum"] == 0


def test_a_state_says_what_it_belongs_to(make: MakeRunner) -> None:
    meta = describe_state(make(validate=True))
    assert meta["model"] == "Toy"
    described = meta["optimizers"]["optimizer"]
    assert described["type"] == "SGD"
    assert described["parameters"] == [["net.weight", "net.bias"]]
    assert [given["lr"] for given in described["given"]] == [0.1]
    assert meta["dataset"] == {
        "train": {"samples": 20, "batches": 5},
        "val": {"samples": 10, "batches": 3},
    }
    assert (meta["plugins"], meta["world_size"]) == ([], 1)


def test_without_training_there_are_no_optimizers(make: MakeRunner) -> None:
    runner = make(validate=True, train_dataloader=None, train_cfg=None, optim_wrapper=None)
    assert describe_run(runner)["optimizers"] == {}
    assert describe_state(runner)["optimizers"] == {}

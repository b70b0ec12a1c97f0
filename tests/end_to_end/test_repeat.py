"""A plugin that repeats each step with unchanged weights leaves a run as it is, in every part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from hookengine import BaseModel, Plugin, Runner, hookimpl
from tests.fixtures import ToyAccuracy, toy_data


class Net(BaseModel):
    """A deterministic classifier in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()

    def forward(self, inputs: Tensor, labels: Tensor, mode: str = "tensor") -> Any:
        scores = self.net(inputs.double())
        if mode == "loss":
            return {"loss": F.cross_entropy(scores, labels)}
        return (scores, labels) if mode == "predict" else scores


class Again(Plugin, name="again"):
    """Repeats each step once."""

    before = ("clip",)

    def before_train(self) -> None:
        self.window: list[Any] = []

    @hookimpl(trylast=True)
    def before_train_iter(self, data_batch: Any) -> None:
        self.window.append(data_batch)

    def before_optim_step(self, runner: Any) -> None:
        runner.repeat(*self.window)
        self.window.clear()


SCHEDULE = dict(type="schedule", scheduler="CosineAnnealingLR", by_epoch=False, warmup=3)
CASES: dict[str, list[Any]] = {
    "clip": [dict(type="clip", max_norm=0.1)],
    "ema": [dict(type="ema", momentum=0.1, evaluate="both")],
    "swa": [dict(type="swa", begin=1, lr=0.05)],
    "schedule": [SCHEDULE],
    "watch": [dict(type="watch", what="all", every=2)],
    "checkpoint": [dict(type="checkpoint", every="2 iterations", keep_last=1)],
    "early_stop": [dict(type="early_stop", metric="accuracy", patience=1)],
    "seed": [dict(type="seed", seed=3)],
    "amp": ["amp"],
    "amp, float16": [dict(type="amp", dtype="float16", growth_interval=2)],
    "accumulate": [dict(type="accumulate", steps=3)],
    "everything": [
        dict(type="accumulate", steps=2),
        dict(type="amp", dtype="float16", growth_interval=2),
        dict(type="clip", max_norm=0.1),
        dict(type="ema", momentum=0.1),
        SCHEDULE,
        dict(type="watch", what="all", every=2),
    ],
    "compile": [dict(type="compile", backend="eager")],
}


def train(folder: Path, plugins: list[Any], *again: Plugin) -> tuple[dict[str, Any], list[Any]]:
    """The state that a run ends with, and its records without times."""
    torch.manual_seed(0)
    logging = dict(type="logging", interval=2, level="ERROR")
    if not any(isinstance(p, dict) and p["type"] == "checkpoint" for p in plugins):
        plugins = [*plugins, "no:checkpoint"]
    with Runner(
        Net(),
        folder,
        name="run",
        train_dataloader=DataLoader(toy_data(22), batch_size=3, shuffle=True),
        train_cfg=dict(max_epochs=3),
        val_dataloader=DataLoader(toy_data(10, seed=1), batch_size=4),
        val_evaluator=ToyAccuracy(),
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.2, momentum=0.9)),
        plugins=["no:progress_bar", logging, *plugins, *again],
        device="cpu",
    ) as runner:
        runner.train()
        state = runner.state_dict()
    times = {"time", "data_time", "samples_per_second", "memory", "eta", "seconds", "timestamp"}
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    for record in records:
        record.pop("history", None)
    return state, [{k: v for k, v in r.items() if k not in times} for r in records]


def is_same(one: Any, other: Any) -> bool:
    if isinstance(other, Tensor):
        return torch.equal(one, other)
    if isinstance(other, dict):
        return one.keys() == other.keys() and all(is_same(one[k], other[k]) for k in other)
    if isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(is_same, one, other))
    return bool(one == other)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.process] if n == "compile" else []) for n in CASES],
)
def test_a_repeat_with_unchanged_weights_changes_no_weight_counter_or_record(
    name: str, tmp_path: Path
) -> None:
    state, records = train(tmp_path / "again", CASES[name], Again())
    expected, expected_records = train(tmp_path / "plain", CASES[name])
    for part in ("state_dict", "optimizer", "progress"):
        assert is_same(state[part], expected[part])
    for plugin in expected["plugins"].keys() - {"logging", "checkpoint"}:
        assert is_same(state["plugins"][plugin], expected["plugins"][plugin]), plugin
    assert len(records) == len(expected_records)
    for record, one in zip(records, expected_records, strict=True):
        assert record == one


def test_a_model_with_dropout_and_batch_norm_is_trained_with_other_numbers(tmp_path: Path) -> None:
    """What the docstring of ``Runner.repeat`` says: it draws again, and sees the batch again."""

    class Random(Net):
        def __init__(self) -> None:
            super().__init__()
            self.net.insert(1, nn.BatchNorm1d(8).double())
            self.net.insert(2, nn.Dropout(0.5))

    counts = []
    for again in ([Again()], []):
        torch.manual_seed(0)
        model = Random()
        with Runner(
            model,
            tmp_path,
            train_dataloader=DataLoader(TensorDataset(*toy_data(8).tensors), batch_size=4),
            train_cfg=dict(max_epochs=1),
            optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.1)),
            plugins=again,
            defaults=("preprocess",),
        ) as runner:
            runner.train()
        counts.append(int(model.net[1].num_batches_tracked))  # type: ignore[arg-type]
    assert counts == [4, 2]

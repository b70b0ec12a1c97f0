"""Looking at a run does not change it: the weights stay bit-identical."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from hookengine import BaseModel, Plugin, Record, Sink
from tests.fixtures import MakeData, MakeRunner


class Dropping(BaseModel):
    """Dropout and batch norm: whatever touches the random state or the statistics shows."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(4, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 3)
        )

    def forward(self, inputs: Tensor, labels: Tensor, mode: str) -> Any:
        scores = self.net(inputs)
        return {"loss": F.cross_entropy(scores, labels)} if mode == "loss" else (scores, labels)


class Watching(Plugin):
    """Looks at everything and reads values."""

    def after_train_iter(self, runner: Any, outputs: Any) -> None:
        runner.log({"again": outputs["loss"], "norm": outputs["loss"].norm()})
        outputs["loss"].item()

    def after_val_iter(self, outputs: Any) -> None:
        torch.rand(3)
        outputs[0].sum().item()


class Listening(Sink):
    """Receives records."""

    def write(self, runner: Any, record: Record) -> None:
        dict(record.scalars)


def train(make: MakeRunner, data: Any, **options: Any) -> list[Tensor]:
    torch.manual_seed(0)
    dataset: TensorDataset = data(24)
    options.setdefault("train_cfg", dict(max_iters=18))
    loader = DataLoader(dataset, batch_size=4, shuffle=True)
    runner = make(model=Dropping(), train_dataloader=loader, **options)
    torch.manual_seed(7)
    runner.train()
    runner.close()
    return [*runner.bare_model.state_dict().values()]


LOGGING = dict(type="logging", interval=1)


@pytest.mark.parametrize(
    "options",
    [
        dict(validate=True, train_cfg=dict(max_iters=18, val_interval=1)),
        dict(validate=True, train_cfg=dict(max_iters=18, val_interval=5)),
        dict(validate=True, train_cfg=dict(max_epochs=3), val_cfg=dict(loss=True)),
        dict(defaults=("preprocess", "logging", "progress_bar")),
        dict(plugins=[LOGGING, Watching(), Listening()], validate=True),
        dict(test=True),
    ],
    ids=["val every 1", "val every 5", "val by epoch", "defaults", "observers", "test"],
)
def test_weights_are_bit_identical(make: MakeRunner, data: MakeData, options: Any) -> None:
    plain, watched = train(make, data), train(make, data, **options)
    for one, other in zip(plain, watched, strict=True):
        assert torch.equal(one, other)

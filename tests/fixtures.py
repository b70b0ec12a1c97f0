"""What the fixtures in conftest.py give to a test: a small model, small data, a bare Runner."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from hookengine import BaseMetric, BaseModel, Runner


class Toy(BaseModel):
    """A linear classifier of four features into three classes."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 3)

    def forward(self, inputs: Tensor, labels: Tensor, mode: str = "tensor") -> Any:
        scores = self.net(inputs)
        if mode == "loss":
            return {"loss": F.cross_entropy(scores, labels)}
        return (scores, labels) if mode == "predict" else scores


class ToyAccuracy(BaseMetric):
    """Share of right predictions."""

    def process(self, data_batch: Any, data_samples: Any) -> None:
        scores, labels = data_samples
        self.results.append(((scores.argmax(1) == labels).sum().item(), len(labels)))

    def compute_metrics(self, results: list[Any]) -> dict[str, Any]:
        return {"accuracy": sum(r[0] for r in results) / sum(r[1] for r in results)}


def toy_data(samples: int = 20, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(samples, 4, generator=generator)
    labels = torch.randint(3, (samples,), generator=generator)
    return TensorDataset(inputs, labels)


class ToyRunner(Runner):
    """A Runner into whose model a test reaches."""

    bare_model: Any


class MakeData(Protocol):
    """The fixture ``data``: ``toy_data``."""

    def __call__(self, samples: int = ..., seed: int = ...) -> TensorDataset: ...


class Install(Protocol):
    """The fixture ``install``: puts a distribution on the path, and returns its folder."""

    def __call__(
        self,
        source: str | None,
        points: str = ...,
        requires: tuple[str, ...] = ...,
        name: str = ...,
        group: str = ...,
        module: str = ...,
    ) -> Path: ...


class MakeRunner(Protocol):
    """The fixture ``make``: builds a Runner from what differs from a bare one over the toy."""

    def __call__(self, validate: bool = ..., test: bool = ..., **options: Any) -> ToyRunner: ...

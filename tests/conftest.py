"""What the tests share: a small model, small data, and a bare Runner over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from hookengine import BaseMetric, BaseModel, Runner


@pytest.fixture(autouse=True)
def quiet_and_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOOKENGINE_DISABLE", raising=False)
    torch.manual_seed(0)
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.accelerator.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no accelerator here"))


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


@pytest.fixture
def toy() -> type[Toy]:
    return Toy


@pytest.fixture
def accuracy() -> type[ToyAccuracy]:
    return ToyAccuracy


@pytest.fixture
def data() -> Callable[..., TensorDataset]:
    return toy_data


@pytest.fixture
def make(tmp_path: Any) -> Iterator[Callable[..., Runner]]:
    """Build Runners over the toy: bare, two epochs of five batches, unless told otherwise."""
    runners: list[Runner] = []

    def build(validate: bool = False, test: bool = False, **options: Any) -> Runner:
        torch.manual_seed(0)
        model = options.pop("model", None)
        model = Toy() if model is None else model
        options.setdefault("defaults", ())
        options.setdefault("train_dataloader", DataLoader(toy_data(), batch_size=4))
        options.setdefault("train_cfg", dict(max_epochs=2))
        options.setdefault("optim_wrapper", dict(optimizer=dict(type="SGD", lr=0.1)))
        options.setdefault("work_dir", tmp_path / "work_dir")
        for phase in ["val"] * validate + ["test"] * test:
            loader = DataLoader(toy_data(10, seed=1), batch_size=4)
            options.setdefault(f"{phase}_dataloader", loader)
            options.setdefault(f"{phase}_evaluator", ToyAccuracy())
        runner = Runner(model, **options)
        runners.append(runner)
        return runner

    yield build
    for runner in runners:
        runner.close()

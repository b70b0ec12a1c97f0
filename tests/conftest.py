"""What the tests share: the fixtures, whose types are in tests/fixtures.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from hookengine import Runner
from tests.fixtures import MakeData, MakeRunner, Toy, ToyAccuracy, ToyRunner, toy_data


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


@pytest.fixture
def toy() -> type[Toy]:
    return Toy


@pytest.fixture
def accuracy() -> type[ToyAccuracy]:
    return ToyAccuracy


@pytest.fixture
def data() -> MakeData:
    return toy_data


@pytest.fixture
def make(tmp_path: Path) -> Iterator[MakeRunner]:
    """Build Runners over the toy: bare, two epochs of five batches, unless told otherwise."""
    runners: list[Runner] = []

    def build(validate: bool = False, test: bool = False, **options: Any) -> ToyRunner:
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
        runner = ToyRunner(model, **options)
        runners.append(runner)
        return runner

    yield build
    for runner in runners:
        runner.close()

"""MixUp and CutMix are torchvision's, in training alone."""

from __future__ import annotations

from collections import UserDict
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hookengine_mixup import Mixup
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms import v2

from hookengine import Plugin
from tests.fixtures import MakeRunner


def images() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.rand(22, 1, 4, 4, generator=generator)
    return DataLoader(TensorDataset(inputs, torch.arange(22) % 3), batch_size=4)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 3))


class Batches(Plugin):
    """Keeps what the model gets."""

    after = ("mixup",)

    def before_train(self) -> None:
        self.seen: list[Any] = []

    def before_train_iter(self, data_batch: Any) -> None:
        self.seen.append(data_batch)

    def before_val_iter(self, data_batch: Any) -> None:
        assert data_batch[1].dtype == torch.int64


def run(make: MakeRunner, *plugins: Any, **options: Any) -> list[Any]:
    batches = Batches()
    make(
        model=net(),
        loss=F.cross_entropy,
        train_dataloader=images(),
        train_cfg=dict(max_epochs=1),
        val_dataloader=images(),
        val_cfg=dict(loss=True),
        plugins=[*plugins, batches],
        **options,
    ).train()
    return batches.seen


@pytest.mark.parametrize(
    ("options", "transform"),
    [
        (dict(mixup=0.4), lambda: v2.MixUp(alpha=0.4, num_classes=3)),
        (dict(mixup=0, cutmix=1.0), lambda: v2.CutMix(alpha=1.0, num_classes=3)),
    ],
)
def test_it_is_torchvisions(make: MakeRunner, options: Any, transform: Any) -> None:
    seen = run(make, Mixup(num_classes=3, **options))
    torch.manual_seed(0)
    mix = transform()
    expected = [mix(batch) for batch in images()]
    assert len(seen) == len(expected) == 6
    for mine, theirs in zip(seen, expected, strict=True):
        assert torch.equal(mine[0], theirs[0])
        assert torch.equal(mine[1], theirs[1])
        assert mine[1].sum(1) == pytest.approx(torch.ones(len(mine[1])))


def test_some_batches_some_of_them_by_cutmix(make: MakeRunner) -> None:
    samples: Any = [(torch.rand(1, 4, 4), i % 3) for i in range(600)]
    loader = DataLoader(samples, batch_size=2)
    batches = Batches()
    mixup = Mixup(mixup=1, cutmix=1, num_classes=3, prob=0.5, switch_prob=0.25)
    kinds = dict.fromkeys(mixup._transforms, 0)
    for transform in mixup._transforms:
        transform.register_forward_hook(
            lambda module, *_: kinds.__setitem__(module, kinds[module] + 1)
        )
    make(
        model=net(),
        loss=F.cross_entropy,
        train_dataloader=loader,
        train_cfg=dict(max_epochs=1),
        plugins=[mixup, batches],
    ).train()
    mixed = sum(batch[1].is_floating_point() for batch in batches.seen)
    mixups, cutmixes = kinds.values()
    assert mixups + cutmixes == mixed
    assert 110 < mixed < 190, "about half of 300"
    assert 15 < cutmixes < 65, "about a quarter of those"


@pytest.mark.parametrize("kind", [dict, UserDict, MappingProxyType])
@pytest.mark.parametrize("labels", [None, "target", lambda batch: batch["target"]])
def test_a_batch_may_be_a_dict_or_any_mapping(labels: Any, kind: Any) -> None:
    key = "labels" if labels is None else "target"
    batch = kind({"inputs": torch.rand(4, 1, 4, 4), key: torch.tensor([0, 1, 2, 0])})
    mixed = Mixup(num_classes=3, labels=labels).before_train_iter(batch)
    assert mixed.keys() == batch.keys()
    assert mixed[key].shape == (4, 3)
    assert not torch.equal(mixed["inputs"], batch["inputs"])


def test_what_the_run_writes_names_who_replaces_the_batch_in_order(
    make: MakeRunner, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    class Brighter(Plugin, name="brighter"):
        def before_train_iter(self, data_batch: Any) -> Any:
            return [data_batch[0] + 1, data_batch[1]]

    run(make, "logging", Brighter(), Mixup(num_classes=3), name="run")
    text = (tmp_path / "work_dir" / "run" / "run.log").read_text()
    assert "before_train_iter: brighter, then mixup replace the data_batch\n" in text


@pytest.mark.parametrize(
    ("batch", "options", "error"),
    [
        ((torch.rand(4, 16), torch.zeros(4, dtype=torch.long)), dict(num_classes=3), ValueError),
        ((torch.rand(4, 1, 4, 4), torch.zeros(4, dtype=torch.long)), dict(), ValueError),
        ({"inputs": torch.rand(4, 1, 4, 4)}, dict(num_classes=3, labels="target"), KeyError),
    ],
)
def test_a_batch_that_cannot_be_mixed_is_answered(batch: Any, options: Any, error: Any) -> None:
    with pytest.raises(error) as raised:
        Mixup(**options).before_train_iter(batch)
    assert "mixup expects (images, labels), or a dict" in raised.value.__notes__[0]


def test_bad_options_are_refused() -> None:
    for options, message in (
        (dict(mixup=0), "leave nothing to do"),
        (dict(mixup=-1), "mixup=-1"),
        (dict(prob=0), "prob=0"),
    ):
        with pytest.raises(TypeError, match=message):
            Mixup(**options)  # type: ignore[arg-type]


def test_images_stay_as_they_are_outside_of_it() -> None:
    batch = (torch.rand(4, 1, 4, 4), torch.tensor([0, 1, 2, 0]))
    before: list[Tensor] = [tensor.clone() for tensor in batch]
    Mixup(num_classes=3).before_train_iter(batch)
    assert all(torch.equal(a, b) for a, b in zip(batch, before, strict=True))

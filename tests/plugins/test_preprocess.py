"""Data preprocessors: moving, and making images into a batch."""

from __future__ import annotations

from collections import OrderedDict, UserDict, namedtuple
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.data import DataLoader

from hookengine.model import BaseDataPreprocessor, ImgDataPreprocessor, stack_batch
from tests.fixtures import MakeData, MakeRunner

Pair = namedtuple("Pair", "image label")
META = torch.device("meta")


class Movable:
    """A data structure of one's own that can be moved."""

    def __init__(self, device: Any = "cpu") -> None:
        self.device = device

    def to(self, device: Any) -> Movable:
        return Movable(device)


@pytest.fixture
def mover() -> BaseDataPreprocessor:
    return BaseDataPreprocessor().to(META)


def test_any_nesting_is_moved(mover: BaseDataPreprocessor) -> None:
    one = torch.ones(1)
    batch = {
        "list": [one, {"deep": (one, [one])}],
        "pair": Pair(one, 3),
        "text": "abc",
        "bytes": b"abc",
        "none": None,
        "number": 3.5,
        "own": Movable(),
        "packed": pack_sequence([one]),
    }
    moved = mover(batch, training=True)
    assert moved["list"][0].device == META
    assert moved["list"][1]["deep"][0].device == META
    assert moved["list"][1]["deep"][1][0].device == META
    assert type(moved["list"]) is list
    assert type(moved["list"][1]["deep"]) is tuple
    assert type(moved["pair"]) is Pair
    assert moved["pair"].image.device == META
    assert moved["pair"].label == 3
    assert {k: moved[k] for k in ("text", "bytes", "none", "number")} == {
        "text": "abc",
        "bytes": b"abc",
        "none": None,
        "number": 3.5,
    }
    assert moved["own"].device == META
    assert isinstance(moved["packed"], PackedSequence)
    assert moved["packed"].data.device == META
    assert batch["list"][0] is one
    assert mover(OrderedDict(x=one))["x"].device == META
    assert mover(one).device == META


class Encoding(UserDict[str, Any]):
    """As BatchEncoding of transformers."""

    def to(self, device: Any) -> Encoding:
        self.data = {key: value.to(device) for key, value in self.items()}
        return self


class InPlace(Encoding):
    """Moves its tensors and returns nothing."""

    def to(self, device: Any) -> None:  # type: ignore[override]
        super().to(device)


@pytest.mark.parametrize("non_blocking", [False, True])
def test_a_mapping_is_moved_and_stays_one(non_blocking: bool) -> None:
    mover = BaseDataPreprocessor(non_blocking=non_blocking).to(META)
    for kind in (Encoding, InPlace, UserDict, OrderedDict, lambda **items: MappingProxyType(items)):
        moved = mover({"nested": kind(x=torch.ones(2), y=torch.ones(2))})["nested"]
        assert isinstance(moved, Mapping)
        assert {name: value.device for name, value in moved.items()} == {"x": META, "y": META}
    assert mover([Movable()])[0].device == META


def test_a_field_called_to_is_no_method(mover: BaseDataPreprocessor) -> None:
    edges = namedtuple("edges", "start to")
    moved = mover(edges(torch.ones(1), torch.ones(1)))
    assert moved.to.device == META


@pytest.mark.parametrize("kind", [Encoding, UserDict, OrderedDict])
def test_images_may_be_in_any_mapping(kind: Any) -> None:
    images = torch.ones(2, 3, 4, 4)
    batch = ImgDataPreprocessor()(kind(inputs=images.byte()))
    assert torch.equal(batch["inputs"], images)
    assert batch["data_samples"] is None


def test_what_is_there_already_is_not_copied_but_its_containers_are() -> None:
    one = torch.ones(1)
    batch = [one, {"x": one}]
    moved = BaseDataPreprocessor()(batch)
    assert moved[0] is one
    assert moved[1]["x"] is one
    assert moved is not batch
    assert moved[1] is not batch[1]


def test_a_subclass_may_move_in_a_way_of_its_own() -> None:
    class Doubled(BaseDataPreprocessor):
        def cast_data(self, data: Any) -> Any:
            return [2 * item for item in super().cast_data(data)]

    assert Doubled()([torch.ones(1)])[0].item() == 2


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float64])
@pytest.mark.parametrize("stacked", [True, False])
def test_images_are_swapped_normalised_and_padded(dtype: torch.dtype, stacked: bool) -> None:
    images = torch.randint(0, 255, (2, 3, 5, 6)).to(dtype)
    mean, std = [1.0, 2.0, 3.0], [4.0, 5.0, 6.0]
    preprocessor = ImgDataPreprocessor(
        mean=mean, std=std, bgr_to_rgb=True, pad_size_divisor=4, pad_value=9
    )
    batch = dict(inputs=images.clone() if stacked else [*images])
    result = preprocessor(batch, training=True)
    swapped = images[:, [2, 1, 0]].to(torch.float32)
    expected = (swapped - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    expected = F.pad(expected, (0, 2, 0, 3), value=9)
    assert torch.equal(result["inputs"], expected)
    assert result["inputs"].dtype == torch.float32
    assert result["data_samples"] is None
    assert "data_samples" not in batch  # the dataloader's own dict stays as it was


def test_a_tuple_is_a_batch_too() -> None:
    images, labels = torch.ones(2, 1, 4, 4), torch.ones(2)
    inputs, same = ImgDataPreprocessor(mean=[1], std=[2])((images, labels))
    assert inputs.abs().sum() == 0
    assert same is labels


def test_images_of_different_sizes_are_padded_to_the_largest() -> None:
    images = [torch.ones(3, 2, 7), torch.ones(3, 5, 4)]
    result = ImgDataPreprocessor(pad_value=-1)(dict(inputs=images, data_samples=["a", "b"]))
    assert result["inputs"].shape == (2, 3, 5, 7)
    assert (result["inputs"][0, :, 2:] == -1).all()
    assert (result["inputs"][1, :, :, 4:] == -1).all()
    assert (result["inputs"] == 1).sum() == 3 * (2 * 7 + 5 * 4)
    assert result["data_samples"] == ["a", "b"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(bgr_to_rgb=True, rgb_to_bgr=True), "are the same swap"),
        (dict(mean=[1.0]), "only one of mean and std is set"),
        (dict(mean=[1.0, 2.0], std=[1.0]), "mean takes 1 or 3 numbers, got 2"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImgDataPreprocessor(**options)


@pytest.mark.parametrize(
    ("options", "batch", "error", "message"),
    [
        ({}, torch.ones(1), TypeError, "got Tensor"),
        ({}, {"images": 3}, TypeError, "got NoneType"),
        ({}, {"inputs": torch.ones(3, 4, 4)}, ValueError, r"\(N, C, H, W\), got \(3, 4, 4\)"),
        (dict(mean=[1, 2, 3], std=[1, 1, 1]), (torch.ones(1, 1, 4, 4),), ValueError, "need images"),
        (dict(rgb_to_bgr=True), ([torch.ones(1, 4, 4)],), ValueError, "channel swaps need images"),
    ],
)
def test_batches_that_are_no_images_are_answered(
    options: Any, batch: Any, error: type, message: str
) -> None:
    with pytest.raises(error, match=message):
        ImgDataPreprocessor(**options)(batch)


def test_stack_batch_pads_all_dimensions_but_the_first() -> None:
    one, other = torch.ones(2, 3, 4, 5), torch.ones(2, 4, 3, 5)
    stacked = stack_batch([one, other], pad_size_divisor=2, pad_value=7)
    assert stacked.shape == (2, 2, 4, 4, 6)
    assert stacked.sum() == 2 * 2 * 60 + 7 * (stacked.numel() - 2 * 2 * 60)
    assert torch.equal(stack_batch([one, one]), torch.stack([one, one]))


@pytest.mark.parametrize(
    ("tensors", "error", "message"),
    [
        (torch.ones(2, 3), TypeError, "list of tensors, got Tensor"),
        ([torch.ones(1), 3], TypeError, "list of tensors, got a list with int"),
        ([], ValueError, "at least one tensor"),
        ([torch.ones(1, 2), torch.ones(1, 2, 3)], ValueError, r"shapes \[\(1, 2\), \(1, 2, 3\)\]"),
        ([torch.ones(1, 2), torch.ones(2, 2)], ValueError, "the same first dimension"),
    ],
)
def test_what_cannot_be_stacked_is_answered(tensors: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        stack_batch(tensors)


def test_prefetch_on_the_cpu_says_that_it_has_nothing_to_do(
    make: MakeRunner, caplog: pytest.LogCaptureFixture
) -> None:
    runner = make(plugins=[dict(type="preprocess", prefetch=True)], device="cpu")
    assert isinstance(runner.train_loop.dataloader, DataLoader)
    assert "prefetch=True has no effect" in caplog.text
    runner.train()


@pytest.mark.gpu
def test_prefetched_batches_train_as_others_do(make: MakeRunner, data: MakeData) -> None:
    def weights(**options: Any) -> Tensor:
        runner = make(train_dataloader=DataLoader(data(), 4, pin_memory=True), **options)
        runner.train()
        return runner.bare_model.net.weight.cpu()

    prefetching = weights(plugins=[dict(type="preprocess", prefetch=True)])
    assert torch.equal(prefetching, weights())

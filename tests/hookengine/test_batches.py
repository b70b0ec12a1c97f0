"""Tests of ``hookengine/batches.py``."""

from __future__ import annotations

import warnings
from collections import UserDict, namedtuple
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DataLoader

from hookengine import BatchSizeError, SampleCounter, batch_size
from tests.fixtures import Toy

IMAGES = torch.zeros(5, 3, 8, 8)
IMAGE = IMAGES[0]
LABELS = torch.zeros(5)
SCALAR = torch.tensor(0.5)
BOXES = {"boxes": torch.zeros(2, 4), "labels": torch.zeros(2)}

Pair = namedtuple("Pair", "images labels")


@dataclass
class Views:
    """A batch as a dataclass."""

    first: Any
    second: Any


class Graphs:
    """A batch of a graph library, into which nobody can look."""

    num_graphs = 3


class Lazy(UserDict[str, Any]):
    """As TensorDict of tensordict: a mapping with a shape."""

    def __init__(self, data: dict[str, Any], size: tuple[int, ...]) -> None:
        super().__init__(data)
        self.batch_size = self.shape = torch.Size(size)


def packed() -> Any:
    """Five sequences."""
    return pack_sequence([torch.zeros(length, 4) for length in (9, 6, 3, 3, 1)])


def nested(layout: Any, sizes: tuple[int, ...] = (9, 6, 3, 3, 1)) -> Any:
    """Five sequences in a nested tensor."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The PyTorch API of nested tensors")
        return torch.nested.nested_tensor([torch.zeros(n, 4) for n in sizes], layout=layout)


def loader(samples: int = 1, batch_size: int = 1) -> Any:
    """A DataLoader of which only the numbers matter."""
    numbers: Any = [0] * samples
    return DataLoader(numbers, batch_size=batch_size)


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        (IMAGES, 5),
        ((IMAGES, LABELS), 5),
        ([IMAGES, LABELS], 5),
        (Pair(IMAGES, LABELS), 5),
        ([[IMAGES, IMAGES], LABELS], 5),  # two views of each sample
        ({"images": IMAGES, "labels": LABELS}, 5),
        ({"nested": {"x": IMAGES}}, 5),
        # several inputs
        (({"a": IMAGES, "b": IMAGES}, LABELS), 5),
        (({"a": IMAGES, "b": {"c": IMAGES, "d": LABELS}}, LABELS), 5),
        ((Pair(IMAGES, IMAGES), LABELS), 5),
        ((((IMAGES, IMAGES), IMAGES), LABELS), 5),
        (({"a": IMAGES}, {"b": LABELS}), 5),
        ((Views(IMAGES, [IMAGES, IMAGES]), LABELS), 5),
        ({"views": [IMAGES, IMAGES], "labels": LABELS}, 5),
        ({"views": [IMAGES, IMAGES], "ids": ["a", "b", "c", "d", "e"]}, 5),
        (UserDict({"a": UserDict({"b": IMAGES, "c": IMAGES}), "labels": LABELS}), 5),
        (MappingProxyType({"a": IMAGES, "labels": LABELS}), 5),
        (Lazy({"a": IMAGES, "b": torch.zeros(5, 2)}, (5,)), 5),
        (Lazy({"a": IMAGES, "b": torch.zeros(5, 2)}, ()), 5),
        ((np.zeros((5, 4)), np.zeros(5)), 5),
        # what is no sample stands beside them
        ((SCALAR, IMAGES, LABELS), 5),
        ({"temperature": SCALAR, "images": IMAGES}, 5),
        ({"step": 3, "names": ["cat", "dog"], "images": IMAGES, "extra": None}, 5),
        ({"size": (224, 224), "images": IMAGES, "graph": Graphs()}, 5),
        ((IMAGES, None), 5),
        # sequences
        (packed(), 5),
        ((packed(), LABELS), 5),
        ((nested(torch.strided), LABELS), 5),
        ((nested(torch.jagged), LABELS), 5),
        ({"x": nested(torch.strided)}, 5),
        ((torch.zeros(5, 4).to_sparse(), LABELS), 5),
        # lists of samples
        ({"inputs": [IMAGE] * 4, "data_samples": [None] * 4}, 4),
        ({"inputs": [IMAGE] * 4, "data_samples": [Graphs()] * 4}, 4),
        ({"inputs": [torch.zeros(7), torch.zeros(9)]}, 2),  # of different lengths
        ([{"image": IMAGE}] * 3, 3),
        ([{"image": IMAGE, "id": 7}] * 4, 4),
        ([{"image": IMAGE, **BOXES}] * 4, 4),
        ([(IMAGE, "caption")] * 4, 4),
        ([(torch.zeros(7), SCALAR)] * 4, 4),
        ([("text", 1)] * 4, 4),
        ([{"text": "a", "tokens": [1, 2]}, {"text": "b", "tokens": [1]}], 2),
        (["a", "b"], 2),
        ([["a", "b", "c"], [0, 1, 0]], 3),
        ({"text": ["a", "b"], "label": [0, 1]}, 2),
        ({"ids": [[1, 2, 3], [4]]}, 2),
        # no samples
        ((IMAGES[:0], LABELS[:0]), 0),
        (({"a": IMAGES[:0], "b": IMAGES[:0]}, LABELS[:0]), 0),
        (([], []), 0),
        ([], 0),
        ((), 0),
        ({"inputs": [], "data_samples": []}, 0),
    ],
)
def test_the_number_of_samples_in_a_batch(batch: Any, expected: int) -> None:
    assert batch_size(batch) == expected


def test_a_list_of_samples_is_known_by_the_targets_beside_it() -> None:
    images = [torch.zeros(3, 8, 8)] * 5
    assert batch_size((tuple(images), ({"boxes": 1},) * 5)) == 5
    assert batch_size([images, [torch.zeros(2, 4)] * 5]) == 5
    assert batch_size((images, torch.zeros(5))) == 5
    assert batch_size((images[:2], [BOXES, BOXES])) == 2
    three = {"boxes": torch.zeros(3, 4), "labels": torch.zeros(3)}  # as many as channels
    assert batch_size((images[:2], [three, three])) == 2
    assert batch_size({"inputs": images[:2], "targets": (three, three)}) == 2
    assert batch_size((torch.zeros(2, 3, 8, 8), [three, three])) == 2
    assert batch_size((images, [three, None, three, None, BOXES])) == 5
    assert batch_size((images, torch.zeros(5, 1))) == 5
    pair = (torch.zeros(8, 3), torch.zeros(8, 2))
    assert batch_size([pair, (torch.zeros(8), torch.zeros(8))]) == 8
    two_inputs = [torch.zeros(4, 3), torch.zeros(4, 2)]
    assert batch_size((two_inputs, torch.zeros(4))) == 4
    assert batch_size(([torch.zeros(2, 3), torch.zeros(2, 2)], torch.zeros(2))) == 2


@pytest.mark.parametrize(
    ("batch", "shapes"),
    [
        ((torch.zeros(12, 5, 4), LABELS), r"batch\[0\]: \(12, 5, 4\), batch\[1\]: \(5,\)"),
        ({"x": IMAGES, "weights": torch.zeros(3)}, r"batch\['weights'\]: \(3,\)"),
        (([IMAGES, torch.zeros(7, 2)], LABELS), r"batch\[0\]\[1\]: \(7, 2\)"),
        ((Views(torch.zeros(7, 2), IMAGES), LABELS), r"batch\[0\].first: \(7, 2\)"),
        ((packed(), torch.zeros(9)), r"batch\[0\]: 5 packed sequences, batch\[1\]: \(9,\)"),
        ((nested(torch.strided), torch.zeros(9)), r"batch\[0\]: \(5, \*, \*\), batch\[1\]: \(9,\)"),
        ((nested(torch.jagged), torch.zeros(9)), r"batch\[0\]: \(5, \*, \*\)"),
        ([torch.zeros(7), torch.zeros(9)], r"batch\[0\]: \(7,\), batch\[1\]: \(9,\)"),
    ],
)
def test_tensors_that_disagree_are_an_error(batch: Any, shapes: str) -> None:
    with pytest.raises(BatchSizeError, match=shapes) as caught:
        batch_size(batch)
    assert "count_samples" in str(caught.value)


@pytest.mark.parametrize(
    "batch",
    [
        torch.tensor(3.0),
        (SCALAR, SCALAR),
        [SCALAR] * 3,
        {"x": SCALAR},
        (3, 4.0),
        {},
        None,
        Graphs(),
        (Graphs(), Graphs()),
        "text",
        {"text": "a"},
        ({"x": ["a", "b"]}, [1, 2, 3]),
    ],
)
def test_a_batch_that_does_not_tell_is_an_error(batch: Any) -> None:
    with pytest.raises(BatchSizeError, match="cannot determine the number of samples"):
        batch_size(batch)


AMBIGUOUS: list[tuple[Any, int, int]] = [
    ({"inputs": [IMAGE] * 4}, 3, 4),  # four images, or four views of three images
    ([[IMAGES, IMAGES]], 5, 2),
    ([{"x": IMAGES}, {"x": IMAGES}], 5, 2),
    ([(IMAGE, BOXES["boxes"][[0, 0, 0]])] * 4, 3, 4),  # an image and its three boxes
    (([IMAGE] * 4, [IMAGE] * 4), 3, 4),
    ([(torch.zeros(8, 3), torch.zeros(8, 2)), torch.zeros(2, 8)], 8, 2),  # targets of two heads
]


@pytest.mark.parametrize(("batch", "one", "other"), AMBIGUOUS)
def test_a_batch_that_can_be_read_in_two_ways_is_an_error(batch: Any, one: int, other: int) -> None:
    low, high = sorted((one, other))
    with pytest.raises(BatchSizeError, match=f"it could be {low} or {high} "):
        batch_size(batch)


@pytest.mark.parametrize(("batch", "one", "other"), AMBIGUOUS)
def test_the_batch_size_of_the_dataloader_decides_between_two_ways(
    batch: Any, one: int, other: int
) -> None:
    for size in (one, other):
        assert SampleCounter(loader(2 * size, size), None)(batch) == size
        assert SampleCounter(loader(100 + size, 100), None)(batch) == size  # the last batch
    with pytest.raises(BatchSizeError):
        SampleCounter(loader(70, 70), None)(batch)


def test_tensors_that_agree_on_time_instead_of_samples_are_an_error() -> None:
    batch = torch.zeros(12, 5, 4), torch.zeros(12, 5)  # (T, B, ...)
    with pytest.raises(BatchSizeError, match="it could be 5 or 12"):
        SampleCounter(loader(20, 5), None)(batch)
    views = torch.zeros(10, 5), torch.zeros(10)  # a collate function may add samples
    assert SampleCounter(loader(20, 5), None)(views) == 10
    empty = torch.zeros(0, 5), torch.zeros(0, 5)
    assert SampleCounter(loader(20, 5), None)(empty) == 0


def flat(number: int) -> Any:
    """Samples of three or four tokens, joined into one sequence."""
    return torch.zeros(3 * number + 1, 3)


RAGGED = [torch.zeros(3, width, width) for width in (5, 6, 5, 7)]
UNCOLLATED: dict[str, Any] = {
    "image, caption": lambda n: [(IMAGE, "caption")] * n,
    "features, label": lambda n: [(torch.zeros(7), torch.tensor(1))] * n,
    "tuple of tuples": lambda n: ((torch.zeros(7), torch.tensor(1)),) * n,
    "image, targets": lambda n: [(IMAGE, {"boxes": torch.zeros(3, 4)})] * n,
    "image, targets or None": lambda n: [(IMAGE, None), *[(IMAGE, torch.zeros(3, 4))] * (n - 1)],
    "images": lambda n: RAGGED[:n],
    "arrays": lambda n: [np.zeros((3, 5, 5))] * n,
    "texts": lambda n: [("question", "answer", "hint")] * n,
    "dicts": lambda n: [{"x": torch.zeros(4), "y": torch.zeros(4)}] * n,
    "texts, tokens": lambda n: (["text"] * n, flat(n)),
    "lengths, tokens": lambda n: {"lengths": [4] * n, "x": flat(n), "y": flat(n)[:, 0]},
    "sequences joined into one": lambda n: {"x": flat(n)[None], "y": flat(n)[None]},
}


@pytest.mark.parametrize("name", UNCOLLATED)
def test_the_batch_size_of_the_dataloader_tells_what_a_list_holds(name: str) -> None:
    """The sizes of tensors that no collate function has stacked tell nothing."""
    counts: list[int | None] = []
    for sizes in ((4, 4), (4, 4, 2), (4, 4, 3), (2,), (3,)):  # the last two as after a resume
        last = sizes[-1]
        count = SampleCounter(loader(8 + last, 4), None)
        for size in sizes:
            try:
                counts.append(count(UNCOLLATED[name](size)))
                assert counts[-1] == size
            except BatchSizeError:
                counts.append(None)
    if name == "sequences joined into one":
        assert set(counts) == {None}
    else:
        assert counts[:4] == [4, 4, 4, 4]


def test_a_list_whose_length_changes_is_one_of_samples() -> None:
    """Each of its samples has as many features as there are samples in a full batch."""
    count = SampleCounter(loader(11, 4), None)
    assert [count(UNCOLLATED["dicts"](size)) for size in (4, 4, 3)] == [4, 4, 3]


FIELDS: dict[str, Any] = {
    "two tensors alike": lambda n: [torch.zeros(n, 4), torch.zeros(n, 4)],
    "single rows": lambda n: {"x": torch.zeros(n, 10), "y": torch.zeros(n, 10)},
    "pairs": lambda n: [[torch.zeros(n, 4), torch.zeros(n)], [torch.zeros(n, 4), torch.zeros(n)]],
    "lists of images": lambda n: ([IMAGE] * n, [IMAGE] * n),
    "names of classes": lambda n: {"classes": ["cat", "dog"], "x": torch.zeros(n, 4)},
    "texts": lambda n: [("question",) * n, ("answer",) * n],
}


@pytest.mark.parametrize("collate", FIELDS.values(), ids=[*FIELDS])
@pytest.mark.parametrize(("size", "last"), [(8, 1), (2, 1), (5, 4)])
def test_batches_of_fields_are_counted_whatever_their_last_one_holds(
    collate: Any, size: int, last: int
) -> None:
    count = SampleCounter(loader(2 * size + last, size), None)
    assert [count(collate(n)) for n in (size, size, last)] == [size, size, last]
    alone = SampleCounter(loader(last, size), None)
    assert alone(collate(last)) == last


def test_a_collate_function_may_make_more_or_fewer_samples() -> None:
    count = SampleCounter(loader(21, 8), None)
    assert [count((torch.zeros(n, 3), torch.zeros(n))) for n in (6, 16, 14, 10)] == [6, 16, 14, 10]
    with pytest.raises(BatchSizeError, match="10 does not fit the batch_size"):
        SampleCounter(loader(21, 8), None)((torch.zeros(10, 3), torch.zeros(10)))


def test_objects_in_a_list_are_samples_if_the_dataloader_has_that_batch_size() -> None:
    pair = [Graphs(), Graphs()]  # what graph libraries collate pairs of graphs to
    with pytest.raises(BatchSizeError):
        SampleCounter(loader(8, 8), None)(pair)
    assert SampleCounter(loader(8, 2), None)(pair) == 2


def test_the_dataloader_or_the_model_counts_the_samples() -> None:
    class Loader:
        def __iter__(self) -> Any:
            return iter(())

        def count_samples(self, batch: Any) -> int:
            return int(batch.num_graphs)

    model, plain = Toy(), nn.Linear(1, 1)
    with pytest.raises(BatchSizeError):
        SampleCounter([], model)(Graphs())
    plain.count_samples = lambda batch: 7  # type: ignore[assignment]
    assert SampleCounter([], plain)(Graphs()) == 7
    assert SampleCounter(Loader(), plain)(Graphs()) == 3  # that of the dataloader wins
    assert SampleCounter(Loader(), model)(Graphs()) == 3
    counting = loader()
    counting.count_samples = lambda batch: 2
    assert SampleCounter(counting, plain)((IMAGES, LABELS)) == 2  # also where it could be told


@pytest.mark.parametrize("number", [4, 0, np.int64(4), torch.tensor(4)])
def test_a_number_of_samples_is_an_integer(number: Any) -> None:
    counting = loader()
    counting.count_samples = lambda batch: number
    count = SampleCounter(counting, None)(None)
    assert count == int(number)
    assert type(count) is int


@pytest.mark.parametrize(
    "number", [-1, 2.0, True, None, "4", torch.tensor(True), [4], torch.ones(2)]
)
def test_what_is_no_number_of_samples_is_refused(number: Any) -> None:
    counting = loader()
    counting.count_samples = lambda batch: number
    with pytest.raises(TypeError, match=r"DataLoader.count_samples must return .* integer"):
        SampleCounter(counting, None)(None)


def test_count_samples_must_be_a_function() -> None:
    counting = loader()
    counting.count_samples = 8
    with pytest.raises(TypeError, match=r"DataLoader.count_samples must be a function .* got 8"):
        SampleCounter(counting, None)


def test_an_error_in_count_samples_is_not_hidden() -> None:
    counting = loader()
    counting.count_samples = lambda batch: batch["missing"]
    with pytest.raises(KeyError, match="missing") as caught:
        SampleCounter(counting, None)({})
    assert "DataLoader.count_samples" in caught.value.__notes__[0]

"""Dataloaders and batches."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler

from hookengine import batch_size, copy_dataloader, samplers_of
from hookengine.loop.data import iterate_from

IMAGES = torch.zeros(5, 3, 8, 8)


LABELS = torch.zeros(5)


DIGITS: Any = range(8)  # torch's types want a Dataset, torch any sequence


Pair = namedtuple("Pair", "images labels")


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        (IMAGES, 5),
        (torch.tensor(3.0), 1),
        ((IMAGES, LABELS), 5),
        ([IMAGES, LABELS], 5),
        (Pair(IMAGES, LABELS), 5),
        ([[IMAGES, IMAGES], LABELS], 5),  # two views of each sample
        ({"images": IMAGES, "labels": LABELS}, 5),
        ({"inputs": [IMAGES[0]] * 4, "data_samples": [None] * 4}, 4),  # a list of samples
        ([{"image": IMAGES[0]}] * 3, 3),
        ([torch.tensor(1.0)] * 3, 3),
        (["a", "b"], 2),
        ({"nested": {"x": IMAGES}}, 5),
        ({}, 1),
        ([], 1),
        (None, 1),
    ],
)
def test_the_number_of_samples_in_a_batch(batch: Any, expected: int) -> None:
    assert batch_size(batch) == expected


def test_a_pass_starts_at_a_batch() -> None:
    for batches, batch, expected in ([1, 2, 3], 2, [3]), ([1, 2, 3], 0, [1, 2, 3]), ([1, 2], 2, []):
        iterator, dropped = iterate_from(batches, 0, batch)
        assert (list(iterator), dropped) == (expected, 0)  # nothing is fetched
        iterator, dropped = iterate_from(dict.fromkeys(batches), 0, batch)
        assert (list(iterator), dropped) == (expected, batch)
    running = iter([1, 2, 3])  # an iterator goes on where it is
    iterator, dropped = iterate_from(running, 0, 2)
    assert (list(iterator), dropped) == ([1, 2, 3], 0)
    iterator, dropped = iterate_from(iter([1, 2, 3]), 0, 0, behind=2)
    assert (list(iterator), dropped) == ([3], 2)


def test_a_list_of_samples_is_known_by_the_targets_beside_it() -> None:
    images = [torch.zeros(3, 8, 8)] * 5
    assert batch_size((tuple(images), ({"boxes": 1},) * 5)) == 5
    assert batch_size([images, [torch.zeros(2, 4)] * 5]) == 5
    assert batch_size((images, torch.zeros(5))) == 5
    pair = (torch.zeros(8, 3), torch.zeros(8, 2))
    assert batch_size([pair, (torch.zeros(8), torch.zeros(8))]) == 8
    assert batch_size([pair, torch.zeros(2, 8)]) == 8
    two_inputs = [torch.zeros(4, 3), torch.zeros(4, 2)]
    assert batch_size((two_inputs, torch.zeros(4))) == 4
    assert batch_size(([torch.zeros(2, 3), torch.zeros(2, 2)], torch.zeros(2))) == 2


class Renumbered:
    """A sampler that wraps another one."""

    def __init__(self, **inner: Any) -> None:
        vars(self).update(inner)


def test_samplers_are_listed_from_the_outermost_in() -> None:
    plain = DataLoader(DIGITS, batch_size=4)
    assert samplers_of(plain) == [plain.batch_sampler, plain.sampler]
    unbatched = DataLoader(DIGITS, batch_size=None)
    assert samplers_of(unbatched) == [unbatched.sampler]
    innermost = SequentialSampler(range(8))
    batches = BatchSampler(innermost, 4, drop_last=False)
    outermost = Renumbered(batch_sampler=batches, sampler=None)
    nested = DataLoader(DIGITS, batch_sampler=outermost)  # type: ignore[arg-type]
    assert samplers_of(nested) == [outermost, batches, innermost]


def test_samplers_that_wrap_one_another_are_listed_once() -> None:
    first, second = Renumbered(), Renumbered()
    first.sampler, second.sampler = second, first  # type: ignore[attr-defined]
    loader = DataLoader(DIGITS, sampler=first)  # type: ignore[arg-type]
    assert samplers_of(loader)[1:] == [first, second]


def test_an_empty_sampler_is_a_sampler() -> None:
    empty = SequentialSampler([])
    loader = DataLoader(DIGITS, sampler=Renumbered(sampler=empty))  # type: ignore[arg-type]
    assert samplers_of(loader)[-1] is empty


def test_an_iterable_dataset_has_no_samplers() -> None:
    class Stream(IterableDataset[int]):
        def __iter__(self) -> Iterator[int]:
            return iter(range(8))

    assert samplers_of(DataLoader(Stream())) == []


def test_a_copied_dataloader_has_the_new_attributes_and_shares_the_others() -> None:
    class Named(DataLoader[int]):
        def __init__(self, name: str) -> None:
            super().__init__(DIGITS, batch_size=4)
            self.name = name

    original = Named("digits")
    copied = copy_dataloader(original, dataset=range(10, 18), batch_size=2)
    assert type(copied) is Named
    assert vars(copied)["name"] == "digits"
    assert copied.collate_fn is original.collate_fn
    assert copied.batch_sampler is original.batch_sampler
    assert (copied.batch_size, original.batch_size) == (2, 4)
    assert torch.cat([*copied]).tolist() == [*range(10, 18)]
    assert torch.cat([*original]).tolist() == [*range(8)]


@pytest.mark.process
def test_a_copied_dataloader_has_workers_of_its_own() -> None:
    original = DataLoader(DIGITS, num_workers=1, persistent_workers=True)
    running = iter(original)
    copied = copy_dataloader(original, dataset=range(10, 18))
    assert torch.cat([*copied]).tolist() == [*range(10, 18)]
    assert torch.cat([*running]).tolist() == [*range(8)]

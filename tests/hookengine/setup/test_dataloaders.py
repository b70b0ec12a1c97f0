"""Tests of ``hookengine/setup/dataloaders.py``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler

from hookengine import copy_dataloader, samplers_of

DIGITS: Any = range(8)  # torch's types want a Dataset, torch any sequence


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

"""Tests of ``hookengine/loop/data.py``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from hookengine import is_seekable
from hookengine.loop.data import dataset_size, iterate_from, length_of


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


class Seekable:
    """Three batches, from the one that ``seek`` names."""

    start = 0

    def seek(self, epoch: int, batch: int) -> None:
        self.start = batch

    def __iter__(self) -> Iterator[int]:
        return iter([1, 2, 3][self.start :])


class Forwarding:
    """A wrapper that forwards the attributes of a dataloader, as many wrappers do."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.loader)


@pytest.mark.parametrize("loader", [Seekable(), Forwarding(Seekable())])
def test_a_seekable_loader_starts_a_pass_by_itself(loader: Any) -> None:
    assert is_seekable(loader)
    iterator, dropped = iterate_from(loader, 0, 2)
    assert (list(iterator), dropped) == ([3], 0)
    assert not is_seekable(Forwarding([1]))


class Sized:
    """Something whose ``__len__`` does what it is told."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer
        self.dataset = self

    def __len__(self) -> Any:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.mark.parametrize(
    "answer",
    [
        NotImplementedError(),
        TypeError("no len()"),
        AttributeError("dataset"),
        ValueError("not known yet"),
        -1,
        None,
        float("inf"),
        10**30,
    ],
)
def test_a_length_that_is_not_told_is_unknown(answer: Any) -> None:
    assert length_of(Sized(answer)) is None  # type: ignore[arg-type]
    assert dataset_size(Sized(answer)) is None  # type: ignore[arg-type]
    assert length_of(Sized(3)) == dataset_size(Sized(3)) == 3  # type: ignore[arg-type]


def test_an_error_while_the_length_is_read_is_not_hidden() -> None:
    with pytest.raises(OSError, match="index"):
        length_of(Sized(OSError("the index is missing")))  # type: ignore[arg-type]

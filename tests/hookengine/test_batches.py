"""Tests of ``hookengine/batches.py``."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import pytest
import torch

from hookengine import batch_size

IMAGES = torch.zeros(5, 3, 8, 8)


LABELS = torch.zeros(5)


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

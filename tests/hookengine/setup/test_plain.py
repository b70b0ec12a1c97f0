"""Tests of ``hookengine/setup/plain.py``."""

from __future__ import annotations

import io
from collections import OrderedDict
from enum import IntEnum
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hookengine import not_plain


class Color(IntEnum):
    RED = 1


PLAIN: dict[str, Any] = {
    "tensors": torch.ones(2),
    "parameter": nn.Parameter(torch.ones(2)),
    "numbers": [1, 2.5, 3j, True, None],
    "texts": ("a", b"b"),
    "set": {1, 2},
    "ordered": OrderedDict(a=1),
    "of torch": [torch.float32, torch.device("cpu"), torch.Size((2, 3))],
    "key": {(1, 2): 3},
}
OTHERS: list[tuple[Any, str]] = [
    (np.float64(1.5), "state"),
    ([0, np.int64(1)], "state[1]"),
    ({"a": {"b": Color.RED}}, "state['a']['b']"),
    (lambda: None, "state"),
    ({Color.RED: 1}, "the key <Color.RED: 1> of state"),
    ({(1, Color.RED): 1}, "the key (1, <Color.RED: 1>) of state"),
    (range(3), "state"),
]


def loads(value: Any) -> bool:
    file = io.BytesIO()
    torch.save({"value": value}, file)
    file.seek(0)
    try:
        torch.load(file, weights_only=True)
    except Exception:
        return False
    return True


@pytest.mark.parametrize("name", PLAIN)
def test_what_is_plain_can_be_loaded(name: str) -> None:
    assert list(not_plain(PLAIN[name], "state")) == []
    assert loads(PLAIN[name])


@pytest.mark.parametrize(("value", "path"), OTHERS, ids=[path for _, path in OTHERS])
def test_the_place_of_anything_else_is_named(value: Any, path: str) -> None:
    assert [place for place, _ in not_plain(value, "state")] == [path]


def test_all_of_them_are_named() -> None:
    state = {"a": np.float64(1), "b": [Color.RED, 2]}
    assert [place for place, _ in not_plain(state, "s")] == ["s['a']", "s['b'][0]"]

"""Tests of ``hookengine/setup/plain.py``."""

from __future__ import annotations

import io
from collections import Counter, OrderedDict
from enum import IntEnum
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hookengine import as_plain, not_plain


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


SCALARS: list[tuple[Any, Any]] = [
    (np.float64(0.1), 0.1),
    (np.float32(0.1), 0.10000000149011612),
    (np.float16(0.1), 0.0999755859375),
    (np.longdouble(0.1), 0.1),
    (np.int64(-3), -3),
    (np.uint64(2**64 - 1), 2**64 - 1),
    (np.bool_(True), True),
    (np.complex64(1j), 1j),
    (np.str_("a"), "a"),
    (np.bytes_(b"a"), b"a"),
    (np.array(2.5), 2.5),
    (np.array("a"), "a"),
    (np.float64("inf"), float("inf")),
]


@pytest.mark.parametrize(("scalar", "expected"), SCALARS, ids=[repr(s) for s, _ in SCALARS])
def test_a_scalar_of_numpy_becomes_an_equal_python_value(scalar: Any, expected: Any) -> None:
    plain = as_plain(scalar)
    assert plain == expected
    assert type(plain) is type(expected)
    nested = as_plain({"a": [1, (scalar, {"b": scalar})], "s": scalar})
    assert nested == {"a": [1, (expected, {"b": expected})], "s": expected}
    assert list(not_plain(nested, "state")) == []
    assert loads(nested)
    if not isinstance(scalar, np.ndarray):  # these have no hash
        assert {*map(type, as_plain({scalar: 1}))} == {type(expected)}
        assert as_plain({scalar, None}) == {expected, None}


def test_what_did_not_change_is_shared() -> None:
    for value in PLAIN.values():
        assert as_plain(value) is value
    inner, state = [1, 2], OrderedDict(a=np.float64(1))
    vars(state)["_metadata"] = {"version": 2}
    plain = as_plain({"inner": inner, "state": state})
    assert plain["inner"] is inner
    assert type(plain["state"]) is OrderedDict
    assert vars(plain["state"])["_metadata"] == {"version": 2}
    assert type(state["a"]) is np.float64  # the state itself is not changed
    counter: Any = Counter()
    counter["a"] = np.int64(2)
    assert as_plain(counter) == {"a": 2}
    assert type(as_plain(counter)) is Counter


@pytest.mark.parametrize(
    "value",
    [np.zeros(2), np.datetime64("2020-01-01"), np.longdouble(1) / 3, Color.RED, range(3), open],
    ids=["array", "date", "long double", "enum", "range", "function"],
)
def test_what_python_has_no_equal_value_for_stays(value: Any) -> None:
    state = [value]
    assert as_plain(state) is state
    assert [place for place, _ in not_plain(state, "s")] == ["s[0]"]


def test_a_container_that_contains_itself_is_named() -> None:
    state: dict[str, Any] = {"a": [np.float64(1)]}
    state["a"].append(state)
    assert [place for place, _ in not_plain(as_plain(state), "s")] == [
        "s['a'][1]['a'][0]",
        "s['a'][1]['a'][1]",
    ]

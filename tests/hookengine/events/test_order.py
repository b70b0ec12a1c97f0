"""Tests of ``hookengine/events/order.py``."""

from __future__ import annotations

import types
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hookengine import Plugin
from hookengine.events.order import resolve_order
from tests.hookengine.events.noise import Noise


def plugins_with(**constraints: dict[str, tuple[str, ...]]) -> dict[str, object]:
    return {name: types.SimpleNamespace(**c) for name, c in constraints.items()}


def test_order_is_as_given_subject_to_what_is_declared() -> None:
    assert resolve_order(plugins_with(a={}, b={}, c={})) == ["a", "b", "c"]
    assert resolve_order(plugins_with(a={"after": ("c",)}, b={}, c={})) == ["c", "a", "b"]
    assert resolve_order(plugins_with(a={}, b={}, c={"before": ("a",)})) == ["c", "a", "b"]
    assert resolve_order(plugins_with(a={"after": ("absent",)}, b={})) == ["a", "b"]
    assert resolve_order(plugins_with(a={"after": "b"}, b={})) == ["b", "a"]  # type: ignore[dict-item]


def test_a_cycle_prints_itself() -> None:
    with pytest.raises(
        ValueError, match=r"(a -> b -> c -> a|b -> c -> a -> b|c -> a -> b -> c) \(each"
    ):
        resolve_order(plugins_with(a={"after": ("b",)}, b={"after": ("c",)}, c={"after": ("a",)}))


@given(st.data())
def test_order_holds_every_constraint_and_changes_nothing_else(data: st.DataObject) -> None:
    names = [f"p{i}" for i in range(data.draw(st.integers(1, 8)))]
    constraints: dict[str, dict[str, tuple[str, ...]]] = {name: {} for name in names}
    hidden = data.draw(st.permutations(names))  # an order that all constraints agree with
    for index, name in enumerate(hidden):
        earlier = data.draw(st.lists(st.sampled_from(hidden[: index + 1]), unique=True))
        constraints[name]["after"] = tuple(e for e in earlier if e != name)
    plugins = plugins_with(**constraints)
    order = resolve_order({name: plugins[name] for name in names})
    assert sorted(order) == sorted(names)
    for name in names:
        for other in constraints[name]["after"]:
            assert order.index(other) < order.index(name)
    if not any(c["after"] for c in constraints.values()):
        assert order == names


def test_a_place_relative_to_a_plugin_holds_for_each_of_its_class() -> None:
    class Late(Plugin, name="late"):
        after: ClassVar[tuple[str, ...]] = ("noise",)

    class Early(Plugin, name="early"):
        before: ClassVar[tuple[str, ...]] = ("noise",)

    second = Noise(plugin_name="second")
    plugins = {"late": Late(), "noise": Noise(), "second": second, "early": Early()}
    assert resolve_order(plugins) == ["early", "noise", "second", "late"]

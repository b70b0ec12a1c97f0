"""What a plugin is: options, names, events, order."""

from __future__ import annotations

import types
from typing import ClassVar

import pydantic
import pytest

from hookengine import Plugin, options_of
from hookengine.events.plugin import name_of
from tests.hookengine.events.noise import Noise


def test_annotated_fields_are_validated_options() -> None:
    assert Noise(eta="0.5").eta == 0.5  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="plugin 'noise': eta=-1: Input should be greater than 0"):
        Noise(eta=-1)
    with pytest.raises(TypeError, match=r"plugin 'noise': unknown option 'etta'\. Did you mean"):
        Noise(etta=1)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="options by name"):
        Noise(0.5)  # type: ignore[arg-type, call-arg]


def test_options_have_a_json_schema() -> None:
    schema = pydantic.TypeAdapter(Noise).json_schema()
    assert schema["properties"]["eta"]["description"] == "noise scale"
    assert schema["properties"]["eta"]["exclusiveMinimum"] == 0


def test_anything_else_is_a_plain_attribute_and_equality_is_identity() -> None:
    one, other = Noise(), Noise()
    one.best = 3  # type: ignore[attr-defined]
    assert one != other
    assert len({one, other}) == 2
    assert options_of(one) == {"eta": 0.01, "names": []}


def test_an_init_of_its_own_stays_as_it_is_written() -> None:
    class Written(Plugin):
        def __init__(self, interval: int = 10) -> None:
            self.interval = interval

    assert Written(3).interval == 3
    assert options_of(Written()) == {}


def test_options_that_json_cannot_hold_are_shown_by_repr() -> None:
    class Holder(Plugin):
        what: object = None

    assert options_of(Holder(what=types)) == {"what": repr(types)}


def test_a_subclass_inherits_options() -> None:
    class More(Noise):
        gamma: float = 0.5

    assert options_of(More(eta=1)) == {"eta": 1.0, "names": [], "gamma": 0.5}


def test_the_name_is_given_or_the_class_in_snake_case() -> None:
    class HTTPSink2Go(Plugin): ...

    class Named(Plugin, name="other"): ...

    class Plain: ...

    assert name_of(Noise()) == "noise"
    assert name_of(HTTPSink2Go()) == "http_sink2_go"
    assert name_of(Named()) == "other"
    assert name_of(Plain()) == "plain"
    assert name_of(types.ModuleType("some_module")) == "some_module"
    second = Noise()
    second.plugin_name = "second"  # type: ignore[misc]
    assert name_of(second) == "second"


def test_the_class_keyword_and_the_class_variables_are_no_options() -> None:
    class Ordered(Plugin, name="ordered"):
        after: ClassVar[tuple[str, ...]] = ("noise",)
        before = "logging"

    assert options_of(Ordered()) == {}
    assert Ordered().after == ("noise",)

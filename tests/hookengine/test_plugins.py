"""What a plugin is: options, names, events, order."""

from __future__ import annotations

import types
from typing import ClassVar

import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from hookengine import Plugin, options_of
from hookengine.events.checks import check_methods
from hookengine.events.order import resolve_order
from hookengine.events.plugin import name_of


class Noise(Plugin):
    """A plugin with options."""

    eta: float = Field(default=0.01, gt=0, description="noise scale")
    names: tuple[str, ...] = ()

    def before_optim_step(self, optim_wrapper: object) -> None:
        self.last = optim_wrapper


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
    second.plugin_name = "second"
    assert name_of(second) == "second"


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("after_train_itr(self)", "Did you mean 'after_train_iter'"),
        ("on_error(self)", "unknown event 'on_error'"),
        ("after_train_iter(self, output)", "Did you mean 'outputs'"),
        ("after_train_iter(self, ouputs=None)", "Did you mean 'outputs'"),
        ("after_train_iter(self, *args)", "instead of *args"),
        ("after_train_iter(self, **kwargs)", "instead of *kwargs"),
    ],
)
def test_misspelled_events_and_arguments_are_refused(method: str, message: str) -> None:
    namespace: dict[str, object] = {}
    exec(f"class Misspelt:\n    def {method}: pass", namespace)
    plugin = namespace["Misspelt"]()
    with pytest.raises(TypeError) as caught:
        check_methods("misspelled", plugin)
    assert message in str(caught.value)
    assert "'misspelled'" in str(caught.value)


def test_properties_options_and_private_methods_are_no_events() -> None:
    class Careful(Plugin):
        resume: str = "auto"
        on_error: str = "warn"

        def _before_anything(self) -> None: ...

        def after_run(self) -> None: ...

        @property
        def after_all(self) -> None:
            raise AssertionError("evaluated")

    check_methods("careful", Careful())


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


def test_the_class_keyword_and_the_class_variables_are_no_options() -> None:
    class Ordered(Plugin, name="ordered"):
        after: ClassVar[tuple[str, ...]] = ("noise",)
        before = "logging"  # type: ignore[assignment]

    assert options_of(Ordered()) == {}
    plugins = {"ordered": Ordered(), "logging": object(), "noise": Noise()}
    assert resolve_order(plugins) == ["noise", "ordered", "logging"]


def test_a_place_relative_to_a_plugin_holds_for_each_of_its_class() -> None:
    class Late(Plugin, name="late"):
        after: ClassVar[tuple[str, ...]] = ("noise",)

    class Early(Plugin, name="early"):
        before: ClassVar[tuple[str, ...]] = ("noise",)

    second = Noise(plugin_name="second")
    plugins = {"late": Late(), "noise": Noise(), "second": second, "early": Early()}
    assert resolve_order(plugins) == ["early", "noise", "second", "late"]

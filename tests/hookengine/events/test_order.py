"""Tests of ``hookengine/events/order.py``."""

from __future__ import annotations

import types
import warnings
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hookengine import Place, Plugin, PluginManager, hookimpl
from hookengine.events.hookspecs import EVENTS
from hookengine.events.order import resolve_order
from tests.fixtures import MakeRunner
from tests.hookengine.events.noise import Noise

EVENT = EVENTS["after_train_iter"]
Declared = dict[str, dict[str, Any]]


def plugins_with(**declared: dict[str, Any]) -> dict[str, object]:
    """Plugins that implement one event; ``cls=True`` declares on the class, not on the method."""
    plugins: dict[str, object] = {}
    for name, options in declared.items():
        options = dict(options)
        on_class = options.pop("cls", False)

        def method(self: Any) -> None: ...

        members: dict[str, Any] = {EVENT.name: method if on_class else hookimpl(**options)(method)}
        plugins[name] = type(name.title(), (), {**members, **(options if on_class else {})})()
    return plugins


def order(**declared: dict[str, Any]) -> list[str]:
    return [place.plugin for place in resolve_order(EVENT, plugins_with(**declared))]


@pytest.mark.parametrize("cls", [False, True])
def test_order_is_as_given_subject_to_what_is_declared(cls: bool) -> None:
    assert order(a={}, b={}, c={}) == ["a", "b", "c"]
    assert order(a=dict(after=("c",), cls=cls), b={}, c={}) == ["b", "c", "a"]
    assert order(a={}, b={}, c=dict(before=("a",), cls=cls)) == ["c", "a", "b"]
    assert order(a=dict(after=("absent",), cls=cls), b={}) == ["a", "b"]
    assert order(a=dict(after="b", cls=cls), b={}) == ["b", "a"]


def test_a_method_replaces_what_its_class_declares() -> None:
    class Third(Plugin, name="third"):
        after = ("first", "second")

        def before_train(self) -> None: ...

        @hookimpl(after=())
        def after_train(self) -> None: ...

        @hookimpl(after="first", before="second")
        def before_run(self) -> None: ...

    class Other(Plugin):
        def before_train(self) -> None: ...
        def after_train(self) -> None: ...
        def before_run(self) -> None: ...

    plugins = [Third(), Other(plugin_name="first"), Other(plugin_name="second")]
    assert PluginManager(plugins, defaults=()).calls() == {
        "before_train": ["first", "second", "third"],
        "after_train": ["third", "first", "second"],
        "before_run": ["first", "third", "second"],
    }


def test_groups_hold_the_given_order() -> None:
    first, last = dict(tryfirst=True), dict(trylast=True)
    assert order(a=last, b={}, c=first, d=last, e=first, f={}) == ["c", "e", "b", "f", "a", "d"]


def test_a_constraint_wins_over_the_groups_and_only_the_one_that_declares_it_moves() -> None:
    last = dict(trylast=True)
    assert order(a=dict(after="b"), b=last, c=last, d={}) == ["d", "b", "a", "c"]
    first = dict(tryfirst=True)
    assert order(a=first, b=first, c={}, d=dict(before="b")) == ["a", "d", "b", "c"]
    assert order(a=dict(tryfirst=True, after="b"), b=last, c={}) == ["c", "b", "a"]
    assert order(a=dict(trylast=True, before="b"), b=first, c={}) == ["a", "b", "c"]
    # After the last and before the first at once: what it names has to move.
    assert order(a=first, b=dict(after="c", before="a"), c=last) == ["c", "b", "a"]


def test_the_reason_for_each_place_is_told() -> None:
    plugins = plugins_with(
        a=dict(trylast=True, after="b", every=10), b={}, c=dict(before="b", once=True)
    )
    assert resolve_order(EVENT, plugins) == [
        Place("c", "before b", "once"),
        Place("b", "given order", ""),
        Place("a", "trylast, after b", "every 10"),
    ]


def test_a_contradiction_quotes_the_event_and_the_declarations() -> None:
    with pytest.raises(ValueError, match="contradict each other") as caught:
        order(a=dict(after="b"), b=dict(after="a"))
    text = str(caught.value)
    assert "event 'after_train_iter'" in text
    assert "'a' declares after='b'" in text
    assert "'b' declares after='a'" in text
    with pytest.raises(ValueError, match="contradict") as caught:
        order(a=dict(after="b", before="b"), b={})
    assert "'a' declares after='b' (with @hookimpl)" in str(caught.value)
    assert "'a' declares before='b' (with @hookimpl)" in str(caught.value)
    with pytest.raises(ValueError, match="'b' declares after='a' \\(on its class"):
        order(a=dict(after="b"), b=dict(after="a", cls=True))
    with pytest.raises(ValueError, match="contradict") as caught:
        order(a=dict(after="b"), b=dict(after="c"), c=dict(after="a"))
    assert all(f"'{n}' declares after=" in str(caught.value) for n in "abc")


def test_plugins_that_never_meet_do_not_contradict_each_other() -> None:
    class A(Plugin, name="a"):
        after = ("b",)

        def before_run(self) -> None: ...

        @hookimpl(after=())
        def before_train(self) -> None: ...

    class B(Plugin, name="b"):
        def before_run(self) -> None: ...

        @hookimpl(after="a")
        def before_train(self) -> None: ...

    calls = PluginManager([A(), B()], defaults=()).calls()
    assert calls == {"before_run": ["b", "a"], "before_train": ["a", "b"]}


@st.composite
def declarations(draw: st.DrawFn) -> Declared:
    """Random groups and constraints that have a solution."""
    names = [f"p{i}" for i in range(draw(st.integers(1, 8)))]
    declared: Declared = {name: {} for name in names}
    hidden = draw(st.permutations(names))  # an order that all constraints agree with
    for index, name in enumerate(hidden):
        declared[name].update(draw(st.sampled_from([{}, {"tryfirst": True}, {"trylast": True}])))
        for side, others in (("after", hidden[:index]), ("before", hidden[index + 1 :])):
            if draw(st.booleans()) and others:
                declared[name][side] = tuple(draw(st.sets(st.sampled_from(others), max_size=2)))
    return declared


def _group(options: dict[str, Any]) -> int:
    return bool(options.get("trylast")) - bool(options.get("tryfirst"))


@given(declarations())
def test_order_holds_every_constraint_and_moves_nothing_else(declared: Declared) -> None:
    found = order(**declared)
    assert sorted(found) == sorted(declared)
    for name, options in declared.items():
        assert all(found.index(other) < found.index(name) for other in options.get("after", ()))
        assert all(found.index(name) < found.index(other) for other in options.get("before", ()))
    if not _chained(declared):
        free = [n for n, options in declared.items() if not {"after", "before"} & options.keys()]
        free.sort(key=lambda name: _group(declared[name]))
        assert [name for name in found if name in free] == free


def _chained(declared: Declared) -> bool:
    """Whether constraints together say something about plugins that declare nothing."""
    declaring = {n for n, options in declared.items() if {"after", "before"} & options.keys()}
    named = {o for d in declared.values() for s in ("after", "before") for o in d.get(s, ())}
    both = any({"after", "before"} <= options.keys() for options in declared.values())
    return both or bool(declaring & named)


def test_a_place_relative_to_a_plugin_holds_for_each_of_its_class() -> None:
    class Late(Plugin, name="late"):
        after: ClassVar[tuple[str, ...]] = ("noise",)

        def before_optim_step(self) -> None: ...

    class Early(Plugin, name="early"):
        before: ClassVar[tuple[str, ...]] = ("noise",)

        def before_optim_step(self) -> None: ...

    plugins = [Late(), Noise(), Noise(plugin_name="second"), Early()]
    calls = PluginManager(plugins, defaults=()).calls()
    assert calls == {"before_optim_step": ["early", "noise", "second", "late"]}


def test_what_was_configured_last_is_released_first() -> None:
    class Base(Plugin):
        def configure(self) -> None: ...
        def unconfigure(self) -> None: ...

    class Late(Base, name="late"):
        after = ("other",)

    class Own(Base, name="own"):
        @hookimpl(after="other")
        def unconfigure(self) -> None: ...

    plugins = [Late(), Own(), Base(plugin_name="other")]
    calls = PluginManager(plugins, defaults=()).calls()
    assert calls["configure"] == ["own", "other", "late"]
    assert calls["unconfigure"] == ["late", "other", "own"]


def test_a_name_of_a_plugin_that_is_off_is_ignored(recwarn: pytest.WarningsRecorder) -> None:
    class Late(Plugin, name="late"):
        after = ("clip", "wandb", "logging", "one_that_is_not_installed")

        def after_train_iter(self) -> None: ...

    assert PluginManager([Late()], defaults=()).calls() == {"after_train_iter": ["late"]}
    PluginManager([Late(), "no:logging"])
    assert not recwarn


@pytest.mark.parametrize("wrong", ["loging", "clpi", "acumulate", "Logging", "progressbar"])
def test_a_misspelled_name_is_an_error_with_the_nearest_match(wrong: str) -> None:
    class Late(Plugin, name="late"):
        @hookimpl(after=wrong)
        def after_train_iter(self) -> None: ...

    with pytest.raises(ValueError, match=rf"'late' declares after='{wrong}'.*Did you mean '"):
        PluginManager([Late()])


def test_plugins_that_never_meet_are_warned_of(make: MakeRunner) -> None:
    with pytest.warns(UserWarning, match="has no effect") as caught:
        runner = make(
            plugins=["ema", type("Sam", (), {"after": ("ema",), "after_optim_step": _none})()]
        )
    (warning,) = caught
    assert str(warning.message) == (
        "plugin 'sam' declares after='ema' (on its class), which has no effect in "
        "after_optim_step: 'ema' does not implement this, only configure, convert_model, "
        "wrap_model, after_train_epoch, after_train_iter, evaluated_models, "
        "before_save_checkpoint, after_load_checkpoint"
    )
    with pytest.warns(UserWarning, match=r"with @hookimpl, after_train\), which has no effect"):
        runner.on("after_train", before="ema")(lambda: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runner.on("after_train_iter", before="ema")(lambda: None)


def _none(self: Any) -> None: ...


@pytest.mark.parametrize("wrong", [(Noise,), 3, "", "clip amp", ("clip", None), 0.5])
def test_names_are_names(wrong: Any) -> None:
    with pytest.raises(TypeError, match="after and before take the name of a plugin"):
        hookimpl(after=wrong)
    with pytest.raises(TypeError, match=r"plugin 'bad', attribute '.*': after and"):
        PluginManager([type("Bad", (), {"before": wrong, "before_run": _none})()])
    with pytest.raises(TypeError, match=r"plugin 'bad', attribute '.*': after and"):
        PluginManager([type("Bad", (), {"after": _none, "before_run": _none})()])
    PluginManager([type("Good", (), {"after": None, "before_run": _none})()])


def test_a_method_overrides_the_opposite_of_its_class() -> None:
    class Early(Plugin, name="early"):
        after = "late", "other"

        @hookimpl(before="late")
        def before_run(self) -> None: ...

        def before_train(self) -> None: ...

    class Late(Plugin, name="late"):
        def before_run(self) -> None: ...
        def before_train(self) -> None: ...

    class Other(Plugin, name="other"):
        def before_run(self) -> None: ...
        def before_train(self) -> None: ...

    calls = PluginManager([Late(), Early(), Other()], defaults=()).calls()
    assert calls["before_train"] == ["late", "other", "early"]
    with pytest.raises(ValueError, match=r"before='late'.*, which includes 'other'"):
        PluginManager([Late(plugin_name="two"), Early(), Late(plugin_name="other")], defaults=())


def test_plugins_of_one_class_do_not_order_each_other_by_the_name_of_the_class() -> None:
    class Base(Plugin, name="base"):
        def before_run(self) -> None: ...

    class Derived(Base, name="derived"):
        after = "base"

    plugins = [Derived(plugin_name="one"), Derived(plugin_name="two"), Base()]
    order = PluginManager(plugins, defaults=()).order()["before_run"]
    assert [place.plugin for place in order] == ["base", "one", "two"]

    class Mixed(Plugin, name="mixed"):
        @hookimpl(after="renamed", before="base")
        def before_run(self) -> None: ...

    with pytest.raises(ValueError, match="contradict") as caught:
        PluginManager([Base(plugin_name="renamed"), Mixed(), Base()], defaults=())
    assert "'mixed' declares before='base' (with @hookimpl), which includes 'renamed'" in str(
        caught.value
    )


def test_a_function_is_named_by_its_own_name_too(make: MakeRunner) -> None:
    runner = make()

    @runner.on("after_train_iter")
    def one() -> None: ...

    @runner.on("after_train_iter", before="one")
    def two() -> None: ...

    order = runner.plugins.order()["after_train_iter"]
    assert [place.plugin for place in order] == ["after_train_iter:two", "after_train_iter:one"]
    assert order[0].reason == "before one (after_train_iter:one)"
    with pytest.raises(ValueError, match="Did you mean 'one'"):
        runner.on("after_train_iter", before="onee")(lambda: None)


def test_a_reason_is_told_once_and_says_who_moved_a_plugin() -> None:
    last = dict(trylast=True)
    plugins = plugins_with(a=dict(after=("c", "c"), before="z"), z={}, c=last)
    assert [(place.plugin, place.reason) for place in resolve_order(EVENT, plugins)] == [
        ("c", "trylast"),
        ("a", "after c, before z"),
        ("z", "given order, moved by a"),
    ]


def test_a_module_is_a_plugin(make: MakeRunner) -> None:
    module = types.ModuleType("my_hooks")
    seen: list[int] = []
    module.after_train_iter = lambda runner: seen.append(runner.progress.iter)  # type: ignore[attr-defined]
    make(plugins=[module], train_cfg=dict(max_epochs=1)).train()
    assert seen == [1, 2, 3, 4, 5]


def test_a_star_stands_for_all_others(make: MakeRunner) -> None:
    first, last = dict(tryfirst=True), dict(trylast=True)
    assert order(a=dict(after="*"), b=last, c={}, d=first, e=dict(before="*")) == [*"edcba"]
    assert order(a=dict(after="*", cls=True), b=last, c=dict(after="*")) == ["b", "a", "c"]
    assert order(a=dict(after="*"), b=dict(after="a"), c=last) == ["c", "a", "b"]
    with pytest.raises(ValueError, match=r"both after='\*' and before='\*' in 'after_train_iter'"):
        order(a=dict(after="*", before="*"))
    places = resolve_order(EVENT, plugins_with(a=dict(after="*", trylast=True)))
    assert places[0].reason == "trylast, after all others"


LAST = {
    "before_train": "seed",
    "before_train_epoch": "seed",
    "before_train_iter": "accumulate",
    "before_optim_step": "logging",
    "before_val_iter": "distributed",
    "after_train_iter": "logging",
    "after_train_epoch": "logging",
    "after_train": "logging",
    "after_val": "logging",
    "after_run": "checkpoint",
    "safe_point": "checkpoint",
    "initialize_model": "checkpoint",
    "unconfigure": "distributed",
}


@pytest.mark.parametrize("event", LAST)
def test_what_saves_and_records_comes_after_a_users_last_hook(event: str) -> None:
    def hook(self: Any) -> None: ...

    user = type("User", (), {event: hookimpl(trylast=True)(hook)})()
    plugins = [dict(type="accumulate", steps=2), user, dict(type="clip", max_norm=1.0), "watch"]
    called = PluginManager(plugins).calls()[event]
    assert called.index("user") < called.index(LAST[event])


def test_what_configures_first_releases_last_whatever_made_it_first() -> None:
    class Base(Plugin):
        def configure(self) -> None: ...
        def unconfigure(self) -> None: ...

    class First(Base, name="first"):
        @hookimpl(tryfirst=True)
        def configure(self) -> None: ...

    class Middle(Base, name="middle"):
        @hookimpl(after="plain")
        def configure(self) -> None: ...

    class Only(Plugin, name="only"):
        def unconfigure(self) -> None: ...

    plugins = [Middle(), Base(plugin_name="plain"), Only(), First()]
    calls = PluginManager(plugins, defaults=()).calls()
    assert calls["configure"] == ["first", "plain", "middle"]
    assert [name for name in calls["unconfigure"] if name != "only"] == ["middle", "plain", "first"]


def test_a_plugin_of_ones_own_that_is_off_is_no_misspelling(
    recwarn: pytest.WarningsRecorder,
) -> None:
    class Ema2(Plugin, name="ema2"):
        def after_train_iter(self) -> None: ...

    class Late(Plugin, name="late"):
        @hookimpl(after="ema2")
        def after_train_iter(self) -> None: ...

    PluginManager([Late()])
    assert not recwarn


def test_a_lambda_is_named_by_its_place(make: MakeRunner) -> None:
    runner = make()
    runner.on("after_train_iter")(lambda: None)
    (name,) = runner.plugins
    runner.on("after_train_iter", before=name)(_none_of_it)
    assert [*runner.plugins.calls()["after_train_iter"]][1] == name


def _none_of_it() -> None: ...

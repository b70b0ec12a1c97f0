"""Tests of ``hookengine/events/active.py``."""

from __future__ import annotations

from typing import Any

from hookengine import PluginManager, hookimpl
from tests.fixtures import MakeRunner
from tests.hookengine.events.notes import Note, named


def test_order_is_printed_per_event() -> None:
    def hook(self: Any) -> None: ...

    first = named("first", after_train_iter=hook, unconfigure=hook)
    second = named("second", after_train_iter=hook, unconfigure=hook)
    eager = named("eager", after_train_iter=hookimpl(tryfirst=True)(lambda self: None))
    manager = PluginManager([first, second, eager], defaults=())
    assert manager.calls() == {
        "unconfigure": ["second", "first"],
        "after_train_iter": ["eager", "first", "second"],
    }


def test_order_does_not_depend_on_when_a_plugin_was_added() -> None:
    def hook(self: Any) -> None: ...

    late = named("late", after_train_iter=hook)
    late.before = ("early",)
    manager = PluginManager([named("early", after_train_iter=hook)], defaults=())
    manager.add(late)
    assert manager.calls()["after_train_iter"] == ["late", "early"]


def test_an_observer_wraps_each_implementation_until_it_is_stopped() -> None:
    seen = []

    def observer(event: str, plugin: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            seen.append((event, plugin))
            return function(*args, **kwargs)

        return call

    note = Note()
    manager = PluginManager([note], defaults=())
    stop = manager.observe(observer)
    manager.hooks.before_train(None)  # type: ignore[arg-type]
    manager.configure()
    stop()
    manager.hooks.before_train(None)  # type: ignore[arg-type]
    assert seen == [("before_train", "note"), ("configure", "note")]
    assert note.log == ["before_train", "configure", "before_train"]


def test_configure_follows_the_printed_order(make: MakeRunner) -> None:
    log: list[str] = []

    def note(event: str, name: str, **order: Any) -> Any:
        return hookimpl(**order)(lambda self: log.append(f"{event} {name}"))

    a = named("a", configure=note("configure", "a"), unconfigure=note("unconfigure", "a"))
    b = named(
        "b",
        configure=note("configure", "b", tryfirst=True),
        unconfigure=note("unconfigure", "b", tryfirst=True),
    )
    runner = make(plugins=[a, b])
    calls = runner.plugins.calls()
    runner.close()
    assert log == [
        *(f"configure {name}" for name in calls["configure"]),
        *(f"unconfigure {name}" for name in calls["unconfigure"]),
    ]
    assert calls["configure"] == ["b", "a"]

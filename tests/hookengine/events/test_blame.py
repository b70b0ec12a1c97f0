"""Tests of ``hookengine/events/blame.py``."""

from __future__ import annotations

from typing import Any

import pytest

from hookengine import Plugin
from tests.fixtures import MakeRunner, Toy
from tests.hookengine.events.notes import Note


def test_an_error_names_the_plugin_the_event_and_the_iteration(make: MakeRunner) -> None:
    class Broken(Plugin):
        def after_train_iter(self, runner: Any) -> None:
            if runner.progress.iter == 3:
                self.helper()

        def helper(self) -> None:
            raise LookupError("no")

    with pytest.raises(LookupError, match="no") as caught:
        make(plugins=[Broken()]).train()
    (note,) = caught.value.__notes__
    assert note == (
        f"raised by plugin 'broken' ({__name__}), event 'after_train_iter', epoch 1, iteration 3"
    )
    assert caught.traceback[-1].name == "helper"


def test_of_two_plugins_of_one_class_the_right_one_is_blamed(make: MakeRunner) -> None:
    class Broken(Plugin):
        fails: bool = False

        def before_run(self) -> None:
            if self.fails:
                raise LookupError("no")

    good, bad = Broken(), Broken(fails=True)
    bad.plugin_name = "bad"  # type: ignore[misc]
    for order in ([good, bad], [bad, good]):
        with pytest.raises(LookupError) as caught:
            make(plugins=order).train()
        assert "plugin 'bad'" in caught.value.__notes__[0]


def test_a_function_and_a_wrapped_function_are_blamed(make: MakeRunner) -> None:
    import functools

    def wrap(function: Any) -> Any:
        @functools.wraps(function)
        def wrapper(*args: Any) -> Any:
            return function(*args)

        return wrapper

    runner = make()

    @runner.on("before_train")
    @wrap
    def fail(runner: Any) -> None:
        raise LookupError("no")

    with pytest.raises(LookupError) as caught:
        runner.train()
    assert "plugin 'before_train:fail'" in caught.value.__notes__[0]


def test_an_error_of_the_users_model_blames_nobody(make: MakeRunner) -> None:
    class Failing(Toy):
        def forward(self, inputs: Any, labels: Any, mode: str = "tensor") -> Any:
            raise LookupError("no")

    with pytest.raises(LookupError) as caught:
        make(model=Failing(), plugins=[Note()]).train()
    assert not getattr(caught.value, "__notes__", [])


def test_a_group_of_errors_out_of_a_plugin_is_blamed(make: MakeRunner) -> None:
    class Group(Plugin):
        def before_train(self) -> None:
            raise ExceptionGroup("several", [ValueError("a")])

    with pytest.raises(ExceptionGroup) as caught:
        make(plugins=[Group()]).train()
    assert "plugin 'group'" in caught.value.__notes__[0]

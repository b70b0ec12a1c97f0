"""Tests of ``hookengine/events/blame.py``."""

from __future__ import annotations

from typing import Any

import pytest
import torch

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


class Replaces(Plugin):
    """Replace the batches of one phase by something that no model takes."""

    phase: str
    batch: Any

    def before_train_iter(self, data_batch: Any) -> Any:
        return self.batch if self.phase == "train" else None

    def before_val_iter(self, data_batch: Any) -> Any:
        return self.batch if self.phase == "val" else None

    def before_test_iter(self, data_batch: Any) -> Any:
        return self.batch if self.phase == "test" else None


@pytest.mark.parametrize("phase", ["train", "val", "test"])
@pytest.mark.parametrize("batch", [5, "later", True, torch.ones(3), [1, 2, 3, 4], {"x": 1}, {1}])
def test_an_error_about_a_replaced_batch_names_the_plugin_that_replaced_it(
    make: MakeRunner, phase: str, batch: Any
) -> None:
    plugins = [Replaces(phase=phase, batch=batch), "ema"]
    runner = make(plugins=plugins, validate=True, test=True)
    with pytest.raises((TypeError, ValueError, RuntimeError, AttributeError)) as caught:
        runner.train() if phase != "test" else runner.test()
    by = f"plugin 'replaces' ({__name__}) in before_{phase}_iter"
    assert f"the batch was replaced by {by}" in "\n".join(caught.value.__notes__)


def test_a_batch_that_no_plugin_replaced_is_not_blamed_on_one(make: MakeRunner) -> None:
    class Fails(Toy):
        def forward(self, inputs: Any, labels: Any, mode: str = "tensor") -> Any:
            if mode == "predict":
                raise LookupError("no")
            return super().forward(inputs, labels, mode)

    class Doubles(Plugin):
        def before_train_iter(self, data_batch: Any) -> Any:
            inputs, labels = data_batch
            return inputs * 2, labels

    with pytest.raises(LookupError) as caught:
        make(model=Fails(), plugins=[Doubles()], validate=True).train()
    assert "replaced" not in "\n".join(getattr(caught.value, "__notes__", []))


def test_of_two_plugins_that_replace_a_batch_the_last_one_is_named(make: MakeRunner) -> None:
    def first(data_batch: Any) -> Any:
        return 5

    def second(data_batch: Any) -> Any:
        return 6

    runner = make()
    runner.on("before_train_iter")(first)
    runner.on("before_train_iter")(second)
    with pytest.raises(TypeError) as caught:
        runner.train()
    assert "plugin 'before_train_iter:second'" in "\n".join(caught.value.__notes__)

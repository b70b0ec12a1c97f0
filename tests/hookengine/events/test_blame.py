"""Tests of ``hookengine/events/blame.py``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from hookengine import Plugin
from tests.fixtures import MakeRunner, Toy, toy_data
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
    note = f"plugin 'replaces' had replaced what this error is about, in before_{phase}_iter"
    assert note in caught.value.__notes__


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
    assert "plugin 'before_train_iter:second' had replaced" in "\n".join(caught.value.__notes__)


@pytest.mark.parametrize(
    ("event", "value"),
    [
        ("after_forward", {}),
        ("after_forward", {5: torch.ones(())}),
        ("after_forward", {"loss": 0.5}),
        ("scale_loss", torch.ones(3)),
        ("scale_loss", torch.ones(())),
    ],
)
def test_an_error_about_a_replaced_loss_names_the_plugin(
    make: MakeRunner, event: str, value: Any
) -> None:
    replaces = type("Replaces", (), {event: lambda self: value})()
    with pytest.raises((TypeError, ValueError, AttributeError, RuntimeError)) as caught:
        make(plugins=[replaces]).train()
    note = f"plugin 'replaces' had replaced what this error is about, in {event}"
    assert caught.value.__notes__.count(note) == 1


def test_only_errors_over_the_replaced_value_get_that_note(make: MakeRunner) -> None:
    """Not those of the dataloader, of metrics, of Ctrl-C, of a value passed on as it was."""

    class Doubles(Plugin):
        keeps: bool = False

        def before_train_iter(self, data_batch: Any) -> Any:
            return data_batch if self.keeps else [part * 1 for part in data_batch]

    class Batches:
        def __iter__(self) -> Any:
            yield from list(DataLoader(toy_data(), batch_size=4))[:2]
            raise LookupError("no")

        def __len__(self) -> int:
            return 5

    class Stops(Toy):
        error: BaseException = KeyboardInterrupt()

        def forward(self, inputs: Any, labels: Any, mode: str = "tensor") -> Any:
            raise self.error

    runners = [
        make(plugins=[Doubles()], train_dataloader=Batches()),
        make(plugins=[Doubles()], model=Stops()),
        make(plugins=[Doubles(keeps=True)], model=Stops()),
    ]
    runners[2].bare_model.error = LookupError("no")
    for runner in runners:
        with pytest.raises((LookupError, KeyboardInterrupt)) as caught:
            runner.train()
        assert not getattr(caught.value, "__notes__", [])


def test_whatever_is_in_a_traceback_the_error_stays_itself_and_the_run_ends_as_usual(
    make: MakeRunner,
) -> None:
    """Frames without a module's name, globals of any name, plugins that are gone."""
    namespace: dict[str, Any] = {}
    exec("def raising(output, target): raise LookupError('no')", namespace)
    assert "__name__" not in namespace
    log: list[str] = []

    class Warm(Plugin):
        def before_train_iter(self, runner: Any, data_batch: Any) -> Any:
            runner.plugins.remove("warm")
            return [part * 1 for part in data_batch]

    class Notes(Plugin):
        def on_exception(self) -> None:
            log.append("on_exception")

        def after_run(self) -> None:
            log.append("after_run")

    losses = [namespace["raising"]]
    values: list[Any] = [torch.ones(3), ["a"], True, 5, {}]
    for value in values:
        namespace = {"__name__": "script", "generated": value, "lines": value}
        exec("def raising(output, target): raise LookupError('no')", namespace)
        losses.append(namespace["raising"])
    for loss in losses:
        runner = make(model=nn.Linear(4, 3), loss=loss, plugins=[Warm(), Notes()])
        with pytest.raises(LookupError, match="no"):
            runner.train()
    assert log == ["on_exception", "after_run"] * len(losses)


def test_an_error_of_the_model_or_the_optimizer_in_a_save_is_not_blamed_on_the_plugin_that_saves(
    make: MakeRunner,
) -> None:
    class Layer(nn.Linear):
        def get_extra_state(self) -> Any:
            raise LookupError("no")

    runner = make(model=nn.Sequential(Layer(4, 3)), loss=F.cross_entropy, plugins=["checkpoint"])
    with pytest.raises(LookupError) as caught:
        runner.train()
    assert caught.value.__notes__[0] == "raised by the model, method 'state_dict'"

"""Tests of ``hookengine/events/hookimpl.py``: places and rhythms of single implementations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hookengine import Plugin, PluginManager, Sink, hookimpl
from tests.fixtures import MakeRunner


def test_an_implementation_is_first_or_last_not_both() -> None:
    with pytest.raises(ValueError, match="both tryfirst=True and trylast=True"):
        hookimpl(tryfirst=True, trylast=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(evry=3), "unknown argument of hookimpl 'evry'. Did you mean 'every'"),
        (dict(every=0), "at least 1"),
        (dict(every=-5), "at least 1"),
        (dict(every=2.0), "every takes a whole number"),
        (dict(every=True), "every takes a whole number"),
        (dict(every="3 epochs"), "the name of an option"),
        (dict(tryfirst="clip"), "tryfirst takes True or False, got 'clip'"),
        (dict(once=1), "once takes True or False"),
        (dict(after=3), "take the name of a plugin"),
        (dict(before=""), "take the name of a plugin"),
        (dict(before="clip, amp"), "take the name of a plugin"),
    ],
)
def test_invalid_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        hookimpl(**options)


def counting(event: str, **options: Any) -> tuple[list[Any], type]:
    """A plugin class with one hook that notes the counters, and the list of its notes."""
    seen: list[Any] = []

    def hook(self: Any, runner: Any) -> None:
        progress = runner.progress
        seen.append({"iter": progress.iter, "step": progress.step, "epoch": progress.epoch})

    method = hookimpl(**options)(hook)
    return seen, type("Counting", (Plugin,), {event: method, "__module__": __name__})


@pytest.mark.parametrize(
    ("event", "counter", "due"),
    [
        ("after_train_iter", "iter", [3, 6, 9]),
        ("before_train_iter", "iter", [0, 3, 6, 9]),
        ("should_step", "iter", [0, 3, 6, 9]),
        ("after_optim_step", "step", [3, 6]),
        ("before_optim_step", "step", [0, 3]),
        ("after_train_epoch", "epoch", []),
        ("before_train_epoch", "epoch", [0]),
    ],
)
def test_every_counts_what_the_event_is_of(
    make: MakeRunner, event: str, counter: str, due: list[int]
) -> None:
    seen, cls = counting(event, every=3)
    runner = make(plugins=[cls(), dict(type="accumulate", steps=2)], train_cfg=dict(max_epochs=2))
    runner.train()
    assert runner.progress.iter == 10
    assert runner.progress.step == 6
    assert [one[counter] for one in seen] == due


def test_every_counts_the_batches_of_an_evaluation(make: MakeRunner) -> None:
    seen = []
    runner = make(validate=True, test=True)
    for phase in ("val", "test"):
        runner.on(f"after_{phase}_iter", every=2)(lambda batch_idx: seen.append(batch_idx))
    runner.val()
    runner.test()
    assert seen == [1, 1]  # of three batches each


def test_every_may_be_an_option_that_is_read_at_each_event(make: MakeRunner) -> None:
    class Sometimes(Plugin):
        interval: int | None = 4

        def configure(self) -> None:
            self.seen: list[int] = []

        @hookimpl(every="interval")
        def after_train_iter(self, runner: Any) -> None:
            self.seen.append(runner.progress.iter)

    plugin = Sometimes()
    runner = make(plugins=[plugin], train_cfg=dict(max_epochs=2))
    runner.train()
    assert plugin.seen == [4, 8]
    plugin.interval = 3
    runner.train(max_epochs=3)
    assert plugin.seen == [4, 8, 12, 15]
    plugin.interval = None
    runner.train(max_epochs=4)
    assert plugin.seen == [4, 8, 12, 15]


def test_a_rhythm_that_cannot_be_is_refused() -> None:
    _, cls = counting("safe_point", every=10)
    with pytest.raises(TypeError, match=r"'counting', event 'safe_point': every=10 needs an event"):
        PluginManager([cls()])
    _, cls = counting("after_train_iter", every="intervall")
    with pytest.raises(TypeError, match="unknown option in every 'intervall'"):
        PluginManager([cls()])
    for value in ("ten", -1, 2.5, True):
        _, cls = counting("after_train_iter", every="interval")
        cls.interval = value  # type: ignore[attr-defined]
        with pytest.raises(TypeError, match="must be a whole number, at least 0, or None"):
            PluginManager([cls()])


def test_once_is_once_per_runner_also_when_plugins_change(make: MakeRunner) -> None:
    seen, cls = counting("after_train_iter", once=True)
    late, later = counting("before_train_iter", once=True, every=4)
    plugins = [cls(), later(plugin_name="later")]
    runner = make(plugins=plugins, train_cfg=dict(max_epochs=2))
    runner.on("after_train_iter", every=2)(lambda: runner.on("before_run")(lambda: None))
    runner.train()
    runner.train(max_epochs=3)
    assert [one["iter"] for one in seen] == [1]
    assert [one["iter"] for one in late] == [0]
    runner = make(plugins=[cls()])
    runner.train()
    assert [one["iter"] for one in seen] == [1, 1]


def test_a_hook_that_is_not_due_is_not_called_for_events_in_progress(make: MakeRunner) -> None:
    seen, cls = counting("before_train_epoch", every=2)
    runner = make(train_cfg=dict(max_epochs=4))

    @runner.on("before_train_iter", once=True, every=6)
    def add() -> None:
        runner.plugins.add(cls())

    runner.train()
    assert [one["epoch"] for one in seen] == [0, 2]


def test_on_takes_the_same_options(make: MakeRunner) -> None:
    runner = make(plugins=["ema"])
    seen = []

    @runner.on("after_train_iter", every=2, before="ema")
    def note() -> None:
        seen.append(runner.progress.iter)

    runner.train()
    assert seen == [2, 4, 6, 8, 10]
    order = runner.plugins.order()["after_train_iter"]
    assert [(p.plugin, p.reason, p.rhythm) for p in order] == [
        ("after_train_iter:note", "before ema", "every 2"),
        ("ema", "given order", ""),
    ]
    with pytest.raises(TypeError, match="unknown argument of hookimpl 'evry'"):
        runner.on("after_train_iter", evry=2)(note)  # type: ignore[call-arg]


def test_a_sink_keeps_the_options_of_its_methods() -> None:
    class Nowhere(Sink):
        @hookimpl(trylast=True)
        def configure(self, runner: Any) -> None: ...

        @hookimpl(tryfirst=True)
        def write(self, record: Any) -> None: ...

    order = PluginManager([Nowhere()]).order()
    assert [p.plugin for p in order["configure"]][-1] == "nowhere"
    assert order["configure"][-1].reason == "trylast"
    assert order["write"][0].reason == "tryfirst"


def test_pluggys_own_marker_works_too() -> None:
    import pluggy

    class Raw:
        @pluggy.HookimplMarker("hookengine")(trylast=True)
        def before_train(self) -> None: ...

    (place,) = PluginManager([Raw()], defaults=()).order()["before_train"]
    assert place.reason == "trylast"


def test_decorators_add_up_and_the_upper_one_wins() -> None:
    class Both:
        @hookimpl(after="clip", every=3)
        @hookimpl(every=2, once=True, trylast=True)
        def before_optim_step(self) -> None: ...

        @hookimpl(every=4)
        @classmethod
        def after_train_iter(cls) -> None: ...

        @hookimpl(once=True)
        @staticmethod
        def after_train() -> None: ...

    order = PluginManager([Both(), dict(type="clip", max_norm=1.0)], defaults=()).order()
    place = order["before_optim_step"][1]
    assert (place.reason, place.rhythm) == ("trylast, after clip", "every 3, once")
    assert order["after_train_iter"][0].rhythm == "every 4"
    assert order["after_train"][0].rhythm == "once"
    with pytest.raises(TypeError, match="hookimpl decorates a method, got 'clip'"):
        hookimpl("clip")  # type: ignore[call-overload]


def test_whole_numbers_of_numpy_will_do(make: MakeRunner) -> None:
    seen, cls = counting("after_train_iter", every=np.int64(4))
    make(plugins=[cls()]).train()
    assert [one["iter"] for one in seen] == [4, 8]
    seen, cls = counting("after_train_iter", every="interval")
    cls.interval = np.int64(4)  # type: ignore[attr-defined]
    make(plugins=[cls()]).train()
    assert [one["iter"] for one in seen] == [4, 8]


def test_a_function_has_no_options_to_name(make: MakeRunner) -> None:
    with pytest.raises(TypeError, match="a function has no options"):
        make().on("after_train_iter", every="interval")(lambda: None)


def test_a_sink_may_wrap_its_methods_itself() -> None:
    class Quiet(Sink):
        @hookimpl(trylast=True)
        @torch.no_grad()
        def configure(self) -> None:  # type: ignore[override]
            self.grad = torch.is_grad_enabled()

        def write(self, record: Any) -> None: ...

    manager = PluginManager([sink := Quiet()], defaults=())
    manager.configure()
    assert sink.grad is False
    assert manager.order()["configure"][0].reason == "trylast"


def test_an_option_that_no_longer_counts_is_blamed_on_its_plugin(make: MakeRunner) -> None:
    class Sometimes(Plugin):
        interval: Any = 2

        @hookimpl(every="interval")
        def after_train_iter(self) -> None:
            self.interval = "x"

    with pytest.raises(TypeError, match="unsupported operand") as caught:
        make(plugins=[Sometimes()]).train()
    assert "raised by plugin 'sometimes'" in caught.value.__notes__[0]
    assert "event 'after_train_iter', epoch 1, iteration 3" in caught.value.__notes__[0]

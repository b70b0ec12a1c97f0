"""Schedules are torch's, on real optimizer steps; and what they refuse."""

from __future__ import annotations

import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hookengine_schedule import Schedule
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader

from hookengine import BaseMetric, Plugin
from tests.fixtures import MakeData, MakeRunner, Toy

CONFIGS: dict[str, dict[str, Any]] = {
    "LambdaLR": dict(lr_lambda=lambda count: 0.8**count),
    "MultiplicativeLR": dict(lr_lambda=lambda count: 0.9),
    "StepLR": dict(step_size=2, gamma=0.5),
    "MultiStepLR": dict(milestones=[2, 3], gamma=0.5),
    "ConstantLR": dict(factor=0.5, total_iters=2),
    "LinearLR": dict(start_factor=0.2, total_iters=3),
    "ExponentialLR": dict(gamma=0.9),
    "PolynomialLR": dict(total_iters=4, power=2),
    "CosineAnnealingLR": dict(T_max=4),
    "CosineAnnealingWarmRestarts": dict(T_0=3),
    "CyclicLR": dict(base_lr=0.01, max_lr=0.1, step_size_up=2, cycle_momentum=False),
    "OneCycleLR": dict(max_lr=0.3, total_steps=20, cycle_momentum=False),
}
COMPOUND = {"SequentialLR", "ChainedScheduler", "ReduceLROnPlateau", "LRScheduler"}


class Rates(Plugin):
    """Keeps the learning rate that each iteration trained with."""

    def before_train(self) -> None:
        self.seen: list[float] = []

    def before_optim_step(self, optim_wrapper: Any) -> None:
        self.seen += optim_wrapper.get_lr()


def sgd() -> torch.optim.Optimizer:
    return torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)


def by_hand(optimizer: Any, scheduler: Any, epochs: int, by_epoch: bool) -> list[float]:
    """Five iterations an epoch."""
    rates = []
    for _ in range(epochs):
        for _ in range(5):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            if not by_epoch:
                scheduler.step()
        if by_epoch:
            scheduler.step()
    return rates


def run(make: MakeRunner, *plugins: Any, epochs: int = 4, **options: Any) -> list[float]:
    rates = Rates()
    runner = make(plugins=[*plugins, rates], train_cfg=dict(max_epochs=epochs), **options)
    runner.train()
    return rates.seen


def test_every_scheduler_of_torch_is_tried() -> None:
    known = {
        name
        for name, cls in vars(lr_scheduler).items()
        if isinstance(cls, type) and issubclass(cls, lr_scheduler.LRScheduler) and name[0] != "_"
    }
    assert {*CONFIGS} | COMPOUND == known


@pytest.mark.parametrize("by_epoch", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_scheduler_by_dict(make: MakeRunner, name: str, by_epoch: bool) -> None:
    optimizer = sgd()
    scheduler = getattr(lr_scheduler, name)(optimizer, **CONFIGS[name])
    expected = by_hand(optimizer, scheduler, 4, by_epoch)
    mine = run(make, Schedule(scheduler=dict(type=name, **CONFIGS[name]), by_epoch=by_epoch))
    assert mine == expected


@pytest.mark.parametrize(
    "scheduler",
    [
        "ExponentialLR",
        lr_scheduler.ExponentialLR,
        dict(type="ExponentialLR"),
        lambda optimizer: lr_scheduler.ChainedScheduler(
            [lr_scheduler.ExponentialLR(optimizer, 0.9)], optimizer
        ),
    ],
)
def test_other_ways_to_name_it(make: MakeRunner, scheduler: Any) -> None:
    if not callable(scheduler) or isinstance(scheduler, type):
        if not isinstance(scheduler, dict):
            scheduler = dict(type=scheduler)
        scheduler = dict(scheduler, gamma=0.9)
    optimizer = sgd()
    expected = by_hand(optimizer, lr_scheduler.ExponentialLR(optimizer, 0.9), 4, True)
    assert run(make, Schedule(scheduler=scheduler)) == expected


def test_an_instance_finds_its_optimizer(make: MakeRunner, toy: type[Toy]) -> None:
    model = toy()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = lr_scheduler.StepLR(optimizer, 1, 0.5)
    mine = run(make, Schedule(scheduler=scheduler), model=model, optim_wrapper=optimizer)
    assert mine == [0.1] * 5 + [0.05] * 5 + [0.025] * 5 + [0.0125] * 5


def test_by_default_it_follows_train_cfg(make: MakeRunner) -> None:
    rates = Rates()
    schedule = Schedule(scheduler=dict(type="StepLR", step_size=1, gamma=0.5))
    runner = make(plugins=[schedule, rates], train_cfg=dict(max_iters=3))
    runner.train()
    assert rates.seen == [0.1, 0.05, 0.025]


@pytest.mark.parametrize("by_epoch", [True, False])
def test_what_follows_from_the_runs_length_is_filled_in(make: MakeRunner, by_epoch: bool) -> None:
    total = 4 if by_epoch else 20
    for name, given, filled in (
        ("CosineAnnealingLR", {}, {"T_max": total}),
        ("OneCycleLR", dict(max_lr=0.3, cycle_momentum=False), {"total_steps": total}),
    ):
        optimizer = sgd()
        scheduler = getattr(lr_scheduler, name)(optimizer, **given, **filled)
        expected = by_hand(optimizer, scheduler, 4, by_epoch)
        assert (
            run(make, Schedule(scheduler=dict(type=name, **given), by_epoch=by_epoch)) == expected
        )


def test_windows_of_accumulated_gradients_make_fewer_steps(make: MakeRunner) -> None:
    schedule = Schedule(scheduler="CosineAnnealingLR", by_epoch=False)
    mine = run(make, schedule, dict(type="accumulate", steps=2))
    optimizer = sgd()
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, 12)  # three windows an epoch
    expected = []
    for _ in range(12):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert mine == expected


@pytest.mark.parametrize("by_epoch", [True, False])
def test_several_in_sequence(make: MakeRunner, by_epoch: bool) -> None:
    configs = [dict(type="LinearLR", start_factor=0.1, total_iters=2), "CosineAnnealingLR"]
    optimizer = sgd()
    parts = [
        lr_scheduler.LinearLR(optimizer, 0.1, total_iters=2),
        lr_scheduler.CosineAnnealingLR(optimizer, (4 if by_epoch else 20) - 2),
    ]
    expected = by_hand(optimizer, lr_scheduler.SequentialLR(optimizer, parts, [2]), 4, by_epoch)
    assert run(make, Schedule(scheduler=configs, milestones=[2], by_epoch=by_epoch)) == expected


@pytest.mark.parametrize("warmup", [6, 0.3])
def test_warm_up_then_a_schedule_by_step(make: MakeRunner, warmup: Any) -> None:
    schedule = Schedule(
        scheduler="CosineAnnealingLR", by_epoch=False, warmup=warmup, warmup_factor=0.1
    )
    optimizer = sgd()
    parts = [
        lr_scheduler.LinearLR(optimizer, 0.1, total_iters=6),
        lr_scheduler.CosineAnnealingLR(optimizer, 14),
    ]
    expected = by_hand(optimizer, lr_scheduler.SequentialLR(optimizer, parts, [6]), 4, False)
    assert run(make, schedule) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", ["MultiStepLR", "LambdaLR"])
def test_warm_up_over_a_schedule_by_epoch(make: MakeRunner, name: str) -> None:
    config = dict(type=name, **CONFIGS[name])
    optimizer = sgd()
    plain = by_hand(optimizer, getattr(lr_scheduler, name)(optimizer, **CONFIGS[name]), 4, True)
    factors = [min(1.0, 0.1 + 0.9 * step / 8) for step in range(20)]
    mine = run(make, Schedule(scheduler=config, by_epoch=True, warmup=8, warmup_factor=0.1))
    assert mine == pytest.approx([a * b for a, b in zip(plain, factors, strict=True)], rel=1e-12)


class Skips(Plugin):
    """Refuses some steps."""

    at: tuple[int, ...] = ()

    def optim_step(self, runner: Any) -> bool | None:
        return False if runner.progress.iter in self.at else None


@pytest.mark.parametrize("by_epoch", [True, False])
def test_it_moves_on_with_real_steps_only(make: MakeRunner, by_epoch: bool) -> None:
    config = dict(type="StepLR", step_size=1, gamma=0.5)
    skips = Skips(at=(0, 1, 2, 3, 4, 7))  # the whole first epoch, and one of the second
    mine = run(make, Schedule(scheduler=config, by_epoch=by_epoch), skips, epochs=3)
    if by_epoch:
        assert mine == [0.1] * 10 + [0.05] * 5
    else:
        halvings = [0, 0, 0, 0, 0, 0, 1, 2, 2, 3, 4, 5, 6, 7, 8]
        assert mine == [0.1 * 0.5**count for count in halvings]


class Losing(Plugin):
    """Replaces the metric by one that is told."""

    def after_val_epoch(self, runner: Any, metrics: Any) -> None:
        metrics["accuracy"] = [0.5, 0.4, 0.6, 0.6, 0.6][runner.progress.epoch - 1]


def test_reduce_on_plateau(make: MakeRunner) -> None:
    class First(Losing):
        before = ("schedule",)

    config = dict(type="ReduceLROnPlateau", patience=0, factor=0.5)
    schedule = Schedule(scheduler=config, metric="accuracy")
    mine = run(make, First(), schedule, epochs=5, validate=True)
    assert mine[::5] == [0.1, 0.1, 0.05, 0.05, 0.025]


def test_reduce_on_plateau_looks_only_at_validations_of_training(make: MakeRunner) -> None:
    config = dict(type="ReduceLROnPlateau", patience=0, factor=0.5)
    schedule = Schedule(scheduler=config, metric="accuracy")
    runner = make(plugins=[schedule], validate=True)
    for _ in range(4):
        runner.val()
    assert runner.optim_wrapper.get_lr() == [0.1]


def test_reduce_on_plateau_needs_a_metric_that_is_there(make: MakeRunner) -> None:
    config = dict(type="ReduceLROnPlateau")
    with pytest.raises(TypeError, match="needs metric="):
        make(plugins=[Schedule(scheduler=config)], validate=True)
    with pytest.raises(ValueError, match="this Runner does not validate"):
        make(plugins=[Schedule(scheduler=config, metric="accuracy")])
    with pytest.raises(ValueError, match="more or less of 'distance' is better"):
        make(plugins=[Schedule(scheduler=config, metric="distance")], validate=True)
    runner = make(plugins=[Schedule(scheduler=config, metric="val/accuracy")], validate=True)
    with pytest.raises(KeyError, match=r"unknown metric 'val/accuracy'\. Did you mean 'accuracy'"):
        runner.train()


@pytest.mark.parametrize(
    "options",
    [
        dict(scheduler=dict(type="CosineAnnealingLR")),
        dict(scheduler="CosineAnnealingLR", by_epoch=False, warmup=4),
        dict(scheduler=dict(type="MultiStepLR", milestones=[1, 2]), warmup=7),
        dict(scheduler=["ConstantLR", "CosineAnnealingLR"], milestones=[1]),
        dict(scheduler=dict(type="OneCycleLR", max_lr=0.3), by_epoch=False),
        dict(scheduler=dict(type="ReduceLROnPlateau", patience=0), metric="accuracy", warmup=7),
    ],
)
def test_a_run_that_is_cut_goes_on_with_its_schedule(
    make: MakeRunner, options: dict[str, Any], tmp_path: Path
) -> None:
    if isinstance(options["scheduler"], list):
        options = dict(
            options, scheduler=[dict(type="ExponentialLR", gamma=0.5), "CosineAnnealingLR"]
        )

    def runner(stop: bool = False) -> tuple[Any, Rates]:
        rates = Rates()
        made = make(
            plugins=[Schedule(**options), rates], train_cfg=dict(max_epochs=4), validate=True
        )
        if stop:
            made.on("after_train_iter")(
                lambda runner: runner.stop("cut") if runner.progress.iter == 8 else None
            )
        return made, rates

    straight, expected = runner()
    straight.train()
    first, before = runner(stop=True)
    first.train()
    torch.save(first.state_dict(), tmp_path / "state.pth")
    second, after = runner()
    second.load_state_dict(torch.load(tmp_path / "state.pth", weights_only=True))
    second.train()
    assert before.seen + after.seen == expected.seen
    assert torch.equal(second.bare_model.net.weight, straight.bare_model.net.weight)


def test_a_learning_rate_that_is_a_tensor(make: MakeRunner, toy: type[Toy]) -> None:
    model = toy()
    optimizer = torch.optim.SGD(model.parameters(), lr=torch.tensor(0.1), foreach=False)
    schedule = Schedule(scheduler="CosineAnnealingLR", by_epoch=False, warmup=5)
    mine = run(make, schedule, model=model, optim_wrapper=optimizer)
    assert mine == pytest.approx(run(make, Schedule(**schedule_options(schedule))), rel=1e-5)


def schedule_options(schedule: Schedule) -> dict[str, Any]:
    return {name: getattr(schedule, name) for name in ("scheduler", "by_epoch", "warmup")}


@pytest.mark.parametrize("lr", [0.3, 0.1, 0.07, 0.0123])
def test_a_learning_rate_that_is_a_tensor_goes_on_where_it_was_cut(
    make: MakeRunner, toy: type[Toy], lr: float
) -> None:
    def runner(epochs: int) -> Any:
        torch.manual_seed(0)
        model = toy()
        optimizer = torch.optim.SGD(model.parameters(), lr=torch.tensor(lr), foreach=False)
        schedule = Schedule(scheduler="ConstantLR", by_epoch=False, warmup=8)
        return make(
            model=model,
            optim_wrapper=optimizer,
            plugins=[schedule],
            train_cfg=dict(max_epochs=epochs),
        )

    straight, first, second = runner(2), runner(1), runner(2)
    straight.train()
    first.train()
    second.load_state_dict(first.state_dict())
    second.train()
    assert second.optim_wrapper.get_lr() == straight.optim_wrapper.get_lr()
    assert torch.equal(second.bare_model.net.weight, straight.bare_model.net.weight)


def test_a_run_that_is_cut_at_the_end_of_its_first_epoch_goes_on(make: MakeRunner) -> None:
    def runner(cut: bool = False) -> tuple[Any, Rates]:
        rates = Rates()
        made = make(plugins=[Schedule(scheduler="CosineAnnealingLR", warmup=7), rates])
        if cut:
            made.on("after_train_iter")(
                lambda runner: runner.stop("cut") if runner.progress.iter == 5 else None
            )
        return made, rates

    (straight, expected), (first, _), (second, rates) = runner(), runner(cut=True), runner()
    straight.train()
    first.train()
    assert first.progress.batch == 5
    second.load_state_dict(first.state_dict())
    second.train()
    assert rates.seen == expected.seen[5:]


def test_each_group_keeps_its_share(make: MakeRunner) -> None:
    wrapper = dict(
        optimizer=dict(type="SGD", lr=0.1), paramwise=dict(custom_keys={"bias": dict(lr_mult=2)})
    )
    mine = run(make, Schedule(scheduler="CosineAnnealingLR"), optim_wrapper=wrapper)
    assert mine[1::2] == pytest.approx([2 * rate for rate in mine[::2]])


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.parametrize("name", ["CosineAnnealingLR", "PolynomialLR", "OneCycleLR"])
@pytest.mark.parametrize("by_epoch", [True, False])
def test_beyond_its_end_a_schedule_stays_where_it_is(
    make: MakeRunner, caplog: pytest.LogCaptureFixture, name: str, by_epoch: bool
) -> None:
    config: dict[str, Any] = dict(type=name)
    if name == "OneCycleLR":
        config |= dict(max_lr=0.3, cycle_momentum=False)
    rates = Rates()
    schedule = Schedule(scheduler=config, by_epoch=by_epoch)
    runner = make(plugins=[schedule, rates], train_cfg=dict(max_epochs=4))
    runner.train()
    assert not warnings_of(caplog)
    runner.train(max_epochs=6)
    assert len(rates.seen) == 10
    assert len({*rates.seen}) == 1
    planned = "4 epochs, but this run continues to 6" if by_epoch else "20 optimizer steps"
    assert f"{name} was made for {planned}" in warnings_of(caplog)[0]


def test_a_schedule_without_a_length_of_the_run_is_not_warned_of(
    make: MakeRunner, caplog: pytest.LogCaptureFixture
) -> None:
    for scheduler in (
        dict(type="MultiStepLR", milestones=[1]),
        dict(type="CosineAnnealingLR", T_max=9),
    ):
        runner = make(plugins=[Schedule(scheduler=scheduler)])
        runner.train()
        runner.train(max_epochs=4)
    assert not warnings_of(caplog)


@pytest.mark.parametrize("last", ["OneCycleLR", "CosineAnnealingLR", "ExponentialLR"])
def test_a_sequence_ends_where_its_last_does(
    make: MakeRunner, caplog: pytest.LogCaptureFixture, last: str
) -> None:
    more: dict[str, dict[str, Any]] = {
        "OneCycleLR": dict(max_lr=0.3, cycle_momentum=False, anneal_strategy="linear"),
        "ExponentialLR": dict(gamma=0.5),
    }
    configs = [dict(type="CosineAnnealingLR"), dict(type=last, **more.get(last, {}))]
    rates = Rates()
    schedule = Schedule(scheduler=configs, milestones=[4], by_epoch=False)
    runner = make(plugins=[schedule, rates])
    runner.train()
    runner.train(max_epochs=4)
    assert min(rates.seen) > 0 or last != "OneCycleLR"
    assert len({*rates.seen}) == (10 if last == "ExponentialLR" else 1)
    assert bool(warnings_of(caplog)) == (last != "ExponentialLR")


def test_a_longer_run_goes_on_with_the_schedule_as_it_was_made(
    make: MakeRunner, caplog: pytest.LogCaptureFixture
) -> None:
    def runner(epochs: int, **options: Any) -> tuple[Any, Rates]:
        rates = Rates()
        schedule = Schedule(scheduler="CosineAnnealingLR", by_epoch=False, **options)
        return make(plugins=[schedule, rates], train_cfg=dict(max_epochs=epochs)), rates

    for options in (dict(), dict(warmup=0.4)):
        first, _ = runner(2, **options)
        first.train(max_epochs=1)
        straight, expected = runner(2, **options)
        straight.train()
        longer, rates = runner(4, **options)
        longer.load_state_dict(first.state_dict())
        longer.train()
        assert rates.seen[:5] == expected.seen[5:]
        assert rates.seen[5:] == [straight.optim_wrapper.get_lr()[0]] * 10
        assert "made for 10 optimizer steps, but this run continues to 20" in caplog.text


def test_a_warm_up_can_begin_where_the_state_has_none(make: MakeRunner) -> None:
    first = make()
    first.train()
    rates = Rates()
    schedule = Schedule(scheduler=dict(type="ConstantLR", factor=1), by_epoch=False, warmup=5)
    second = make(plugins=[schedule, rates], train_cfg=dict(max_epochs=4))
    second.load_state_dict(first.state_dict(), allow=["schedule"])
    second.train()
    factors = [min(1.0, 0.01 + 0.99 * step / 5) for step in range(10)]
    assert rates.seen == pytest.approx([0.1 * factor for factor in factors])


def test_a_resumed_run_that_ends_before_its_schedule_is_warned_about(
    make: MakeRunner, data: MakeData, caplog: pytest.LogCaptureFixture
) -> None:
    def run(size: int, epochs: int, state: Any = None) -> tuple[Any, str]:
        caplog.clear()
        schedule = Schedule(scheduler="CosineAnnealingLR", by_epoch=False)
        loader = DataLoader(data(), batch_size=size)
        runner = make(plugins=[schedule], train_dataloader=loader, train_cfg=dict(max_epochs=4))
        if state is not None:
            runner.load_state_dict(state, allow=["dataset"])
        runner.train(max_epochs=epochs)
        return runner.state_dict(), caplog.text

    state, text = run(4, 2)
    assert "does not reach" not in text
    assert "does not reach" not in run(4, 4, state)[1]
    _, text = run(10, 4, state)
    assert "CosineAnnealingLR was made for 20 optimizer steps" in text
    assert "the resumed run ends after 14. The learning rate does not reach its last" in text


def test_the_state_of_another_scheduler_is_refused(make: MakeRunner) -> None:
    state = make(plugins=[Schedule(scheduler="CosineAnnealingLR")]).state_dict()
    runner = make(plugins=[Schedule(scheduler=dict(type="StepLR", step_size=1))])
    with pytest.raises(ValueError, match="CosineAnnealingLR per epoch, but this run has StepLR"):
        runner.load_state_dict(state)
    other: Any
    for other in (
        dict(scheduler="CosineAnnealingLR", by_epoch=False),
        dict(scheduler=["ConstantLR", "CosineAnnealingLR"], milestones=[1]),
    ):
        with pytest.raises(ValueError, match="the saved state is of CosineAnnealingLR per epoch"):
            make(plugins=[Schedule(**other)]).load_state_dict(state)
    del state["plugins"]["schedule"]
    runner.load_state_dict(state, allow=["schedule"])


def test_a_second_schedule_for_one_optimizer_is_refused(make: MakeRunner) -> None:
    with pytest.raises(ValueError, match="already has a schedule, from the plugin 'schedule'"):
        make(
            plugins=[
                Schedule(scheduler="CosineAnnealingLR"),
                Schedule(scheduler="ConstantLR", plugin_name="second"),
            ]
        )


def test_a_scheduler_that_cannot_be_saved_is_refused(make: MakeRunner) -> None:
    class Odd(lr_scheduler.LRScheduler):
        def __init__(self, optimizer: Any) -> None:
            self.function = lambda: 1
            super().__init__(optimizer)

        def get_lr(self) -> Any:
            return [0.1]

    with pytest.raises(TypeError, match=r"Odd.state_dict\(\) holds <function .* as 'function'"):
        make(plugins=[Schedule(scheduler=Odd)])


def test_the_plan_is_told(make: MakeRunner, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        run(
            make,
            Schedule(scheduler="CosineAnnealingLR", by_epoch=False, warmup=2),
            dict(type="accumulate", steps=2),
        )
    text = "schedule: CosineAnnealingLR per optimizer step, made for 12, warm-up over 2 steps"
    assert text in caplog.text
    run(make, Schedule(scheduler="ConstantLR", warmup=500))
    assert "warm-up of 500 optimizer steps does not end within this run of 20" in caplog.text


def test_by_default_what_moves_on_by_batch_does_so(make: MakeRunner) -> None:
    config = dict(type="OneCycleLR", max_lr=0.3, cycle_momentum=False)
    assert len({*run(make, Schedule(scheduler=config))}) == 20
    torchs: dict[str, Any] = dict(max_lr=0.3, cycle_momentum=False, total_steps=20)
    by_function = Schedule(scheduler=lambda optimizer: lr_scheduler.OneCycleLR(optimizer, **torchs))
    assert len({*run(make, by_function)}) == 20


def test_it_finds_the_window_of_any_plugin_that_accumulates(make: MakeRunner) -> None:
    class Other(Plugin):
        def setup_optimizer(self, optim_wrapper: Any) -> None:
            optim_wrapper.window_length = 5

    schedule = Schedule(scheduler="CosineAnnealingLR", by_epoch=False)
    runner = make(plugins=[schedule, Other()])
    assert runner.state_dict()["plugins"]["schedule"]["optimizer"]["end"] == 2


def test_a_runner_that_does_not_train_needs_no_schedule(make: MakeRunner) -> None:
    schedule = Schedule(scheduler="CosineAnnealingLR")
    none: Any = dict(train_dataloader=None, train_cfg=None, optim_wrapper=None)
    make(plugins=[schedule], validate=True, **none).val()


def unsized() -> Any:
    class Batches:
        def __iter__(self) -> Any:
            return iter([(torch.ones(1, 4), torch.zeros(1, dtype=torch.long))])

    return Batches()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(scheduler="CosineAnealingLR"), KeyError, "Did you mean 'CosineAnnealingLR'"),
        (dict(scheduler=dict(T_max=3)), KeyError, "needs a 'type'"),
        (dict(scheduler=3), TypeError, "a scheduler, a function of the optimizer"),
        (dict(scheduler=lambda optimizer: 3), TypeError, "must return an LRScheduler"),
        (dict(scheduler=dict(type="StepLR", step=1)), TypeError, "'step'"),
        (
            dict(scheduler=dict(type="StepLR", step_size=1, by_epoch=True)),
            TypeError,
            "of the plugin",
        ),
        (dict(scheduler="ExponentialLR", milestones=[1]), TypeError, "need a list of schedulers"),
        (dict(scheduler=["ConstantLR", "LinearLR"]), ValueError, "need 1 increasing"),
        (
            dict(scheduler=["ConstantLR", "CosineAnnealingLR"], milestones=[2]),
            ValueError,
            "at or beyond the end",
        ),
        (dict(scheduler="ConstantLR", optimizer="critic"), KeyError, "unknown optimizer 'critic'"),
        (
            dict(scheduler=lr_scheduler.ConstantLR(sgd())),
            ValueError,
            "belongs to an optimizer that this Runner does not have",
        ),
        (
            dict(scheduler=[lr_scheduler.ConstantLR(sgd()), "LinearLR"], milestones=[1]),
            ValueError,
            "belongs to another optimizer",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_training(
    make: MakeRunner, options: Any, error: Any, message: str
) -> None:
    with pytest.raises(error, match=message):
        make(plugins=[Schedule(**options)])


def test_what_needs_the_runs_length_says_so(make: MakeRunner) -> None:
    options: Any
    for options, message in (
        (dict(scheduler="CosineAnnealingLR", by_epoch=False), "CosineAnnealingLR needs T_max"),
        (dict(scheduler="ConstantLR", warmup=0.1), "warmup=0.1 is a share of the run"),
    ):
        with pytest.raises(ValueError, match=message):
            make(plugins=[Schedule(**options)], train_dataloader=unsized())


@pytest.mark.parametrize("warmup", [-1, 1.5, 1.0])
def test_a_warm_up_that_is_neither_steps_nor_a_share(warmup: Any) -> None:
    with pytest.raises(TypeError, match="warmup"):
        Schedule(scheduler="ConstantLR", warmup=warmup)


def test_several_optimizers_have_a_schedule_each(make: MakeRunner) -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

        def train_step(self, data: Any, optim_wrapper: Any) -> dict[str, Any]:
            for name in ("a", "b"):
                loss = nn.functional.cross_entropy(getattr(self, name)(data[0]), data[1])
                optim_wrapper[name].update_params(loss)
            return {}

    runner = make(
        model=Pair(),
        train_dataloader=DataLoader([(torch.ones(4), 1)] * 4, batch_size=4),  # type: ignore[arg-type]
        optim_wrapper={n: dict(optimizer=dict(type="SGD", lr=1.0)) for n in ("a", "b")},
        plugins=[
            Schedule(scheduler=dict(type="ExponentialLR", gamma=0.5), optimizer="a"),
            Schedule(
                scheduler=dict(type="ExponentialLR", gamma=0.1), optimizer="b", plugin_name="for b"
            ),
        ],
    )
    runner.train()
    rates = {name: wrapper.get_lr() for name, wrapper in runner.optim_wrapper.items()}
    assert rates == {"a": [0.25], "b": pytest.approx([0.01])}


class Holding(lr_scheduler.LambdaLR):
    """A scheduler that also keeps something else in its state."""

    def __init__(self, optimizer: Any, kept: Any) -> None:
        super().__init__(optimizer, lambda _: 1.0)
        self.kept = kept


class Pair(NamedTuple):
    first: Any
    second: Any


@pytest.mark.parametrize(
    ("kept", "place"),
    [
        (object(), "'kept'"),
        ([0, {"a": object()}], "'kept'[1]['a']"),
        (defaultdict(list, a=[object()]), "'kept'['a'][0]"),
        (Pair(1, object()), "'kept'[1]"),
    ],
    ids=["itself", "nested", "in a defaultdict", "in a named tuple"],
)
def test_a_state_that_no_checkpoint_can_hold_is_refused(
    make: MakeRunner, kept: Any, place: str
) -> None:
    with pytest.raises(TypeError, match="cannot hold safely") as caught:
        make(plugins=[dict(type="schedule", scheduler=dict(type=Holding, kept=kept))])
    assert f"as {place}," in str(caught.value)


@pytest.mark.parametrize(
    "kept", [np.float64(0.5), np.int64(2), Pair(1, 2.0), defaultdict(int, a=1), {1, 2}]
)
def test_subclasses_of_plain_types_are_left_to_who_saves(make: MakeRunner, kept: Any) -> None:
    make(plugins=[dict(type="schedule", scheduler=dict(type=Holding, kept=kept))]).train()


@pytest.mark.parametrize("later", ["loss", "accuracy"])
def test_a_plateau_of_another_metric_starts_over_and_says_so(
    make: MakeRunner, capsys: pytest.CaptureFixture[str], later: str
) -> None:
    def build(metric: str, epochs: int) -> Any:
        mode = "min" if metric == "loss" else "max"
        config = dict(type="ReduceLROnPlateau", patience=5, mode=mode)
        return make(
            plugins=[dict(type="schedule", scheduler=config, metric=metric), "logging"],
            validate=True,
            val_cfg=dict(loss=True),
            train_cfg=dict(max_epochs=epochs),
        )

    first = build("loss", 1)
    first.train()
    second = build(later, 3)
    second.load_state_dict(first.state_dict())
    scheduler = second.plugins["schedule"]._tracks["optimizer"].scheduler
    seen: list[float] = []
    second.on("after_val_epoch")(lambda metrics: seen.append(metrics[later]))
    second.train()
    best = {"loss": min, "accuracy": max}[later]
    before = [first.val_loop.metrics["loss"]] if later == "loss" else []
    assert scheduler.best == best([*before, *seen])
    said = "it starts over, at the current learning rate" in capsys.readouterr().out
    assert said is (later != "loss")


@pytest.mark.parametrize("change", ["metric", "mode", "nothing"])
def test_a_plateau_that_starts_over_does_so_in_the_direction_of_the_script(
    make: MakeRunner, caplog: pytest.LogCaptureFixture, change: str
) -> None:
    """Its values improve from then on, so the learning rate stays."""

    class Falling(BaseMetric):
        count = 0

        def process(self, data_batch: Any, data_samples: Any) -> None:
            self.results.append(0)

        def compute_metrics(self, results: list[Any]) -> dict[str, Any]:
            Falling.count += 1
            return {"error": 99.0 - Falling.count, "score": 0.5}

    def run(metric: str, mode: str, epochs: int, state: Any = None) -> Any:
        config = dict(type="ReduceLROnPlateau", patience=2, mode=mode)
        runner = make(
            plugins=[Schedule(scheduler=config, metric=metric)],
            validate=True,
            val_evaluator=Falling(),
            train_cfg=dict(max_epochs=epochs),
        )
        if state is not None:
            runner.load_state_dict(state)
        runner.train()
        return runner

    first = {"metric": ("score", "max"), "mode": ("error", "max"), "nothing": ("error", "min")}
    second = run("error", "min", 9, run(*first[change], 2).state_dict())
    assert second.optim_wrapper.get_lr() == [0.1]
    assert ("it starts over" in caplog.text) == (change != "nothing")
    assert "instead of" not in caplog.text


@pytest.mark.parametrize("plugin", ["schedule", "swa"])
def test_warnings_that_were_shown_are_not_shown_again(make: MakeRunner, plugin: str) -> None:
    """Python keeps them in a registry, which `warnings.catch_warnings` clears."""
    options: dict[str, Any] = dict(begin=1, lr=0.1)
    if plugin == "schedule":
        options = dict(scheduler=dict(type="StepLR", step_size=1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        runner = make(plugins=[dict(type=plugin, **options)], train_cfg=dict(max_epochs=4))
        runner.on("after_train_epoch")(lambda: warnings.warn("of a user", stacklevel=1))
        runner.train()
    assert [str(w.message) for w in caught if "of a user" in str(w.message)] == ["of a user"]

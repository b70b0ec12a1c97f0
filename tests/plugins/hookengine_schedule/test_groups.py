"""Parameter groups that are added during training, and options that a checkpoint replaces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hookengine_schedule import Schedule
from torch.optim import lr_scheduler

from hookengine import Plugin
from tests.fixtures import MakeRunner, Toy

SCHEDULES: dict[str, dict[str, Any]] = {
    "by epoch": dict(scheduler=dict(type="StepLR", step_size=1)),
    "cosine": dict(scheduler="CosineAnnealingLR", by_epoch=False),
    "with a minimum": dict(scheduler=dict(type="CosineAnnealingLR", eta_min=1e-3), warmup=7),
    "one cycle": dict(scheduler=dict(type="OneCycleLR", max_lr=0.3)),
    "cyclic": dict(scheduler=dict(type="CyclicLR", base_lr=0.01, max_lr=0.1), warmup=3),
    "lambda": dict(scheduler=dict(type="LambdaLR", lr_lambda=lambda n: 0.8**n), by_epoch=False),
    "product": dict(scheduler=dict(type="MultiplicativeLR", lr_lambda=lambda _: 0.9)),
    "restarts": dict(scheduler=dict(type="CosineAnnealingWarmRestarts", T_0=3), by_epoch=False),
    "polynomial": dict(scheduler="PolynomialLR", by_epoch=False, warmup=4),
    "in sequence": dict(
        scheduler=["LinearLR", "CosineAnnealingLR"], milestones=[3], by_epoch=False
    ),
    "chained": dict(
        scheduler=lambda optimizer: lr_scheduler.ChainedScheduler(
            [lr_scheduler.ExponentialLR(optimizer, 0.9), lr_scheduler.StepLR(optimizer, 2)]
        )
    ),
}
PLATEAU = dict(
    scheduler=dict(type="ReduceLROnPlateau", patience=0, mode="min", min_lr=1e-6),
    metric="accuracy",
    warmup=7,
)


class Adding(Plugin):
    """Trains the bias from an iteration on, also after a resume."""

    def __init__(self, at: int, lr: float | torch.Tensor = 0.02) -> None:
        self.at = at
        self.lr = lr
        self.seen: list[list[float]] = []

    def add(self, runner: Any) -> None:
        bias = runner.bare_model.net.bias
        runner.optim_wrapper.optimizer.add_param_group(dict(params=[bias], lr=self.lr))

    def before_train_iter(self, runner: Any) -> None:
        if runner.progress.iter == self.at:
            self.add(runner)

    def before_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        if 0 <= self.at < checkpoint["progress"]["iter"]:
            self.add(runner)

    def before_optim_step(self, optim_wrapper: Any) -> None:
        self.seen.append(optim_wrapper.get_lr())


def build(
    make: MakeRunner, adding: Adding, *plugins: Any, optimizer: Any = None, **options: Any
) -> Any:
    """Build a Runner over 20 steps that trains the weight, and the bias from when it is added."""
    torch.manual_seed(0)
    model = Toy()
    groups: list[dict[str, Any]] = [dict(params=[model.net.weight])]
    if adding.at < 0:
        groups.append(dict(params=[model.net.bias], lr=adding.lr))
    options.setdefault("train_cfg", dict(max_epochs=4))
    if optimizer is None:
        optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    else:
        optimizer.param_groups[0]["params"] = [model.net.weight]
    return make(
        model=model, optim_wrapper=optimizer, plugins=[adding, *plugins], validate=True, **options
    )


def stop_at(runner: Any, iteration: int) -> None:
    runner.on("after_train_iter")(
        lambda runner: runner.stop("cut") if runner.progress.iter == iteration else None
    )


def schedule_of(schedule: Schedule) -> dict[str, Any]:
    return dict(scheduler=schedule.scheduler, by_epoch=schedule.by_epoch, warmup=schedule.warmup)


def rates(make: MakeRunner, at: int, *plugins: Any) -> list[list[float]]:
    adding = Adding(at)
    build(make, adding, *plugins).train()
    return adding.seen


@pytest.mark.parametrize("options", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("at", [2, 11])
def test_an_added_group_has_the_rates_it_would_have_had_from_the_start(
    make: MakeRunner, options: dict[str, Any], at: int
) -> None:
    from_start = rates(make, -1, Schedule(**options))
    assert rates(make, at, Schedule(**options)) == [
        known[:1] if iteration < at else known for iteration, known in enumerate(from_start)
    ]


def test_a_plateau_reduces_an_added_group_from_then_on(make: MakeRunner) -> None:
    seen = rates(make, 12, Schedule(**PLATEAU))  # type: ignore[arg-type]
    assert [len(known) for known in seen] == [1] * 12 + [2] * 8
    assert seen[12][1] == 0.02
    assert seen[-1][1] / 0.02 == pytest.approx(seen[-1][0] / seen[12][0])


@pytest.mark.parametrize("at", [6, 11, 17])
def test_swa_moves_an_added_group_to_its_rate(make: MakeRunner, at: int) -> None:
    swa = dict(type="swa", begin=1, lr=0.05, anneal_epochs="8 steps")
    seen = rates(make, at, swa, Schedule(scheduler="CosineAnnealingLR"))
    assert [len(known) for known in seen] == [1] * at + [2] * (20 - at)
    assert seen[-1] == pytest.approx([0.05, 0.05])


@pytest.mark.parametrize(
    "plugins",
    [
        (),
        *((dict(type="schedule", **options),) for options in SCHEDULES.values()),
        (dict(type="schedule", **PLATEAU),),
        (dict(type="swa", begin=1, lr=0.05, anneal_epochs="8 steps"),),
        ("ema", "amp", dict(type="accumulate", steps=2), dict(type="clip", max_norm=1.0)),
    ],
    ids=["nothing", *SCHEDULES, "plateau", "swa", "other plugins"],
)
def test_a_run_with_an_added_group_resumes_exactly(
    make: MakeRunner, plugins: tuple[Any, ...], tmp_path: Path
) -> None:
    def runner() -> tuple[Any, Adding]:
        adding = Adding(3)
        return build(make, adding, *plugins), adding

    straight, expected = runner()
    straight.train()
    first, before = runner()
    stop_at(first, 8)
    first.train()
    torch.save(first.state_dict(), tmp_path / "state.pth")
    second, after = runner()
    second.load_state_dict(torch.load(tmp_path / "state.pth", weights_only=True))
    second.train()
    assert before.seen + after.seen == expected.seen
    for name, value in straight.bare_model.state_dict().items():
        assert torch.equal(second.bare_model.state_dict()[name], value), name


def test_without_the_event_the_resume_says_what_is_missing(make: MakeRunner) -> None:
    first = build(make, Adding(3))
    first.train()

    second = build(make, Adding(99))
    with pytest.raises(ValueError, match=r"groups of \[1\] .* of \[1, 1\].*before_load_checkpoint"):
        second.load_state_dict(first.state_dict())


@pytest.mark.parametrize("options", SCHEDULES.values(), ids=SCHEDULES)
def test_an_optimizer_that_starts_over_with_fewer_groups_keeps_its_schedule(
    make: MakeRunner, options: dict[str, Any]
) -> None:
    straight = Adding(99)
    build(make, straight, Schedule(**options)).train()
    first = build(make, Adding(3), Schedule(**options))
    stop_at(first, 10)
    first.train()
    state = first.state_dict()
    after = Adding(99)
    second = build(make, after, Schedule(**options))
    second.load_state_dict(state, allow=["optimizer"])
    second.train()
    assert after.seen == [pytest.approx(known) for known in straight.seen[10:]]


def test_swa_starts_over_with_fewer_groups(make: MakeRunner) -> None:
    swa = dict(type="swa", begin=1, lr=0.05, anneal_epochs="4 steps")
    first = build(make, Adding(3), swa)
    stop_at(first, 10)
    first.train()
    after = Adding(99)
    second = build(make, after, swa)
    second.load_state_dict(first.state_dict(), allow=["optimizer"])
    second.train()
    assert after.seen[-1] == pytest.approx([0.05])


def test_a_scheduler_that_the_script_has_created_is_refused(make: MakeRunner) -> None:
    optimizer = build(make, Adding(3)).optim_wrapper.optimizer
    schedule = Schedule(scheduler=lr_scheduler.StepLR(optimizer, 2))
    runner = build(make, Adding(3), schedule, optimizer=optimizer)
    with pytest.raises(ValueError, match=r"before parameter group 1 .* or as a function"):
        runner.train()


def test_options_per_group_cannot_be_extended(make: MakeRunner) -> None:
    functions = [lambda n: 0.9**n, lambda n: 0.8**n]
    schedule = Schedule(scheduler=dict(type="LambdaLR", lr_lambda=functions))
    runner = build(make, Adding(-1), schedule)

    @runner.on("before_train_epoch")
    def add(runner: Any) -> None:
        more = torch.nn.Parameter(torch.ones(1))
        runner.optim_wrapper.optimizer.add_param_group(dict(params=[more]))

    with pytest.raises(ValueError, match="lr_lambda") as caught:
        runner.train()
    assert "one value for all groups" in "".join(caught.value.__notes__)


def test_a_scheduler_that_the_script_extends_itself_is_left_alone(make: MakeRunner) -> None:
    adding = Adding(3)
    optimizer = build(make, adding).optim_wrapper.optimizer
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
    runner = build(make, adding, Schedule(scheduler=scheduler, by_epoch=False), optimizer=optimizer)
    runner.on("before_train_iter", after="*")(
        lambda runner: scheduler.base_lrs.append(0.02) if runner.progress.iter == 3 else None
    )
    runner.train()
    assert [known[1] for known in adding.seen[3:6]] == [0.02, 0.01, 0.005]


@pytest.mark.parametrize("replaced", [False, True])
@pytest.mark.parametrize(
    "plugin",
    [dict(type="schedule", scheduler="CosineAnnealingLR"), dict(type="swa", begin=1, lr=0.05)],
    ids=["schedule", "swa"],
)
def test_a_group_that_is_removed_is_an_error(make: MakeRunner, plugin: Any, replaced: bool) -> None:
    if replaced and plugin["type"] == "swa":
        return  # the same rate is right for the other group
    adding = Adding(-1)
    runner = build(make, adding, plugin)

    @runner.on("after_train_epoch", after="*")
    def remove(runner: Any) -> None:
        if runner.progress.epoch == 2:
            del runner.optim_wrapper.param_groups[1]
            if replaced:
                adding.add(runner)

    with pytest.raises(ValueError, match=r"parameter group.*Keep the groups.*requires_grad_"):
        runner.train()


def test_a_group_that_is_added_right_before_the_step_follows_at_once(make: MakeRunner) -> None:
    expected = rates(make, -1, Schedule(**SCHEDULES["cosine"]))

    class Late(Adding):
        def before_train_iter(self, runner: Any) -> None: ...

        def before_optim_step(self, runner: Any) -> None:  # type: ignore[override]
            if runner.progress.step == self.at:
                self.add(runner)

        def optim_step(self, optim_wrapper: Any) -> None:
            self.seen.append(optim_wrapper.get_lr())

    late = Late(7)  # type: ignore[call-arg, arg-type]
    build(make, late, Schedule(**SCHEDULES["cosine"])).train()
    assert late.seen[7:] == expected[7:]


def test_a_group_that_shares_a_tensor_with_another_gets_a_rate_of_its_own(
    make: MakeRunner,
) -> None:
    """The optimizer gives its default tensor to all groups without a learning rate."""

    def run(lr: Any, plugin: dict[str, Any]) -> list[list[float]]:
        torch.manual_seed(0)
        model = Toy()
        adding = Adding(10)
        optimizer = torch.optim.SGD([model.net.weight], lr=lr)
        adding.add = lambda runner: optimizer.add_param_group(  # type: ignore[method-assign]
            dict(params=[model.net.bias])
        )
        make(
            model=model,
            optim_wrapper=optimizer,
            plugins=[adding, plugin],
            train_cfg=dict(max_epochs=4),
        ).train()
        return adding.seen

    for plugin in (
        dict(type="schedule", **SCHEDULES["cosine"]),
        dict(type="schedule", **SCHEDULES["polynomial"]),
        dict(type="swa", begin=1, lr=0.05, anneal_epochs=2),
    ):
        numbers = run(0.1, plugin)
        assert run(torch.tensor(0.1), plugin) == [pytest.approx(n, rel=1e-5) for n in numbers]


def test_swa_adds_a_group_after_the_script_has_set_the_initial_rate_to_a_number(
    make: MakeRunner,
) -> None:
    torch.manual_seed(0)
    model = Toy()
    adding = Adding(10)
    optimizer = torch.optim.SGD([model.net.weight], lr=torch.tensor(0.1))
    optimizer.param_groups[0]["initial_lr"] = 0.1
    adding.add = lambda runner: optimizer.add_param_group(  # type: ignore[method-assign]
        dict(params=[model.net.bias])
    )
    swa = dict(type="swa", begin=1, lr=0.05, anneal_epochs=2)
    options: dict[str, Any] = dict(train_cfg=dict(max_epochs=4), plugins=[adding, swa])
    make(model=model, optim_wrapper=optimizer, **options).train()
    assert adding.seen[10][1] == pytest.approx(0.1)
    assert adding.seen[-1] == pytest.approx([0.05, 0.05])


def test_a_function_that_returns_the_same_scheduler_is_refused(make: MakeRunner) -> None:
    made: list[Any] = []

    def same(optimizer: Any) -> Any:
        if not made:
            made.append(lr_scheduler.StepLR(optimizer, 2))
        return made[0]

    with pytest.raises(ValueError, match="a new scheduler in each call"):
        build(make, Adding(6), Schedule(scheduler=same)).train()


class Floors(lr_scheduler.LRScheduler):
    """Keeps a value per group in an attribute that torch does not know."""

    def __init__(self, optimizer: Any) -> None:
        self.floors = [group["lr"] / 10 for group in optimizer.param_groups]
        super().__init__(optimizer)

    def get_lr(self) -> Any:
        return [max(f, b * 0.9**self.last_epoch) for f, b in zip(self.floors, self.base_lrs)]  # noqa: B905


class Halving(lr_scheduler.LRScheduler):
    """Needs only what torch keeps of each group."""

    def get_lr(self) -> Any:
        return [base * 0.5**self.last_epoch for base in self.base_lrs]


@pytest.mark.parametrize(
    "options",
    [
        dict(scheduler=dict(type=Floors)),
        dict(scheduler=dict(type="ReduceLROnPlateau", min_lr=[0.0]), metric="accuracy"),
    ],
)
def test_a_scheduler_with_values_per_group_of_its_own_is_refused(
    make: MakeRunner, options: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match="parameter group 1 was added, and cannot be extended"):
        build(make, Adding(6), Schedule(**options)).train()


def test_a_schedulers_subclass_is_extended(make: MakeRunner) -> None:
    options: dict[str, Any] = dict(scheduler=dict(type=Halving))
    assert rates(make, 12, Schedule(**options))[12:] == rates(make, -1, Schedule(**options))[12:]


@pytest.mark.parametrize("groups", [(1, 2), (2, 1)])
def test_an_optimizer_that_starts_over_during_the_warm_up(
    make: MakeRunner, groups: tuple[int, int]
) -> None:
    schedule = dict(type="schedule", scheduler="CosineAnnealingLR", warmup=15)
    first, second = (Adding(-1 if number == 2 else 99) for number in groups)
    straight = Adding(second.at)
    build(make, straight, schedule).train()
    runner = build(make, first, schedule)
    stop_at(runner, 8)
    runner.train()
    again = build(make, second, schedule)
    again.load_state_dict(runner.state_dict(), allow=["optimizer"])
    again.train()
    assert second.seen == [pytest.approx(known) for known in straight.seen[8:]]


@pytest.mark.parametrize("warmup", [0, 12])
def test_another_initial_rate_takes_effect_with_an_instance_too(
    make: MakeRunner, warmup: int
) -> None:
    def run(created: bool, state: Any = None) -> Any:
        def scheduler(optimizer: Any) -> Any:
            return lr_scheduler.LambdaLR(optimizer, lambda n: 1 / (1 + n))

        optimizer = build(make, Adding(99)).optim_wrapper.optimizer
        given = scheduler(optimizer) if created else scheduler
        seen = Adding(99)
        schedule = Schedule(scheduler=given, warmup=warmup, by_epoch=True)
        runner = build(make, seen, schedule, optimizer=optimizer)
        if state is None:
            stop_at(runner, 8)
        else:
            runner.load_state_dict(state)
            runner.optim_wrapper.param_groups[0]["initial_lr"] = 0.03
        runner.train()
        return seen.seen, runner.state_dict()

    seen = [run(created, run(created)[1])[0] for created in (False, True)]
    assert seen[1] == [pytest.approx(known) for known in seen[0]]


def test_a_rate_that_is_a_tensor_stays_the_same_tensor(make: MakeRunner) -> None:
    lr = torch.tensor(0.02)
    adding = Adding(6, lr)
    schedule = Schedule(scheduler="CosineAnnealingLR", by_epoch=False, warmup=3)
    runner = build(make, adding, schedule)
    runner.train()
    assert runner.optim_wrapper.param_groups[1]["lr"] is lr
    numbers = rates(make, 6, Schedule(**schedule_of(schedule)))
    assert adding.seen == [pytest.approx(known, rel=1e-5) for known in numbers]


# -- options that a checkpoint replaces -----------------------------------------------------------


@pytest.mark.parametrize(
    ("then", "now", "said"),
    [
        (dict(type="StepLR", step_size=3), dict(type="StepLR", step_size=2), "step_size 3 inst"),
        (
            dict(type="ExponentialLR", gamma=0.5),
            dict(type="ExponentialLR", gamma=0.9),
            "gamma 0.5 instead of 0.9",
        ),
        (
            dict(type="CosineAnnealingLR", T_max=9, eta_min=0.1),
            dict(type="CosineAnnealingLR", T_max=8, eta_min=0.0),
            "T_max 9 instead of 8, eta_min 0.1 instead of 0.0",
        ),
        (
            [dict(type="StepLR", step_size=3), "ConstantLR"],
            [dict(type="StepLR", step_size=5), "ConstantLR"],
            "step_size 3 instead of 5",
        ),
        ("CosineAnnealingLR", "CosineAnnealingLR", None),
    ],
)
def test_changed_options_of_a_schedule_are_said(
    make: MakeRunner, caplog: pytest.LogCaptureFixture, then: Any, now: Any, said: str | None
) -> None:
    more: dict[str, Any] = dict(milestones=[2]) if isinstance(then, list) else {}
    first = build(make, Adding(99), Schedule(scheduler=then, **more))
    second = build(make, Adding(99), Schedule(scheduler=now, **more))
    caplog.clear()
    second.load_state_dict(first.state_dict())
    warned = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert (said in warned[0]) if said else not warned


def test_a_changed_warm_up_is_said(make: MakeRunner, caplog: pytest.LogCaptureFixture) -> None:
    first, second = (
        build(make, Adding(99), Schedule(scheduler="ConstantLR", warmup=steps)) for steps in (3, 5)
    )
    second.load_state_dict(first.state_dict())
    assert "warmup 3 instead of 5" in caplog.text


@pytest.mark.parametrize("options", SCHEDULES.values(), ids=SCHEDULES)
def test_another_initial_rate_takes_effect_after_a_resume(
    make: MakeRunner, options: dict[str, Any]
) -> None:
    """As the warning about changed options says to do it."""
    if "cycl" in str(options).lower():
        return  # these two have their own rates, and ignore those of the groups
    expected = Adding(99)
    straight = build(make, expected, Schedule(**options))
    straight.optim_wrapper.param_groups[0]["initial_lr"] = 0.03
    straight.train()
    first = build(make, Adding(99), Schedule(**options))
    stop_at(first, 8)
    first.train()
    after = Adding(99)
    second = build(make, after, Schedule(**options))
    second.load_state_dict(first.state_dict())
    second.optim_wrapper.param_groups[0]["initial_lr"] = 0.03
    second.train()
    assert after.seen == [pytest.approx(known) for known in expected.seen[8:]]

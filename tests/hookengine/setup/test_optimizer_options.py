"""Options of an optimizer that the script has changed before a resume."""

from __future__ import annotations

import copy
import inspect
import re
from typing import Any

import pytest
import torch
from torch import nn

from hookengine import BaseModel, OptimWrapper, OptimWrapperDict, Plugin
from tests.fixtures import MakeRunner, Toy


def adam(*groups: dict[str, Any], **options: Any) -> Any:
    """Build a model, and AdamW over its weight and its bias, in one group or in two."""
    torch.manual_seed(0)
    model = Toy()
    parts = [[model.net.weight], [model.net.bias]] if len(groups) == 2 else [[*model.parameters()]]
    made: list[dict[str, Any]] = [
        {**group, "params": part} for group, part in zip(groups or ({},), parts, strict=True)
    ]
    return dict(model=model, optim_wrapper=torch.optim.AdamW(made, **options))


@pytest.fixture
def resume(make: MakeRunner, caplog: pytest.LogCaptureFixture) -> Any:
    """Load a state into a Runner, and return both the Runner and the warning."""

    def load(state: Any, **options: Any) -> tuple[Any, str]:
        runner = make(**options)
        caplog.clear()
        runner.load_state_dict(copy.deepcopy(state))
        texts = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
        assert len(texts) <= 1
        return runner, "".join(texts)

    return load


def run_advice(warning: str, runner: Any) -> None:
    """Run the lines that the warning says to write."""
    exec(inspect.cleandoc(warning.rpartition("created:")[2]), {"runner": runner})


def trained(make: MakeRunner, **options: Any) -> Any:
    runner = make(**options)
    runner.train()
    return runner.state_dict()


CHANGES: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (dict(lr=0.1), dict(lr=0.2), "lr 0.1 from the checkpoint, instead of 0.2"),
    (dict(weight_decay=0.01), dict(weight_decay=0.5), "weight_decay 0.01 from the checkpoint"),
    (dict(betas=(0.9, 0.99)), dict(betas=(0.8, 0.99)), "betas [0.9, 0.99] from the checkpoint"),
    (dict(eps=1e-8), dict(eps=1e-6), "eps 1e-08 from the checkpoint, instead of 1e-06"),
    (dict(amsgrad=False), dict(amsgrad=True), "amsgrad False from the checkpoint"),
    (dict(maximize=False), dict(maximize=True), "maximize False"),
    (dict(foreach=None), dict(foreach=False), "foreach None"),
    (dict(lr=torch.tensor(0.5)), dict(lr=torch.tensor(0.25)), "lr 0.5 from the checkpoint"),
]


@pytest.mark.parametrize(("then", "now", "said"), CHANGES)
def test_each_changed_option_is_said(
    make: MakeRunner, resume: Any, then: dict[str, Any], now: dict[str, Any], said: str
) -> None:
    state = trained(make, **adam(**then))
    _, warning = resume(state, **adam(**now))
    assert said in warning
    assert warning.count(" from the checkpoint") == 1
    assert resume(state, **adam(**then))[1] == ""


# amsgrad needs a state that the optimizer did not have before.
@pytest.mark.parametrize(("then", "now", "said"), [c for c in CHANGES if "amsgrad" not in c[0]])
def test_the_advice_takes_the_value_of_the_script(
    make: MakeRunner, resume: Any, then: dict[str, Any], now: dict[str, Any], said: str
) -> None:
    runner, warning = resume(trained(make, **adam(**then)), **adam(**now))
    ((name, value),) = now.items()
    run_advice(warning, runner)
    found = runner.optim_wrapper.param_groups[0][name]
    assert found == (list(value) if isinstance(value, tuple) else value)
    runner.train(max_epochs=3)
    assert resume(runner.state_dict(), **adam(**now))[1] == ""


def test_each_group_is_named(make: MakeRunner, resume: Any) -> None:
    state = trained(make, **adam(dict(weight_decay=0.1), dict(weight_decay=0.2, lr=0.3)))
    _, warning = resume(state, **adam(dict(weight_decay=0.1), dict(weight_decay=0.0, lr=0.4)))
    assert "\n  in group 1: weight_decay 0.2 from the checkpoint, instead of 0.0" in warning
    assert "\n  in group 1: lr 0.3 from the checkpoint, instead of 0.4" in warning
    assert warning.count(" from the checkpoint") == 2
    assert warning.count("runner.optim_wrapper.param_groups[1]") == 2
    _, warning = resume(state, **adam(dict(weight_decay=0.5), dict(weight_decay=0.6, lr=0.3)))
    assert re.findall("in group (.):", warning) == ["0", "1"]


def test_the_same_change_in_all_groups_is_said_once(make: MakeRunner, resume: Any) -> None:
    state = trained(make, **adam({}, {}, eps=1e-8))
    _, warning = resume(state, **adam({}, {}, eps=1e-6))
    assert warning.count(" from the checkpoint") == 1
    assert "in all groups: eps 1e-08" in warning


def test_each_of_several_optimizers_is_named(make: MakeRunner, resume: Any) -> None:
    class Two(BaseModel):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, *data: Any, mode: str = "tensor") -> Any:
            raise AssertionError("only train_step is called")

        def train_step(self, data: Any, optim_wrapper: Any) -> dict[str, Any]:
            for name, part in (("one", self.one), ("two", self.two)):
                optim_wrapper[name].update_params(part(data[0]).square().mean())
            return {}

    def options(momentum: float) -> dict[str, Any]:
        model = Two()
        made = {
            "one": OptimWrapper(torch.optim.SGD(model.one.parameters(), lr=0.1)),
            "two": OptimWrapper(torch.optim.SGD(model.two.parameters(), lr=0.1, momentum=momentum)),
        }
        return dict(model=model, optim_wrapper=OptimWrapperDict(**made))

    _, warning = resume(trained(make, **options(0.9)), **options(0.5))
    assert "momentum 0.9 from the checkpoint, instead of 0.5" in warning
    assert "runner.optim_wrapper['two'].param_groups[0]['momentum'] = 0.5" in warning


@pytest.mark.parametrize(
    "schedule",
    [
        dict(scheduler="CosineAnnealingLR"),
        dict(scheduler=dict(type="OneCycleLR", max_lr=0.2)),
        dict(scheduler=dict(type="StepLR", step_size=1), warmup=3),
        dict(scheduler=dict(type="CyclicLR", base_lr=0.01, max_lr=0.1)),
    ],
)
def test_what_a_schedule_has_changed_is_not_said(
    make: MakeRunner, resume: Any, schedule: dict[str, Any]
) -> None:
    plugins: list[Any] = [dict(type="schedule", **schedule)]
    state = trained(make, plugins=plugins, **adam(lr=0.1))
    assert resume(state, plugins=plugins, **adam(lr=0.1))[1] == ""
    _, warning = resume(state, plugins=plugins, **adam(lr=0.2, eps=1e-6))
    assert "eps 1e-08" in warning
    own_rates = "Cycl" in str(schedule)  # these do not use the optimizer's
    assert ("lr 0.1 from the checkpoint, instead of 0.2" in warning) != own_rates


def test_what_a_hook_has_changed_is_not_said(make: MakeRunner, resume: Any) -> None:
    runner = make(**adam(weight_decay=0.1, lr=0.1))

    @runner.on("after_train_epoch")
    def grow(runner: Any) -> None:
        runner.optim_wrapper.param_groups[0]["weight_decay"] *= 2
        runner.optim_wrapper.param_groups[0]["lr"] /= 2

    runner.train()
    state = runner.state_dict()
    again, warning = resume(state, **adam(weight_decay=0.1, lr=0.1))
    assert warning == ""
    assert again.optim_wrapper.param_groups[0]["weight_decay"] == 0.4
    assert "weight_decay 0.4" in resume(state, **adam(weight_decay=0.3, lr=0.1))[1]


def test_a_second_resume_says_it_too(make: MakeRunner, resume: Any) -> None:
    state = trained(make, **adam(weight_decay=0.1))
    for _ in range(3):
        runner, warning = resume(state, **adam(weight_decay=0.3))
        assert "weight_decay 0.1 from the checkpoint, instead of 0.3" in warning
        state = runner.state_dict()


def test_a_state_that_does_not_hold_the_options_of_its_script(
    make: MakeRunner, resume: Any
) -> None:
    """As an earlier release wrote it."""
    plugins = [dict(type="schedule", scheduler="CosineAnnealingLR")]
    state = trained(make, plugins=plugins, **adam(lr=0.1, eps=1e-8))
    del state["meta"]["optimizers"]["optimizer"]["given"]
    assert resume(state, plugins=plugins, **adam(lr=0.1, eps=1e-8))[1] == ""
    _, warning = resume(state, plugins=plugins, **adam(lr=0.2, eps=1e-6))
    assert "lr 0.1 from the checkpoint, instead of 0.2" in warning
    assert "eps 1e-08" in warning


def test_an_option_that_only_the_script_has_is_kept(make: MakeRunner, resume: Any) -> None:
    state = trained(make, **adam())
    runner, warning = resume(state, **adam(dict(role="head")))
    assert runner.optim_wrapper.param_groups[0]["role"] == "head"
    assert warning == ""


def test_an_optimizer_that_starts_over_replaces_nothing(
    make: MakeRunner, caplog: pytest.LogCaptureFixture
) -> None:
    state = trained(make, **adam(eps=1e-8))
    runner = make(**adam({}, {}, eps=1e-6))
    runner.load_state_dict(state, allow=["optimizer"])
    assert "instead of" not in caplog.text
    assert runner.optim_wrapper.param_groups[0]["eps"] == 1e-6


def test_an_added_group_whose_options_a_hook_has_changed(make: MakeRunner, resume: Any) -> None:
    def options(lr: float, **changes: Any) -> dict[str, Any]:
        torch.manual_seed(0)
        model = Toy()
        optimizer = torch.optim.SGD([model.net.weight], lr=0.1)

        class Adding(Plugin):
            def before_train_epoch(self, runner: Any) -> None:
                if runner.progress.epoch == 1:
                    optimizer.add_param_group(dict(params=[model.net.bias], lr=lr))

            def before_load_checkpoint(self, checkpoint: Any) -> None:
                optimizer.add_param_group(dict(params=[model.net.bias], lr=lr))

            def after_train_epoch(self, runner: Any) -> None:
                for group in runner.optim_wrapper.param_groups:
                    group["lr"] /= 2

        return dict(model=model, optim_wrapper=optimizer, plugins=[Adding()])

    state = trained(make, **options(0.01))
    assert resume(state, **options(0.01))[1] == ""
    assert (
        "in group 1: lr 0.005 from the checkpoint, instead of 0.02"
        in resume(state, **options(0.02))[1]
    )


def test_a_momentum_that_a_schedule_replaces_is_not_said(make: MakeRunner, resume: Any) -> None:
    def options(momentum: float) -> dict[str, Any]:
        schedule = dict(type="schedule", scheduler=dict(type="OneCycleLR", max_lr=0.2))
        optimizer = dict(type="SGD", lr=0.1, momentum=momentum)
        return dict(plugins=[schedule], optim_wrapper=dict(optimizer=optimizer))

    assert resume(trained(make, **options(0.9)), **options(0.8))[1] == ""


def test_a_rate_in_single_precision_is_the_same_rate(make: MakeRunner, resume: Any) -> None:
    assert resume(trained(make, **adam(lr=0.001)), **adam(lr=torch.tensor(0.001)))[1] == ""


def test_tensors_among_the_options_are_described_briefly(make: MakeRunner) -> None:
    runner = make(**adam(dict(mask=torch.ones(1000), hint=torch.ones(2, device="meta"))))
    (given,) = runner.state_dict()["meta"]["optimizers"]["optimizer"]["given"]
    assert len(str(given)) < 1000


def test_a_wrapper_with_a_state_of_its_own_kind_resumes(make: MakeRunner) -> None:
    class Own(OptimWrapper):
        def state_dict(self) -> dict[str, Any]:
            return {"inner": super().state_dict(), "factor": 1.0}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            super().load_state_dict(state["inner"])

    def options() -> dict[str, Any]:
        given = adam()
        return dict(given, optim_wrapper=Own(given["optim_wrapper"]))

    runner = make(**options())
    runner.load_state_dict(trained(make, **options()))
    assert len(runner.optim_wrapper.optimizer.state) == 2
    parts = adam({}, {})
    other = make(**{**parts, "optim_wrapper": Own(parts["optim_wrapper"])})
    with pytest.raises(ValueError, match=r"groups of \[1, 1\] parameters here, of \[2\]"):
        other.load_state_dict(runner.state_dict())


def test_an_optimizer_around_another_needs_no_defaults(make: MakeRunner) -> None:
    class Around(torch.optim.Optimizer):
        def __init__(self, base: Any) -> None:
            self.base = base
            self.param_groups, self.state = base.param_groups, base.state

        def step(self, closure: Any = None) -> Any:
            return self.base.step(closure)

        def zero_grad(self, set_to_none: bool = True) -> None:
            self.base.zero_grad(set_to_none)

    parts = adam()
    runner = make(**{**parts, "optim_wrapper": Around(parts["optim_wrapper"])})
    before = runner.bare_model.net.weight.clone()
    runner.train()
    assert not torch.equal(runner.bare_model.net.weight, before)


def test_the_advice_for_a_scheduled_rate_can_stay_in_the_script(make: MakeRunner) -> None:
    """Each start of the script sets it again, and the rates are those of one run with it."""

    def run(lr: float, until: int, state: Any = None) -> tuple[list[float], Any]:
        schedule = dict(type="schedule", scheduler="CosineAnnealingLR", by_epoch=False)
        runner = make(plugins=[schedule], train_cfg=dict(max_epochs=4), **adam(lr=lr))
        if state is not None:
            runner.load_state_dict(state)
            runner.optim_wrapper.param_groups[0]["initial_lr"] = lr
        seen: list[float] = []
        runner.on("before_optim_step")(lambda runner: seen.extend(runner.optim_wrapper.get_lr()))
        runner.on("after_train_epoch")(
            lambda runner: runner.stop("requeue") if runner.progress.epoch == until else None
        )
        runner.train()
        return seen, runner.state_dict()

    expected, _ = run(0.05, 4)
    first, state = run(0.1, 1)
    assert first[0] == 0.1
    second, state = run(0.05, 2, state)
    third, _ = run(0.05, 4, state)
    assert [*second, *third] == pytest.approx(expected[5:])


def test_an_optimizer_that_starts_over_is_said(
    make: MakeRunner, caplog: pytest.LogCaptureFixture
) -> None:
    runner = make(optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.1)))
    runner.load_state_dict(trained(make, **adam()), allow=["optimizer"])
    assert "is not loaded, as allowed: is SGD here, AdamW in the checkpoint" in caplog.text


def test_texts_can_be_pasted_and_removed_groups_are_no_error(make: MakeRunner, resume: Any) -> None:
    runner, warning = resume(trained(make, **adam(dict(role="a"))), **adam(dict(role="b")))
    run_advice(warning, runner)
    assert runner.optim_wrapper.param_groups[0]["role"] == "b"
    first = make(**adam({}, dict(eps=1e-7)))
    del first.optim_wrapper.param_groups[1]
    second = make(**adam({}, dict(eps=1e-7)))
    del second.optim_wrapper.param_groups[1]
    second.load_state_dict(first.state_dict())

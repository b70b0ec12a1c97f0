"""The Runner: what it accepts, what it refuses, and how it lives."""

from __future__ import annotations

import gc
import re
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from hookengine import MODELS, BaseModel, OptimWrapper, Plugin, Runner
from tests.fixtures import MakeData, MakeRunner, Toy, ToyAccuracy


class Plain(nn.Module):
    """A plain network for the toy data."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.fc(inputs)


# -- what it accepts ----------------------------------------------------------------------------


def test_a_plain_module_trains_with_a_loss(make: MakeRunner, accuracy: type[ToyAccuracy]) -> None:
    model = Plain()
    runner = make(model=model, loss=F.cross_entropy, validate=True, val_cfg=dict(loss=True))
    metrics = runner.train()
    assert set(metrics) == {"loss", "accuracy"}
    assert runner.bare_model is model
    assert set(runner.state_dict()["state_dict"]) == {"fc.weight", "fc.bias"}
    assert runner.progress.step == 10


def test_a_loss_may_be_a_module_or_return_a_dict(make: MakeRunner) -> None:
    weighted = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]))
    runner = make(model=Plain(), loss=weighted)
    runner.train()
    assert set(runner.state_dict()["state_dict"]) == {"fc.weight", "fc.bias"}
    seen = []

    def losses(output: Tensor, target: Tensor) -> dict[str, Tensor]:
        return {"loss_ce": F.cross_entropy(output, target), "norm": output.norm()}

    runner = make(model=Plain(), loss=losses)
    runner.on("after_train_iter")(lambda outputs: seen.append(set(outputs)))
    runner.train()
    assert seen[0] == {"loss", "loss_ce", "norm"}


@pytest.mark.parametrize(
    "build",
    [
        lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
        lambda model: OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.1)),
        lambda model: dict(optimizer=torch.optim.SGD(model.parameters(), lr=0.1)),
        lambda model: dict(optimizer=dict(type="SGD", lr=0.1)),
        lambda model: dict(optimizer=dict(type=torch.optim.SGD, lr=0.1)),
        lambda model: dict(type="OptimWrapper", optimizer=dict(type="SGD", lr=0.1)),
    ],
)
def test_an_optimizer_is_given_in_any_of_these_ways(
    make: MakeRunner, toy: type[Toy], build: Any
) -> None:
    torch.manual_seed(0)
    model = toy()
    runner = make(model=model, optim_wrapper=build(model))
    runner.train()
    other = make()
    other.train()
    assert torch.equal(model.net.weight, other.bare_model.net.weight)


def test_a_model_is_a_module_a_dict_or_a_function(make: MakeRunner, toy: type[Toy]) -> None:
    MODELS.register_module("runner_toy", module=toy, force=True)
    for model in (toy(), dict(type="runner_toy"), toy, lambda: dict(type="runner_toy")):
        runner = make(model=model)
        assert type(runner.bare_model) is toy
        runner.train()


def test_dataloaders_are_given_as_the_arguments_of_one(make: MakeRunner, data: MakeData) -> None:
    runner = make(train_dataloader=dict(dataset=data(), batch_size=5, shuffle=True))
    runner.train()
    assert runner.progress.iter == 8


# -- what it refuses ----------------------------------------------------------------------------


class NoLoss(BaseModel):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 3)

    def forward(self, inputs: Tensor, labels: Tensor, mode: str) -> Any:
        if mode == "predict":
            return inputs, labels
        return None


LOADER = [(torch.ones(2, 4), torch.zeros(2, dtype=torch.long))]

MISTAKES = [
    (dict(train_cfg=dict(max_epoch=3)), ValueError, "unknown option 'max_epoch'. Did you mean"),
    (dict(train_cfg=None), ValueError, "training needs train_cfg in addition to train_dataloader"),
    (dict(optim_wrapper=None), ValueError, "training needs optim_wrapper in addition to"),
    (dict(val_dataloader=LOADER), ValueError, "val_dataloader .*Pass val_evaluator or val_cfg"),
    (dict(test_evaluator=object()), ValueError, "testing needs test_dataloader in addition to"),
    (dict(val_cfg=dict()), ValueError, "val_cfg .*Pass val_dataloader and val_evaluator"),
    (
        dict(val_cfg=dict(los=True)),
        ValueError,
        "val_cfg: unknown option 'los'. Did you mean 'loss'",
    ),
    (dict(train_dataloader=[]), ValueError, "train_dataloader is empty"),
    (dict(model=Plain()), TypeError, r"Plain has no train_step. Derive .* loss=F.cross_entropy"),
    (dict(model=3), TypeError, "model must be an nn.Module, got int"),
    (dict(loss=F.cross_entropy), TypeError, "Toy is a BaseModel, .* Remove loss="),
    (dict(optim_wrapper=dict(lr=0.1)), ValueError, "needs an 'optimizer'"),
    (dict(optim_wrapper=3), TypeError, "optim_wrapper takes an optimizer"),
    (dict(optim_wrapper=dict(optimizer=3)), TypeError, r"optim_wrapper\['optimizer'\] takes"),
    (
        dict(optim_wrapper=dict(optimizer=dict(type="SDG", lr=1))),
        KeyError,
        "unknown optimizer 'SDG'. Did you mean 'SGD'",
    ),
    (
        dict(optim_wrapper=torch.optim.SGD(Plain().parameters(), lr=0.1)),
        ValueError,
        r"parameter of shape \(3, 4\) that does not belong to the model",
    ),
    (dict(plugins=["ema2000"]), KeyError, "unknown plugin 'ema2000'"),
    (dict(validator=3), TypeError, "Runner: unknown argument 'validator'"),
]


@pytest.mark.parametrize(("options", "error", "message"), MISTAKES)
def test_a_mistake_gets_one_clear_error_at_construction(
    make: MakeRunner, options: Any, error: type, message: str
) -> None:
    with pytest.raises(error, match=message):
        make(**options)


def test_an_error_in_building_the_optimizer_says_what_was_built(make: MakeRunner) -> None:
    with pytest.raises(TypeError) as caught:
        make(optim_wrapper=dict(optimizer=dict(type="SGD", learning_rate=0.1)))
    (note,) = caught.value.__notes__
    assert note.startswith("while building optim_wrapper['optimizer']={'type': 'SGD'")


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (lambda o, t: None, TypeError, r"forward\(mode='loss'\) returned None"),
        (lambda o, t: F.cross_entropy(o, t).detach(), ValueError, "does not require a gradient"),
        (lambda o, t: 3.0, TypeError, "'loss' must be a tensor"),
        (lambda o, t: {"cost": o.sum()}, ValueError, "must contain 'loss'"),
    ],
)
def test_a_loss_that_is_none_shows_in_the_first_iteration(
    make: MakeRunner, loss: Any, error: type, message: str
) -> None:
    runner = make(model=Plain(), loss=loss)
    with pytest.raises(error, match=message):
        runner.train()
    assert runner.progress.iter == 0


def test_what_it_has_no_parts_for_is_answered(make: MakeRunner) -> None:
    idle = make(train_dataloader=None, train_cfg=None, optim_wrapper=None)
    with pytest.raises(ValueError, match="needs train_dataloader, train_cfg and optim_wrapper"):
        idle.train()
    with pytest.raises(ValueError, match="Pass val_dataloader and val_evaluator"):
        idle.val()
    with pytest.raises(ValueError, match="Pass test_dataloader and test_evaluator"):
        idle.test()


def test_validating_and_testing_need_no_optimizer(make: MakeRunner) -> None:
    runner = make(
        train_dataloader=None, train_cfg=None, optim_wrapper=None, validate=True, test=True
    )
    assert runner.val() == runner.test()
    runner.load_state_dict(runner.state_dict())


# -- how it lives -------------------------------------------------------------------------------


def test_train_again_goes_on_and_says_so_at_the_limit(
    make: MakeRunner, caplog: pytest.LogCaptureFixture
) -> None:
    runner = make(train_cfg=dict(max_epochs=1))
    runner.train()
    weight = runner.bare_model.net.weight.clone()
    runner.train()
    assert "has already reached its limit of 1 epochs" in caplog.text
    assert "train(max_epochs=2)" in caplog.text
    assert torch.equal(runner.bare_model.net.weight, weight)
    runner.train(max_epochs=2)
    straight = make(train_cfg=dict(max_epochs=2))
    straight.train()
    assert torch.equal(runner.bare_model.net.weight, straight.bare_model.net.weight)
    runner.train(max_iters=12)  # the unit may change
    assert runner.progress.iter == 12
    with pytest.raises(ValueError, match="max_epochs=3 and max_iters=3 are both set"):
        runner.train(max_epochs=3, max_iters=3)


def test_two_runners_in_one_process_do_not_meet(make: MakeRunner) -> None:
    one, other = make(), make()
    seen: list[str] = []
    one.on("before_train")(lambda: seen.append("one"))
    other.on("before_train")(lambda: seen.append("other"))
    one.train()
    other.train()
    one.close()
    other.train(max_epochs=3)
    assert seen == ["one", "other", "other"]


def test_a_runner_that_is_dropped_is_freed(
    make: MakeRunner, toy: type[Toy], tmp_path: Path
) -> None:
    runner = Runner(toy(), tmp_path, LOADER, optim_wrapper=dict(optimizer=dict(type="SGD", lr=1)),
                    train_cfg=dict(max_epochs=1), defaults=())  # fmt: skip
    runner.train()
    gone = weakref.ref(runner)
    del runner
    gc.collect()
    assert gone() is None


class Life(Plugin):
    """Notes the events of a life, and fails where it is told to."""

    fails_in: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.log: list[str] = []

    def _note(self, event: str) -> None:
        self.log.append(event)
        if event in self.fails_in:
            raise LookupError(event)

    def configure(self) -> None:
        self._note("configure")

    def before_run(self) -> None:
        self._note("before_run")

    def after_train_iter(self, runner: Any) -> None:
        if runner.progress.iter == 3:
            self._note("third")

    def on_exception(self, error: BaseException) -> None:
        self._note(f"on_exception {type(error).__name__}")

    def after_run(self) -> None:
        self._note("after_run")

    def unconfigure(self) -> None:
        self._note("unconfigure")


def test_with_closes_once(make: MakeRunner) -> None:
    life = Life()
    with make(plugins=[life]) as runner:
        runner.train()
    runner.close()
    assert life.log == ["configure", "before_run", "third", "after_run", "unconfigure"]
    with pytest.raises(RuntimeError, match="this Runner is closed"):
        runner.train()


def test_an_exception_is_told_to_all_and_raised_on(make: MakeRunner) -> None:
    first, second = Life(fails_in=("third",)), Life()
    second.plugin_name = "second"
    runner = make(plugins=[first, second])
    with pytest.raises(LookupError, match="third"):
        runner.train()
    ending = ["on_exception LookupError", "after_run"]
    assert first.log == ["configure", "before_run", "third", *ending]
    assert second.log == ["configure", "before_run", *ending]


def test_closing_events_reach_everybody_and_hide_no_error(make: MakeRunner) -> None:
    first = Life(fails_in=("third", "on_exception LookupError", "after_run"))
    second = Life()
    second.plugin_name = "second"
    runner = make(plugins=[first, second])
    with pytest.raises(LookupError, match="third") as caught:
        runner.train()
    assert second.log == ["configure", "before_run", "on_exception LookupError", "after_run"]
    notes = caught.value.__notes__
    assert "plugin 'life'" in notes[0]
    assert "and then LookupError: on_exception LookupError (raised by plugin 'life'" in notes[1]
    assert "and then LookupError: after_run" in notes[2]


def test_an_interrupt_leaves_a_runner_that_goes_on(make: MakeRunner) -> None:
    straight = make()
    straight.train()
    for event in ("before_train_iter", "before_optim_step", "after_train_iter"):
        life = Life()
        runner = make(plugins=[life])
        left = [1]

        def interrupt(runner: Any) -> None:
            if runner.progress.iter == 6 and left:  # noqa: B023
                left.pop()  # noqa: B023
                raise KeyboardInterrupt

        runner.on(event)(interrupt)
        with pytest.raises(KeyboardInterrupt):
            runner.train()
        assert life.log[-2:] == ["on_exception KeyboardInterrupt", "after_run"]
        runner.train()
        assert runner.progress.iter == 10
        # Gradients that the interrupted iteration left are not added to the next one's.
        assert torch.equal(runner.bare_model.net.weight, straight.bare_model.net.weight)


def test_a_failed_construction_unconfigures(make: MakeRunner) -> None:
    life = Life()
    with pytest.raises(TypeError, match="Plain has no train_step"):
        make(plugins=[life], model=Plain())
    assert life.log == ["configure", "unconfigure"]
    failing, never = Life(fails_in=("configure", "unconfigure")), Life()
    never.plugin_name = "never"
    with pytest.raises(LookupError, match="configure") as caught:
        make(plugins=[failing, never])
    assert failing.log == ["configure", "unconfigure"]
    assert never.log == []
    assert "plugin 'life'" in caught.value.__notes__[0]
    assert "and then LookupError: unconfigure" in caught.value.__notes__[1]


def test_an_open_runner_is_closed_at_exit(tmp_path: Path) -> None:
    script = f"""
from hookengine import Plugin, Runner
from torch import nn
class Last(Plugin):
    def unconfigure(self): print("unconfigured")
runner = Runner(nn.Linear(1, 1), {str(tmp_path)!r}, loss=None, plugins=[Last()], defaults=())
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout == "unconfigured\n"


def test_conversion_and_wrapping_keep_optimizer_and_names(make: MakeRunner) -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: Any) -> None:
            super().__init__()
            self.module = module

        def train_step(self, data: Any, optim_wrapper: Any) -> Any:
            return self.module.train_step(data, optim_wrapper)

    class Surgeon(Plugin):
        def convert_model(self, model: Any) -> Any:
            model.net.weight = nn.Parameter(model.net.weight.detach().clone())

        def wrap_model(self, model: Any, role: str) -> Any:
            return Wrapper(model)

    torch.manual_seed(0)
    model = make().bare_model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model.net.weight.grad = torch.zeros_like(model.net.weight)
    optimizer.step()  # the optimizer has a state already
    optimizer.zero_grad()
    old = model.net.weight
    runner = make(model=model, optim_wrapper=optimizer, plugins=[Surgeon()])
    assert type(runner.model) is Wrapper
    assert runner.bare_model is model
    assert model.net.weight is not old
    assert any(p is model.net.weight for p in runner.optim_wrapper.parameters())
    assert model.net.weight in optimizer.state
    assert old not in optimizer.state
    before = model.net.weight.clone()
    runner.train()
    assert not torch.equal(model.net.weight, before)
    assert set(runner.state_dict()["state_dict"]) == {"net.weight", "net.bias"}
    assert type(runner.wrap(nn.Linear(1, 1), "average")) is Wrapper


def test_state_is_plain_and_goes_on(make: MakeRunner, tmp_path: Path) -> None:
    first = make(train_cfg=dict(max_epochs=1))
    first.train()
    torch.save(first.state_dict(), tmp_path / "state.pth")
    second = make(train_cfg=dict(max_epochs=2))
    second.load_state_dict(torch.load(tmp_path / "state.pth", weights_only=True))
    second.train()
    straight = make(train_cfg=dict(max_epochs=2))
    straight.train()
    assert torch.equal(second.bare_model.net.weight, straight.bare_model.net.weight)
    assert second.progress.step == 10


def test_what_mmengines_users_pass_is_answered(make: MakeRunner) -> None:
    for name in ("param_scheduler", "default_hooks", "custom_hooks", "launcher", "cfg"):
        with pytest.raises(TypeError, match=rf"'{name}' comes from MMEngine. In hookengine, "):
            make(**{name: {"type": "x"}})  # type: ignore[arg-type]
    for name in ("epoch", "max_iters", "message_hub", "register_hook", "save_checkpoint"):
        with pytest.raises(
            AttributeError, match=rf"the Runner has no '{name}': .* In hookengine, "
        ):
            getattr(make(), name)
    options: Any
    for options, answer in [
        (
            dict(type="AmpOptimWrapper"),
            "'AmpOptimWrapper' comes from MMEngine. In hookengine, use plugins=['amp']",
        ),
        (dict(accumulative_counts=4), "dict(type='accumulate', steps=...)"),
        (dict(clip_grad=dict(max_norm=1)), "dict(type='clip', max_norm=1.0)"),
    ]:
        with pytest.raises((TypeError, ValueError), match=re.escape(answer)):
            make(optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.1), **options))
    with pytest.raises(ValueError, match=r"'fp16' comes from MMEngine"):
        make(validate=True, val_cfg=dict(fp16=True))


def test_other_frequent_slips_are_answered(make: MakeRunner) -> None:
    with pytest.raises(TypeError, match=r"Runner: 'optimizer' .*optim_wrapper=dict\(optimizer="):
        make(optimizer=dict(type="SGD", lr=0.1))
    with pytest.raises(ValueError, match=r"optim_wrapper: 'OptimWrapperDict' comes from MMEngine"):
        make(optim_wrapper=dict(type="OptimWrapperDict", a=dict(optimizer=dict(type="SGD"))))
    with pytest.raises(KeyError, match=r"no plugin 'LoggerHook'.*dict\(type='logging'"):
        make(plugins=[dict(type="LoggerHook")])

    class Hook(Plugin):
        priority = "LOW"

        def before_run(self) -> None: ...

    with pytest.warns(UserWarning, match="'priority' comes from MMEngine"):
        make(plugins=[Hook()])


def test_an_answer_says_whether_the_plugin_is_here(make: MakeRunner) -> None:
    from hookengine import PLUGINS
    from hookengine.setup.migration import REPLACEMENTS, answer

    for name, (plugin, _, _) in REPLACEMENTS.items():
        text = answer(name)
        assert text is not None
        assert ("no plugin" in text) == (plugin is not None and plugin not in PLUGINS)
    assert answer("anything") is None


def test_what_mmengines_configurations_carry_along_does_no_harm(
    make: MakeRunner, data: MakeData
) -> None:
    class Dataset(torch.utils.data.Dataset[Any]):
        def __init__(self, n: int) -> None:
            self.pairs = data(n)

        def __len__(self) -> int:
            return len(self.pairs)

        def __getitem__(self, index: int) -> Any:
            return self.pairs[index]

    runner = make(
        train_cfg=dict(type="IterBasedTrainLoop", max_iters=3),
        train_dataloader=dict(
            batch_size=4,
            dataset=dict(type=Dataset, n=12),
            sampler=dict(type="DefaultSampler", shuffle=True),
            collate_fn=dict(type="default_collate"),
        ),
        val_cfg=dict(type="ValLoop"),
        validate=True,
        launcher="none",
        load_from=None,
        resume=False,
        visualizer=None,
        default_scope="mmengine",
    )
    assert set(runner.train()) == {"accuracy"}
    assert isinstance(runner.train_loop.dataloader.sampler, torch.utils.data.RandomSampler)
    with pytest.raises(
        ValueError,
        match=r"sampler=.*'InfiniteSampler' comes from MMEngine. In hookengine, use shuffle",
    ):
        make(train_dataloader=dict(dataset=data(), sampler=dict(type="InfiniteSampler")))


def test_log_hands_raw_values_on(make: MakeRunner) -> None:
    seen = []

    class Watch(Plugin):
        def log(self, phase: str, values: Any) -> None:
            seen.append((phase, dict(values)))

    runner = make(plugins=[Watch()])
    runner.log({"a": 1})
    runner.log({"b": 2}, phase="val")
    assert seen == [("train", {"a": 1}), ("val", {"b": 2})]


def test_the_device_is_the_one_that_is_asked_for(make: MakeRunner) -> None:
    class Mover(Plugin):
        def configure(self, runner: Any) -> None:
            runner.device = torch.device("meta")

    assert make(device="cpu").device == torch.device("cpu")
    runner = make(plugins=[Mover()])
    assert runner.bare_model.net.weight.device.type == "meta"


@pytest.mark.gpu
def test_training_on_the_accelerator_is_the_default(make: MakeRunner, data: MakeData) -> None:
    runner = make(train_dataloader=DataLoader(data(), batch_size=4), validate=True)
    runner.train()
    assert runner.device.type == torch.accelerator.current_accelerator().type
    assert runner.bare_model.net.weight.device.type == runner.device.type


# -- runs within runs, and ends in the middle ---------------------------------------------------


def test_a_plugin_may_validate_within_a_run(make: MakeRunner) -> None:
    life = Life()
    runner = make(plugins=[life], validate=True, train_cfg=dict(max_iters=4, val_interval=100))
    seen = []

    @runner.on("after_train_iter")
    def validate(runner: Any) -> None:
        if runner.progress.iter == 2:
            runner.stop("enough")
            seen.append(runner.val())

    runner.train()
    assert set(seen[0]) == {"accuracy"}
    assert runner.progress.stopped == "enough"  # the validation did not lose the request
    assert life.log == ["configure", "before_run", "after_run"]


def test_runs_that_cannot_be_nested_are_refused(make: MakeRunner) -> None:
    def attempt(event: str, call: Any, message: str) -> None:
        runner = make(validate=True)
        runner.on(event)(lambda runner: call(runner))
        with pytest.raises(RuntimeError, match=message):
            runner.train()

    attempt("after_val_epoch", lambda r: r.val(), r"val\(\) was called while val\(\)")
    attempt("after_train_iter", lambda r: r.train(), r"train\(\) was called within a run")
    attempt("after_train_iter", lambda r: r.close(), r"call stop\(\) to end the run")


def test_a_stop_before_the_run_holds(make: MakeRunner) -> None:
    runner = make()
    runner.stop("before it began")
    runner.train()
    assert runner.progress.iter == 1
    runner.train()
    assert runner.progress.iter == 10


def test_other_limits_hold_once(make: MakeRunner) -> None:
    runner = make(train_cfg=dict(max_epochs=3))
    runner.train(max_epochs=1)
    runner.train()
    assert runner.progress.epoch == 3


def test_an_error_in_close_does_not_hide_the_users(make: MakeRunner) -> None:
    with (
        pytest.raises(ValueError, match="mine") as caught,
        make(plugins=[Life(fails_in=("unconfigure",))]),
    ):
        raise ValueError("mine")
    assert "and then LookupError: unconfigure" in caught.value.__notes__[0]


def test_a_second_interrupt_does_not_skip_the_closing_events(make: MakeRunner) -> None:
    life = Life()
    runner = make(plugins=[life])

    @runner.on("before_train")
    def interrupt() -> None:
        raise KeyboardInterrupt

    @runner.on("on_exception")
    def again() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runner.train()
    assert life.log[-1] == "after_run"


def test_a_dropped_runner_is_unconfigured_and_a_closed_one_let_go(
    make: MakeRunner, toy: type[Toy]
) -> None:
    life = Life()
    runner = Runner(toy(), plugins=[life], defaults=())
    del runner
    gc.collect()
    assert life.log == ["configure", "unconfigure"]
    runner = Runner(toy(), defaults=())
    model, gone = runner.bare_model, weakref.ref(runner)
    runner.close()
    del runner
    gc.collect()
    assert gone() is None
    assert type(model).__name__ == "Toy"


def test_a_closed_runner_takes_no_plugin(make: MakeRunner) -> None:
    runner = make()
    runner.close()
    with pytest.raises(RuntimeError, match="closed"):
        runner.plugins.add(Life())


def test_a_plugin_may_bring_another_along_in_configure(make: MakeRunner) -> None:
    life = Life()

    class Bringing(Plugin):
        def configure(self, runner: Any) -> None:
            runner.plugins.add(life)

        def convert_model(self, model: Any) -> None: ...

    runner = make(plugins=[Bringing()])
    runner.close()
    assert life.log == ["configure", "unconfigure"]


def test_an_averaged_copy_of_a_plain_module_is_evaluated_through_wrap(make: MakeRunner) -> None:
    class Averaged(Plugin):
        def evaluated_models(self, runner: Any) -> Any:
            return {"": runner.model, "ema": runner.wrap(runner.bare_model, "average")}

    runner = make(model=Plain(), loss=F.cross_entropy, validate=True, plugins=[Averaged()])
    metrics = runner.val()
    assert metrics["accuracy"] == metrics["ema/accuracy"]

    class Wrong(Plugin):
        def evaluated_models(self, runner: Any) -> Any:
            return {"ema": runner.bare_model}

    with pytest.raises(TypeError, match=r"evaluated_models must return modules with val_step\(\)"):
        make(model=Plain(), loss=F.cross_entropy, validate=True, plugins=[Wrong()]).val()


def test_validation_loss_is_summed_exactly_in_half_precision(make: MakeRunner) -> None:
    class Half(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            return inputs.half()

    batches = [(torch.full((2000, 1), 0.5), torch.zeros(2000, 1))] * 100
    runner = make(
        model=Half(),
        loss=lambda output, target: output.float().mean().half() + 0 * target.sum(),
        train_dataloader=None,
        train_cfg=None,
        optim_wrapper=None,
        val_dataloader=batches,
        val_cfg=dict(loss=True),
    )
    assert runner.val()["loss"] == 0.5


def test_more_mistakes_are_answered(make: MakeRunner, data: MakeData) -> None:
    class Centres(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.centre = nn.Parameter(torch.zeros(3))

    options: Any
    for options, error, message in [
        (dict(train_dataloader=data()), TypeError, "single samples instead of batches. Wrap it"),
        (dict(model=Plain(), loss="cross_entropy"), TypeError, "loss must be callable"),
        (dict(model=Plain(), loss=Centres()), TypeError, "Centres has parameters, which"),
        (dict(plugins=[3]), TypeError, r"plugin 'int' \(3\) implements no event"),
        (dict(plugins=Life()), TypeError, r"write plugins=\[...\]"),
    ]:
        with pytest.raises(error, match=message):
            make(**options)
    make(plugins=None)
    three = [(torch.ones(2, 4), torch.ones(2), torch.ones(2))]
    with pytest.raises(TypeError) as caught:
        make(model=Plain(), loss=F.cross_entropy, train_dataloader=three).train()
    assert (
        "forward got a batch of 3 (Tensor[2, 4], Tensor[2], Tensor[2])" in caught.value.__notes__[0]
    )

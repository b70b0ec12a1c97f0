"""The Runner: what it accepts, what it refuses, and how it lives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from hookengine import BaseModel, Plugin, Runner
from tests.fixtures import MakeData, MakeRunner, Toy, ToyAccuracy
from tests.hookengine.lives import Life, Plain


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


class NoLoss(BaseModel):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 3)

    def forward(self, inputs: Tensor, labels: Tensor, mode: str) -> Any:
        if mode == "predict":
            return inputs, labels
        return None


def test_validating_and_testing_need_no_optimizer(make: MakeRunner) -> None:
    runner = make(
        train_dataloader=None, train_cfg=None, optim_wrapper=None, validate=True, test=True
    )
    assert runner.val() == runner.test()
    runner.load_state_dict(runner.state_dict())


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
    assert runner.device.type == torch.accelerator.current_accelerator().type  # type: ignore[union-attr]
    assert runner.bare_model.net.weight.device.type == runner.device.type


def test_other_limits_hold_once(make: MakeRunner) -> None:
    runner = make(train_cfg=dict(max_epochs=3))
    runner.train(max_epochs=1)
    runner.train()
    assert runner.progress.epoch == 3


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

    with pytest.raises(TypeError, match=r"must return a dict of modules with val_step\(\)"):
        make(model=Plain(), loss=F.cross_entropy, validate=True, plugins=[Wrong()]).val()


def test_what_a_plugin_may_change_is_checked(make: MakeRunner) -> None:
    class Changes(Plugin):
        def configure(self, runner: Runner) -> None:
            for name in ("", "..", "../escape", "/absolute", "a/../../b"):
                with pytest.raises(ValueError, match="a folder within work_dir"):
                    runner.use_name(name)
            with pytest.raises(TypeError, match="must be a string, got 3"):
                runner.use_name(3)  # type: ignore[arg-type]
            with pytest.raises(TypeError, match="takes a structlog logger, got None"):
                runner.use_logger(None)
            with pytest.raises(RuntimeError, match="call stop"):
                runner.stop("too early", now=True)
            runner.use_device("cpu")
            runner.use_name("chosen")

        def before_run(self, runner: Runner) -> None:
            runner.make_run_dir()
            with pytest.raises(RuntimeError, match=r"already created\. Call use_name"):
                runner.use_name("other")

    runner = make(plugins=[Changes()])
    assert runner.run_dir.name == "chosen"
    with pytest.raises(RuntimeError, match="Call use_device in configure"):
        runner.use_device("meta")
    with pytest.raises(ValueError, match="a folder within work_dir"):
        make(name="../escape")
    runner.train()
    assert runner.progress.iter == 10


def test_training_stops_now_without_another_iteration(make: MakeRunner) -> None:
    runner = make()
    runner.on("before_train")(lambda: runner.stop("not today", now=True))
    runner.train()
    assert (runner.progress.iter, runner.progress.stopped) == (0, "not today")
    other = make()
    other.on("safe_point", once=True)(lambda: other.stop("enough", now=True))
    other.train()
    assert (other.progress.iter, other.progress.stopped) == (1, "enough")


def test_an_unknown_attribute_is_answered_with_the_nearest(make: MakeRunner) -> None:
    with pytest.raises(AttributeError, match=r"no 'use_devise'. Did you mean 'use_device'"):
        make().use_devise  # type: ignore[attr-defined]  # noqa: B018


def test_the_dataloaders_and_optimizers_are_found_by_name(make: MakeRunner) -> None:
    runner = make(validate=True)
    assert list(runner.dataloaders) == ["train", "val"]
    assert runner.optim_wrappers == {"optimizer": runner.optim_wrapper}


def test_its_repr_says_in_one_line_what_it_is_and_where_it_stands(make: MakeRunner) -> None:
    runner = make(name="digits", plugins=["watch"], validate=True)
    model, folder = "model=Toy", f"run_dir={str(runner.run_dir)!r}"
    plugins = "plugins=['watch']"
    assert (
        repr(runner) == f"ToyRunner('digits', {model}, epoch=0/2, iter=0/10, {plugins}, {folder})"
    )
    runner.train()
    assert "epoch=2/2, iter=10/10" in repr(runner)
    runner.close()
    assert repr(runner).endswith(f"{folder}, closed)")
    assert repr(runner.plugins) == "PluginManager(['watch'])"
    assert runner.val_loop is not None
    assert repr(runner.val_loop.evaluator) == "Evaluator(['ToyAccuracy'])"
    by_iterations = make(train_cfg=dict(max_iters=7), train_dataloader=iter([]))
    assert "epoch=0, iter=0/7" in repr(by_iterations)
    only_val = Runner(Toy(), val_dataloader=[1], val_evaluator=ToyAccuracy(), defaults=())
    assert "iter" not in repr(only_val)


def test_its_repr_works_at_any_moment_of_the_construction() -> None:
    shown = []

    class Shows(Plugin):
        def configure(self, runner: Runner) -> None:
            shown.append(repr(runner))

        def initialize_model(self, runner: Runner) -> None:
            shown.append(repr(runner))

        def resume(self, runner: Runner) -> None:
            shown.append(repr(runner))

    Runner(Toy(), val_dataloader=[1], val_evaluator=ToyAccuracy(), defaults=(), plugins=[Shows()])
    assert len(shown) == 3
    assert "model=Toy" in shown[2]
    assert repr(Runner.__new__(Runner)) == "Runner()"

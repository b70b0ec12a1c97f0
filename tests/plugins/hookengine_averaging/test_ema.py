"""The plugin ``ema``: what is averaged, what is evaluated, what is saved."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any, Literal, cast

import pytest
import torch
import torch.distributed as torch_dist
from hookengine_averaging import Ema
from hookengine_averaging.span import steps_left
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from hookengine import Plugin, Runner
from hookengine.model import ExponentialMovingAverage, StochasticWeightAverage, load_weights
from tests.fixtures import MakeRunner, Toy, toy_data
from tests.ranks import spawn


class States(Plugin):
    """Keeps the raw weights after each iteration."""

    def before_train(self) -> None:
        self.weights: list[Tensor] = []

    def after_train_iter(self, runner: Any) -> None:
        self.weights.append(runner.bare_model.net.weight.detach().clone())


def ema_of(values: list[Tensor], momentum: float) -> Tensor:
    average = values[0].clone()
    for value in values[1:]:
        average.lerp_(value, momentum)
    return average


def test_the_average_is_that_of_the_weights_after_each_step(make: MakeRunner) -> None:
    states = States()
    runner = make(plugins=["ema", states], validate=True)
    plain = make(validate=True)
    runner.train()
    plain.train()
    averaged = runner.plugins["ema"].averaged
    assert torch.equal(averaged.module.net.weight, ema_of(states.weights, 0.0002))
    assert torch.equal(runner.bare_model.net.weight, plain.bare_model.net.weight)
    assert averaged.steps == 10


class Refuses(Plugin):
    """Refuses some steps."""

    def optim_step(self, runner: Any) -> bool | None:
        return False if runner.progress.iter in (2, 5) else None


@pytest.mark.parametrize(
    ("plugins", "updated"),
    [
        ([Refuses()], [0, 1, 3, 4, 6, 7, 8, 9]),
        ([dict(type="accumulate", steps=2)], [1, 3, 4, 6, 8, 9]),
        ([dict(type="ema", begin_step=4)], [4, 5, 6, 7, 8, 9]),
        ([dict(type="ema", begin_epoch=1)], [5, 6, 7, 8, 9]),
        pytest.param(
            [dict(type="compile", backend="eager")], list(range(10)), marks=pytest.mark.process
        ),
    ],
)
def test_it_counts_real_steps_from_where_it_begins(
    make: MakeRunner, plugins: Any, updated: Any
) -> None:
    states = States()
    if not any(isinstance(p, dict) and p["type"] == "ema" for p in plugins):
        plugins = [*plugins, "ema"]
    runner = make(plugins=[*plugins, states])
    runner.train()
    averaged = runner.plugins["ema"].averaged
    expected = ema_of([states.weights[index] for index in updated], 0.0002)
    assert averaged.steps == len(updated)
    assert torch.equal(averaged.module.net.weight, expected)


def test_a_window_that_is_closed_after_an_epoch_of_unknown_length_counts(make: MakeRunner) -> None:
    class Batches:
        def __iter__(self) -> Any:
            return iter([[torch.ones(1, 4), torch.zeros(1, dtype=torch.long)]] * 3)

    accumulate = dict(type="accumulate", steps=2)
    runner = make(plugins=["ema", accumulate], train_dataloader=Batches())
    runner.train()
    assert runner.progress.step == 4
    assert runner.plugins["ema"].averaged.steps == 4


def test_with_amp_skipped_steps_do_not_count(make: MakeRunner) -> None:
    states = States()
    amp = dict(type="amp", dtype="float16", init_scale=2.0**22)
    runner = make(plugins=["ema", amp, states])
    runner.train()
    skipped = 10 - runner.progress.step
    assert 0 < skipped < 10
    assert runner.plugins["ema"].averaged.steps == runner.progress.step
    expected = ema_of(states.weights[skipped:], 0.0002)
    assert torch.equal(runner.plugins["ema"].averaged.module.net.weight, expected)


@pytest.mark.parametrize("evaluate", ["averaged", "raw", "both"])
def test_what_is_evaluated(make: MakeRunner, evaluate: Literal["averaged", "raw", "both"]) -> None:
    ema = Ema(evaluate=evaluate, momentum=0.001)
    runner = make(plugins=[ema], validate=True, val_cfg=dict(loss=True))
    metrics = runner.train()
    raw = make(validate=True, val_cfg=dict(loss=True))
    expected = raw.train()
    raw.bare_model.load_state_dict(ema.averaged.module.state_dict())
    averaged = raw.val()
    assert averaged["loss"] != expected["loss"]
    if evaluate == "both":
        assert metrics == {**expected, **{f"ema/{name}": v for name, v in averaged.items()}}
    else:
        assert metrics == (averaged if evaluate == "averaged" else expected)


def test_before_the_first_update_the_raw_weights_are_evaluated(
    make: MakeRunner, caplog: pytest.LogCaptureFixture
) -> None:
    for evaluate in ("averaged", "both"):
        runner = make(plugins=[Ema(evaluate=evaluate, begin_epoch=1)], validate=True)
        plain = make(validate=True)
        with torch.no_grad():  # as loading weights would
            for model in (runner.bare_model, plain.bare_model):
                model.net.weight.copy_(torch.eye(3, 4))
        with caplog.at_level("INFO"):
            metrics = runner.val()
        assert metrics["accuracy"] == plain.val()["accuracy"]
        assert "there is no average yet, so the raw weights are evaluated" in caplog.text
        with pytest.raises(RuntimeError, match="no average yet to export"):
            runner.plugins["ema"].export("x.pth")


def test_an_error_or_a_stop_in_validation_leaves_the_raw_weights(make: MakeRunner) -> None:
    seen = []

    class Fails(Plugin):
        def after_val_iter(self, runner: Any) -> None:
            seen.append({n: v.clone() for n, v in runner.state_dict()["state_dict"].items()})
            runner.stop("enough")
            raise LookupError("in validation")

    runner, plain = make(plugins=["ema", Fails()], validate=True), make()
    with pytest.raises(LookupError):
        runner.train()
    plain.train(max_epochs=1)
    for name, value in plain.bare_model.state_dict().items():
        assert torch.equal(runner.bare_model.state_dict()[name], value)
        assert torch.equal(seen[0][name], value), "also in a state that is taken meanwhile"


@pytest.mark.parametrize(
    "plugins",
    [
        [],
        [dict(type="accumulate", steps=2)],
        [dict(type="amp", dtype="float16", init_scale=2.0**22)],
        pytest.param([dict(type="compile", backend="eager")], marks=pytest.mark.process),
    ],
)
def test_a_run_that_is_cut_within_an_epoch_goes_on(
    make: MakeRunner, plugins: Any, tmp_path: Path
) -> None:
    def runner(cut: bool = False) -> Any:
        made = make(plugins=[Ema(gamma=4, begin_step=1), *plugins], validate=True)
        if cut:
            made.on("after_train_iter")(
                lambda runner: runner.stop("cut") if runner.progress.iter == 7 else None
            )
        return made

    straight, first, second = runner(), runner(cut=True), runner()
    straight.train()
    first.train()
    torch.save(first.state_dict(), tmp_path / "state.pth")
    checkpoint = torch.load(tmp_path / "state.pth", weights_only=True)
    assert checkpoint["ema_state_dict"].keys() == {
        "steps",
        *(f"module.{name}" for name in checkpoint["state_dict"]),
    }
    second.load_state_dict(checkpoint)
    second.train()
    mine, theirs = second.state_dict(), straight.state_dict()
    for key in ("state_dict", "ema_state_dict"):
        for name, value in theirs[key].items():
            assert torch.equal(mine[key][name], value), name
    assert second.val_loop.metrics == straight.val_loop.metrics


def test_a_checkpoint_without_averaged_weights(
    make: MakeRunner, caplog: pytest.LogCaptureFixture
) -> None:
    plain, runner = make(train_cfg=dict(max_epochs=1)), make(plugins=["ema"])
    plain.train()
    with pytest.raises(ValueError, match=r"(?s)no state of 'ema'.*allow=\['ema'\]"):
        runner.load_state_dict(plain.state_dict())
    states = States()
    runner.plugins.add(states)
    runner.load_state_dict(plain.state_dict(), allow=["ema"])
    assert "no averaged weights (ema_state_dict): the average starts over" in caplog.text
    runner.train()
    averaged = runner.plugins["ema"].averaged
    assert torch.equal(averaged.module.net.weight, ema_of(states.weights, 0.0002))
    with pytest.raises(ValueError, match="state of 'ema', which is not enabled"):
        make().load_state_dict(runner.state_dict())


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_the_averaged_weights_alone_are_exported(
    make: MakeRunner, toy: type[Toy], tmp_path: Path, suffix: str
) -> None:
    runner = make(plugins=["ema"])
    runner.train()
    ema = runner.plugins["ema"]
    path = ema.export(tmp_path / "folder" / f"averaged.{suffix}")
    read = load_file(path) if suffix == "safetensors" else torch.load(path, weights_only=True)
    assert read.keys() == runner.bare_model.state_dict().keys()
    model = toy()
    load_weights(model, path)
    assert torch.equal(model.net.weight, ema.averaged.module.net.weight)
    with pytest.raises(ValueError, match=r"as .pth or .safetensors, not as 'weights.bin'"):
        ema.export(tmp_path / "weights.bin")


def test_a_plain_module_keeps_its_names(make: MakeRunner) -> None:
    runner = make(
        model=nn.Linear(4, 3), loss=nn.functional.cross_entropy, plugins=["ema"], validate=True
    )
    runner.train()
    assert [*runner.state_dict()["ema_state_dict"]] == ["steps", "module.weight", "module.bias"]


def test_the_copy_is_wrapped_as_the_model_is(make: MakeRunner) -> None:
    roles = []

    class Wraps(Plugin):
        def wrap_model(self, model: nn.Module, role: str) -> None:
            roles.append((role, model))

    runner = make(plugins=[Wraps(), "ema"])
    averaged = runner.plugins["ema"].averaged.module
    assert roles == [("train", runner.bare_model), ("average", averaged)]


def test_any_averaged_class_by_type(make: MakeRunner) -> None:
    class Other(ExponentialMovingAverage):
        def __init__(self, model: nn.Module, tau: float, **options: Any) -> None:
            super().__init__(model, **options)
            self.tau = tau

    kind: Any
    for kind in ("StochasticWeightAverage", StochasticWeightAverage):
        runner = make(plugins=[Ema(ema_type=kind, interval=2)])
        assert type(runner.plugins["ema"].averaged) is StochasticWeightAverage
        assert runner.plugins["ema"].averaged.interval == 2
    runner = make(plugins=[Ema(ema_type=Other, options=dict(tau=3))])
    assert runner.plugins["ema"].averaged.tau == 3
    for kind in ("ExponentialMovingAverage", ExponentialMovingAverage, "MomentumAnnealingEMA"):
        runner = make(plugins=[Ema(gamma=7, momentum=0.1, ema_type=kind)])
        assert runner.plugins["ema"].averaged.gamma == 7
    runner = make(plugins=[Ema(options=dict(momentum=0.3))])
    assert runner.plugins["ema"].averaged.momentum == 0.3

    class Few(ExponentialMovingAverage):
        def __init__(self, model: nn.Module, decay: float = 0.9) -> None:
            super().__init__(model, momentum=1 - decay)

    make(plugins=[Ema(ema_type=Few)])
    with pytest.raises(TypeError, match="Few has no interval"):
        make(plugins=[Ema(ema_type=Few, interval=3)])
    with pytest.raises(TypeError, match="StochasticWeightAverage has no momentum"):
        make(plugins=[Ema(ema_type="StochasticWeightAverage", momentum=0.1)])
    with pytest.raises(TypeError, match="'BaseDataPreprocessor' is not a BaseAveragedModel"):
        make(plugins=[Ema(ema_type="BaseDataPreprocessor")])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(momentum=0), "momentum=0: Input should be greater than 0"),
        (dict(momentum=1), "momentum=1: Input should be less than 1"),
        (dict(begin_step=3, begin_epoch=2), "begin_step or begin_epoch, not both"),
        (dict(gamma=3, ema_type="StochasticWeightAverage"), "gamma is for exponential averages"),
        (dict(evaluate="ema"), "'averaged', 'raw' or 'both'"),
    ],
)
def test_bad_options_are_refused(options: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        Ema(**options)


class Pair(nn.Module):
    """Two parts, the first of which begins to train later."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)
        self.seen = 0

    def train_step(self, data: Any, optim_wrapper: Any) -> dict[str, Tensor]:
        self.seen += 1
        for name in ("a", "b") if self.seen > 7 else ("b",):
            loss = nn.functional.cross_entropy(getattr(self, name)(data[0]), data[1])
            optim_wrapper[name].update_params(loss)
        return {}


@pytest.mark.parametrize(("begin", "updates"), [(0, 10), (4, 6)])
def test_with_several_optimizers_an_iteration_in_which_any_steps_counts(
    make: MakeRunner, begin: int, updates: int
) -> None:
    runner = make(
        model=Pair(),
        optim_wrapper={n: dict(optimizer=dict(type="SGD", lr=0.1)) for n in ("a", "b")},
        plugins=[Ema(begin_step=begin)],
    )
    runner.train()
    assert {n: w.steps for n, w in runner.optim_wrapper.items()} == {"a": 3, "b": 10}
    assert runner.plugins["ema"].averaged.steps == updates


def test_a_window_closed_after_an_epoch_belongs_to_it(make: MakeRunner) -> None:
    class Batches:
        def __iter__(self) -> Any:
            return iter([[torch.ones(1, 4), torch.zeros(1, dtype=torch.long)]] * 3)

    runner = make(
        plugins=[Ema(begin_epoch=1), dict(type="accumulate", steps=2)],
        train_dataloader=Batches(),
    )
    runner.train(max_epochs=1)
    assert runner.plugins["ema"].averaged.steps == 0


def test_two_averages_keep_apart(make: MakeRunner) -> None:
    def runner(**slow: Any) -> Any:
        fast = Ema(momentum=0.1, evaluate="both")
        return make(plugins=[fast, Ema(plugin_name="slow", **slow)], validate=True)

    first, second = runner(evaluate="raw"), runner(evaluate="raw")
    first.train()
    state = first.state_dict()
    assert {"ema_state_dict", "slow_state_dict"} <= state.keys()
    second.load_state_dict(state)
    for name in ("ema", "slow"):
        mine, theirs = (r.plugins[name].averaged.module.net.weight for r in (second, first))
        assert torch.equal(mine, theirs)
    assert not torch.equal(mine, second.plugins["ema"].averaged.module.net.weight)
    with pytest.raises(ValueError, match="'ema' and 'slow' both choose the weights"):
        runner()


def test_an_average_of_another_type_is_refused(make: MakeRunner) -> None:
    state = make(plugins=["ema"]).state_dict()
    for other in (Ema(gamma=3), Ema(ema_type="StochasticWeightAverage")):
        with pytest.raises(ValueError, match="of type ExponentialMovingAverage, but this run uses"):
            make(plugins=[other]).load_state_dict(state)


def test_a_checkpoint_that_was_cut_is_refused(make: MakeRunner) -> None:
    first, second = make(plugins=["ema"]), make(plugins=["ema"])
    first.train()
    state = first.state_dict()
    del state["ema_state_dict"]
    with pytest.raises(ValueError, match=r"no averaged weights .ema_state_dict.: it is incomplete"):
        second.load_state_dict(state)


def on_rank(rank: int, port: int, folder: str) -> None:
    """Run by each rank; an assertion that fails there fails the test."""
    torch.set_num_threads(1)
    torch_dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(rank)
    batches = [
        (torch.randn(2, 4, generator=generator), torch.randint(3, (2,), generator=generator))
        for _ in range(5)
    ]
    states, ema = DDPStates(), Ema(momentum=0.1)
    with Runner(
        DistributedDataParallel(nn.Linear(4, 3)),
        folder,
        train_dataloader=batches,
        train_cfg=dict(max_epochs=2),
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.1)),
        loss=nn.functional.cross_entropy,
        plugins=[dict(type="accumulate", steps=2), ema, states],
        defaults=(),
    ) as runner:
        runner.train()
        expected = ema_of(states.weights, 0.1)
        assert len(states.weights) == runner.progress.step == 6
        assert torch.equal(cast(Any, ema.averaged.module).module.weight, expected)
        gathered = [torch.zeros(3, 4) for _ in range(2)]
        torch_dist.all_gather(gathered, expected)
        assert torch.equal(*gathered)
    sys.stdout.flush()
    os._exit(0)


class DDPStates(Plugin):
    """Keeps the raw weights after each step."""

    def before_train(self) -> None:
        self.weights: list[Tensor] = []

    def after_optim_step(self, runner: Any) -> None:
        self.weights.append(runner.bare_model.module.weight.detach().clone())


@pytest.mark.ranks
def test_over_ranks_the_averages_are_the_same(tmp_path: Path) -> None:
    spawn(2, on_rank, tmp_path, str(tmp_path))


# -- models with a low precision ----------------------------------------------------------------


def low(make: MakeRunner, *plugins: Any, **options: Any) -> Any:
    """A run of 200 steps in bfloat16, whose weights move away from where they began."""
    data = toy_data(20)
    batches = [(data.tensors[0].bfloat16(), data.tensors[1])] * 20
    return make(
        model=nn.Sequential(nn.Linear(4, 3)).bfloat16(),
        loss=nn.functional.cross_entropy,
        train_dataloader=batches,
        train_cfg=dict(max_epochs=10),
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.5)),
        plugins=plugins,
        **options,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_of_a_low_precision_is_averaged_in_float32(
    make: MakeRunner, tmp_path: Path, dtype: torch.dtype
) -> None:
    seen: list[Tensor] = []
    runner = low(make, Ema(momentum=0.002))
    runner.bare_model.to(dtype)
    runner.plugins["ema"].averaged.module.to(dtype)
    runner.on("before_train_iter")(lambda data_batch: (data_batch[0].to(dtype), data_batch[1]))
    runner.on("after_train_iter")(
        lambda runner: seen.append(runner.bare_model[0].weight.detach().float())
    )
    runner.train()
    expected = ema_of(seen, 0.002)
    ema = runner.plugins["ema"]
    state = runner.state_dict()["ema_state_dict"]
    assert torch.equal(state["module.0.weight"], expected)
    assert ema.averaged.module[0].weight.dtype == dtype
    assert torch.equal(ema.averaged.module[0].weight, expected.to(dtype))
    moved = (expected - seen[0]).norm() / (seen[-1] - seen[0]).norm()
    assert 0.1 < moved < 0.9
    for name in ("average.pth", "average.safetensors"):
        model: Any = nn.Sequential(nn.Linear(4, 3)).to(dtype)
        load_weights(model, ema.export(tmp_path / name))
        assert torch.equal(model[0].weight, expected.to(dtype))
    load_weights(model, {name: value for name, value in state.items() if name != "steps"})
    assert torch.equal(model[0].weight, expected.to(dtype))


@pytest.mark.parametrize("plugin", ["ema", dict(type="swa", begin=3)])
def test_a_run_of_a_low_precision_is_resumed_exactly(
    make: MakeRunner, tmp_path: Path, plugin: Any
) -> None:
    straight, first, second = (low(make, plugin) for _ in range(3))
    straight.train()
    first.on("after_train_iter")(
        lambda runner: runner.stop("cut") if runner.progress.iter == 97 else None
    )
    first.train()
    torch.save(first.state_dict(), tmp_path / "state.pth")
    second.load_state_dict(torch.load(tmp_path / "state.pth", weights_only=True))
    second.train()
    key = "ema_state_dict" if plugin == "ema" else "swa_state_dict"
    expected = straight.state_dict()[key]
    assert expected["module.0.weight"].dtype == torch.float32
    for name, value in second.state_dict()[key].items():
        assert torch.equal(value, expected[name]), name


def test_a_checkpoint_with_rounded_averages_can_be_resumed(make: MakeRunner) -> None:
    first, second = low(make, "ema"), low(make, "ema")
    first.train(max_epochs=2)
    state = first.state_dict()
    state["ema_state_dict"] = {
        name: value.bfloat16() if value.is_floating_point() else value
        for name, value in state["ema_state_dict"].items()
    }
    second.load_state_dict(state)
    second.train()
    averages = second.state_dict()["ema_state_dict"]
    assert averages["module.0.weight"].dtype == torch.float32
    assert averages["steps"] == 200


class Rotary(nn.Module):
    """Keeps caches as language models do: of positions, a mask, and a table that is saved."""

    positions: Tensor
    mask: Tensor | None
    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("positions", torch.arange(2.0).expand(1, -1), persistent=False)
        self.register_buffer("mask", None, persistent=False)
        self.register_buffer("table", torch.arange(2.0))

    def forward(self, inputs: Tensor) -> Tensor:
        length = inputs.shape[1]
        if length > self.positions.shape[1]:
            self.positions = torch.arange(float(length)).expand(1, -1)
        if length > len(self.table):
            self.table = torch.arange(float(length))
        if self.mask is None or len(self.mask) != length:
            self.mask = torch.ones(length, length).tril()
        return (inputs + self.positions[:, :length] + self.table[:length]) @ self.mask[:, :2]


@pytest.mark.parametrize("plugin", ["ema", dict(type="swa", begin=1)])
@pytest.mark.parametrize("update_buffers", [False, True])
def test_caches_that_grow_while_training_are_no_trouble(
    make: MakeRunner, plugin: Any, update_buffers: bool
) -> None:
    def batches(*lengths: int) -> list[Any]:
        return [(torch.ones(3, length), torch.zeros(3, 3)) for length in lengths]

    if plugin == "ema":
        plugin = Ema(update_buffers=update_buffers, momentum=0.1)
    runner = make(
        model=nn.Sequential(Rotary(), nn.Linear(2, 3)),
        loss=nn.functional.mse_loss,
        train_dataloader=batches(2, 5, 3, 8),
        val_dataloader=batches(3, 11, 4),
        val_cfg=dict(loss=True),
        plugins=[plugin],
    )
    metrics = runner.train()
    name = "loss" if isinstance(plugin, Ema) else "swa/loss"
    averaged = runner.plugins["ema" if name == "loss" else "swa"].averaged.module
    fresh = nn.Sequential(Rotary(), nn.Linear(2, 3))
    fresh[1].load_state_dict(averaged[1].state_dict())
    with torch.no_grad():
        losses = [nn.functional.mse_loss(fresh(x), y).item() for x, y in batches(3, 11, 4)]
    assert metrics[name] == pytest.approx(sum(losses) / 3, rel=1e-5)


# -- an average that is still where it began ----------------------------------------------------


def short(make: MakeRunner, *plugins: Any, epochs: int = 8, **options: Any) -> Any:
    """A run of 160 steps, 20 per epoch, that learns fast."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(80, 4, generator=generator)
    batches = [(inputs[i : i + 4], inputs[i : i + 4, :3].argmax(1)) for i in range(0, 80, 4)]
    return make(
        train_dataloader=batches,
        val_dataloader=batches,
        val_cfg=dict(loss=True),
        train_cfg=dict(max_epochs=epochs),
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.5)),
        plugins=plugins,
        **options,
    )


WARNING = "small for a run of"


@pytest.mark.parametrize("evaluate", ["averaged", "both"])
def test_an_average_that_is_still_where_it_began_is_warned_of_once(
    make: MakeRunner, caplog: pytest.LogCaptureFixture, evaluate: Any
) -> None:
    runner = short(make, Ema(evaluate=evaluate))
    runner.train()
    runner.val()
    assert caplog.text.count(WARNING) == 1
    assert (
        "ema: this evaluates an average of 20 updates, of which the weights that it began with "
        "still make up 100%, because momentum=0.0002 is small for a run of 160 updates: the "
        "metrics are nearly those of the start. Use momentum=0.06, or gamma=10, which starts with "
        "a larger momentum"
    ) in caplog.text


@pytest.mark.parametrize("options", [dict(momentum=0.06), dict(gamma=10)])
def test_what_the_warning_advises_is_enough(
    make: MakeRunner, caplog: pytest.LogCaptureFixture, options: Any
) -> None:
    metrics = short(make, Ema(evaluate="both", **options)).train()
    first = short(make, epochs=1).train()["loss"]
    assert metrics["loss"] < first / 2
    assert metrics["ema/loss"] - metrics["loss"] < 0.15 * (first - metrics["loss"])
    assert WARNING not in caplog.text


@pytest.mark.parametrize(
    "plugin",
    [
        Ema(evaluate="raw"),
        Ema(momentum=0.02),
        Ema(gamma=100),
        Ema(ema_type="StochasticWeightAverage"),
        Ema(ema_type="MomentumAnnealingEMA"),
        Ema(momentum=0.5, interval=10),
        Ema(begin_epoch=10),
    ],
)
def test_a_healthy_average_is_not_warned_of(
    make: MakeRunner, caplog: pytest.LogCaptureFixture, plugin: Any
) -> None:
    short(make, plugin).train()
    assert WARNING not in caplog.text


@pytest.mark.parametrize(
    ("plugin", "advice"),
    [
        (Ema(momentum=0.02, interval=10), "Use momentum=0.5, or"),
        (Ema(momentum=0.002, begin_epoch=4), r"run of 80 updates: .*Use momentum=0\.1, or"),
        (Ema(options=dict(momentum=0.001)), "because momentum=0.001"),
        (Ema(plugin_name="slow"), "slow: this evaluates"),
    ],
)
def test_the_warning_counts_updates_from_where_the_average_begins(
    make: MakeRunner, caplog: pytest.LogCaptureFixture, plugin: Any, advice: str
) -> None:
    short(make, plugin).train()
    assert WARNING in caplog.text
    assert re.search(advice, caplog.text)


def test_windows_of_accumulated_gradients_make_fewer_updates(
    make: MakeRunner, caplog: pytest.LogCaptureFixture
) -> None:
    short(make, "ema", dict(type="accumulate", steps=4)).train()
    assert "run of 40 updates" in caplog.text


def test_an_average_that_will_forget_its_start_is_only_explained(
    make: MakeRunner, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        short(make, Ema(momentum=0.02)).train(max_epochs=5)
    assert WARNING not in caplog.text
    text = "still make up 68%. At the end of the run, they will make up 14%"
    assert caplog.text.count(text) == 1


def test_updates_count_over_the_whole_run(
    make: MakeRunner, caplog: pytest.LogCaptureFixture
) -> None:
    first = short(make, Ema(momentum=0.01, evaluate="raw"))
    first.train(max_epochs=7)
    second = short(make, Ema(momentum=0.01))
    second.load_state_dict(first.state_dict())
    second.train()
    assert WARNING not in caplog.text


class Unsized:
    """A dataloader whose length is unknown."""

    def __iter__(self) -> Any:
        return iter(DataLoader(toy_data(), batch_size=4))


@pytest.mark.parametrize("window", [1, 2])
def test_an_epoch_of_unknown_length_counts_as_long_as_those_before(
    make: MakeRunner, caplog: pytest.LogCaptureFixture, window: int
) -> None:
    def build(*plugins: Any) -> Any:
        cfg = dict(max_epochs=4)
        return make(plugins=plugins, train_dataloader=Unsized(), validate=True, train_cfg=cfg)

    accumulate = dict(type="accumulate", steps=window)
    runner = build("ema", accumulate)
    runner.train()
    updates = runner.plugins["ema"].averaged.steps.item()
    assert updates == 4 * (5 if window == 1 else 3)
    assert f"run of about {updates} updates" in caplog.text
    caplog.clear()
    build(Ema(momentum=0.15), accumulate).train()  # forgets its start, but not in the first epoch
    assert WARNING not in caplog.text


def test_the_end_of_an_epoch_closes_a_window_and_makes_an_update(
    make: MakeRunner, caplog: pytest.LogCaptureFixture
) -> None:
    plugins = [dict(type="accumulate", steps=100), Ema(momentum=0.05)]
    runner = make(plugins=plugins, train_cfg=dict(max_epochs=40), validate=True)
    runner.train()
    assert runner.plugins["ema"].averaged.steps == 40
    assert WARNING not in caplog.text


@pytest.mark.parametrize("window", [1, 3, 7])
@pytest.mark.parametrize("limit", [dict(max_epochs=3), dict(max_iters=7)])
@pytest.mark.parametrize("is_sized", [True, False])
def test_the_steps_that_are_left_are_those_that_follow(
    make: MakeRunner, window: int, limit: Any, is_sized: bool
) -> None:
    counts: list[tuple[int | None, int]] = []

    class Counts(Plugin):
        def after_train_iter(self, runner: Runner) -> None:
            self.count(runner)

        def after_train_epoch(self, runner: Runner) -> None:
            self.count(runner)

        def count(self, runner: Runner) -> None:
            # Within an epoch of unknown length, a window may end where the epoch turns out to end.
            if is_sized or (runner.progress.batch == 0 and runner.progress.epoch):
                counts.append((steps_left(runner.progress, window), runner.progress.step))

    loader = DataLoader(toy_data(), batch_size=4) if is_sized else Unsized()
    plugins = [dict(type="accumulate", steps=window), Counts()]
    runner = make(plugins=plugins, train_dataloader=loader, train_cfg=limit)
    if not is_sized and "max_epochs" in limit:
        assert steps_left(runner.progress, window) is None
    runner.train()
    assert [left for left, _ in counts] == [runner.progress.step - step for _, step in counts]


def test_an_avg_func_of_unknown_weight_is_not_warned_of(
    make: MakeRunner, caplog: pytest.LogCaptureFixture
) -> None:
    class Own(ExponentialMovingAverage):
        def avg_func(self, averaged_param: Tensor, source_param: Tensor, steps: int) -> None:
            averaged_param.copy_(source_param)

    short(make, Ema(ema_type=Own)).train()
    assert WARNING not in caplog.text

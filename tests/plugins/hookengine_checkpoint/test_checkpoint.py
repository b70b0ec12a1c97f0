"""When checkpoints are saved, what is in them, which are kept, and how a run goes on from one."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hookengine_checkpoint import export_weights
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader

from hookengine import Plugin
from hookengine.model import initialize, load_weights
from tests.fixtures import MakeData, MakeRunner, Toy


def names(runner: Any) -> list[str]:
    """The checkpoints that are there, by number."""
    folder = runner.run_dir / "checkpoints"
    found = [p for p in folder.iterdir() if not p.is_symlink() and p.name != "abandoned"]
    assert all((p / "manifest.json").exists() for p in found)
    return [p.name for p in sorted(found, key=lambda p: manifest(p)["number"])]


def manifest(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((path / "manifest.json").read_text())
    return loaded


def load(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(path / "state.pth", weights_only=True)
    return loaded


class Scores(Plugin):
    """Sets what validations come to, before anybody reads it."""

    def __init__(self, values: list[float]) -> None:
        self.values = values

    def before_val_iter(self, runner: Any) -> None:
        epoch = runner.progress.epoch
        runner.val_loop.evaluator.metrics[0].compute_metrics = lambda results: {
            "accuracy": self.values[epoch - 1]
        }


# -- when ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("every", "cfg", "expected"),
    [
        (None, dict(max_epochs=3), ["epoch_1", "epoch_2", "epoch_3"]),
        (2, dict(max_epochs=3), ["epoch_2", "epoch_3"]),
        ("2 epochs", dict(max_epochs=5), ["epoch_2", "epoch_4", "epoch_5"]),
        ("4 iterations", dict(max_epochs=2), ["iter_4", "iter_8", "epoch_2"]),
        (4, dict(max_iters=9), ["iter_4", "iter_8", "iter_9"]),
        (None, dict(max_iters=9), ["iter_9"]),
        ("1 epoch", dict(max_iters=9), ["iter_5", "iter_9"]),
        ("1000 minutes", dict(max_epochs=2), ["epoch_2"]),
        ("0.0000001 minutes", dict(max_iters=3), ["iter_2", "iter_3"]),
    ],
)
def test_it_saves_at_its_rhythm_and_at_the_end(
    make: MakeRunner, every: Any, cfg: Any, expected: list[str]
) -> None:
    plugin = dict(type="checkpoint", every=every, keep_last=None)
    runner = make(plugins=[plugin], train_cfg=cfg)
    runner.train()
    assert names(runner) == expected
    assert (runner.run_dir / "checkpoints" / "latest").resolve().name == expected[-1]


def test_it_saves_on_request_and_where_training_is_stopped(make: MakeRunner) -> None:
    runner = make(plugins=[dict(type="checkpoint", keep_last=None)])

    @runner.on("after_train_iter")
    def ask(runner: Any) -> None:
        if runner.progress.iter == 2:
            runner.requests["save"] = "before the experiment"
        if runner.progress.iter == 8:
            runner.stop("enough")

    runner.train()
    assert names(runner) == ["iter_2", "epoch_1", "iter_8"]


def test_it_never_saves_within_a_window_of_accumulation(make: MakeRunner) -> None:
    plugins = [
        dict(type="accumulate", steps=3),
        dict(type="checkpoint", every="1 iterations", keep_last=None),
    ]
    runner = make(plugins=plugins)
    runner.train()
    iters = [
        manifest(runner.run_dir / "checkpoints" / n)["progress"]["iter"] for n in names(runner)
    ]
    assert iters == [3, 5, 8, 10]


def test_the_last_one_includes_the_validation(make: MakeRunner) -> None:
    runner = make(plugins=["checkpoint"], validate=True)
    runner.train()
    assert names(runner) == ["epoch_2"]
    state = load(runner.run_dir / "checkpoints" / "epoch_2")
    assert state["progress"]["val_due"] is False
    assert manifest(runner.run_dir / "checkpoints" / "epoch_2")["metrics"].keys() == {"accuracy"}


def test_the_epoch_is_saved_before_a_validation_that_fails(make: MakeRunner) -> None:
    runner = make(plugins=["checkpoint"], validate=True)

    @runner.on("after_val_iter")
    def fail() -> None:
        raise RuntimeError("a bug in a metric")

    with pytest.raises(RuntimeError, match="a bug in a metric"):
        runner.train()
    assert names(runner) == ["epoch_1"]
    assert load(runner.run_dir / "checkpoints" / "epoch_1")["progress"]["val_due"] is True


# -- what ---------------------------------------------------------------------------------------


def test_what_a_checkpoint_holds(make: MakeRunner, toy: type[Toy]) -> None:
    class Kept(Plugin):
        def after_train_iter(self) -> None: ...

        def state_dict(self) -> dict[str, Any]:
            return {"list": [1, (2.5, "x")], "tensor": torch.arange(3)}

        def load_state_dict(self, state: Any) -> None: ...

        def rank_state_dict(self) -> dict[str, Any]:
            return {"mine": True}

        def load_rank_state_dict(self, state: Any) -> None: ...

    runner = make(plugins=["checkpoint", dict(type="seed", seed=7), Kept(), "ema"])
    runner.train()
    path = runner.run_dir / "checkpoints" / "epoch_2"
    state = load(path)
    assert {*state} == {
        *("state_dict", "optimizer", "progress", "plugins", "ranks", "meta", "ema_state_dict")
    }
    for name, value in runner.bare_model.state_dict().items():
        assert torch.equal(state["state_dict"][name], value)
    toy().load_state_dict(state["state_dict"])  # outside of hookengine
    assert state["progress"]["iter"] == 10
    assert state["plugins"]["kept"]["list"] == [1, (2.5, "x")]
    assert torch.equal(state["plugins"]["kept"]["tensor"], torch.arange(3))
    (rank,) = state["ranks"]
    assert rank["plugins"]["kept"] == {"mine": True}
    assert {"python", "numpy", "torch"} <= rank["plugins"]["seed"]["random"].keys()
    assert state["plugins"]["seed"] == {"seed": 7}
    assert state["meta"]["optimizers"]["optimizer"]["type"] == "SGD"
    assert state["meta"]["dataset"]["train"] == {"samples": 20, "batches": 5}

    written = manifest(path)
    assert written["format"] == 1
    assert written["progress"]["epoch"] == 2
    assert written["plugins"]["checkpoint"].startswith("hookengine ")
    assert written["environment"]["packages"]["torch"] == torch.__version__.partition("+")[0]
    assert written["files"]["state.pth"]["size"] == (path / "state.pth").stat().st_size
    assert written["finite"] is True


def test_tied_and_strided_tensors_and_versions_of_modules_come_back(make: MakeRunner) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4)
            self.a = nn.Linear(4, 4)
            self.b = nn.Linear(4, 4)
            self.b.weight = self.a.weight
            self.register_buffer("wide", torch.arange(12.0).view(3, 4).t())
            self.register_buffer("none", torch.empty(0, 3))

        def forward(self, x: Any) -> Any:
            return self.b(self.a(self.norm(x)))[:, :3]

    loss = nn.functional.cross_entropy
    runner = make(model=Tied(), loss=loss, plugins=["checkpoint"])
    runner.train()
    state = load(runner.run_dir / "checkpoints" / "epoch_2")["state_dict"]
    assert state["a.weight"].data_ptr() == state["b.weight"].data_ptr()
    assert state._metadata["norm"]["version"] == 2
    for name, value in runner.bare_model.state_dict().items():
        assert torch.equal(state[name], value)


class Holding(Plugin, name="holding"):
    """Has a state; loads it."""

    def __init__(self, value: Any = None) -> None:
        self.value = value

    def after_train_iter(self) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {"best": [0, self.value]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["best"][1]

    def rank_state_dict(self) -> dict[str, Any]:
        return {"own": self.value}

    def load_rank_state_dict(self, state: dict[str, Any]) -> None: ...


@pytest.mark.parametrize(
    "value",
    [np.float64(0.1), np.float32(0.1), np.int64(7), np.bool_(True), np.str_("a"), np.array(2.5)],
    ids=lambda value: type(value).__name__,
)
def test_scalars_of_numpy_are_saved_as_python_values(make: MakeRunner, value: Any) -> None:
    class Adding(Plugin):
        def before_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["added"] = {"value": value}

    class Extra(nn.Linear):
        def get_extra_state(self) -> Any:
            return {"value": value}

        def set_extra_state(self, state: Any) -> None: ...

    def build(holding: Holding, **options: Any) -> Any:
        model = Extra(4, 3)
        plugins = ["checkpoint", holding, Adding()]
        loss = nn.functional.cross_entropy
        return make(model=model, loss=loss, plugins=plugins, name="run", **options)

    runner = build(Holding(value))
    runner.train()
    state = load(runner.run_dir / "checkpoints" / "epoch_2")
    found = [
        state["plugins"]["holding"]["best"][1],
        state["ranks"][0]["plugins"]["holding"]["own"],
        state["added"]["value"],
        state["state_dict"]["_extra_state"]["value"],
    ]
    for one in found:
        assert one == value.item()
        assert type(one) is type(value.item())
    holding = Holding()
    build(holding, resume="auto")
    assert holding.value == value


@pytest.mark.parametrize("kind", [np.float64, np.float32, np.array, float, torch.tensor])
@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
def test_a_learning_rate_may_be_a_scalar_of_numpy(
    make: MakeRunner, kind: Any, optimizer: str, tmp_path: Path
) -> None:
    """Resumed, the run ends with the weights of the straight run."""

    def build(epochs: int, name: str, built: bool = False, **options: Any) -> Any:
        torch.manual_seed(0)
        model = Toy()
        config: dict[str, Any] = dict(type=optimizer, lr=kind(0.01), weight_decay=np.float64(0.1))
        if optimizer == "Adam":
            config.update(betas=(np.float64(0.9), np.float32(0.99)))
        if built and optimizer == "SGD":
            config.pop("type")
            config = torch.optim.SGD(model.parameters(), **config)  # type: ignore[assignment]
        return make(
            model=model,
            optim_wrapper=dict(optimizer=config),
            plugins=["checkpoint", "logging", "no:progress_bar"],
            train_cfg=dict(max_epochs=epochs),
            name=name,
            **options,
        )

    straight = build(3, "straight")
    straight.train()
    first = build(1, "run", built=True)
    first.train()
    first.close()
    resumed = build(3, "run", resume="auto")
    resumed.train()
    for name, value in straight.bare_model.state_dict().items():
        assert torch.equal(resumed.bare_model.state_dict()[name], value)
    rate = resumed.optim_wrapper.param_groups[0]["lr"]
    assert rate == kind(0.01)
    described = json.loads((straight.run_dir / "run.json").read_text())["optimizers"]["optimizer"]
    assert described["lr"] == float(kind(0.01))
    assert described["weight_decay"] == 0.1


def test_a_rate_that_numpy_computes_during_training(make: MakeRunner) -> None:
    runner = make(plugins=["checkpoint"])

    @runner.on("before_train_iter")
    def decay(runner: Any) -> None:
        runner.optim_wrapper.param_groups[0]["lr"] = np.logspace(-1, -3, 10)[runner.progress.iter]

    runner.train()
    state = load(runner.run_dir / "checkpoints" / "epoch_2")
    rate = state["optimizer"]["param_groups"][0]["lr"]
    assert type(rate) is float
    assert rate == np.logspace(-1, -3, 10)[9]


@pytest.mark.parametrize(
    "value", [np.float32(0.5), Fraction(1, 2), Decimal("0.5"), torch.tensor(0.5), np.ones(1) / 2]
)
def test_metrics_that_are_numbers_of_any_type_are_saved(make: MakeRunner, value: Any) -> None:
    runner = make(plugins=[dict(type="checkpoint", keep_best="extra_loss")], validate=True)

    @runner.on("after_val_epoch")
    def add(metrics: dict[str, Any]) -> None:
        metrics.update(extra_loss=value, text="0.5", several=torch.ones(2), nothing=None)

    runner.train()
    path = runner.run_dir / "checkpoints" / "epoch_2"
    assert manifest(path)["metrics"].keys() == {"accuracy", "extra_loss"}
    assert load(path)["metrics"]["extra_loss"] == manifest(path)["metrics"]["extra_loss"] == 0.5


class Colors(Enum):
    RED = 1


UNSAVABLE: dict[str, Any] = {
    "a function": lambda: None,
    "an enum": Colors.RED,
    "an array": np.zeros(2),
    "a fraction": Fraction(1, 2),
    "a path": Path("x"),
    "an object": object(),
    "a date": np.datetime64("2020-01-01"),
    "a generator": (i for i in range(3)),
    "a range": range(3),
    "a tensor without values": torch.ones(2, device="meta"),
    "a parameter without a shape": torch.nn.UninitializedParameter(),
}
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch calls them a prototype
    UNSAVABLE["a nested tensor"] = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


@pytest.mark.parametrize("kind", UNSAVABLE)
def test_a_state_that_only_code_could_restore_is_refused_before_training(
    make: MakeRunner, kind: str
) -> None:
    value = UNSAVABLE[kind]
    runner = make(plugins=["checkpoint", Holding(value)])
    with pytest.raises(TypeError, match=r"\['holding'\]\['best'\]\[1\] is a .*instead"):
        runner.train()
    assert runner.progress.iter == 0
    assert not (runner.run_dir / "checkpoints").exists()


def test_every_place_of_a_state_is_checked_before_training(make: MakeRunner) -> None:
    class OfRank(Plugin, name="of_rank"):
        def after_train_iter(self) -> None: ...

        def rank_state_dict(self) -> dict[str, Any]:
            return {"key": print}

        def load_rank_state_dict(self, state: Any) -> None: ...

    class Adding(Plugin, name="adding"):
        def before_train(self) -> None:
            self.options = {"key": print}

        def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
            checkpoint["options"] = self.options

    class Extra(Toy):
        def get_extra_state(self) -> Any:
            return {"key": print}

        def set_extra_state(self, state: Any) -> None: ...

    class Slow(torch.optim.SGD):
        def __init__(self, params: Any, lr: float, how: Any) -> None:
            super().__init__(params, lr)
            self.param_groups[0]["how"] = how

    itself: dict[str, Any] = {}
    itself["me"] = itself
    cases: list[tuple[dict[str, Any], str]] = [
        (dict(plugins=[OfRank()]), "the state of plugins['of_rank']['key']"),
        (dict(plugins=[Adding()]), "checkpoint['options']['key'], which the plugin 'adding' adds,"),
        (dict(model=Extra()), "the state of the model['_extra_state']['key']"),
        (
            dict(optim_wrapper=dict(optimizer=dict(type=Slow, lr=0.1, how=print))),
            "the state of the optimizer['param_groups'][0]['how']",
        ),
        (dict(plugins=[Holding(itself)]), "the state of plugins['holding']['best'][1]['me']"),
    ]
    for options, place in cases:
        plugins = ["checkpoint", *options.pop("plugins", [])]
        runner = make(plugins=plugins, **options)
        with pytest.raises(TypeError) as caught:
            runner.train()
        assert str(caught.value).startswith(f"{place} is a builtins.")
        assert runner.progress.iter == 0


def test_hooks_that_add_nothing_are_called_only_for_a_save(make: MakeRunner) -> None:
    runner = make(plugins=["checkpoint"])
    calls = []
    runner.on("before_save_checkpoint")(lambda runner: calls.append(runner.progress.iter))

    @runner.on("before_save_checkpoint")
    def needs_a_validation(checkpoint: dict[str, Any]) -> None:
        checkpoint["last"] = calls[-1]  # there is none before the first save

    runner.train()
    assert calls == [5, 10]
    assert load(runner.run_dir / "checkpoints" / "epoch_2")["last"] == 10


def test_a_state_that_becomes_unsavable_names_its_plugin_and_loses_nothing(
    make: MakeRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    holding = Holding(0)
    runner = make(plugins=["checkpoint", "logging", holding], train_cfg=dict(max_epochs=3))

    @runner.on("before_train_epoch")
    def spoil(runner: Any) -> None:
        if runner.progress.epoch == 1:
            holding.value = print

    with pytest.raises(TypeError) as caught:
        runner.train()
    place = "the state of plugins['holding']['best'][1] is a builtins.builtin_function_or_method"
    assert f"last checkpoint could not be saved: {place}" in str(caught.value)
    assert "room" not in str(caught.value)
    out = " ".join(capsys.readouterr().out.split())
    assert f"saving failed ({place}" in out
    assert "the previous checkpoint, epoch_1, is intact. The next save tries again" in out
    assert "disk space" not in out
    assert names(runner) == ["epoch_1"]
    assert runner.progress.iter == 15
    with pytest.raises(TypeError, match="holding"):
        runner.plugins["checkpoint"].save(runner)
    holding.value = 1
    runner.plugins["checkpoint"].save(runner)  # as the error says
    assert names(runner) == ["epoch_3"]


def test_a_change_in_the_iteration_of_the_save_is_saved_unless_it_comes_after_the_save(
    make: MakeRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    class Counter(Plugin):
        def __post_init__(self) -> None:
            self.iterations = self.points = 0

        def after_train_iter(self) -> None:
            self.iterations += 1

        def safe_point(self) -> None:
            self.points += 1

        def state_dict(self) -> dict[str, Any]:
            return {"iterations": self.iterations, "points": self.points}

        def load_state_dict(self, state: Any) -> None: ...

    class First(Counter):
        before = ("checkpoint",)

    class Last(Counter):
        after = ("checkpoint",)

    saving = dict(type="checkpoint", every="3 iterations", keep_last=None)
    runner = make(plugins=[saving, First(), Last(), Counter(), "logging"])
    runner.train()
    for number in (3, 6, 9):
        state = load(runner.run_dir / "checkpoints" / f"iter_{number}")["plugins"]
        assert state["first"] == state["counter"]
        assert state["first"]["iterations"] == state["last"]["iterations"] == number
        assert state["first"]["points"] >= number
        assert state["last"]["points"] == state["first"]["points"] - 1
    out = "".join(capsys.readouterr())
    assert out.count("is called after a checkpoint is saved") == 1
    assert "the plugin 'last' is called after" in out
    assert "Declare @hookimpl(before='checkpoint')" in out


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_what_is_written_is_the_state_of_the_save_not_of_later_iterations(
    make: MakeRunner, device: str
) -> None:
    """The copy is taken before training goes on; from a GPU into pinned memory, without a wait."""
    kept = {}

    class Watch(Plugin):
        def before_save_checkpoint(self, runner: Any) -> None:
            weights = runner.bare_model.state_dict()
            kept[runner.progress.iter] = {n: v.clone().cpu() for n, v in weights.items()}

    saving = dict(type="checkpoint", every="1 iterations", keep_last=None)
    runner = make(plugins=[saving, Watch()], device=device)
    runner.train()
    for number, expected in kept.items():
        path = runner.run_dir / "checkpoints" / f"iter_{number}"
        if path.exists():
            for name, value in load(path)["state_dict"].items():
                assert torch.equal(value, expected[name])
    assert len(kept) >= 10


@pytest.mark.parametrize("val_interval", [1, 2])
def test_saving_never_changes_training(make: MakeRunner, val_interval: int) -> None:
    def weights(*plugins: Any, validate: bool = True) -> Any:
        class Dropping(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.net = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 3))

            def forward(self, x: Any) -> Any:
                return self.net(x)

        cfg = dict(max_epochs=3, **dict(val_interval=val_interval) if validate else {})
        runner = make(
            model=Dropping,
            loss=nn.functional.cross_entropy,
            plugins=[dict(type="seed", seed=1), *plugins],
            train_cfg=cfg,
            validate=validate,
        )
        runner.train()
        return runner.bare_model.net[1].weight

    expected = weights(validate=False)
    often = dict(type="checkpoint", every="1 iterations", keep_best="accuracy")
    for plugins in ([], ["checkpoint"], [often], [{**often, "asynchronous": False}]):
        assert torch.equal(weights(*plugins), expected)


# -- which are kept -----------------------------------------------------------------------------


def test_the_last_and_the_best_are_kept(make: MakeRunner) -> None:
    values = [0.5, 0.8, 0.7, 0.6]
    best = dict(type="checkpoint", keep_best="accuracy", keep_last=1)
    cfg = dict(max_epochs=4)
    runner = make(plugins=[best, Scores(values)], validate=True, train_cfg=cfg)
    runner.train()
    folder = runner.run_dir / "checkpoints"
    assert names(runner) == ["epoch_2", "epoch_4"]
    assert (folder / "best").resolve().name == "epoch_2"
    assert (folder / "latest").resolve().name == "epoch_4"
    assert runner.plugins["checkpoint"].best["value"] == 0.8
    assert load(folder / "epoch_4")["plugins"]["checkpoint"]["best"]["value"] == 0.8


def test_less_is_better_where_it_is_stated_or_known(make: MakeRunner) -> None:
    values = [0.5, 0.3, 0.7]
    options: dict[str, Any] = dict(validate=True, train_cfg=dict(max_epochs=3))
    stated = dict(type="checkpoint", keep_best="accuracy", greater_is_better=False)
    runner = make(plugins=[stated, Scores(values)], **options)
    runner.train()
    assert runner.plugins["checkpoint"].best["value"] == 0.3
    known = make(
        plugins=[dict(type="checkpoint", keep_best="loss")], val_cfg=dict(loss=True), **options
    )
    known.train()
    assert known.plugins["checkpoint"].best["metric"] == "loss"
    with pytest.raises(TypeError, match="greater_is_better"):
        make(plugins=[dict(type="checkpoint", keep_best="happiness")])


def test_the_best_is_saved_where_nothing_else_is_due(make: MakeRunner) -> None:
    best = dict(type="checkpoint", every=10, keep_best="accuracy")
    options: dict[str, Any] = dict(validate=True, train_cfg=dict(max_epochs=3))
    runner = make(plugins=[best, Scores([0.5, 0.8, 0.7])], **options)
    runner.train()
    assert names(runner) == ["epoch_2", "epoch_3"]
    assert (runner.run_dir / "checkpoints" / "best").resolve().name == "epoch_2"


def test_the_best_survives_a_resume(make: MakeRunner) -> None:
    best = dict(type="checkpoint", keep_best="accuracy")
    values = [0.5, 0.8, 0.6, 0.7, 0.9]

    def run(epochs: int) -> Any:
        runner = make(
            plugins=[best, Scores(values)],
            validate=True,
            train_cfg=dict(max_epochs=epochs),
            name="run",
            resume="auto",
        )
        runner.train()
        return runner

    run(3)
    runner = run(4)
    assert names(runner) == ["epoch_2", "epoch_4"]
    assert runner.plugins["checkpoint"].best["value"] == 0.8
    runner = run(5)
    assert names(runner) == ["epoch_5"]
    assert (runner.run_dir / "checkpoints" / "best").resolve().name == "epoch_5"


def test_keep_last(make: MakeRunner) -> None:
    runner = make(plugins=[dict(type="checkpoint", keep_last=2)], train_cfg=dict(max_epochs=5))
    runner.train()
    assert names(runner) == ["epoch_4", "epoch_5"]


def test_weights_that_are_not_finite_do_not_replace_good_ones_silently(
    make: MakeRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    runner = make(
        plugins=["checkpoint", dict(type="logging", nonfinite="warn")],
        train_cfg=dict(max_epochs=4),
        name="run",
    )

    @runner.on("after_train_epoch")
    def spoil(runner: Any) -> None:
        if runner.progress.epoch == 3:
            with torch.no_grad():
                runner.bare_model.net.bias[0] = torch.nan

    runner.train()
    assert names(runner) == ["epoch_2", "epoch_4"]
    assert (runner.run_dir / "checkpoints" / "latest").resolve().name == "epoch_2"
    assert manifest(runner.run_dir / "checkpoints" / "epoch_4")["finite"] is False
    out = capsys.readouterr().out
    assert "the weights in epoch_3 are not finite (net." in out
    assert "the last checkpoint with finite weights is kept, and latest points to it" in out
    options: dict[str, Any] = dict(train_cfg=dict(max_epochs=4), name="run", resume="auto")
    again = make(plugins=["checkpoint", "logging"], **options)
    assert again.progress.epoch == 2


def test_no_finite_checkpoint_is_promised_before_there_is_one(
    make: MakeRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    runner = make(plugins=["checkpoint", dict(type="logging", nonfinite="warn")])

    @runner.on("after_train_epoch")
    def spoil(runner: Any) -> None:
        torch.nn.init.constant_(runner.bare_model.net.bias, torch.nan)

    runner.train()
    out = capsys.readouterr().out
    assert "(net.weight, net.bias); no checkpoint with finite weights has been saved yet" in out
    assert "latest points to" not in out


# -- going on -----------------------------------------------------------------------------------


def test_auto_goes_on_from_the_newest_run_in_its_folder(
    make: MakeRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = dict(plugins=["checkpoint", "logging"], resume="auto")
    first = make(**options)
    first.train()
    assert "there is no checkpoint in" in capsys.readouterr().out
    second = make(train_cfg=dict(max_epochs=3), **options)
    assert second.progress.epoch == 2
    second.train()
    assert second.run_dir == first.run_dir
    assert f"resuming from {first.run_dir.resolve()}" in capsys.readouterr().out
    records = [json.loads(x) for x in (first.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [record["iter"] for record in records] == [5, 10, 15]


@pytest.mark.parametrize("form", ["checkpoint", "state.pth", "latest", "checkpoints", "run", "str"])
def test_a_path_of_any_form(make: MakeRunner, form: str) -> None:
    first = make(plugins=["checkpoint"])
    first.train()
    folder = first.run_dir / "checkpoints"
    paths: dict[str, Any] = {
        "checkpoint": folder / "epoch_2",
        "state.pth": folder / "epoch_2" / "state.pth",
        "latest": folder / "latest",
        "checkpoints": folder,
        "run": first.run_dir,
        "str": str(folder / "epoch_2"),
    }
    second = make(plugins=["checkpoint"], resume=paths[form])
    assert second.progress.epoch == 2
    assert second.name == first.name
    third = make(plugins=["checkpoint"], resume=True, load_from=paths[form])  # MMEngine's way
    assert third.progress.epoch == 2


def test_a_file_of_ones_own_saving(make: MakeRunner, tmp_path: Path) -> None:
    first = make()
    first.train()
    torch.save(first.state_dict(), tmp_path / "mine.pth")
    second = make(plugins=["checkpoint"], resume=tmp_path / "mine.pth")
    assert second.progress.epoch == 2


def test_an_older_checkpoint_begins_a_run_of_its_own(make: MakeRunner) -> None:
    keeping = dict(type="checkpoint", keep_last=None)
    first = make(plugins=[keeping, "logging"], train_cfg=dict(max_epochs=3))
    first.train()
    records = (first.run_dir / "metrics.jsonl").read_text()
    older = first.run_dir / "checkpoints" / "epoch_1"
    second = make(plugins=["checkpoint", "logging"], resume=older, name="branch")
    second.train()
    third = make(plugins=["checkpoint", "logging"], resume=older)
    third.train()
    assert len({first.name, second.name, third.name}) == 3
    assert names(first) == ["epoch_1", "epoch_2", "epoch_3"]
    assert (first.run_dir / "metrics.jsonl").read_text() == records


def test_under_the_same_name_the_newer_ones_are_set_aside(make: MakeRunner) -> None:
    options: dict[str, Any] = dict(name="run", train_cfg=dict(max_epochs=3))
    first = make(plugins=[dict(type="checkpoint", keep_last=None)], **options)
    first.train()
    older = first.run_dir / "checkpoints" / "epoch_1"
    second = make(plugins=["checkpoint"], resume=older, **options)

    @second.on("before_train_epoch")
    def killed_before_the_first_save(runner: Any) -> None:
        if runner.progress.epoch == 1:
            aside = first.run_dir / "checkpoints" / "abandoned"
            assert {p.name for p in aside.iterdir()} == {"epoch_2", "epoch_3"}
            third = make(plugins=["checkpoint"], resume="auto", **options)
            assert third.progress.epoch == 1

    second.train()
    assert names(second) == ["epoch_3"]


def test_checkpoints_of_an_earlier_run_in_the_folder_are_left_alone(
    make: MakeRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    make(plugins=["checkpoint"], name="run").train()
    second = make(plugins=["checkpoint", "logging"], name="run", train_cfg=dict(max_epochs=3))
    second.train()
    assert names(second) == ["epoch_2", "epoch_3"]
    assert "holds checkpoints of an earlier run, the newest is epoch_2" in capsys.readouterr().out


def test_weights_alone(make: MakeRunner) -> None:
    first = make(plugins=["checkpoint"])
    first.train()
    path = first.run_dir / "checkpoints" / "epoch_2"
    weight = first.bare_model.net.weight
    for given in (path, path / "state.pth", dict(checkpoint=path / "state.pth", strict=True)):
        runner = make(plugins=["checkpoint", "ema"], load_from=given)
        assert torch.equal(runner.bare_model.net.weight, weight)
        assert torch.equal(runner.plugins["ema"].averaged.module.net.weight, weight)
        assert runner.progress.iter == 0
    runner = make(plugins=["checkpoint"], load_from="nowhere.pth", resume="auto")
    assert runner.progress.epoch == 2  # beside resume='auto' they are for the first start
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        make(plugins=["checkpoint"], load_from="nowhere.pth")


@pytest.mark.parametrize("form", ["checkpoint", "state.pth", "latest", "checkpoints", "run", "~"])
def test_weights_alone_are_loaded_from_all_that_load_from_takes(
    make: MakeRunner, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make(plugins=["checkpoint"])
    first.train()
    monkeypatch.setenv("HOME", str(first.work_dir))
    folder = first.run_dir / "checkpoints"
    paths: dict[str, Any] = {
        "checkpoint": folder / "epoch_2",
        "state.pth": folder / "epoch_2" / "state.pth",
        "latest": folder / "latest",
        "checkpoints": folder,
        "run": first.run_dir,
        "~": f"~/{first.name}",
    }
    for path in (paths[form], str(paths[form])):
        toy = Toy()
        assert not load_weights(toy, path)
        assert torch.equal(toy.net.weight, first.bare_model.net.weight)
        pretrained = Toy()
        pretrained.init_cfg = dict(type="Pretrained", checkpoint=path)
        pretrained.init_weights()
        assert torch.equal(pretrained.net.weight, first.bare_model.net.weight)
        runner = make(plugins=["checkpoint"], load_from=path)
        assert torch.equal(runner.bare_model.net.weight, first.bare_model.net.weight)


def test_a_folder_without_a_checkpoint_is_the_same_error_everywhere(
    make: MakeRunner, tmp_path: Path
) -> None:
    torch.save({"weight": torch.ones(2)}, tmp_path / "net.pth")
    text = r"there is no checkpoint .*; the checkpoints in .*: none. Pass one of .*: net\.pth"
    with pytest.raises(FileNotFoundError, match=text):
        load_weights(Toy(), tmp_path)
    with pytest.raises(FileNotFoundError, match=text):
        make(plugins=["checkpoint"], load_from=tmp_path)
    with pytest.raises(FileNotFoundError, match=text):
        initialize(Toy(), dict(type="Pretrained", checkpoint=tmp_path))


def test_all_that_differs_is_said_at_once_and_can_be_allowed(
    make: MakeRunner, data: MakeData
) -> None:
    class Kept(Plugin):
        def after_train_iter(self) -> None: ...

        def state_dict(self) -> dict[str, Any]:
            return {"x": 1}

        def load_state_dict(self, state: Any) -> None: ...

    first = make(plugins=["checkpoint", Kept()])
    first.train()
    other: dict[str, Any] = dict(
        resume=first.run_dir,
        train_dataloader=DataLoader(data(12), batch_size=4),
        optim_wrapper=dict(optimizer=dict(type="AdamW", lr=0.1)),
        train_cfg=dict(max_epochs=3),
    )
    with pytest.raises(ValueError, match="does not fit this Runner") as caught:
        make(plugins=["checkpoint", dict(type="amp", dtype="float16")], **other)
    text = str(caught.value)
    assert "optimizer: is AdamW here, SGD in the checkpoint" in text
    assert "kept: the checkpoint has a state of 'kept', which is not enabled" in text
    assert "amp: the checkpoint has no state of 'amp', which is enabled" in text
    assert "dataset: train has 12 samples in 3 batches here, 20 samples in 5 batches" in text
    assert "allow=['optimizer', 'kept', 'amp', 'dataset']" in text
    assert any("dict(type='checkpoint', allow=[...])" in n for n in caught.value.__notes__)
    allowed = dict(type="checkpoint", allow=["optimizer", "kept", "amp", "dataset"])
    runner = make(plugins=[allowed, dict(type="amp", dtype="float16")], **other)
    assert runner.progress.epoch == 2
    assert not runner.optim_wrapper.optimizer.state
    runner.train()


def test_another_model_is_refused_with_the_way_to_its_weights(make: MakeRunner) -> None:
    loss = nn.functional.cross_entropy
    first = make(model=nn.Sequential(nn.Linear(4, 3)), loss=loss, plugins=["checkpoint"])
    first.train()
    other = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
    before = [p.clone() for p in other.parameters()]
    with pytest.raises(ValueError, match=r"state_dict: missing: 1.weight, 1.bias") as caught:
        make(model=other, loss=loss, plugins=["checkpoint"], resume=first.run_dir)
    assert "0.weight [5, 4] here, [3, 4] there" in str(caught.value)
    assert "Runner(load_from=dict(checkpoint=" in str(caught.value)
    assert all(torch.equal(a, b) for a, b in zip(before, other.parameters(), strict=True))


def test_parameters_in_another_order_are_refused(make: MakeRunner) -> None:
    def runner(order: int, **options: Any) -> Any:
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        parameters = [*model.parameters()][::order]
        optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
        loss = nn.functional.cross_entropy
        return make(
            model=model, loss=loss, plugins=["checkpoint"], optim_wrapper=optimizer, **options
        )

    first = runner(1)
    first.train()
    with pytest.raises(ValueError, match="different parameters in its groups, or in a different"):
        runner(-1, resume=first.run_dir)


@pytest.mark.parametrize("how", [dict(resume="auto"), dict(load_from="x.pth")])
def test_without_the_plugin_resume_is_refused(make: MakeRunner, how: Any) -> None:
    with pytest.raises(ValueError, match="plugin that implements the event 'resume'"):
        make(**how)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(every="often"), "every='often'"),
        (dict(every="1.5 epochs"), "every='1.5 epochs'"),
        (dict(every=0), "every=0"),
        (dict(keep_last=0), "keep_last"),
        (dict(every_n=3), "every_n"),
        (dict(signals=["SIGTRM"]), "signals"),
    ],
)
def test_bad_options_are_refused(make: MakeRunner, options: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        make(plugins=[dict(type="checkpoint", **options)])


def test_bad_arguments_of_the_runner(make: MakeRunner) -> None:
    with pytest.raises(TypeError, match="resume takes 'auto' or the path"):
        make(plugins=["checkpoint"], resume=3)
    with pytest.raises(TypeError, match="load_from takes a path"):
        make(plugins=["checkpoint"], load_from=["x"])
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint .*nowhere"):
        make(plugins=["checkpoint"], resume="nowhere")


def test_host_memory_holds_one_copy_which_is_used_again(make: MakeRunner) -> None:
    saving = dict(type="checkpoint", every="2 iterations")
    runner = make(plugins=[saving])
    pointers = set()
    snapshot = runner.plugins["checkpoint"]._saver.snapshot

    @runner.on("before_train_iter")
    def look() -> None:
        pointers.add(tuple(b.data_ptr() for p, b in snapshot._buffers.items() if "ranks" not in p))

    runner.train()
    assert len(pointers - {()}) == 1


@pytest.mark.process
def test_it_imports_neither_distributed_checkpoint_nor_wandb() -> None:
    """They take a while, and few need them."""
    script = (
        "import sys, hookengine_checkpoint; "
        "print([m for m in sys.modules if m.startswith(('wandb', 'torch.distributed.checkpoint'))])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "[]\n"


def test_a_copy_under_another_name(make: MakeRunner, tmp_path: Path) -> None:
    import shutil

    first = make(plugins=["checkpoint"])
    first.train()
    shutil.copytree(first.run_dir / "checkpoints" / "epoch_2", tmp_path / "good_model")
    assert make(plugins=["checkpoint"], resume=tmp_path / "good_model").progress.epoch == 2
    runner = make(plugins=["checkpoint"], load_from=tmp_path / "good_model")
    assert torch.equal(runner.bare_model.net.weight, first.bare_model.net.weight)


def test_those_of_an_earlier_run_stay_after_a_resume_too(make: MakeRunner) -> None:
    make(plugins=["checkpoint"], name="run", train_cfg=dict(max_epochs=3)).train()
    make(plugins=["checkpoint"], name="run", train_cfg=dict(max_epochs=1)).train()
    runner = make(plugins=["checkpoint"], name="run", resume="auto")
    assert runner.progress.epoch == 1
    runner.train()
    assert names(runner) == ["epoch_3", "epoch_2"]


def test_a_resume_that_fails_moves_nothing(make: MakeRunner) -> None:
    class Failing(Plugin):
        fails: bool = True

        def after_train_iter(self) -> None: ...

        def state_dict(self) -> dict[str, Any]:
            return {"x": 1}

        def load_state_dict(self, state: Any) -> None:
            if self.fails:
                raise RuntimeError("no")

    keeping = dict(type="checkpoint", keep_last=None)
    first = make(plugins=[keeping, Failing()], name="run")
    first.train()
    older = first.run_dir / "checkpoints" / "epoch_1"
    with pytest.raises(RuntimeError, match="no"):
        make(plugins=[keeping, Failing()], name="run", resume=older)
    assert names(first) == ["epoch_1", "epoch_2"]
    assert (first.run_dir / "checkpoints" / "latest").resolve().name == "epoch_2"


def test_weights_that_were_trained_on_since_their_validation_are_not_the_best(
    make: MakeRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    plugins = [
        dict(type="checkpoint", keep_best="accuracy"),
        dict(type="accumulate", steps=3),
        "logging",
    ]
    runner = make(plugins=plugins, validate=True, train_cfg=dict(max_iters=5, val_interval=4))
    runner.train()
    assert "validated within a window of accumulated gradients" in capsys.readouterr().out
    best = (runner.run_dir / "checkpoints" / "best").resolve()
    assert manifest(best)["progress"]["iter"] == 5


def test_a_finished_run_that_is_started_again_returns_its_metrics(make: MakeRunner) -> None:
    options: dict[str, Any] = dict(
        plugins=["checkpoint", "logging"], validate=True, test=True, name="run", resume="auto"
    )
    first = make(**options)
    metrics = first.train()
    first.test()
    first.close()
    records = (first.run_dir / "metrics.jsonl").read_text().splitlines()
    second = make(**options)
    assert second.train() == metrics != {}
    second.test()
    again = (first.run_dir / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(x)["phase"] for x in again] == [json.loads(x)["phase"] for x in records]


def test_a_validation_by_hand_stays_in_the_history(make: MakeRunner) -> None:
    def run(epochs: int, **options: Any) -> list[Any]:
        plugins = ["checkpoint", "logging", dict(type="accumulate", steps=1)]
        cfg = dict(max_epochs=epochs)
        runner = make(plugins=plugins, validate=True, train_cfg=cfg, name="run", **options)

        @runner.on("after_train_iter")
        def validate(runner: Any) -> None:
            if runner.progress.iter % 5 == 4:
                runner.val()
            if runner.progress.iter == 4 and epochs == 1:
                runner.stop("here")

        runner.train()
        runner.close()
        lines = (runner.run_dir / "metrics.jsonl").read_text().splitlines()
        return [(r["phase"], r["iter"]) for r in map(json.loads, lines)]

    run(1)
    assert run(2, resume="auto").count(("val", 4)) == 1


def test_to_validate_an_older_checkpoint_changes_nothing(make: MakeRunner) -> None:
    options: dict[str, Any] = dict(validate=True, name="run", train_cfg=dict(max_epochs=3))
    first = make(plugins=[dict(type="checkpoint", keep_last=None), "logging"], **options)
    first.train()
    first.close()
    records = (first.run_dir / "metrics.jsonl").read_text()
    older = first.run_dir / "checkpoints" / "epoch_1"
    second = make(plugins=["checkpoint", "logging"], resume=older, **options)
    second.val()
    second.close()
    assert names(first) == ["epoch_1", "epoch_2", "epoch_3"]
    assert (first.run_dir / "metrics.jsonl").read_text().count("\n") == records.count("\n")


@pytest.mark.parametrize(
    "scheduler",
    [
        dict(type="MultiStepLR", milestones=[1]),
        dict(type="CosineAnnealingLR"),
        dict(type="ReduceLROnPlateau"),
        dict(type="LambdaLR", lr_lambda=lambda epoch: 0.9**epoch),
        dict(type="OneCycleLR", max_lr=0.1),
    ],
    ids=lambda scheduler: scheduler["type"],
)
def test_the_states_of_torchs_schedulers_can_be_saved(make: MakeRunner, scheduler: Any) -> None:
    options = dict(type="schedule", scheduler=scheduler)
    if scheduler["type"] == "ReduceLROnPlateau":
        options["metric"] = "accuracy"
    runner = make(plugins=["checkpoint", options], validate=True)
    runner.train()
    state = load(runner.run_dir / "checkpoints" / "epoch_2")
    assert "schedule" in state["plugins"]


def test_a_new_optimizer_goes_on_at_the_same_share_of_its_rate(make: MakeRunner) -> None:
    schedule = dict(type="schedule", scheduler=dict(type="ExponentialLR", gamma=0.5))
    first = make(plugins=["checkpoint", schedule])
    first.train()
    for rate in (0.01, 0.1):  # also where it is the same rate
        runner = make(
            plugins=[dict(type="checkpoint", allow=["optimizer"]), schedule],
            optim_wrapper=dict(optimizer=dict(type="AdamW", lr=rate)),
            resume=first.run_dir,
        )
        assert runner.optim_wrapper.get_lr()[0] == pytest.approx(rate * 0.25)


def test_another_learning_rate_is_said(
    make: MakeRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    first = make(plugins=["checkpoint", "logging"])
    first.train()
    other = dict(optimizer=dict(type="SGD", lr=0.2))
    make(plugins=["checkpoint", "logging"], optim_wrapper=other, resume=first.run_dir)
    said = "lr 0.1 from the checkpoint, instead of 0.2"
    assert said in capsys.readouterr().out


def test_a_misspelt_name_in_allow_is_refused(make: MakeRunner) -> None:
    first = make(plugins=["checkpoint"])
    first.train()
    with pytest.raises(KeyError, match=r"optimiser.*optimizer"):
        make(plugins=[dict(type="checkpoint", allow=["optimiser"])], resume=first.run_dir)


def test_a_plugin_finds_each_checkpoint_under_the_path_that_it_is_given(
    make: MakeRunner, tmp_path: Path
) -> None:
    seen: list[tuple[str, bool]] = []
    runner = make(validate=True, plugins=[dict(type="checkpoint", keep_best="accuracy")])

    @runner.on("after_save_checkpoint")
    def look(runner: Any, path: Path, best: bool) -> None:
        runner.plugins["checkpoint"]._writer._executor.submit(int).result()  # nothing else to do
        assert sorted(file.name for file in path.iterdir()) == ["manifest.json", "state.pth"]
        assert (path.parent / "latest").resolve() == path
        seen.append((path.name, best))

    runner.train()
    # The save after a validation replaces the one before it, and takes its name afterwards.
    assert [name for name, _ in seen][-1] in ("epoch_2_2", "epoch_2")
    assert len(seen) == 4
    kept = sorted(path.name for path in (runner.run_dir / "checkpoints").iterdir())
    assert kept == ["best", "epoch_2", "latest"]


def test_the_best_of_another_metric_is_no_measure_and_the_log_says_so(
    make: MakeRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    def build(metric: str, epochs: int, **options: Any) -> Any:
        saving = dict(type="checkpoint", keep_best=metric, **options)
        return make(
            plugins=[saving, "logging"],
            validate=True,
            val_cfg=dict(loss=True),
            name="run",
            resume="auto",
            train_cfg=dict(max_epochs=epochs),
        )

    build("loss", 1).train()
    for metric, options, epochs, starts_over in (
        ("loss", {}, 2, False),
        ("accuracy", {}, 3, True),
        ("accuracy", dict(greater_is_better=False), 4, True),
    ):
        runner = build(metric, epochs, **options)
        assert (runner.plugins["checkpoint"].best is None) is starts_over
        runner.train()
        assert ("the comparison starts over" in capsys.readouterr().out) is starts_over
        assert runner.plugins["checkpoint"].best["metric"] == metric
        runner.close()


@pytest.mark.parametrize("event", ["safe_point", "after_train_iter"])
def test_a_run_that_stops_now_is_saved(make: MakeRunner, event: str) -> None:
    runner = make(plugins=["checkpoint"])

    @runner.on(event)
    def stop(runner: Any) -> None:
        if runner.progress.iter == 4:
            runner.stop("now", now=True)

    runner.train()
    assert runner.progress.iter == 4
    state = load(runner.run_dir / "checkpoints" / "latest")
    assert state["progress"]["iter"] == 4


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_averages_are_exported_with_the_dtype_of_the_model(
    make: MakeRunner, tmp_path: Path, suffix: str
) -> None:
    batches = [(torch.randn(4, 4).bfloat16(), torch.randint(3, (4,)))] * 5
    runner = make(
        model=nn.Linear(4, 3).bfloat16(),
        loss=nn.functional.cross_entropy,
        train_dataloader=batches,
        plugins=["checkpoint", dict(type="ema", momentum=0.1)],
    )
    runner.train()
    saved = load(runner.run_dir / "checkpoints" / "latest")["ema_state_dict"]
    assert saved["module.weight"].dtype == torch.float32
    path = export_weights(runner.run_dir, tmp_path / f"ema.{suffix}", "ema_state_dict")
    read = load_file(path) if suffix == "safetensors" else torch.load(path, weights_only=True)
    assert torch.equal(read["weight"], saved["module.weight"].bfloat16())


def test_averages_that_have_not_begun_are_not_exported(make: MakeRunner, tmp_path: Path) -> None:
    runner = make(plugins=["checkpoint", dict(type="ema", begin_epoch=1)])
    runner.train(max_epochs=1)
    with pytest.raises(ValueError, match=r"ema_state_dict of .* has averaged nothing yet"):
        export_weights(runner.run_dir, tmp_path / "ema.pth", "ema_state_dict")
    assert export_weights(runner.run_dir, tmp_path / "raw.pth").exists()

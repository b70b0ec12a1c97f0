"""Training records: the means over intervals, the times, and the learning rates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hookengine import Plugin
from tests.fixtures import MakeData, MakeRunner
from tests.plugins.hookengine_logging.runs import logging_runner, written


class Losses(Plugin):
    """Keep the loss of every iteration."""

    def __post_init__(self) -> None:
        self.values: list[float] = []

    def after_train_iter(self, outputs: Any) -> None:
        self.values.append(outputs["loss"].item())


def test_training_is_averaged_over_intervals_and_epochs(make: MakeRunner) -> None:
    losses = Losses()
    runner = logging_runner(make, plugins=[losses], validate=True)
    runner.train()
    records = written(runner, "train")
    assert [r["iter"] for r in records] == [2, 4, 5, 7, 9, 10]
    starts = [0, 2, 4, 5, 7, 9]
    for record, start in zip(records, starts, strict=True):
        values = losses.values[start : record["iter"]]
        assert record["loss"] == pytest.approx(sum(values) / len(values), rel=1e-12)
        assert record["lr"] == 0.1
        assert 0 <= record["data_time"] <= record["time"]
        assert record["samples_per_second"] > 0
        assert record["memory"] > 0
    assert [r["epoch"] for r in records] == [1, 1, 1, 2, 2, 2]
    assert records[-1]["step"] == 10
    assert records[-1]["eta"] == 0
    val = written(runner, "val")
    assert [(r["epoch"], r["iter"]) for r in val] == [(1, 5), (2, 10)]
    assert val[-1]["accuracy"] == runner.val_loop.metrics["accuracy"]


def test_an_iteration_based_run_is_written_by_iterations(make: MakeRunner) -> None:
    runner = logging_runner(make, interval=4, train_cfg=dict(max_iters=11))
    runner.train()
    assert [r["iter"] for r in written(runner)] == [4, 8, 11]


def test_a_run_of_unknown_length_has_no_eta_and_loses_nothing(
    make: MakeRunner, data: MakeData
) -> None:
    class Unknown:
        def __iter__(self) -> Any:
            return iter([data(4).tensors] * 3)

    runner = logging_runner(make, train_dataloader=Unknown())
    runner.train()
    assert [r["iter"] for r in written(runner)] == [2, 3, 5, 6]
    assert "eta" not in written(runner)[0]


def test_no_value_is_read_from_the_device_between_records(
    make: MakeRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = []
    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy"):
        original = getattr(Tensor, name)

        def watched(self: Tensor, *a: Any, _name: str = name, _f: Any = original, **k: Any) -> Any:
            reads.append((runner.progress.iter, _name))
            return _f(self, *a, **k)

        monkeypatch.setattr(Tensor, name, watched)
    runner = logging_runner(make, interval=5, train_cfg=dict(max_iters=10))
    reads.clear()
    runner.train()
    # At the start of an epoch (here at 0 and 5) the DataLoader draws its seed.
    assert {iteration for iteration, _ in reads} == {0, 5, 10}


def test_each_of_several_optimizers_has_its_rate(make: MakeRunner) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 3)

        def train_step(self, data: Any, optim_wrapper: Any) -> None:
            for one in optim_wrapper.values():
                one.update_params(self.a(data[0]).sum())

    model = Two()
    sgd = torch.optim.SGD
    runner = logging_runner(
        make,
        model=model,
        optim_wrapper=dict(x=sgd([model.a.weight], lr=0.1), y=sgd([model.a.bias], lr=0.2)),
    )
    runner.train()
    assert (written(runner)[0]["x/lr"], written(runner)[0]["y/lr"]) == (0.1, 0.2)
    assert "loss" not in written(runner)[0]


class Used(Plugin):
    """Keep the learning rate used in each iteration."""

    rate = 0.1

    def before_train(self) -> None:
        self.rates: list[float] = []

    def after_train_iter(self) -> None:
        self.rates.append(self.rate)

    def before_optim_step(self, optim_wrapper: Any) -> None:
        (self.rate,) = optim_wrapper.get_lr()


class Unsized:
    """A dataloader without a length."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __iter__(self) -> Any:
        return iter(torch.utils.data.DataLoader(self.data(), batch_size=4))


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(train_dataloader=Unsized),
        dict(train_cfg=dict(max_iters=7)),
        dict(train_cfg=dict(max_iters=7, val_interval=3), validate=True),
        dict(stop=3),
        dict(plugins=[dict(type="accumulate", steps=2)]),
    ],
)
@pytest.mark.parametrize("by_epoch", [True, False])
def test_a_record_has_the_learning_rate_that_was_used(
    make: MakeRunner, data: MakeData, options: dict[str, Any], by_epoch: bool
) -> None:
    options = dict(options)
    used, stop = Used(), options.pop("stop", None)
    config = dict(type="ExponentialLR", gamma=0.5)
    schedule = dict(type="schedule", scheduler=config, by_epoch=by_epoch)
    if "train_dataloader" in options:
        options["train_dataloader"] = Unsized(data)
    plugins = [schedule, used, *options.pop("plugins", [])]
    runner = logging_runner(make, interval=4, plugins=plugins, **options)
    runner.on("after_train_iter")(
        lambda runner: runner.stop("enough") if runner.progress.iter == stop else None
    )
    runner.train()
    records = written(runner, "train")
    assert records
    for record in records:
        assert record["lr"] == used.rates[record["iter"] - 1], record["iter"]


def test_losses_come_first_and_steps_are_shown_if_they_are_not_iterations(make: MakeRunner) -> None:
    plugins = [dict(type="clip", max_norm=1), dict(type="accumulate", steps=2)]
    runner = logging_runner(make, interval=1, plugins=plugins)
    runner.train()
    keys = [[k for k in record if k in ("loss", "grad_norm", "lr")] for record in written(runner)]
    assert keys[1] == keys[3] == ["loss", "grad_norm", "lr"]
    assert "iter 4/10  step 2  loss" in (runner.run_dir / "run.log").read_text()

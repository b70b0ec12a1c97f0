"""Training records: the means over intervals, the times, and the learning rates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hookengine import BaseModel, Plugin
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


# -- samples --------------------------------------------------------------------------------------


class Level(BaseModel):
    """Its loss is the mean of the inputs; where that is above 1, it has a second loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 1)

    def forward(self, x: Any, y: Tensor, mode: str = "tensor") -> Any:
        x = x["a"] if isinstance(x, dict) else x
        losses = {"loss": x.mean() + 0 * self.net(x).sum()}
        return {**losses, "aux": 10 * x.mean()} if len(x) and x.flatten()[0] > 1 else losses


def levels(*sizes: int, wrap: Any = None) -> list[Any]:
    """Batches of these sizes, with the values 1, 2, ... in them."""
    inputs = [torch.full((size, 3), index + 1.0) for index, size in enumerate(sizes)]
    return [(wrap(x) if wrap else x, x[:, 0]) for x in inputs]


def samples(record: dict[str, Any], iterations: int) -> float:
    """The number of samples that a record has counted."""
    return record["samples_per_second"] * record["time"] * iterations


def one_epoch(make: MakeRunner, batches: Any, **options: Any) -> list[dict[str, Any]]:
    options = {"model": Level(), "train_cfg": dict(max_epochs=1), **options}
    runner = logging_runner(make, train_dataloader=batches, **options)
    runner.train()
    return written(runner, "train")


def test_samples_per_second_counts_the_samples_of_several_inputs(make: MakeRunner) -> None:
    (record,) = one_epoch(make, levels(8, 2, wrap=lambda x: {"a": x, "b": x}))
    assert samples(record, 2) == pytest.approx(10)


def test_losses_are_averaged_over_the_samples_of_their_batches(make: MakeRunner) -> None:
    first, second = one_epoch(make, levels(8, 2, 4), interval=2)
    assert first["loss"] == pytest.approx((8 * 1 + 2 * 2) / 10)
    assert first["aux"] == pytest.approx(20)
    assert (second["loss"], second["aux"]) == (3, 30)
    (record,) = one_epoch(make, levels(8, 2, 4), interval=5)
    assert record["loss"] == pytest.approx((8 * 1 + 2 * 2 + 4 * 3) / 14)
    assert record["aux"] == pytest.approx((2 * 20 + 4 * 30) / 6)
    (same,) = one_epoch(
        make, levels(8, 2, 4), interval=5, plugins=[dict(type="accumulate", steps=2)]
    )
    assert (same["loss"], same["aux"]) == (record["loss"], record["aux"])


def test_training_and_validation_average_losses_alike(make: MakeRunner) -> None:
    class Same(Level):
        def forward(self, x: Any, y: Tensor, mode: str = "tensor") -> Any:
            return super().forward(x, y, mode) if mode == "loss" else [0]

    batches = levels(8, 2, 4)
    runner = logging_runner(
        make,
        interval=5,
        model=Same(),
        train_dataloader=batches,
        train_cfg=dict(max_epochs=1),
        val_dataloader=batches,
        val_cfg=dict(loss=True),
    )
    runner.train()
    train, val = written(runner)
    assert (train["loss"], train["aux"]) == pytest.approx((val["loss"], val["aux"]))


def test_logged_values_are_averaged_over_iterations(make: MakeRunner) -> None:
    class Logs(Plugin):
        def after_train_iter(self, runner: Any) -> None:
            runner.log({"mine": runner.progress.iter, "loss": 10.0})

    (record,) = one_epoch(make, levels(8, 2), plugins=[Logs()])
    assert record["mine"] == 1.5
    assert record["loss"] == pytest.approx((1 + 2 + 10 + 10) / 4)  # logged and returned


def time_first(x: Tensor) -> Tensor:
    return x.expand(12, *x.shape)


def test_an_unknown_number_of_samples_is_left_out_with_one_warning(make: MakeRunner) -> None:
    runner = logging_runner(
        make, model=Level(), train_dataloader=levels(8, 2, 4, 6, wrap=time_first)
    )
    runner.train()
    records = written(runner, "train")
    assert not any("samples_per_second" in record for record in records)
    assert records[0]["loss"] == 1.5  # over iterations
    log = (runner.run_dir / "run.log").read_text()
    assert log.count("samples_per_second is left out") == 1
    assert "batch[0]: (12, 8, 3), batch[1]: (8,)" in log
    assert "count_samples" in log


def test_only_the_records_of_unknown_batches_lack_the_number_of_samples(make: MakeRunner) -> None:
    batches = [*levels(8, 2), *levels(4, wrap=time_first), *levels(6, 4, 4)]
    records = one_epoch(make, batches)
    assert [("samples_per_second" in record) for record in records] == [True, False, True]
    assert samples(records[2], 2) == pytest.approx(8)


@pytest.mark.parametrize("where", ["model", "dataloader", "dict"])
def test_who_counts_the_samples_is_asked(make: MakeRunner, where: str) -> None:
    class Counts(Level):
        def count_samples(self, batch: Any) -> int:
            return len(batch[1])

    def count(batch: Any) -> int:
        return 2 * len(batch[1])

    def collate(items: Any) -> Any:
        return time_first(torch.ones(len(items), 3)), torch.ones(len(items))

    arguments: dict[str, Any] = dict(dataset=range(6), batch_size=4, collate_fn=collate)
    loader: Any = torch.utils.data.DataLoader(**arguments)
    if where == "dataloader":
        loader.count_samples = count
    elif where == "dict":
        loader = dict(**arguments, count_samples=count)
    for defaults in (("logging",), ("logging", "seed", "distributed")):
        runner = make(
            model=Counts(),
            train_dataloader=loader,
            train_cfg=dict(max_epochs=1),
            defaults=defaults,
        )
        runner.train()
        (record,) = written(runner, "train")
        assert samples(record, 2) == pytest.approx(6 if where == "model" else 12)


def test_samples_that_were_not_recorded_yet_survive_a_resume(make: MakeRunner) -> None:
    def runner(epochs: int, batches: Any) -> Any:
        return logging_runner(
            make, interval=3, train_dataloader=batches, model=Level(), train_cfg=dict(max_iters=3)
        )

    whole = runner(1, levels(8, 2, 4))
    whole.train()
    first, second = runner(1, levels(8, 2, 4)), runner(1, levels(8, 2, 4))
    first.on("after_train_iter")(
        lambda runner: runner.stop("cut") if runner.progress.iter == 2 else None
    )
    states: list[Any] = []

    class Keeps(Plugin):
        def safe_point(self, runner: Any) -> None:
            if runner.progress.iter == 2:
                states.append(runner.state_dict())

    first.plugins.add(Keeps())
    first.train()
    second.load_state_dict(states[0])
    second.train()
    (expected,) = written(whole, "train")
    found = written(second, "train")[-1]
    assert (found["loss"], found["aux"]) == (expected["loss"], expected["aux"])
    assert samples(found, 3) == pytest.approx(14)


def test_a_training_batch_without_samples_does_not_count(make: MakeRunner) -> None:
    class Finite(Level):
        def forward(self, x: Any, y: Tensor, mode: str = "tensor") -> Any:
            losses = super().forward(x, y, mode)
            return {name: value.nan_to_num(0.0) for name, value in losses.items()}

    (record,) = one_epoch(make, levels(8, 0, 2), interval=3, model=Finite())
    assert record["loss"] == pytest.approx((8 * 1 + 2 * 3) / 10)
    assert samples(record, 3) == pytest.approx(10)
    (record,) = one_epoch(make, levels(0, 0), interval=3, model=Finite())
    assert "loss" not in record
    # accumulate gives such a micro-batch the loss 0
    plugins = [dict(type="accumulate", steps=3)]
    (record,) = one_epoch(make, levels(8, 0, 2), interval=3, plugins=plugins)
    assert record["loss"] == pytest.approx((8 * 1 + 2 * 3) / 10)


def test_the_nan_of_a_training_batch_without_samples_is_explained(make: MakeRunner) -> None:
    message = (
        r"iteration 2, epoch 1: loss nan, because its batch has no samples\. Leave batches without "
        r"samples out of the dataloader"
    )
    with pytest.raises(FloatingPointError, match=message):
        one_epoch(make, levels(8, 0, 2))
    runner = make(
        model=Level(),
        train_dataloader=levels(8, 0, 2),
        train_cfg=dict(max_epochs=1),
        defaults=("logging",),
        plugins=[dict(type="logging", nonfinite="warn")],
    )
    runner.train()
    (record,) = written(runner, "train")
    assert record["loss"] == pytest.approx((8 * 1 + 2 * 3) / 10)
    log = (runner.run_dir / "run.log").read_text()
    assert log.count("loss nan, because its batch has no samples") == 1

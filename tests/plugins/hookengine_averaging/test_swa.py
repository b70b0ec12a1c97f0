"""The plugin ``swa``: beside torch's own recipe."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hookengine_averaging import Swa
from hookengine_averaging.batch_norm import compute_statistics
from torch import Tensor, nn
from torch.optim.swa_utils import SWALR, AveragedModel, update_bn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    Subset,
    TensorDataset,
)

from hookengine import BaseModel, Plugin, Runner

EPOCHS = 6


class Net(BaseModel):
    """With batch norm, and a preprocessor that changes the batch."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(data_preprocessor=dict(type=Doubling))
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, inputs: Tensor, labels: Tensor, mode: str = "tensor") -> Any:
        scores = self.net(inputs)
        return {"loss": F.cross_entropy(scores, labels)} if mode == "loss" else (scores, labels)


class Doubling(nn.Module):
    """Doubles the inputs."""

    def forward(self, data: Any, training: bool = False) -> Any:
        return data[0] * 2, data[1]


def loader(samples: int = 20, seed: int = 0) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(samples, 4, generator=generator)
    labels = torch.randint(3, (samples,), generator=generator)
    return DataLoader(TensorDataset(inputs, labels), batch_size=4)


def build(
    tmp_path: Path,
    *plugins: Any,
    epochs: int = EPOCHS,
    model: Any = None,
    cfg: Any = None,
    **options: Any,
) -> Runner:
    options = {"train_dataloader": loader(), "defaults": (), **options}
    return Runner(
        Net() if model is None else model,
        tmp_path,
        train_cfg=dict(max_epochs=epochs) if cfg is None else cfg,
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.1, momentum=0.9)),
        val_dataloader=loader(10, 1),
        val_cfg=dict(loss=True),
        plugins=[*plugins],
        **options,
    )


def by_torch(begin: int, scheduled: bool) -> dict[str, Any]:
    """The recipe of torch.optim.swa_utils."""
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    averaged = AveragedModel(model)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    swa_schedule, rates = None, []
    for epoch in range(EPOCHS):
        if epoch == begin:
            swa_schedule = SWALR(optimizer, swa_lr=0.03, anneal_epochs=2)
        model.train()
        for inputs, labels in loader():
            rates.append(optimizer.param_groups[0]["lr"])
            model(inputs * 2, labels, mode="loss")["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
        if swa_schedule is not None:
            averaged.update_parameters(model)
            swa_schedule.step()
        elif scheduled:
            schedule.step()
    update_bn([inputs * 2 for inputs, _ in loader()], averaged.module.get_submodule("net"))
    averaged.eval()
    total = 0.0
    with torch.no_grad():
        for inputs, labels in loader(10, 1):
            loss = averaged.module(inputs * 2, labels, mode="loss")["loss"]
            total += loss.item() * len(inputs)
    return dict(model=model, averaged=averaged.module, rates=rates, loss=total / 10)


class Rates(Plugin):
    """Keeps the learning rates."""

    def before_train(self) -> None:
        self.seen: list[float] = []

    def before_optim_step(self, optim_wrapper: Any) -> None:
        self.seen += optim_wrapper.get_lr()


@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("begin", [3, 0.5])
def test_it_is_torchs_recipe(tmp_path: Path, begin: Any, scheduled: bool) -> None:
    rates, swa = Rates(), Swa(begin=begin, lr=0.03, anneal_epochs=2)
    schedule = [dict(type="schedule", scheduler="CosineAnnealingLR")] * scheduled
    with build(tmp_path, swa, *schedule, rates) as runner:
        metrics = runner.train()
        expected = by_torch(3, scheduled)
        assert rates.seen == pytest.approx(expected["rates"], rel=1e-12)
        for name, value in expected["model"].state_dict().items():
            assert torch.equal(runner.bare_model.state_dict()[name], value), name
        for name, value in expected["averaged"].state_dict().items():
            mine = swa.averaged.module.state_dict()[name]
            torch.testing.assert_close(mine, value, rtol=1e-5, atol=1e-6)
        assert metrics["swa/loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert metrics["loss"] != metrics["swa/loss"]
        assert runner.val() == metrics


def test_without_a_rate_the_schedule_goes_on(tmp_path: Path) -> None:
    rates = Rates()
    schedule = dict(type="schedule", scheduler=dict(type="ExponentialLR", gamma=0.5))
    with build(tmp_path, Swa(begin=2), schedule, rates) as runner:
        runner.train()
    assert rates.seen[::5] == [0.1 * 0.5**epoch for epoch in range(EPOCHS)]


@pytest.mark.parametrize("at", [2, 3, 4])
@pytest.mark.parametrize("mid", [0, 2])
def test_a_run_that_is_cut_goes_on(tmp_path: Path, at: int, mid: int) -> None:
    def runner(cut: bool = False) -> Runner:
        schedule = dict(type="schedule", scheduler="CosineAnnealingLR")
        made = build(tmp_path, Swa(begin=3, lr=0.03, anneal_epochs=2), schedule)
        if cut:
            made.on("after_train_iter")(
                lambda runner: runner.stop("cut") if runner.progress.iter == 5 * at + mid else None
            )
        return made

    straight, first, second = runner(), runner(cut=True), runner()
    straight.train()
    first.train()
    torch.save(first.state_dict(), tmp_path / "state.pth")
    second.load_state_dict(torch.load(tmp_path / "state.pth", weights_only=True))
    second.train()
    mine, theirs = second.state_dict(), straight.state_dict()
    for key in ("state_dict", "swa_state_dict"):
        for name, value in theirs[key].items():
            assert torch.equal(mine[key][name], value), name
    assert second.val_loop is not None
    assert straight.val_loop is not None
    assert second.val_loop.metrics == straight.val_loop.metrics
    for made in (straight, first, second):
        made.close()


def test_raw_weights_and_random_state_are_as_without_it(tmp_path: Path) -> None:
    states = []
    for plugins in ([], [Swa(begin=2)]):
        with build(tmp_path, *plugins) as runner:
            torch.manual_seed(5)
            runner.train()
            states.append((torch.get_rng_state(), runner.bare_model.state_dict()))
    assert torch.equal(states[0][0], states[1][0])
    for name, value in states[0][1].items():
        assert torch.equal(states[1][1][name], value), name


def test_with_amp_and_accumulation_it_goes_through(tmp_path: Path) -> None:
    swa = Swa(begin=2, lr=0.03)
    with build(tmp_path, swa, "amp", dict(type="accumulate", steps=2)) as runner:
        metrics = runner.train()
        assert "swa/loss" in metrics
        path = swa.export(tmp_path / "swa.safetensors")
        assert path.exists()


def test_the_finished_average_is_in_the_last_state(tmp_path: Path) -> None:
    states = []
    with build(tmp_path, Swa(begin=3)) as runner, build(tmp_path, Swa(begin=3)) as second:
        runner.on("safe_point")(lambda runner: states.append(runner.state_dict()))
        metrics = runner.train()
        second.load_state_dict(states[-1])
        assert second.val() == metrics
        assert second.plugins["swa"].export(tmp_path / "x.pth").exists()


def test_after_a_stop_it_can_be_finished(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with build(tmp_path, Swa(begin=2)) as runner:
        swa = runner.plugins["swa"]
        with pytest.raises(RuntimeError, match="nothing has been averaged yet"):
            swa.finish(runner)
        runner.on("after_train_epoch")(
            lambda runner: runner.stop("enough") if runner.progress.epoch == 4 else None
        )
        runner.train()
        assert "the mean of 2 epochs is not finished" in caplog.text
        swa.finish(runner)
        assert "swa/loss" in runner.val()


@pytest.mark.parametrize("iterations", [28, 30])
def test_a_run_by_iterations(tmp_path: Path, iterations: int) -> None:
    with Runner(
        Net(),
        tmp_path,
        train_dataloader=loader(),
        train_cfg=dict(max_iters=iterations, val_interval=7),
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.1)),
        val_dataloader=loader(10, 1),
        val_cfg=dict(loss=True),
        plugins=[Swa(begin=3)],
        defaults=(),
    ) as runner:
        assert "swa/loss" in runner.train()
        assert runner.plugins["swa"].averaged.steps == iterations // 5 - 3


def test_a_state_from_before_can_be_loaded_into_a_run_that_is_past_it(tmp_path: Path) -> None:
    def runner() -> Runner:
        return build(tmp_path, Swa(begin=3, lr=0.03))

    with runner() as straight, runner() as again:
        straight.train()
        again.train(max_epochs=1)
        torch.save(again.state_dict(), tmp_path / "state.pth")
        again.train()
        again.load_state_dict(torch.load(tmp_path / "state.pth", weights_only=True))
        again.train()
        mine, theirs = again.state_dict(), straight.state_dict()
        for key in ("state_dict", "swa_state_dict"):
            for name, value in theirs[key].items():
                assert torch.equal(mine[key][name], value), name


def test_training_goes_on_with_the_same_average(tmp_path: Path) -> None:
    with build(tmp_path, Swa(begin=0.5), epochs=4) as runner:
        runner.train()
        runner.train(max_epochs=8)
        assert runner.plugins["swa"].averaged.steps == 6


def test_beside_a_plateau_every_step_has_the_rate_of_averaging(tmp_path: Path) -> None:
    rates = Rates()
    plateau = dict(
        type="schedule",
        scheduler=dict(type="ReduceLROnPlateau", patience=0, threshold=9.0),
        metric="loss",
    )
    with build(tmp_path, plateau, Swa(begin=3, lr=0.03, anneal_epochs=0), rates) as runner:
        runner.train()
    assert {*rates.seen[20:]} == {0.03}


class Frozen(Net):
    """Holds its batch norm frozen while it trains."""

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        self.net[1].eval()
        return self


def test_frozen_batch_norm_and_modes_and_generators_are_left_as_they_are(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    shuffled = DataLoader(loader().dataset, batch_size=4, shuffle=True, generator=generator)
    model = Frozen()
    model.net[1].running_mean.fill_(2)
    with Runner(
        model,
        tmp_path,
        train_dataloader=shuffled,
        train_cfg=dict(max_epochs=2),
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.1)),
        plugins=[Swa(begin=1)],
        defaults=(),
    ) as runner:
        runner.train()
        before = generator.get_state()
        averaged = runner.plugins["swa"].averaged.module
        modes = [module.training for module in averaged.modules()]
        runner.plugins["swa"].finish(runner)
        assert torch.equal(generator.get_state(), before)
        assert [module.training for module in averaged.modules()] == modes
        assert averaged.net[1].running_mean.tolist() == [2] * 8
        assert averaged.net[1].momentum == 0.1


def test_an_error_in_the_pass_leaves_the_statistics(tmp_path: Path) -> None:
    with build(tmp_path, Swa(begin=3)) as runner:
        runner.train()
        swa = runner.plugins["swa"]
        before = {name: value.clone() for name, value in swa.averaged.state_dict().items()}

        def broken(data: Any) -> Any:
            raise LookupError("no data")

        swa._evaluated.loss_step = broken
        with pytest.raises(LookupError):
            swa.finish(runner)
        for name, value in swa.averaged.state_dict().items():
            assert torch.equal(value, before[name]), name
        assert swa.averaged.module.net[1].momentum == 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(begin=0), "begin=0 must be a whole number of epochs, 1 or more"),
        (dict(begin=-1), "begin=-1 must be a whole number"),
        (dict(begin=1.5), "begin=1.5 must be an int, the number of epochs, a text"),
        (dict(begin="soon"), "begin='soon' must be a whole number of epochs"),
        (dict(begin="5 minutes"), "begin='5 minutes' must be"),
        (dict(begin="0 steps"), "begin='0 steps' must be"),
        (dict(interval=0), "interval=0 must be a whole number of epochs, 1 or more"),
        (dict(interval="1.5 epochs"), "interval='1.5 epochs' must be"),
        (dict(anneal_epochs=-1), "anneal_epochs=-1 must be a whole number of epochs, 0 or more"),
    ],
)
def test_bad_options_are_refused(options: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        Swa(**options)


def values(runner: Runner) -> list[int]:
    """Note the iterations whose weights are averaged."""
    taken: list[int] = []
    update = runner.plugins["swa"].averaged.update_parameters

    def note(model: Any) -> None:
        taken.append(runner.progress.iter)
        update(model)

    runner.plugins["swa"].averaged.update_parameters = note
    return taken


# Epochs have five iterations; by "accumulate", two iterations make a step, and epochs three steps.
TAKEN: list[tuple[Any, Any, Any, list[int]]] = [
    (dict(max_epochs=6), 2, 1, [15, 20, 25, 30]),
    (dict(max_epochs=6), 2, 2, [20, 30]),
    (dict(max_epochs=6), 0.5, 1, [20, 25, 30]),
    (dict(max_epochs=6), "2 epochs", "3 iterations", [13, 16, 19, 22, 25, 28]),
    (dict(max_epochs=6), "12 iterations", "1 epoch", [15, 20, 25, 30]),
    (dict(max_epochs=6), "12 iters", "9 iterations", [21, 30]),
    (dict(max_epochs=3), "4 steps", "2 steps", [10, 14]),
    (dict(max_epochs=3), "1 step", "1 epoch", [5, 10, 15]),
    (dict(max_iters=23), 0.5, 1, [15, 20]),
    (dict(max_iters=20), 0.5, 1, [15, 20]),
    (dict(max_iters=23), 2, 1, [15, 20]),
    (dict(max_iters=23), "15 iterations", "4 iterations", [19, 23]),
    (dict(max_iters=23), 0.9, "1 iteration", [21, 22, 23]),
]


@pytest.mark.parametrize(("cfg", "begin", "interval", "taken"), TAKEN)
def test_begin_and_interval_count_epochs_iterations_or_steps(
    tmp_path: Path, cfg: Any, begin: Any, interval: Any, taken: list[int]
) -> None:
    accumulate = [dict(type="accumulate", steps=2)] * ("step" in str(begin))
    with build(tmp_path, Swa(begin=begin, interval=interval), *accumulate, cfg=cfg) as runner:
        seen = values(runner)
        metrics = runner.train()
        assert seen == taken
        assert "swa/loss" in metrics


@pytest.mark.parametrize(("cfg", "begin", "interval", "taken"), TAKEN)
@pytest.mark.parametrize("at", [7, 15, 21])
def test_a_run_of_any_units_that_is_cut_goes_on(
    tmp_path: Path, cfg: Any, begin: Any, interval: Any, taken: list[int], at: int
) -> None:
    limit = cfg.get("max_iters") or 5 * cfg["max_epochs"]

    def runner(cut: bool = False) -> Runner:
        accumulate = [dict(type="accumulate", steps=2)] * ("step" in str(begin))
        anneal = "6 iterations" if "iter" in str(begin) else 2
        swa = Swa(begin=begin, interval=interval, lr=0.02, anneal_epochs=anneal)
        made = build(tmp_path, swa, *accumulate, cfg=cfg)
        if cut:
            made.on("after_train_iter")(
                lambda runner: (
                    runner.stop("cut") if runner.progress.iter == min(at, limit - 1) else None
                )
            )
        return made

    straight, first, second = runner(), runner(cut=True), runner()
    straight.train()
    first.train()
    torch.save(first.state_dict(), tmp_path / "state.pth")
    second.load_state_dict(torch.load(tmp_path / "state.pth", weights_only=True))
    second.train()
    mine, theirs = second.state_dict(), straight.state_dict()
    for key in ("state_dict", "swa_state_dict"):
        for name, value in theirs[key].items():
            assert torch.equal(mine[key][name], value), name
    assert mine["plugins"]["swa"] == theirs["plugins"]["swa"]
    for made in (straight, first, second):
        made.close()


@pytest.mark.parametrize("unit", ["iterations", "steps"])
def test_rates_are_annealed_over_iterations_or_steps(tmp_path: Path, unit: str) -> None:
    rates = Rates()
    swa = Swa(begin=f"3 {unit}", lr=0.02, anneal_epochs=f"4 {unit}", anneal_strategy="linear")
    with build(tmp_path, swa, rates, epochs=2) as runner:
        runner.train()
    expected = [0.1, 0.1, 0.1, 0.1, 0.08, 0.06, 0.04, 0.02, 0.02, 0.02]
    assert rates.seen == pytest.approx(expected)


def test_a_state_of_an_earlier_release_can_be_resumed(tmp_path: Path) -> None:
    with build(tmp_path, Swa(begin=2, lr=0.03)) as straight:
        straight.train()
        for epochs in (1, 2, 4):
            with build(tmp_path, Swa(begin=2, lr=0.03)) as first:
                first.train(max_epochs=epochs)
                state = first.state_dict()
            for key in ("unit", "begun", "passed", "interval"):
                del state["plugins"]["swa"][key]
            with build(tmp_path, Swa(begin=2, lr=0.03)) as second:
                second.load_state_dict(state)
                second.train()
                for key in ("state_dict", "swa_state_dict"):
                    for name, value in straight.state_dict()[key].items():
                        assert torch.equal(second.state_dict()[key][name], value), name


# -- nothing to average -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cfg", "options", "message"),
    [
        (dict(max_epochs=6), dict(begin=9), "begins after 9 epochs, .*ends after 6 epochs"),
        (dict(max_epochs=6), dict(begin=6), "begins after 6 epochs"),
        (dict(max_epochs=6), dict(begin=4, interval=3), "is averaged 3 epochs later"),
        (dict(max_epochs=6), dict(begin="31 iterations"), "begins after 31 iterations"),
        (dict(max_epochs=6), dict(begin="26 iterations", interval="5 iterations"), "later"),
        (dict(max_epochs=6), dict(begin=5, interval="6 iterations"), "6 iterations later"),
        (dict(max_epochs=6), dict(begin="30 steps"), "begins after 30 steps"),
        (dict(max_iters=23), dict(begin=10), "begins after 10 epochs, .*after 23 iterations"),
        (dict(max_iters=23), dict(begin=4), "begins after 4 epochs"),
        (dict(max_iters=23), dict(begin=0.9), "begins after 20 iterations, .* 1 epoch later"),
        (dict(max_iters=3), dict(), "begins after 2 iterations"),
        (
            dict(max_iters=23),
            dict(begin="23 iterations", interval="1 iteration"),
            "begins after 23",
        ),
    ],
)
def test_a_run_that_would_average_nothing_is_refused_before_it_starts(
    tmp_path: Path, cfg: Any, options: Any, message: str
) -> None:
    with build(tmp_path, Swa(**options), cfg=cfg) as runner:
        with pytest.raises(ValueError, match=f"swa: nothing would be averaged: .*{message}"):
            runner.train()
        assert runner.progress.iter == 0


class Endless:
    """Batches without a length."""

    def __iter__(self) -> Any:
        while True:
            yield from loader()


class Unsized:
    """The batches of the loader, without a length."""

    def __iter__(self) -> Any:
        return iter(loader())


@pytest.mark.parametrize(
    ("batches", "cfg", "begin"),
    [
        (Endless(), dict(max_iters=9), 2),
        (Endless(), dict(max_iters=9), 0.5),
        (Unsized(), dict(max_iters=9), 3),
        (Unsized(), dict(max_epochs=2), "200 iterations"),
    ],
)
def test_a_run_of_unknown_length_that_averaged_nothing_ends_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, batches: Any, cfg: Any, begin: Any
) -> None:
    with build(tmp_path, Swa(begin=begin), cfg=cfg, train_dataloader=batches) as runner:
        metrics = runner.train()
        assert "swa: nothing was averaged: averaging begins after" in caplog.text
        assert "swa/loss" not in metrics
        with pytest.raises(RuntimeError, match="ready at the end of training"):
            runner.plugins["swa"].export(tmp_path / "x.pth")


def test_a_train_step_of_ones_own_may_take_more_steps_than_iterations(tmp_path: Path) -> None:
    class Twice(Net):
        def train_step(self, data: Any, optim_wrapper: Any) -> Any:
            super().train_step(data, optim_wrapper)
            return super().train_step(data, optim_wrapper)

    swa = Swa(begin="40 steps", interval="3 steps")
    with build(tmp_path, swa, model=Twice()) as runner:
        seen = values(runner)
        runner.train()
        assert seen == [22, 23, 25, 26, 28, 29]


@pytest.mark.parametrize("how", ["stop", "now", "interrupt"])
def test_a_run_that_is_stopped_before_it_begins_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    with build(tmp_path, Swa(begin=3)) as runner:

        @runner.on("safe_point")
        def stop(runner: Any) -> None:
            if runner.progress.iter == 7 and how == "interrupt":
                raise KeyboardInterrupt
            if runner.progress.iter == 7:
                runner.stop("enough", now=how == "now")

        if how == "interrupt":
            with pytest.raises(KeyboardInterrupt):
                runner.train()
        else:
            runner.train()
    assert caplog.text.count("swa: nothing was averaged, because training was stopped after") == 1
    assert "but this run ends" not in caplog.text


def test_training_piece_by_piece_is_only_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with build(tmp_path, Swa(begin=3)) as runner:
        runner.train(max_epochs=2)
        assert "this run ends after 2 epochs, so nothing is averaged" in caplog.text
        assert caplog.text.count("swa: ") == 1
        assert "swa/loss" in runner.train()
    with build(tmp_path, Swa(begin=9)) as runner:
        assert "swa/loss" in runner.train(max_epochs=10)


# -- statistics of batch norm -------------------------------------------------------------------


class Once:
    """An iterable whose batches come only once."""

    def __init__(self, batches: Any) -> None:
        self.batches = iter(batches)

    def __iter__(self) -> Any:
        return self.batches


class OnceDataset(IterableDataset[Any]):
    """A stream that is used up."""

    def __init__(self, times: int) -> None:
        data: Any = loader().dataset
        self.samples = iter([sample for _ in range(times) for sample in data])

    def __iter__(self) -> Any:
        return self.samples


class Shrinking:
    """Five batches, of which few are left after two epochs."""

    def __init__(self, left: int) -> None:
        self.left, self.passes = left, 0

    def __len__(self) -> int:
        return 5

    def __iter__(self) -> Any:
        self.passes += 1
        return iter([*loader()][: 5 if self.passes <= 2 else self.left])


def once(kind: str) -> tuple[Any, dict[str, int]]:
    def generate() -> Any:
        while True:
            yield from loader()

    return {
        "generator": (generate(), dict(max_iters=12)),
        "iterator": (iter([*loader()] * 3), dict(max_iters=12)),
        "shared": (Once([*loader()] * 2), dict(max_iters=10)),
        "stream": (DataLoader(OnceDataset(2), batch_size=4), dict(max_iters=10)),
        "short stream": (DataLoader(OnceDataset(1), batch_size=4), dict(max_epochs=1)),
        "empty": (Shrinking(0), dict(max_epochs=2)),
    }[kind]


@pytest.mark.parametrize(
    "kind", ["generator", "iterator", "shared", "stream", "short stream", "empty"]
)
def test_without_a_second_pass_the_statistics_are_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    batches, cfg = once(kind)
    swa = Swa(begin="2 iterations", interval="1 iteration")
    with build(tmp_path, swa, cfg=cfg, train_dataloader=batches) as runner:
        metrics = runner.train()
        assert "gave no batch to compute batch-norm statistics of" in caplog.text
        assert "swa/loss" in metrics
        raw, averaged = runner.bare_model.net[1], swa.averaged.module.net[1]
        path = swa.export(tmp_path / "swa.pth")
        exported = torch.load(path, weights_only=True)
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            assert torch.equal(exported[f"net.1.{name}"], getattr(raw, name))
        assert averaged.running_mean.abs().max() > 0
        with pytest.raises(RuntimeError, match=r"no batch .*finish\(runner, batches\)"):
            swa.finish(runner)
        assert torch.equal(averaged.running_mean, raw.running_mean)
        swa.finish(runner, loader())
        assert not torch.equal(averaged.running_mean, raw.running_mean)
        assert averaged.num_batches_tracked == 5


def test_an_iterator_is_left_where_training_continues(tmp_path: Path) -> None:
    states = []
    for plugins in ([], [Swa(begin="2 iterations", interval="1 iteration")]):
        batches = iter([*loader()] * 4)
        with build(tmp_path, *plugins, cfg=dict(max_iters=7), train_dataloader=batches) as runner:
            runner.train()
            runner.train(max_iters=12)
            states.append(runner.bare_model.state_dict())
    for name, value in states[0].items():
        assert torch.equal(states[1][name], value), name


def test_a_dataloader_without_an_end_gives_as_many_batches_as_were_trained_on(
    tmp_path: Path,
) -> None:
    swa = Swa(begin="2 iterations", interval="1 iteration")
    with build(tmp_path, swa, cfg=dict(max_iters=13), train_dataloader=Endless()) as runner:
        runner.train()
    assert swa.averaged.module.net[1].num_batches_tracked == 13


def test_few_batches_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with build(tmp_path, Swa(begin=1), epochs=2, train_dataloader=Shrinking(2)) as runner:
        runner.train()
    assert "the batch-norm statistics are of 2 batches only" in caplog.text


class Shifts(Plugin, name="shifts"):
    """Replaces every second training batch; ``mixup`` may leave some unchanged, too."""

    def before_train_iter(self, batch_idx: int, data_batch: Any) -> Any:
        return None if batch_idx % 2 else [data_batch[0] + 100, data_batch[1]]


class Observes(Plugin, name="observes"):
    """Only looks at the batches."""

    def before_train_iter(self, data_batch: Any) -> None:
        pass


REPLACED = "without what 'shifts', and any plugin before it, makes of them in before_train_iter"


@pytest.mark.parametrize(("plugin", "warnings"), [(Shifts(), 1), (Observes(), 0)])
def test_statistics_without_what_a_plugin_makes_of_the_batches_are_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, plugin: Plugin, warnings: int
) -> None:
    runner = build(tmp_path, plugin, Swa(begin=1), epochs=2)
    runner.train()
    runner.plugins["swa"].finish(runner)
    assert caplog.text.count(REPLACED) == warnings
    norm = runner.plugins["swa"].averaged.module.net[1]
    own = norm.running_mean.clone()
    changed = [[inputs + 100, labels] for inputs, labels in loader()]
    runner.plugins["swa"].finish(runner, changed)  # as the warning advises
    assert not torch.allclose(norm.running_mean, own)
    assert caplog.text.count(REPLACED) == warnings


def test_replaced_batches_are_no_matter_without_statistics(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = nn.Linear(4, 3)
    build(tmp_path, Shifts(), Swa(begin=1), epochs=2, model=model, loss=F.cross_entropy).train()
    assert "before_train_iter" not in caplog.text


class Spare(Net):
    """Has batch norms that no batch passes through."""

    def __init__(self) -> None:
        super().__init__()
        self.spare: Any = nn.BatchNorm1d(3)
        self.without = nn.BatchNorm1d(3, track_running_stats=False)
        self.spare.running_mean.fill_(5)


def test_a_layer_that_sees_no_batch_keeps_its_statistics(tmp_path: Path) -> None:
    with build(tmp_path, Swa(begin=3), model=Spare()) as runner:
        runner.train()
        averaged = runner.plugins["swa"].averaged.module
        assert averaged.spare.running_mean.tolist() == [5, 5, 5]
        assert averaged.net[1].num_batches_tracked == 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_of_a_low_precision_are_averaged_in_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    batches = [(torch.randn(16, 2).add(step / 100).to(dtype), None) for step in range(600)]

    class Low(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(2)

        def loss_step(self, data: Any) -> None:
            self.norm(data[0])

    low, high = Low().to(dtype), Low()
    assert compute_statistics(low, batches, []) == 600
    compute_statistics(high, [(inputs.float(), None) for inputs, _ in batches], [])
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        mine, expected = getattr(low.norm, name), getattr(high.norm, name)
        assert mine.dtype == (torch.int64 if "num" in name else dtype)
        torch.testing.assert_close(mine.float(), expected.float(), rtol=0.01, atol=0)


class Reshuffles:
    """Wraps a dataloader and draws from generators of its own."""

    def __init__(self, dataloader: Any) -> None:
        self.inner = [dataloader]
        self.numpy = np.random.default_rng(0)
        self.legacy = np.random.RandomState(0)
        self.python = random.Random(0)

    def __len__(self) -> int:
        return len(self.inner[0])

    def __iter__(self) -> Any:
        for inputs, labels in self.inner[0]:
            noise = self.numpy.normal() + self.legacy.normal() + self.python.random()
            yield inputs + noise, labels


class Batches(BatchSampler):
    """A batch sampler around a sampler with a generator, with a generator of its own."""

    def __init__(self, sampler: Any) -> None:
        super().__init__(sampler, 4, False)
        self.own = torch.Generator().manual_seed(4)

    def __iter__(self) -> Any:
        batches = [*super().__iter__()]
        return iter([batches[i] for i in torch.randperm(len(batches), generator=self.own)])


@pytest.mark.parametrize("defaults", [(), ("seed",)])
@pytest.mark.parametrize("kind", ["sampler", "batch sampler", "wrapped", "dataset"])
def test_generators_of_any_part_are_as_without_it(tmp_path: Path, kind: str, defaults: Any) -> None:
    class Noisy(TensorDataset):
        draws = torch.Generator()

        def __getitem__(self, index: Any) -> Any:
            inputs, labels = super().__getitem__(index)
            return inputs + torch.randn(4, generator=self.draws), labels

    def batches() -> Any:
        generator = torch.Generator().manual_seed(3)
        data: Any = loader().dataset
        sampler = RandomSampler(data, generator=generator)
        if kind == "sampler":
            return DataLoader(data, batch_size=4, sampler=sampler)
        if kind == "batch sampler":
            return DataLoader(data, batch_sampler=Batches(sampler))
        if kind == "wrapped":
            return Reshuffles(DataLoader(data, batch_sampler=Batches(sampler)))
        noisy = Noisy(*data.tensors)
        noisy.draws = torch.Generator().manual_seed(7)
        return DataLoader(Subset(noisy, range(20)), batch_size=4)

    states = []
    for plugins in ([], [Swa(begin=1)]):
        torch.manual_seed(0)
        with build(tmp_path, *plugins, epochs=2, train_dataloader=batches()) as runner:
            runner.train()
            runner.train(max_epochs=4)
            states.append(runner.bare_model.state_dict())
    for name, value in states[0].items():
        assert torch.equal(states[1][name], value), name


def test_a_checkpoint_that_was_cut_is_refused(tmp_path: Path) -> None:
    with build(tmp_path, Swa(begin=3)) as first, build(tmp_path, Swa(begin=3)) as second:
        first.train()
        state = first.state_dict()
        del state["swa_state_dict"]
        with pytest.raises(
            ValueError, match=r"no averaged weights .swa_state_dict.: it is incomplete"
        ):
            second.load_state_dict(state)


def test_a_model_without_loss_step_is_refused_before_training(tmp_path: Path) -> None:
    class Own(nn.Module):
        def __init__(self, norm: bool) -> None:
            super().__init__()
            self.net = nn.BatchNorm1d(4) if norm else nn.Linear(4, 3)

        def train_step(self, data: Any, optim_wrapper: Any) -> Any: ...

    for norm in (True, False):
        options: Any = dict(
            train_dataloader=loader(),
            train_cfg=dict(max_epochs=1),
            optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.1)),
            plugins=["swa"],
            defaults=(),
        )
        if norm:
            with pytest.raises(TypeError, match=r"with loss_step\(data\).*Own has none"):
                Runner(Own(norm), tmp_path, **options)
        else:
            Runner(Own(norm), tmp_path, **options).close()


def test_beside_a_moving_average(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a run can have only one swa"):
        build(tmp_path, Swa(begin=2), Swa(plugin_name="second"))
    with pytest.raises(ValueError, match="swa and 'ema' both choose the weights"):
        build(tmp_path, Swa(begin=2), "ema")
    with build(tmp_path, Swa(begin=2), dict(type="ema", evaluate="raw")) as runner:
        assert "swa/loss" in runner.train()
        assert {"ema_state_dict", "swa_state_dict"} <= runner.state_dict().keys()


def test_a_checkpoint_without_averaged_weights(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with build(tmp_path, epochs=4) as plain, build(tmp_path, Swa(begin=2)) as runner:
        plain.train()
        with pytest.raises(ValueError, match="no state of 'swa'"):
            runner.load_state_dict(plain.state_dict())
        runner.load_state_dict(plain.state_dict(), allow=["swa"])
        assert "no averaged weights (swa_state_dict): averaging starts over" in caplog.text
        assert "swa/loss" in runner.train()

"""The plugin ``swa``: beside torch's own recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hookengine_averaging import Swa
from torch import Tensor, nn
from torch.optim.swa_utils import SWALR, AveragedModel, update_bn
from torch.utils.data import DataLoader, TensorDataset

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


def build(tmp_path: Path, *plugins: Any, epochs: int = EPOCHS, **options: Any) -> Runner:
    return Runner(
        Net(),
        tmp_path,
        train_dataloader=loader(),
        train_cfg=dict(max_epochs=epochs),
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.1, momentum=0.9)),
        val_dataloader=loader(10, 1),
        val_cfg=dict(loss=True),
        plugins=[*plugins],
        defaults=(),
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


def test_what_does_not_fit_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for begin in (0, -1, 1.5):
        with pytest.raises(TypeError, match="begin"):
            Swa(begin=begin)
    with build(tmp_path, Swa(begin=9)) as runner:
        runner.train()
        assert "averaging begins after epoch 9, but this run ends with epoch 6" in caplog.text
        with pytest.raises(RuntimeError, match="ready at the end of training"):
            runner.plugins["swa"].export("x.pth")
    with (
        Runner(
            Net(),
            tmp_path,
            train_dataloader=loader(),
            train_cfg=dict(max_iters=9),
            optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.1)),
            plugins=[Swa(begin=0.5)],
            defaults=(),
        ) as runner,
        pytest.raises(ValueError, match="is a fraction of the epochs"),
    ):
        runner.train()


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

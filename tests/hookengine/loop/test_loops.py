"""The loops: units, validation, stops, safe points, random state, what a resume goes on from."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from hookengine import DEFAULT_PLUGINS, Plugin, read_records
from tests.fixtures import MakeData, MakeRunner, Toy, ToyAccuracy, toy_data


def weights(runner: Any) -> list[Tensor]:
    return [value.clone() for value in runner.bare_model.state_dict().values()]


def validations(runner: Any) -> list[tuple[int, int]]:
    """(epoch, iter) of each validation; filled as the run goes on."""
    log: list[tuple[int, int]] = []
    runner.on("after_val")(lambda runner: log.append((runner.progress.epoch, runner.progress.iter)))
    return log


def test_training_equals_the_loop_by_hand(make: MakeRunner, toy: type[Toy], data: MakeData) -> None:
    runner = make(train_dataloader=DataLoader(data(), batch_size=3), train_cfg=dict(max_epochs=3))
    by_hand = toy()
    by_hand.load_state_dict(runner.bare_model.state_dict())
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.1)
    for _ in range(3):
        for inputs, labels in DataLoader(data(), batch_size=3):
            nn.functional.cross_entropy(by_hand.net(inputs), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
    runner.train()
    for mine, theirs in zip(weights(runner), by_hand.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)
    assert (runner.progress.epoch, runner.progress.iter, runner.progress.step) == (3, 21, 21)


@pytest.mark.parametrize(
    ("cfg", "expected"),
    [
        (dict(max_epochs=3), [(1, 5), (2, 10), (3, 15)]),
        (dict(max_epochs=3, val_interval=2), [(2, 10), (3, 15)]),
        (dict(max_epochs=3, val_begin=3), [(3, 15)]),
        (dict(max_epochs=2, val_begin=3), []),
        (dict(max_iters=7, val_interval=3), [(0, 3), (1, 6), (1, 7)]),
        (dict(max_iters=10, val_interval=5, val_begin=6), [(1, 10)]),
        (dict(by_epoch=False, max_iters=4), [(0, 4)]),
    ],
)
def test_validation_comes_when_it_is_due(make: MakeRunner, cfg: Any, expected: Any) -> None:
    runner = make(train_cfg=cfg, validate=True)
    log = validations(runner)
    runner.train()
    if cfg.get("max_iters") == 10:
        assert [iteration for _, iteration in log] == [10]
    else:
        assert log == expected
    assert not runner.progress.val_due


def test_both_units_train_alike(make: MakeRunner) -> None:
    by_epoch = make(train_cfg=dict(max_epochs=2))
    by_iter = make(train_cfg=dict(max_iters=10))
    by_epoch.train()
    by_iter.train()
    assert by_epoch.progress.state_dict() == by_iter.progress.state_dict()
    for one, other in zip(weights(by_epoch), weights(by_iter), strict=True):
        assert torch.equal(one, other)


def test_an_infinite_iterable_is_limited_by_max_iters(make: MakeRunner, data: MakeData) -> None:
    batches = list(DataLoader(data(), batch_size=4))
    runner = make(train_dataloader=itertools.cycle(batches), train_cfg=dict(max_iters=12))
    runner.train()
    assert (runner.progress.epoch, runner.progress.iter) == (0, 12)
    runner.train(max_iters=15)  # an iterator goes on where it is
    assert runner.progress.batch == 15


class Stream(IterableDataset[Any]):
    """Eight samples, of unknown number."""

    def __iter__(self) -> Iterator[Any]:
        for index in range(8):
            yield torch.full((4,), float(index)), index % 3


def test_a_dataloader_of_unknown_length_gives_epochs(make: MakeRunner) -> None:
    runner = make(train_dataloader=DataLoader(Stream(), batch_size=3))
    runner.train()
    assert (runner.progress.epoch, runner.progress.iter) == (2, 6)
    assert runner.progress.epoch_length is None


class NoLength:
    """Has a ``__len__`` that raises."""

    error: type[Exception]

    def __len__(self) -> int:
        raise self.error


def unsized(kind: str, error: type[Exception] | None) -> Any:
    """Two batches of unknown number: some part has no ``__len__``, or one that raises an error."""

    def part(base: Any = object, **methods: Any) -> Any:
        bases = (base,) if error is None else (NoLength, base)
        return type("Own", bases, {**methods, "error": error})()

    data, batches = toy_data(8), [[0, 1, 2, 3], [4, 5, 6, 7]]
    if kind == "iterable dataset":
        return DataLoader(part(IterableDataset, __iter__=lambda _: iter(data)), 4)
    if kind == "dataset":
        ours = part(Dataset, __getitem__=lambda _, index: data[index])
        return DataLoader(ours, batch_sampler=batches)
    if kind == "sampler":
        return DataLoader(data, 4, sampler=part(__iter__=lambda _: iter(range(8))))
    if kind == "batch sampler":
        return DataLoader(data, batch_sampler=part(__iter__=lambda _: iter(batches)))
    loader = part(__iter__=lambda _: iter(DataLoader(data, 4)))
    return loader if kind == "dataloader" else Wrapper(loader)


class Wrapper:
    """Wraps a dataloader, and forwards its length."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        return iter(self.loader)

    def __len__(self) -> int:
        return len(self.loader)


EPOCHS, ITERS = ("max_epochs", 1, 2), ("max_iters", 3, 5)


@pytest.mark.parametrize(
    ("kind", "error", "limits"),
    [
        ("iterable dataset", NotImplementedError, EPOCHS),
        ("iterable dataset", NotImplementedError, ITERS),
        ("dataset", NotImplementedError, EPOCHS),
        ("sampler", NotImplementedError, ITERS),
        ("batch sampler", AttributeError, EPOCHS),
        ("dataloader", NotImplementedError, EPOCHS),
        ("wrapper", AttributeError, ITERS),
    ],
)
def test_a_length_that_raises_is_as_unknown_as_a_missing_one(
    make: MakeRunner, tmp_path: Path, kind: str, error: type[Exception], limits: Any
) -> None:
    unit, *counts = limits

    def run(error: type[Exception] | None, count: int, state: Any = None) -> Any:
        runner = make(
            work_dir=tmp_path / str(error),
            train_dataloader=unsized(kind, error),
            train_cfg={unit: count},
            val_dataloader=unsized(kind, error),
            val_evaluator=ToyAccuracy(),
            val_cfg=dict(loss=True),
            defaults=DEFAULT_PLUGINS,
            plugins=[
                dict(type="schedule", scheduler=dict(type="StepLR", step_size=1)),
                dict(type="accumulate", steps=2),
                dict(type="swa", begin="1 iterations", interval="1 iterations"),
            ],
        )
        if state is not None:
            runner.load_state_dict(state)
        runner.train()
        return runner

    states, runners = [], []
    for each in (error, None):
        states.append(run(each, counts[0]).state_dict())
        runners.append(run(each, counts[1], states[-1]))
    assert states[0]["meta"]["dataset"] == states[1]["meta"]["dataset"]
    for mine, theirs in zip(*map(weights, runners), strict=True):
        assert torch.equal(mine, theirs)
    assert runners[0].progress.epoch_length == runners[1].progress.epoch_length
    assert records(runners[0]) == records(runners[1])


def records(runner: Any) -> list[Any]:
    return [
        (record.phase, record.iter, sorted(record.scalars), record.scalars.get("loss"))
        for record in read_records(runner.run_dir)
    ]


def test_a_generator_that_is_used_up_is_said_so(make: MakeRunner, data: MakeData) -> None:
    generator = (batch for batch in DataLoader(data(), batch_size=4))
    with pytest.raises(ValueError, match=r"no batch in epoch 2.*generator"):
        make(train_dataloader=generator).train()


def test_safe_points_come_after_iterations_epochs_and_validations(make: MakeRunner) -> None:
    runner = make(validate=True, train_cfg=dict(max_epochs=1))
    log = []

    class Watch(Plugin):
        def after_train_iter(self) -> None:
            log.append("iter")

        def after_train_epoch(self, runner: Any) -> None:
            log.append(f"epoch due={runner.progress.val_due}")

        def after_val(self) -> None:
            log.append("val")

        def safe_point(self, runner: Any, agreed: Any) -> None:
            log.append(f"safe due={runner.progress.val_due}")

    runner.plugins.add(Watch())
    runner.train()
    assert log == [
        *["iter", "safe due=False"] * 5,
        "epoch due=True",
        "safe due=True",
        "val",
        "safe due=False",
    ]


class EveryOther(Plugin):
    """A veto on each first iteration of two: an accumulation window."""

    def should_step(self, runner: Any) -> bool:
        return runner.progress.iter % 2 == 1


def test_no_safe_point_while_a_window_is_open_and_a_stop_waits(make: MakeRunner) -> None:
    runner = make(plugins=[EveryOther()], train_cfg=dict(max_iters=10))
    safe = []

    @runner.on("safe_point")
    def note(runner: Any) -> None:
        safe.append(runner.progress.iter)

    @runner.on("after_train_iter")
    def stop(runner: Any) -> None:
        if runner.progress.iter == 5:
            runner.stop("enough")

    runner.train()
    assert safe == [2, 4, 6]
    assert runner.progress.iter == 6
    assert runner.progress.step == 3
    assert runner.progress.stopped == "enough"
    assert runner.requests == {}


def test_a_stop_is_taken_up_again_where_it_was(make: MakeRunner) -> None:
    straight = make(validate=True, train_cfg=dict(max_epochs=3))
    straight.train()
    for stop_at in (2, 5, 7):
        runner = make(validate=True, train_cfg=dict(max_epochs=3))
        log = validations(runner)

        @runner.on("after_train_iter")
        def stop(runner: Any, batch_idx: int) -> None:
            if runner.progress.iter == stop_at:  # noqa: B023
                runner.stop()

        runner.train()
        assert runner.progress.iter == stop_at
        runner.train()
        assert runner.progress.iter == 15
        assert log == [(1, 5), (2, 10), (3, 15)]
        for one, other in zip(weights(runner), weights(straight), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("request_by", ["runner.stop()", "a request of another plugin", "now"])
def test_a_stop_that_was_agreed_on_when_a_hook_raised_does_not_stop_the_next_run(
    make: MakeRunner, request_by: str
) -> None:
    class Raises(Plugin):
        def safe_point(self, runner: Any, agreed: Any) -> None:
            if agreed or runner.progress.stopped:
                raise LookupError("while a stop was agreed on")

    runner, straight = make(plugins=[Raises()]), make()

    @runner.on("after_train_iter")
    def stop(runner: Any) -> None:
        if runner.progress.iter == 5:  # the end of an epoch, where no batch is lost
            if request_by == "runner.stop()":
                runner.stop("enough")
            elif request_by == "now":
                runner.stop("enough", now=True)
            else:
                runner.requests.update(save="why", stop="enough")

    with pytest.raises(LookupError, match="while a stop was agreed on"):
        runner.train()
    assert (runner.progress.iter, runner.requests) == (5, {})
    runner.train()
    assert (runner.progress.iter, runner.progress.stopped) == (10, None)
    straight.train()
    for one, other in zip(weights(runner), weights(straight), strict=True):
        assert torch.equal(one, other)


def test_requests_are_settled_by_agree(make: MakeRunner) -> None:
    class Slow(Plugin):
        """Answers two safe points later, once, as one does that overlaps its all-reduce."""

        def __post_init__(self) -> None:
            self.seen: list[dict[str, str]] = []

        def agree(self, requests: Any) -> dict[str, str]:
            on_its_way = {name for earlier in self.seen[-2:] for name in earlier}
            self.seen.append({n: r for n, r in requests.items() if n not in on_its_way})
            return self.seen[-3] if len(self.seen) > 2 else {}

    class Saver(Plugin):
        saved_at: int = 0

        def after_train_iter(self, runner: Any) -> None:
            if runner.progress.iter == 2:
                runner.requests["save"] = "the clock"
            if runner.progress.iter == 4:
                runner.stop("done")

        def safe_point(self, runner: Any, agreed: Any) -> None:
            if "save" in agreed:
                self.saved_at = runner.progress.iter

    saver = Saver()
    runner = make(plugins=[Slow(), saver], train_cfg=dict(max_iters=20))
    runner.train()
    assert saver.saved_at == 4
    assert runner.progress.iter == 5  # the third safe point from there is the epoch's


def test_evaluation_leaves_random_state_modes_and_weights(make: MakeRunner) -> None:
    class Draws(Plugin):
        """Draws from everything, in validation."""

        def before_val_iter(self) -> None:
            random.random()
            np.random.rand()
            torch.rand(1)

    runner = make(plugins=[Draws()], validate=True)
    frozen = nn.BatchNorm1d(3).eval()
    runner.bare_model.frozen = frozen
    runner.bare_model.train()
    frozen.eval()
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    before = weights(runner)
    metrics = runner.val()
    assert set(metrics) == {"accuracy"}
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
    assert runner.bare_model.training
    assert not frozen.training
    for one, other in zip(weights(runner), before, strict=True):
        assert torch.equal(one, other)


def test_an_error_in_validation_leaves_modes_and_random_state(make: MakeRunner) -> None:
    runner = make(validate=True)

    @runner.on("after_val_iter")
    def fail() -> None:
        torch.rand(1)
        raise LookupError("no")

    runner.bare_model.train()
    state = torch.get_rng_state()
    with pytest.raises(LookupError):
        runner.val()
    assert runner.bare_model.training
    assert torch.equal(torch.get_rng_state(), state)
    runner.plugins.remove("after_val_iter:fail")
    assert set(runner.val()) == {"accuracy"}  # and nothing of the interrupted one is counted


def test_each_evaluated_model_gets_a_pass_of_its_own(make: MakeRunner, toy: type[Toy]) -> None:
    torch.manual_seed(1)
    other = toy()

    class Both(Plugin):
        def evaluated_models(self, runner: Any) -> dict[str, nn.Module]:
            return {"": runner.model, "other": other}

    runner = make(plugins=[Both()], validate=True, val_cfg=dict(loss=True))
    metrics = runner.val()
    assert set(metrics) == {"accuracy", "loss", "other/accuracy", "other/loss"}
    assert metrics["loss"] != metrics["other/loss"]


def test_validation_loss_is_the_mean_over_samples(make: MakeRunner, data: MakeData) -> None:
    runner = make(validate=True, val_cfg=dict(loss=True))
    inputs, labels = data(10, seed=1).tensors
    with torch.no_grad():
        expected = nn.functional.cross_entropy(runner.bare_model.net(inputs), labels)
    assert runner.val()["loss"] == pytest.approx(expected.item(), rel=1e-6)


def test_the_loss_alone_needs_no_evaluator(make: MakeRunner, data: MakeData) -> None:
    loader = DataLoader(data(10, seed=1), batch_size=4)
    runner = make(val_dataloader=loader, val_cfg=dict(loss=True))
    runner.train()
    assert set(runner.val()) == {"loss"}


def test_a_loader_that_can_seek_is_told_where_to_start(make: MakeRunner, data: MakeData) -> None:
    class Seeking:
        def __init__(self) -> None:
            self.batches = list(DataLoader(data(), batch_size=4))
            self.sought: list[tuple[int, int]] = []

        def __len__(self) -> int:
            return len(self.batches)

        def seek(self, epoch: int, batch: int) -> None:
            self.sought.append((epoch, batch))

        def __iter__(self) -> Iterator[Any]:
            return iter(self.batches[self.sought[-1][1] :])

    first = make(train_dataloader=Seeking(), train_cfg=dict(max_iters=7))
    first.train()
    state = first.state_dict()
    loader = Seeking()
    second = make(train_dataloader=loader, train_cfg=dict(max_epochs=2))
    second.load_state_dict(state)
    second.train()
    assert loader.sought == [(1, 2)]
    straight = make(train_cfg=dict(max_epochs=2))
    straight.train()
    for one, other in zip(weights(second), weights(straight), strict=True):
        assert torch.equal(one, other)


def test_without_seek_what_was_consumed_is_dropped_and_said(
    make: MakeRunner, caplog: pytest.LogCaptureFixture
) -> None:
    first = make(train_cfg=dict(max_iters=7))
    first.train()
    second = make(train_cfg=dict(max_epochs=2))
    second.load_state_dict(first.state_dict())
    second.train()
    assert second.progress.iter == 10
    assert "fetched and skipped the first 2 batches of epoch 2" in caplog.text


def test_a_validation_that_was_owed_comes_first_after_a_resume(make: MakeRunner) -> None:
    first = make(validate=True, train_cfg=dict(max_epochs=2))
    states = []

    @first.on("safe_point")
    def save(runner: Any) -> None:
        states.append((runner.progress.val_due, runner.state_dict()["progress"]))

    first.train()
    owed = [state for due, state in states if due]
    assert [state["iter"] for state in owed] == [5, 10]
    second = make(validate=True, train_cfg=dict(max_epochs=2))
    log = validations(second)
    second.progress.load_state_dict(owed[0])
    second.train()
    assert log == [(1, 5), (2, 10)]
    last = make(validate=True, train_cfg=dict(max_epochs=2))
    log = validations(last)
    last.progress.load_state_dict(owed[1])  # at the limit, but for its validation
    last.train()
    assert log == [(2, 10)]

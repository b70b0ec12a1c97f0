"""States taken at any safe point, loaded into another Runner, end where the straight run ends."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from hookengine import Plugin
from tests.fixtures import MakeData, MakeRunner


class Journal(Plugin):
    """Counts the closing events."""

    def __post_init__(self) -> None:
        self.epochs: list[int] = []
        self.validations: list[tuple[int, int]] = []
        self.states: list[Any] = []

    def after_train_epoch(self, runner: Any) -> None:
        self.epochs.append(runner.progress.epoch)

    def after_val(self, runner: Any) -> None:
        self.validations.append((runner.progress.epoch, runner.progress.iter))

    def safe_point(self, runner: Any, agreed: Any) -> None:
        seen = copy.deepcopy((self.epochs, self.validations))
        self.states.append((seen, copy.deepcopy(runner.state_dict())))


def generator(data: Any) -> Any:
    """A one-shot stream: what an iteration-based run may be given."""
    while True:
        yield from DataLoader(data(), batch_size=4)


@pytest.mark.parametrize(
    ("cfg", "loader"),
    [
        (dict(max_epochs=2, val_interval=1), None),
        (dict(max_iters=10, val_interval=5), None),
        (dict(max_iters=8, val_interval=3), None),
        (dict(max_iters=8, val_interval=3), generator),
    ],
    ids=["epochs", "iterations to an epoch's end", "iterations", "a generator"],
)
def test_every_safe_point_is_one_to_go_on_from(
    make: MakeRunner, data: MakeData, cfg: Any, loader: Callable[[Any], Any] | None
) -> None:
    def run(state: Any = None) -> tuple[Journal, Any]:
        journal = Journal()
        options = dict(train_dataloader=loader(data)) if loader is not None else {}
        runner = make(plugins=[journal], validate=True, train_cfg=cfg, **options)
        if state is not None:
            runner.load_state_dict(state)
        runner.train()
        return journal, runner

    straight, expected = run()
    for (epochs, validations), state in straight.states:
        journal, runner = run(state)
        assert epochs + journal.epochs == straight.epochs
        assert validations + journal.validations == straight.validations
        assert runner.progress.state_dict() == expected.progress.state_dict()
        for name, value in runner.bare_model.state_dict().items():
            assert torch.equal(value, expected.bare_model.state_dict()[name])


def test_an_epoch_that_is_closed_at_the_limit_draws_no_batch(
    make: MakeRunner, data: MakeData
) -> None:
    class Endless:
        """Has a length, and yields more than that."""

        def __len__(self) -> int:
            return 5

        def __iter__(self) -> Any:
            return generator(data)

    first = make(train_dataloader=Endless(), train_cfg=dict(max_iters=5))
    states = []
    first.on("after_train_iter")(lambda runner: states.append(runner.state_dict()["progress"]))
    first.train()
    second = make(train_dataloader=Endless(), train_cfg=dict(max_iters=5))
    second.progress.load_state_dict(states[-1])
    second.train()
    assert (second.progress.epoch, second.progress.iter, second.progress.batch) == (1, 5, 0)


def test_an_interrupt_after_the_last_iteration_leaves_its_validation_owed(make: MakeRunner) -> None:
    runner = make(validate=True, train_cfg=dict(max_iters=4, val_interval=2))
    validated = []
    runner.on("after_val")(lambda runner: validated.append(runner.progress.iter))
    left = [1]

    @runner.on("after_train_iter")
    def interrupt(runner: Any) -> None:
        if runner.progress.iter == 4 and left:
            left.pop()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runner.train()
    assert validated == [2]
    runner.train()
    assert validated == [2, 4]


def test_what_is_asked_for_while_requests_are_served_is_served_next(make: MakeRunner) -> None:
    saved = []

    class Saver(Plugin):
        def safe_point(self, runner: Any, agreed: Any) -> None:
            if "save" in agreed:
                saved.append((runner.progress.iter, agreed["save"]))

    class Signal(Plugin):
        def safe_point(self, runner: Any, agreed: Any) -> None:
            if runner.progress.iter in (2, 3):
                runner.requests["save"] = f"signal at {runner.progress.iter}"

    make(plugins=[Saver(), Signal()], train_cfg=dict(max_iters=6)).train()
    assert saved == [(3, "signal at 2"), (4, "signal at 3")]


def test_a_state_that_is_refused_leaves_everything_as_it_was(make: MakeRunner) -> None:
    class Kept(Plugin):
        def after_run(self) -> None: ...

        def state_dict(self) -> dict[str, Any]:
            return {"x": 1}

        def load_state_dict(self, state: Any) -> None: ...

    other = make(plugins=[Kept()])
    other.train()
    runner = make()
    weight = runner.bare_model.net.weight.clone()
    with pytest.raises(ValueError, match="state of 'kept', which is not enabled"):
        runner.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match=r"has no .*progress.*bare_model\.load_state_dict"):
        runner.load_state_dict(other.bare_model.state_dict())
    assert torch.equal(runner.bare_model.net.weight, weight)
    assert runner.progress.iter == 0


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

"""A loss that is NaN or infinite is found, named and reported."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hookengine import Plugin
from tests.fixtures import MakeRunner, Toy
from tests.plugins.hookengine_logging.runs import LOGGING, logging_runner, written


def with_terms(at: dict[int, dict[str, float]]) -> Any:
    """Build a toy with two terms of a loss, replaced in some iterations (from 1)."""

    class WithTerms(Toy):
        seen = 0

        def train_step(self, data: Any, optim_wrapper: Any) -> Any:
            self.seen += 1
            outputs = super().train_step(data, optim_wrapper)
            terms = {"loss": outputs["loss"], "loss_box": torch.tensor(0.25), "size": torch.inf}
            changed = at.get(self.seen, {}).items()
            return {**terms, **{name: torch.tensor(value) for name, value in changed}}

    return WithTerms()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_ends_the_run_at_the_interval(
    make: MakeRunner, value: float
) -> None:
    model = with_terms({7: {"loss": value}, 8: {"loss": value, "loss_box": value}})
    runner = logging_runner(make, model=model, interval=5, train_cfg=dict(max_epochs=4))
    with pytest.raises(FloatingPointError) as error:
        runner.train()
    assert runner.progress.iter == 10
    assert str(error.value).startswith(
        f"the loss is not finite in iteration 7, epoch 2: loss {value} (loss_box 0.25). "
    )
    assert "nonfinite='warn'" in str(error.value)
    assert "plugin 'logging'" in error.value.__notes__[0]
    assert [record["iter"] for record in written(runner)] == [5, 10], "the interval is written"
    assert "the loss is not finite in iteration 7" in (runner.run_dir / "run.log").read_text()


def test_an_interval_over_two_epochs_names_the_epoch_of_the_loss(make: MakeRunner) -> None:
    model = with_terms({4: {"loss_box": float("nan")}})
    runner = logging_runner(make, model=model, interval=7, train_cfg=dict(max_iters=20))
    with pytest.raises(FloatingPointError, match=r"iteration 4, epoch 1: loss_box nan \(loss "):
        runner.train()
    assert runner.progress.iter == 7


def test_a_state_with_corrupted_weights_is_not_saved(make: MakeRunner) -> None:
    states = []

    class Saves(Plugin):
        def safe_point(self, runner: Any) -> None:
            states.append((runner.progress.iter, runner.state_dict()))

    model = with_terms({3: {"loss": float("nan")}})
    runner = logging_runner(make, model=model, interval=50, plugins=[Saves()])
    with pytest.raises(FloatingPointError, match="iteration 3, epoch 1"):
        runner.train()
    assert [iteration for iteration, _ in states] == [1, 2]


def test_a_term_logged_only_sometimes_is_checked(make: MakeRunner) -> None:
    model = with_terms({3: {"loss_g": 1.0}, 4: {"loss_g": float("nan")}})
    runner = logging_runner(make, model=model, interval=5)
    with pytest.raises(FloatingPointError, match="iteration 4, epoch 1: loss_g nan"):
        runner.train()


def test_a_run_that_was_rolled_back_is_checked_again(make: MakeRunner) -> None:
    model = with_terms({3: {"loss": float("nan")}, 9: {"loss": float("nan")}})
    runner = logging_runner(make, model=model, interval=2)
    state = runner.state_dict()
    for _ in range(2):
        with pytest.raises(FloatingPointError, match="iteration"):
            runner.train()
        runner.load_state_dict(state)


def test_with_warn_training_continues_after_one_warning(make: MakeRunner) -> None:
    model = with_terms({3: {"loss": float("nan")}, 8: {"loss": float("nan")}})
    options = dict(type="logging", interval=2, nonfinite="warn")
    runner = make(model=model, defaults=LOGGING, plugins=[options])
    runner.train()
    assert runner.progress.iter == 10
    text = (runner.run_dir / "run.log").read_text()
    assert text.count("the loss is not finite in iteration 3") == 1
    assert "iteration 8" not in text
    runner.state_dict()

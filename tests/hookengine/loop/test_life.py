"""Tests of ``hookengine/loop/life.py``."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from hookengine import Runner
from tests.fixtures import MakeRunner, Toy
from tests.hookengine.lives import LOADER, Life, Plain


def test_a_runner_that_is_dropped_is_freed(
    make: MakeRunner, toy: type[Toy], tmp_path: Path
) -> None:
    runner = Runner(toy(), tmp_path, LOADER, optim_wrapper=dict(optimizer=dict(type="SGD", lr=1)),
                    train_cfg=dict(max_epochs=1), defaults=())  # fmt: skip
    runner.train()
    gone = weakref.ref(runner)
    del runner
    gc.collect()
    assert gone() is None


def test_with_closes_once(make: MakeRunner) -> None:
    life = Life()
    with make(plugins=[life]) as runner:
        runner.train()
    runner.close()
    assert life.log == ["configure", "before_run", "third", "after_run", "unconfigure"]
    with pytest.raises(RuntimeError, match="this Runner is closed"):
        runner.train()


def test_an_exception_is_told_to_all_and_raised_on(make: MakeRunner) -> None:
    first, second = Life(fails_in=("third",)), Life()
    second.plugin_name = "second"  # type: ignore[misc]
    runner = make(plugins=[first, second])
    with pytest.raises(LookupError, match="third"):
        runner.train()
    ending = ["on_exception LookupError", "after_run"]
    assert first.log == ["configure", "before_run", "third", *ending]
    assert second.log == ["configure", "before_run", *ending]


def test_closing_events_reach_everybody_and_hide_no_error(make: MakeRunner) -> None:
    first = Life(fails_in=("third", "on_exception LookupError", "after_run"))
    second = Life()
    second.plugin_name = "second"  # type: ignore[misc]
    runner = make(plugins=[first, second])
    with pytest.raises(LookupError, match="third") as caught:
        runner.train()
    assert second.log == ["configure", "before_run", "on_exception LookupError", "after_run"]
    notes = caught.value.__notes__
    assert "plugin 'life'" in notes[0]
    assert "and then LookupError: on_exception LookupError (raised by plugin 'life'" in notes[1]
    assert "and then LookupError: after_run" in notes[2]


def test_an_interrupt_leaves_a_runner_that_goes_on(make: MakeRunner) -> None:
    straight = make()
    straight.train()
    for event in ("before_train_iter", "before_optim_step", "after_train_iter"):
        life = Life()
        runner = make(plugins=[life])
        left = [1]

        def interrupt(runner: Any) -> None:
            if runner.progress.iter == 6 and left:  # noqa: B023
                left.pop()  # noqa: B023
                raise KeyboardInterrupt

        runner.on(event)(interrupt)
        with pytest.raises(KeyboardInterrupt):
            runner.train()
        assert life.log[-2:] == ["on_exception KeyboardInterrupt", "after_run"]
        runner.train()
        assert runner.progress.iter == 10
        # Gradients that the interrupted iteration left are not added to the next one's.
        assert torch.equal(runner.bare_model.net.weight, straight.bare_model.net.weight)


def test_a_failed_construction_unconfigures(make: MakeRunner) -> None:
    life = Life()
    with pytest.raises(TypeError, match="Plain has no train_step"):
        make(plugins=[life], model=Plain())
    assert life.log == ["configure", "unconfigure"]
    failing, never = Life(fails_in=("configure", "unconfigure")), Life()
    never.plugin_name = "never"  # type: ignore[misc]
    with pytest.raises(LookupError, match="configure") as caught:
        make(plugins=[failing, never])
    assert failing.log == ["configure", "unconfigure"]
    assert never.log == []
    assert "plugin 'life'" in caught.value.__notes__[0]
    assert "and then LookupError: unconfigure" in caught.value.__notes__[1]


@pytest.mark.process
def test_an_open_runner_is_closed_at_exit(tmp_path: Path) -> None:
    script = f"""
from hookengine import Plugin, Runner
from torch import nn
class Last(Plugin):
    def unconfigure(self): print("unconfigured")
runner = Runner(nn.Linear(1, 1), {str(tmp_path)!r}, loss=None, plugins=[Last()], defaults=())
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout == "unconfigured\n"


def test_a_plugin_may_validate_within_a_run(make: MakeRunner) -> None:
    life = Life()
    runner = make(plugins=[life], validate=True, train_cfg=dict(max_iters=4, val_interval=100))
    seen = []

    @runner.on("after_train_iter")
    def validate(runner: Any) -> None:
        if runner.progress.iter == 2:
            runner.stop("enough")
            seen.append(runner.val())

    runner.train()
    assert set(seen[0]) == {"accuracy"}
    assert runner.progress.stopped == "enough"  # the validation did not lose the request
    assert life.log == ["configure", "before_run", "after_run"]


def test_runs_that_cannot_be_nested_are_refused(make: MakeRunner) -> None:
    def attempt(event: str, call: Any, message: str) -> None:
        runner = make(validate=True)
        runner.on(event)(lambda runner: call(runner))
        with pytest.raises(RuntimeError, match=message):
            runner.train()

    attempt("after_val_epoch", lambda r: r.val(), r"val\(\) was called while val\(\)")
    attempt("after_train_iter", lambda r: r.train(), r"train\(\) was called within a run")
    attempt("after_train_iter", lambda r: r.close(), r"Call stop\(\) to end the run")


def test_a_stop_before_the_run_holds(make: MakeRunner) -> None:
    runner = make()
    runner.stop("before it began")
    runner.train()
    assert runner.progress.iter == 1
    runner.train()
    assert runner.progress.iter == 10


def test_an_error_in_close_does_not_hide_the_users(make: MakeRunner) -> None:
    with (
        pytest.raises(ValueError, match="mine") as caught,
        make(plugins=[Life(fails_in=("unconfigure",))]),
    ):
        raise ValueError("mine")
    assert "and then LookupError: unconfigure" in caught.value.__notes__[0]


def test_a_second_interrupt_does_not_skip_the_closing_events(make: MakeRunner) -> None:
    life = Life()
    runner = make(plugins=[life])

    @runner.on("before_train")
    def interrupt() -> None:
        raise KeyboardInterrupt

    @runner.on("on_exception")
    def again() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runner.train()
    assert life.log[-1] == "after_run"


def test_a_dropped_runner_is_unconfigured_and_a_closed_one_let_go(
    make: MakeRunner, toy: type[Toy]
) -> None:
    life = Life()
    runner = Runner(toy(), plugins=[life], defaults=())
    del runner
    gc.collect()
    assert life.log == ["configure", "unconfigure"]
    runner = Runner(toy(), defaults=())
    model, gone = runner.bare_model, weakref.ref(runner)
    runner.close()
    del runner
    gc.collect()
    assert gone() is None
    assert type(model).__name__ == "Toy"

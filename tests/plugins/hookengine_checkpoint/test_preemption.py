"""Signals: one leads to a checkpoint and an orderly exit, a second one to an end at once."""

from __future__ import annotations

import os
import select
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from hookengine_checkpoint.files import published, verify
from hookengine_checkpoint.preemption import EXIT_CODE, Signals

from tests import forks
from tests.fixtures import MakeRunner

SCRIPT = """
import os, signal, sys, threading
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from hookengine import BaseMetric, Runner

folder, name, event, number, times, workers = sys.argv[1:]
torch.set_num_threads(1)

def mine(received, frame):
    print("my own handler was called", flush=True)

signal.signal(signal.SIGUSR1, mine)
before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]

class Count(BaseMetric):
    def process(self, data_batch, data_samples):
        self.results.append(1)
    def compute_metrics(self, results):
        return {"accuracy": float(len(results))}

torch.manual_seed(0)
data = TensorDataset(torch.randn(20, 4), torch.arange(20) % 3)
runner = Runner(
    nn.Linear(4, 3),
    folder,
    train_dataloader=DataLoader(data, batch_size=4, shuffle=True, num_workers=int(workers)),
    train_cfg=dict(max_epochs=3),
    optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.1)),
    val_dataloader=DataLoader(data, batch_size=10),
    val_evaluator=Count(),
    loss=nn.functional.cross_entropy,
    plugins=[dict(type="accumulate", steps=3), "no:progress_bar"],
    name="run",
    resume="auto",
)
calls = []

def kick():
    calls.append(1)
    if len(calls) == 4:
        for _ in range(int(times)):
            os.kill(os.getpid(), getattr(signal, name))

if event != "never":
    runner.on(event)(kick)
try:
    runner.train()
finally:
    after = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    print("handlers are back:", before == after, flush=True)
print("trained to the end:", runner.progress.iter, runner.progress.step)
print("weights:", runner.bare_model.weight.sum().item().hex())
"""


def run(folder: Path, name: str, event: str, times: int = 1, workers: int = 0) -> Any:
    return forks.run(SCRIPT, str(folder), name, event, "4", str(times), str(workers))


def only(folder: Path) -> Any:
    (saved,) = published(folder / "run" / "checkpoints")
    verify(saved)
    return saved


@pytest.fixture(scope="module")
def end(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What a run prints that no signal reaches."""
    done = run(tmp_path_factory.mktemp("straight"), "SIGTERM", "never")
    assert done.returncode == 0, done.stderr
    return "\n".join(done.stdout.splitlines()[-2:])


@pytest.mark.process
@pytest.mark.parametrize(
    ("name", "event", "iteration", "workers"),
    [
        ("SIGTERM", "after_train_iter", 5, 0),  # in the window of iterations 4 and 5
        ("SIGINT", "before_train_iter", 5, 2),
        ("SIGUSR1", "after_val_iter", 10, 0),
        ("SIGTERM", "before_save_checkpoint", 15, 0),
    ],
)
def test_one_leads_to_a_checkpoint_and_code_75(
    tmp_path: Path, end: str, name: str, event: str, iteration: int, workers: int
) -> None:
    done = run(tmp_path, name, event, workers=workers)
    assert done.returncode == EXIT_CODE == 75, done.stderr
    assert "trained to the end" not in done.stdout
    assert "handlers are back: True" in done.stdout
    assert ("my own handler was called" in done.stdout) == (name == "SIGUSR1")
    assert f"ended by {name} with exit code 75" in done.stdout
    assert only(tmp_path).iter == iteration
    again = run(tmp_path, name, "never", workers=workers)
    assert again.returncode == 0, again.stderr
    assert "\n".join(again.stdout.splitlines()[-2:]) == end


@pytest.mark.process
def test_a_signal_to_the_whole_group_is_for_the_main_process(tmp_path: Path, end: str) -> None:
    """As a scheduler sends it: to the workers of the dataloader, too."""
    script = SCRIPT.replace("os.kill(os.getpid(),", "os.killpg(0,")
    arguments = [str(tmp_path), "SIGTERM", "before_train_iter", "4", "1", "2"]
    done = forks.run(script, *arguments, new_session=True)
    assert done.returncode == EXIT_CODE, done.stderr
    assert only(tmp_path).iter == 5
    again = run(tmp_path, "SIGTERM", "never", workers=2)
    assert "\n".join(again.stdout.splitlines()[-2:]) == end


KICK = """
class Kick:  # where it is unpickled, in a worker that starts, the whole group gets the signal
    def __reduce__(self):
        return os.killpg, (0, getattr(signal, name))
"""


@pytest.mark.process
@pytest.mark.parametrize(
    ("method", "name", "when"),
    [
        ("spawn", "SIGINT", "starting"),
        ("spawn", "SIGUSR1", "training"),
        ("forkserver", "SIGUSR1", "starting"),
        ("forkserver", "SIGTERM", "training"),
    ],
)
def test_workers_that_are_not_forked_leave_it_to_the_main_process(
    tmp_path: Path, end: str, method: str, name: str, when: str
) -> None:
    """The window of three batches needs the workers after the signal."""
    starting = when == "starting"
    init = "functools.partial(print, 'worker'" + ", Kick()" * starting + ")"
    loader = f"num_workers=1, multiprocessing_context={method!r}, worker_init_fn={init}"
    script = SCRIPT.replace("num_workers=int(workers)", loader)
    script = script.replace("import os,", "import functools, os,").replace(
        "class Count", f"{KICK}\nclass Count"
    )
    script = script.replace("os.kill(os.getpid(),", "os.killpg(0,")
    event = "never" if starting else "before_train_iter"
    done = forks.run(script, str(tmp_path), name, event, "4", "1", "1", new_session=True)
    assert done.returncode == EXIT_CODE, done.stderr
    assert "handlers are back: True" in done.stdout
    assert ("worker None 0" if starting else "worker 0") in done.stdout
    assert only(tmp_path).iter == (3 if starting else 5)
    again = run(tmp_path, name, "never", workers=1)
    assert "\n".join(again.stdout.splitlines()[-2:]) == end


@pytest.mark.process
def test_forked_workers_leave_it_to_the_main_process_without_the_seed_plugin(
    tmp_path: Path,
) -> None:
    script = SCRIPT.replace("os.kill(os.getpid(),", "os.killpg(0,").replace(
        '"no:progress_bar"', '"no:progress_bar", "no:seed"'
    )
    arguments = [str(tmp_path), "SIGTERM", "before_train_iter", "4", "1", "2"]
    done = forks.run(script, *arguments, new_session=True)
    assert done.returncode == EXIT_CODE, done.stderr
    assert only(tmp_path).iter == 5


@pytest.mark.process
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_workers_end_with_a_main_process_that_is_killed(tmp_path: Path, method: str) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    held = f"functools.partial(os.open, {str(fifo)!r}, os.O_WRONLY)"  # as long as a worker lives
    loader = f"num_workers=1, multiprocessing_context={method!r}, worker_init_fn={held}"
    script = SCRIPT.replace("num_workers=int(workers)", loader)
    script = script.replace("import os,", "import functools, os,")
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    arguments = [str(tmp_path), "SIGKILL", "before_train_iter", "4", "1", "1"]
    done = forks.run(script, *arguments, new_session=True)
    assert done.returncode == -signal.SIGKILL
    assert select.select([reader], [], [], 60)[0]  # its end
    assert os.read(reader, 1) == b""
    os.close(reader)


@pytest.mark.process
def test_a_second_one_ends_the_process_at_once(tmp_path: Path, end: str) -> None:
    done = run(tmp_path, "SIGTERM", "before_train_iter", times=2)
    assert done.returncode == -signal.SIGTERM
    assert "handlers are back" not in done.stdout
    assert run(tmp_path, "SIGTERM", "never").stdout.splitlines()[-2:] == end.splitlines()


def test_who_ignores_a_signal_goes_on_ignoring_it() -> None:
    before = signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    try:
        signals = Signals(["SIGUSR2"], lambda name: None)
        assert signal.getsignal(signal.SIGUSR2) is signal.SIG_IGN
        signals.restore()
        assert signal.getsignal(signal.SIGUSR2) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_two_signals_of_one_wish_are_one() -> None:
    """A launcher may send SIGTERM after the terminal's SIGINT."""
    asked: list[str] = []
    signals = Signals(["SIGUSR1", "SIGUSR2"], asked.append)
    try:
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGUSR2)
        assert asked == ["SIGUSR1"]
    finally:
        signals.restore()


def test_an_error_ends_the_run_with_that_error_and_the_handlers_are_put_back(
    make: MakeRunner,
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    runner = make(plugins=["checkpoint"])

    @runner.on("after_train_iter")
    def fail(runner: Any) -> None:
        if runner.progress.iter == 2:
            signal.raise_signal(signal.SIGTERM)
            raise RuntimeError("first")

    with pytest.raises(RuntimeError, match="first"):
        runner.train()
    assert signal.getsignal(signal.SIGTERM) is before


def test_at_a_prompt_ctrl_c_leaves_one_there(
    make: MakeRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    runner = make(plugins=["checkpoint"])

    @runner.on("before_train_iter")
    def interrupt(runner: Any) -> None:
        if runner.progress.iter == 3:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        runner.train()
    (saved,) = published(runner.run_dir / "checkpoints")
    assert saved.iter == runner.progress.iter == 4
    runner.train()
    assert runner.progress.iter == 10


def test_outside_of_the_main_thread_there_is_nothing_to_take(make: MakeRunner) -> None:
    import threading

    runner = make(plugins=["checkpoint"])
    thread = threading.Thread(target=runner.train)
    thread.start()
    thread.join()
    assert runner.progress.epoch == 2
    assert published(runner.run_dir / "checkpoints")

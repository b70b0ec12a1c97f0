"""Tests of ``hookengine/abandoned.py``: what Runners give back that the script does not close."""

from __future__ import annotations

import gc
import json
import logging
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from hookengine import DEFAULT_PLUGINS, Record, Runner
from hookengine.abandoned import wait_until_closed
from tests import forks
from tests.fixtures import Toy, toy_data
from tests.hookengine.leaks import abandon, collect, held
from tests.hookengine.lives import Life
from tests.hookengine.records.keeping import Keeping

EVERYTHING: dict[str, Any] = dict(
    defaults=DEFAULT_PLUGINS,
    plugins=[
        *("tensorboard", "report", "ema", "amp"),
        dict(type="clip", max_norm=1.0),
        dict(type="early_stop", metric="accuracy"),
        dict(type="logging", interval=2),
        dict(type="seed", seed=0),
        dict(type="checkpoint", keep_best="accuracy"),
        dict(type="watch", what="all", every=5),
        dict(type="schedule", scheduler="CosineAnnealingLR"),
    ],
)


def train_and_test(runner: Runner) -> None:
    runner.train()
    runner.test()


def fail(runner: Runner) -> None:
    @runner.on("after_train_iter")
    def interrupt(runner: Runner) -> None:
        if runner.progress.iter == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runner.train()


@pytest.mark.parametrize("use", [train_and_test, Runner.test, repr, fail], ids=lambda f: f.__name__)
def test_a_sweep_leaves_nothing_behind(tmp_path: Path, use: Any) -> None:
    abandon(tmp_path, use, **EVERYTHING)  # what Python and torch keep after the first time
    collect()
    before = held()
    gone = [abandon(tmp_path, use, **EVERYTHING) for _ in range(3)]
    collect()
    assert [model() for model in gone] == [None] * 3
    assert held() == before


def test_all_records_arrive_and_the_sinks_are_closed(tmp_path: Path) -> None:
    sink = Keeping()
    abandon(tmp_path, train_and_test, plugins=["logging", sink])
    collect()
    assert [entry[:2] for entry in sink.log[1:-1]] == [
        *[("train", 5), ("val", 5), ("train", 10), ("val", 10), ("test", 10)]
    ]
    assert (sink.log[0], sink.log[-1]) == ("open", "close")
    assert sink.failures == 0


def test_the_log_and_the_metrics_are_complete(tmp_path: Path) -> None:
    class Last(Life):
        def unconfigure(self, runner: Any) -> None:  # type: ignore[override]
            runner.logger.info("the last line")

    abandon(tmp_path, name="run", plugins=["logging", Last(), "tensorboard"])
    collect()
    assert (tmp_path / "run" / "run.log").read_text().endswith("the last line\n")
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 4
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "finished"
    (events,) = (tmp_path / "run").glob("events.out.tfevents.*")
    assert b"_hparams_/session_end_info" in events.read_bytes()


def test_a_closed_runner_is_not_closed_again(tmp_path: Path) -> None:
    life = Life()

    def close_twice(runner: Runner) -> None:
        with runner:
            runner.close()

    abandon(tmp_path, close_twice, plugins=[life])
    collect()
    assert life.log == ["configure", "unconfigure"]


def test_a_runner_whose_construction_failed_leaves_nothing_behind(tmp_path: Path) -> None:
    life, models = Life(), list[Any]()

    def build() -> None:
        models.append(weakref.ref(model := Toy()))
        abandon(tmp_path, model=model, plugins=["logging", life], load_from=tmp_path / "missing",
                defaults=("checkpoint",))  # fmt: skip

    before = held()
    with pytest.raises(FileNotFoundError):
        build()
    collect()
    assert (models[0](), held()) == (None, before)
    assert life.log == ["configure", "unconfigure"]


def test_what_the_script_keeps_does_not_keep_the_runner(tmp_path: Path) -> None:
    model, sink, loader = Toy(), Keeping(), DataLoader(toy_data(), batch_size=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaled = dict(type="amp", dtype="float16")
    seen: list[Any] = []

    def use(runner: Runner) -> None:
        runner.train()
        seen.append(weakref.ref(runner))

    abandon(tmp_path, use, model=model, plugins=["logging", sink, scaled],
            train_dataloader=loader, optim_wrapper=optimizer)  # fmt: skip
    collect()
    assert seen[0]() is None
    assert sink.log[-1] == "close"
    assert model(next(iter(loader))[0], None).shape == (4, 3)


def test_garbage_may_be_collected_while_any_lock_is_held(tmp_path: Path) -> None:
    lock = threading.Lock()

    class Locking(Keeping):
        def close(self, runner: Any) -> None:
            with lock, logging.getLogger().handlers[0].lock:  # type: ignore[union-attr]
                super().close(runner)

    sink = Locking()
    handler = logging.StreamHandler()
    logging.getLogger().handlers.insert(0, handler)
    try:
        abandon(tmp_path, plugins=["logging", sink])
        with lock, handler.lock:  # type: ignore[union-attr]
            gc.collect()  # would wait for the thread of the sink, which waits for the lock
            assert sink.log[-1] != "close"
        wait_until_closed()
    finally:
        logging.getLogger().removeHandler(handler)
    assert sink.log[-1] == "close"
    assert sink.failures == 0


def test_garbage_may_be_collected_on_the_thread_of_another_sink(tmp_path: Path) -> None:
    class Collecting(Keeping):
        def write(self, runner: Any, record: Record) -> None:
            gc.collect()
            super().write(runner, record)

    first, second = Keeping(), Collecting()
    gc.disable()
    try:
        abandon(tmp_path, plugins=["logging", first])
        abandon(tmp_path, plugins=["logging", second])
    finally:
        gc.enable()
    wait_until_closed()
    assert first.log[-1] == "close"
    assert (first.failures, second.failures) == (0, 0)


class Shared(Keeping):
    """Notes the Runner that it serves."""

    def configure(self, runner: Any) -> None:
        self.log.append(f"configure {runner.name}")

    def unconfigure(self, runner: Any) -> None:
        self.log.append(f"unconfigure {runner.name}")


@pytest.mark.parametrize("collects", [True, False])
def test_a_plugin_object_serves_one_runner_after_the_other(tmp_path: Path, collects: bool) -> None:
    """The Runner before closes what it has of the plugin before the next one begins."""
    sink = Shared()
    kept: list[Runner] = []
    for name in ("a", "b"):
        abandon(tmp_path, kept.append, name=name, plugins=["logging", sink])
        kept[-1].train()
        if collects:
            kept.clear()
            gc.collect()  # and do not wait
    kept.clear()
    collect()
    records = [("train", 5), ("val", 5), ("train", 10), ("val", 10)]
    seen = [entry if isinstance(entry, str) else entry[:2] for entry in sink.log]
    assert seen == [
        *("configure a", "open", *records, "unconfigure a", "close"),
        *("configure b", "open", *records, "unconfigure b", "close"),
    ]
    assert (sink.failures, sink.dropped) == (0, 0)


@pytest.mark.process
def test_persistent_workers_end_with_the_run(tmp_path: Path) -> None:
    workers: set[str] = set()

    def use(runner: Runner) -> None:
        runner.on("after_train_epoch")(lambda: workers.update(held()["processes"]))
        runner.train()
        assert not workers & {*held()["processes"]} - {*before["processes"]}

    def sweep() -> None:
        loader = DataLoader(toy_data(), batch_size=4, num_workers=1, persistent_workers=True)
        abandon(tmp_path, use, defaults=DEFAULT_PLUGINS, train_dataloader=loader)

    forks.start_server(forks.PROCESS)  # a worker is a process
    before = held()
    sweep()
    collect()
    before = held()
    workers.clear()
    sweep()
    collect()
    assert held() == before
    assert workers > {*before["processes"]}


FORKED = """
import gc, os, sys
from torch import nn
from hookengine import Plugin, Runner

class Last(Plugin):
    def unconfigure(self):
        os.write(1, b"the parent " if os.getpid() == parent else b"a child ")

def build():
    return Runner(nn.Linear(1, 1), sys.argv[1], loss=None, plugins=[Last()], defaults=())

parent = os.getpid()
gc.disable()
build()
kept = build()
if os.fork() == 0:
    gc.collect()
    from hookengine.abandoned import wait_until_closed
    wait_until_closed()
    sys.exit()
os.wait()
gc.collect()
"""


@pytest.mark.process
def test_a_forked_process_closes_no_copy_and_the_process_waits_at_its_end(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORKED, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout == "the parent " * 2

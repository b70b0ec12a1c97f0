"""Sinks that several tests of records use."""

from __future__ import annotations

import threading
from typing import Any

import torch

from hookengine import Record, Sink
from tests.fixtures import MakeRunner


class Keeping(Sink):
    """Keeps what it is given."""

    def __post_init__(self) -> None:
        self.log: list[Any] = []
        self.threads: set[str] = set()

    def open(self, runner: Any) -> None:
        self.log.append("open")

    def write(self, runner: Any, record: Record) -> None:
        self.threads.add(threading.current_thread().name)
        self.log.append((record.phase, record.iter, dict(record.scalars)))

    def close(self, runner: Any) -> None:
        self.log.append("close")


def record(iteration: int, phase: str = "train", **scalars: float) -> Record:
    return Record(phase, 0, iteration, iteration, scalars)


def trained_weights(make: MakeRunner, *plugins: Any) -> torch.Tensor:
    runner = make(plugins=[dict(type="logging", interval=1), *plugins], validate=True)
    runner.train()
    runner.close()
    return runner.bare_model.net.weight.clone()

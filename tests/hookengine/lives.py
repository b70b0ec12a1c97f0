"""Models and plugins that several tests of the Runner use."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hookengine import Plugin


class Plain(nn.Module):
    """A plain network for the toy data."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.fc(inputs)


LOADER = [(torch.ones(2, 4), torch.zeros(2, dtype=torch.long))]


class Life(Plugin):
    """Notes the events of a life, and fails where it is told to."""

    fails_in: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.log: list[str] = []

    def _note(self, event: str) -> None:
        self.log.append(event)
        if event in self.fails_in:
            raise LookupError(event)

    def configure(self) -> None:
        self._note("configure")

    def before_run(self) -> None:
        self._note("before_run")

    def after_train_iter(self, runner: Any) -> None:
        if runner.progress.iter == 3:
            self._note("third")

    def on_exception(self, error: BaseException) -> None:
        self._note(f"on_exception {type(error).__name__}")

    def after_run(self) -> None:
        self._note("after_run")

    def unconfigure(self) -> None:
        self._note("unconfigure")

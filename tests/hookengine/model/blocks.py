"""Modules that several tests of models use."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hookengine import (
    BaseModule,
)


def tensors(**values: Any) -> dict[str, Any]:
    return {name: torch.tensor(value, requires_grad=True) for name, value in values.items()}


class Block(BaseModule):
    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 2)
        for name, part in parts.items():
            self.add_module(name, part)


def loaded(module: Any) -> set[str]:
    """Names of the tensors of a BaseModule that it knows as loaded."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return {name for name, tensor in tensors if any(tensor is t for t in module.loaded_tensors)}

"""The two workloads on which overhead is measured, and the loop written by hand over them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from hookengine import BaseModel


class Classifier(BaseModel):
    """A BaseModel around a plain network."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, inputs: Tensor, labels: Tensor, mode: str = "tensor") -> Any:
        scores = self.net(inputs)
        if mode == "loss":
            return {"loss": F.cross_entropy(scores, labels)}
        return scores, labels


@dataclass(frozen=True)
class Workload:
    """A network and its data.

    Attributes:
        name: w0, where a step costs next to nothing; w1, about 0.8 ms a step.
        features: Inputs.
        hidden: Widths of the hidden layers.
        classes: Outputs.
        batch_size: Samples a batch.
        lr: Of plain SGD.
    """

    name: str
    features: int
    hidden: tuple[int, ...]
    classes: int
    batch_size: int
    lr: float = 0.01

    def net(self) -> nn.Module:
        """The network, always with the same weights."""
        torch.manual_seed(0)
        widths = [self.features, *self.hidden]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after), nn.ReLU()]
        layers.append(nn.Linear(widths[-1], self.classes))
        return nn.Sequential(*layers) if self.hidden else layers[0]

    def loader(self, iterations: int) -> DataLoader[Any]:
        """As many batches as asked for, always the same."""
        generator = torch.Generator().manual_seed(1)
        size = iterations * self.batch_size
        inputs = torch.randn(size, self.features, generator=generator)
        labels = torch.randint(self.classes, (size,), generator=generator)
        return DataLoader(TensorDataset(inputs, labels), self.batch_size, num_workers=0)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Plain SGD."""
        return torch.optim.SGD(model.parameters(), lr=self.lr)


W0 = Workload("w0", features=8, hidden=(), classes=2, batch_size=4)
W1 = Workload("w1", features=256, hidden=(256, 256), classes=10, batch_size=32)


def raw_loop(net: nn.Module, optimizer: torch.optim.Optimizer, loader: Iterable[Any]) -> None:
    """What one writes by hand."""
    net.train()
    for inputs, labels in loader:
        loss = F.cross_entropy(net(inputs), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

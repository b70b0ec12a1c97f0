"""One update of an exponential moving average beside the multi-tensor calls written by hand."""

from __future__ import annotations

import contextlib
import copy
import statistics
from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from hookengine.model import ExponentialMovingAverage

MOMENTUM = 0.0002


class Tiny(nn.Module):
    """320 parameters of eight numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.values = nn.ParameterList([nn.Parameter(torch.randn(8)) for _ in range(320)])


def _by_hand(model: nn.Module) -> Callable[[], None]:
    average = copy.deepcopy(model).requires_grad_(False)
    averages: list[torch.Tensor] = [*average.parameters()]
    values: list[torch.Tensor] = [*model.parameters()]
    copies, buffers = [*average.buffers()], [*model.buffers()]

    def update() -> None:
        with torch.no_grad():
            torch._foreach_lerp_(averages, values, MOMENTUM)
            if buffers:
                torch._foreach_copy_(copies, buffers)

    return update


def _of(averaged: Any, model: nn.Module) -> Callable[[], None]:
    return lambda: averaged.update_parameters(model)


def _peers() -> dict[str, Callable[[nn.Module], Callable[[], None]]]:
    peers: dict[str, Callable[[nn.Module], Callable[[], None]]] = {
        "by hand": _by_hand,
        "hookengine": lambda m: _of(ExponentialMovingAverage(m, MOMENTUM), m),
        "torch, multi-tensor": lambda m: _of(
            AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(1 - MOMENTUM)), m
        ),
    }
    with contextlib.suppress(ImportError):
        from mmengine.model import ExponentialMovingAverage as MMEngines

        peers["mmengine 0.10.7"] = lambda m: _of(MMEngines(m, MOMENTUM), m)
    return peers


def averaging(rounds: int) -> None:
    """ResNet-50, MobileNetV3-small and 320 tiny tensors; the contenders in turn in each round."""
    from torchvision.models import mobilenet_v3_small, resnet50

    for name, make, factor in (
        ("ResNet-50", resnet50, 2),
        ("MobileNetV3-small", mobilenet_v3_small, 20),
        ("320 tiny tensors", Tiny, 100),
    ):
        model = make()
        updates = {key: peer(model) for key, peer in _peers().items()}
        times: dict[str, list[float]] = {key: [] for key in updates}
        for round_ in range(-3, rounds * factor):
            for key, update in updates.items():
                start = perf_counter()
                update()
                if round_ >= 0:
                    times[key].append(perf_counter() - start)
        first, *others = times
        print(f"{name}: {first} {1e6 * statistics.median(times[first]):.0f} us")
        for key in others:
            ratios = [a / b for a, b in zip(times[key], times[first], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            print(f"  {key:<28} {middle:6.2f} times ({low:.2f} to {high:.2f})")

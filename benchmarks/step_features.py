"""Features between loss and step beside the same thing written by hand with torch.

Four loops are timed in turn in each round: by hand and hookengine's bare kernel, each without and
with the feature. Reported are the ratio of the two loops with it, and what the feature adds to an
iteration in hookengine beyond what it adds by hand, in microseconds: medians over the rounds, with
quartiles.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from overhead import ITERATIONS, WARMUP, Timed, bare, raw, with_runner
from torch import nn
from workloads import W0, W1, Workload

Loop = Callable[[Workload, Timed, int], None]
WINDOW = 4


def _by_hand(
    work: Workload,
    net: Timed,
    iterations: int,
    *,
    dtype: torch.dtype | None = None,
    window: int = 1,
    max_norm: float | None = None,
    schedule: bool = False,
) -> None:
    """What one would write oneself, with just the lines that the feature needs."""
    optimizer = work.optimizer(net)
    net.train()
    loader = work.loader(iterations)
    if dtype is torch.float16:
        scaler = torch.amp.GradScaler("cpu")
        for inputs, labels in loader:
            with torch.autocast("cpu", dtype):
                loss = F.cross_entropy(net(inputs), labels)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    elif dtype is not None:
        for inputs, labels in loader:
            with torch.autocast("cpu", dtype):
                loss = F.cross_entropy(net(inputs), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    elif window > 1:
        for index, (inputs, labels) in enumerate(loader, 1):
            loss = F.cross_entropy(net(inputs), labels) / window
            loss.backward()
            if index % window == 0 or index == len(loader):
                optimizer.step()
                optimizer.zero_grad()
    elif max_norm is not None:
        for inputs, labels in loader:
            F.cross_entropy(net(inputs), labels).backward()
            nn.utils.clip_grad_norm_(net.parameters(), max_norm)
            optimizer.step()
            optimizer.zero_grad()
    elif schedule:
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
        for inputs, labels in loader:
            F.cross_entropy(net(inputs), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()


CASES: dict[str, dict[str, tuple[dict[str, Any], dict[str, Any]]]] = {
    "amp": {
        "amp, bfloat16": (dict(dtype=torch.bfloat16), dict(type="amp")),
        "amp, float16": (dict(dtype=torch.float16), dict(type="amp", dtype="float16")),
    },
    "accumulate": {
        "accumulate, by batch": (
            dict(window=WINDOW),
            dict(type="accumulate", steps=WINDOW, weight="batch"),
        ),
        "accumulate, by sample": (dict(window=WINDOW), dict(type="accumulate", steps=WINDOW)),
    },
    "clip": {"clip, by norm": (dict(max_norm=1.0), dict(type="clip", max_norm=1.0))},
    "schedule": {
        "schedule, by step": (
            dict(schedule=True),
            dict(type="schedule", scheduler="CosineAnnealingLR", by_epoch=False),
        )
    },
}


def _measure(loop: Loop, work: Workload) -> float:
    net = Timed(work.net())
    iterations = ITERATIONS[work.name]
    loop(work, net, WARMUP + iterations)
    return net.microseconds(WARMUP, WARMUP + iterations)


def _spread(values: list[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:6.3f} ({low:.3f} to {high:.3f})"


def compare_steps(feature: str, rounds: int) -> None:
    """Measure a feature on both workloads and print a line for each."""
    for name, (arguments, plugin) in CASES[feature].items():
        loops: dict[str, Loop] = {
            "raw": raw,
            "raw+": lambda work, net, n, a=arguments: _by_hand(work, net, n, **a),  # type: ignore[misc]
            "bare": bare,
            "bare+": lambda work, net, n, p=plugin: with_runner(
                work, net, n, defaults=(), plugins=[dict(p)]
            ),  # type: ignore[misc]
        }
        for work in (W1, W0):
            times: dict[str, list[float]] = {key: [] for key in loops}
            for round_ in range(-1, rounds):  # one to warm up
                for key, loop in loops.items():
                    time = _measure(loop, work)
                    if round_ >= 0:
                        times[key].append(time)
            four = [*zip(*times.values(), strict=True)]
            ratios = [bare_with / raw_with for _, raw_with, _, bare_with in four]
            added = [(d - c) - (b - a) for a, b, c, d in four]
            print(
                f"{name}, {work.name}: by hand {statistics.median(times['raw+']):.1f} us, "
                f"{_spread(ratios)} times; the feature adds {_spread(added)} us more"
            )

"""What logging and the sinks add to a run, in the median over rounds with quartiles.

One value, the loss, is logged every 10 iterations of the MLP step of about 0.8 ms (w1): to the
console, ``metrics.jsonl``, TensorBoard and W&B offline. Each is compared with the same run without
``logging``, which is timed beside it in each round, from an iteration at which the sinks are open
to the end of the run, when they have written everything.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import tempfile
import time
from typing import Any

from workloads import W1, Classifier

from hookengine import DEFAULT_PLUGINS, Runner

WARMUP, ITERATIONS = 2000, 5000
REST = tuple(name for name in DEFAULT_PLUGINS if name not in ("logging", "progress_bar"))
LOGGING = dict(type="logging", interval=10)
WANDB = dict(type="wandb", mode="offline")
CONTENDERS: dict[str, list[Any]] = {
    "none": [],
    "console, metrics.jsonl": [LOGGING],
    "and tensorboard": [LOGGING, "tensorboard"],
    "and wandb offline": [LOGGING, WANDB],
    "all four": [LOGGING, "tensorboard", WANDB],
}


def sinks(rounds: int) -> None:
    """Measure and print one line per contender."""
    times: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for round_ in range(-1, rounds):
        for name, plugins in CONTENDERS.items():
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
                measured = _microseconds(plugins)
            if round_ >= 0:
                times[name].append(measured)
    print(f"sinks, {W1.name}: none {statistics.median(times['none']):.1f} us an iteration")
    for name, measured_ in times.items():
        ratios = [one / none for one, none in zip(measured_, times["none"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        if name != "none":
            print(f"  {name:<28} {middle:6.3f} times ({low:.3f} to {high:.3f})")


def _microseconds(plugins: list[Any]) -> float:
    """Time of an iteration, from the end of the warm-up to the end of the run."""
    with tempfile.TemporaryDirectory() as folder:
        net = W1.net()
        runner = Runner(
            Classifier(net),
            work_dir=folder,
            train_dataloader=W1.loader(WARMUP + ITERATIONS),
            train_cfg=dict(max_iters=WARMUP + ITERATIONS),
            optim_wrapper=dict(optimizer=W1.optimizer(net)),
            plugins=plugins,
            defaults=REST,
        )
        marks = []

        @runner.on("after_train_iter")
        def mark(runner: Any) -> None:
            if runner.progress.iter == WARMUP:
                marks.append(time.perf_counter())

        with runner:
            runner.train()
            end = time.perf_counter()
    return 1e6 * (end - marks[0]) / ITERATIONS

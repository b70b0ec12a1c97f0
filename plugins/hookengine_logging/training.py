"""What the iterations since the last record have left, and the record that it becomes."""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping
from math import isfinite
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from hookengine import OptimWrapper, Runner, batch_size, dist
from hookengine_logging.losses import RecentLosses
from hookengine_logging.meter import Medium, Meter, as_float
from hookengine_logging.stopwatch import Stopwatch


class TrainingInterval:
    """Collect outputs, losses, times and learning rates from one training record to the next.

    Args:
        meter: Collects the values of training, of this plugin and of all others.
        losses: Keeps the losses.

    Attributes:
        stopwatch: The time of the iterations.
        rates: The learning rate of the last step, by the name of the optimizer.
    """

    def __init__(self, meter: Meter, losses: RecentLosses) -> None:
        self._meter = meter
        self._losses = losses
        self.stopwatch = Stopwatch()
        self.rates: dict[str, Any] = {}
        self._output_names: list[str] = []

    # Called in every iteration, so it calls as little as it can.
    def add_iteration(self, iteration: int, data_batch: Any, outputs: Any) -> None:
        """Collect the time of an iteration, and the numbers among its outputs.

        Args:
            iteration: Its number, from 1.
            data_batch: The batch.
            outputs: What ``train_step`` has returned; anything but a dict is ignored.
        """
        clock = self.stopwatch
        now = perf_counter()
        clock.seconds += now - clock.mark
        clock.mark = now
        clock.iterations += 1
        clock.samples += batch_size(data_batch)
        if not isinstance(outputs, dict):
            return
        self._output_names = [*outputs]
        numbers, losses = self._meter.numbers, {}
        for name, value in outputs.items():
            if isinstance(value, Tensor):
                if value.requires_grad:
                    value = value.detach()
                if value.dim() or value.is_complex():
                    if value.numel() != 1 or value.is_complex():
                        continue
                    value = value.reshape(())
            elif (value := as_float(value)) is None:
                continue
            numbers[name].append(value)
            if "loss" in str(name):
                losses[name] = value
        self._losses.by_iteration.append((iteration, losses))

    def finish(
        self, runner: Runner, *, this_rank_only: bool = False
    ) -> tuple[dict[str, float], dict[str, Medium], str | None]:
        """Reduce the values to those of a record, and start the next interval.

        Args:
            runner: The Runner.
            this_rank_only: Leave out the values of other ranks, which may not be there to answer.

        Returns:
            The scalars by name, losses first; the media by name; and what is wrong with the loss,
            or None.
        """
        values, media = self._meter.reduce()
        finite = all(isfinite(value) for name, value in values.items() if "loss" in name)
        problem = None if finite else self._losses.find_nonfinite(runner.progress)
        if not this_rank_only:
            values = _mean_over_ranks(values)
        outputs = {name: values.pop(name) for name in self._output_names if name in values}
        scalars = {**outputs, **values}
        for name, value in self._measurements(runner).items():
            scalars.setdefault(name, value)
        self._losses.by_iteration.clear()
        self.stopwatch.start_interval()
        return scalars, media, problem

    def _measurements(self, runner: Runner) -> dict[str, float]:
        """Return what the record holds besides logged values: rates, times, memory."""
        clock, progress = self.stopwatch, runner.progress
        measured = _learning_rates(runner.optim_wrappers, self.rates)
        measured["time"] = clock.seconds / clock.iterations
        measured["data_time"] = clock.data_seconds / clock.iterations
        samples = clock.samples * dist.get_world_size()  # every rank has as many
        measured["samples_per_second"] = samples / clock.seconds if clock.seconds else 0.0
        measured["memory"] = _peak_memory(runner.device)
        if progress.max_iters is not None:
            left = max(progress.max_iters - progress.iter, 0)
            measured["eta"] = left * clock.seconds_per_iteration
        return measured

    def check_losses(self, runner: Runner) -> None:
        """Look at the losses so far, as ``finish`` would, and report one that is not finite."""
        if not self._meter.are_finite(self._losses.names()):
            problem = self._losses.find_nonfinite(runner.progress)
            if problem is not None:
                self._losses.report(problem, runner.logger)

    def state_dict(self) -> dict[str, Any]:
        """Return the times and learning rates since the last record."""
        return {"stopwatch": self.stopwatch.state_dict(), "rates": dict(self.rates)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned; the losses before it count no longer."""
        self._losses.by_iteration.clear()
        self.rates = dict(state["rates"])
        self.stopwatch.load_state_dict(state["stopwatch"])


def _mean_over_ranks(values: dict[str, float]) -> dict[str, float]:
    """Average each value over the ranks that have logged it."""
    if dist.get_world_size() == 1:
        return values
    ranks = dist.all_gather_objects(values)
    names = dict.fromkeys(name for rank in ranks for name in rank)
    by_name = {name: [rank[name] for rank in ranks if name in rank] for name in names}
    return {name: sum(logged) / len(logged) for name, logged in by_name.items()}


def _learning_rates(
    wrappers: Mapping[str, OptimWrapper], used: Mapping[str, Any]
) -> dict[str, float]:
    """Return ``lr``, that of the first parameter group; ``NAME/lr`` for several optimizers.

    Args:
        wrappers: The optimizer wrappers of the Runner, by name.
        used: The rate of the last step, by optimizer; the current rate stands in for a missing one.
    """
    several = len(wrappers) > 1
    rates = {name: used.get(name, wrapper.get_lr()[0]) for name, wrapper in wrappers.items()}
    return {f"{n}/lr" if several else "lr": float(rate) for n, rate in rates.items()}


def _peak_memory(device: torch.device) -> float:
    """Return the peak memory in MB: of the device on CUDA, otherwise of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)

"""What the iterations since the last record have left, and the record that it becomes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from hookengine import BatchSizeError, OptimWrapper, Runner, SampleCounter, batch_size, dist
from hookengine_logging.losses import RecentLosses
from hookengine_logging.meter import Mean, Medium, Meter, as_float
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
        self._count: Callable[[Any], int] = batch_size
        self._problem: str | None = None
        self._warned = False

    def start(self, runner: Runner) -> None:
        """Start the clock, and find out who counts the samples in a batch."""
        self._count = SampleCounter(runner.dataloaders["train"], runner.bare_model)
        self.stopwatch.restart()

    # Called in every iteration, so it calls as little as it can.
    def add_iteration(self, iteration: int, data_batch: Any, outputs: Any) -> None:
        """Collect the time of an iteration, and the numbers among its outputs.

        Args:
            iteration: Its number, from 1.
            data_batch: The batch.
            outputs: What ``train_step`` has returned; anything but a mapping is ignored.
        """
        clock = self.stopwatch
        now = perf_counter()
        clock.seconds += now - clock.mark
        clock.mark = now
        clock.iterations += 1
        size = None
        if clock.samples is not None:
            try:
                size = self._count(data_batch)
                clock.samples += size
            except BatchSizeError as error:
                clock.samples, self._problem = None, str(error)
        if not isinstance(outputs, (dict, Mapping)):  # a dict is recognized faster
            return
        self._output_names = [*outputs]
        numbers, sizes, losses = self._meter.numbers, self._meter.sizes, {}
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
            if size is not None:
                sizes[name].append(size)
            if "loss" in str(name):
                losses[name] = value
        self._losses.by_iteration.append((iteration, losses, size))

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
        finite = self._meter.are_finite(self._losses.names())
        problem = None if finite else self._losses.find_nonfinite(runner.progress)
        means, media = self._meter.reduce()
        samples = self.stopwatch.samples
        if this_rank_only:
            samples = samples if dist.get_world_size() == 1 else None
        elif dist.get_world_size() > 1:
            ranks = dist.all_gather_objects((means, samples, self._problem))
            means, samples = _over_ranks([(means, samples) for means, samples, _ in ranks])
            self._problem = next((problem for _, _, problem in ranks if problem), None)
        values = {name: mean.value for name, mean in means.items()}
        outputs = {name: values.pop(name) for name in self._output_names if name in values}
        scalars = {**outputs, **values}
        for name, value in self._measurements(runner, samples).items():
            scalars.setdefault(name, value)
        self._warn(runner)
        self._losses.by_iteration.clear()
        self.stopwatch.start_interval()
        return scalars, media, problem

    def _warn(self, runner: Runner) -> None:
        if self._problem is not None and not self._warned:
            self._warned = True
            runner.logger.warning(
                "samples_per_second is left out of the records, and losses are averaged over "
                f"iterations instead of samples: {self._problem}"
            )

    def _measurements(self, runner: Runner, samples: int | None) -> dict[str, float]:
        """Return what the record holds besides logged values: rates, times, memory."""
        clock, progress = self.stopwatch, runner.progress
        measured = _learning_rates(runner.optim_wrappers, self.rates)
        measured["time"] = clock.seconds / clock.iterations
        measured["data_time"] = clock.data_seconds / clock.iterations
        if samples is not None:
            measured["samples_per_second"] = samples / clock.seconds if clock.seconds else 0.0
        if (memory := _peak_memory(runner.device)) is not None:
            measured["memory"] = memory
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
        return {
            "stopwatch": self.stopwatch.state_dict(),
            "rates": dict(self.rates),
            "sizes": {name: list(sizes) for name, sizes in self._meter.sizes.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned; the losses before it count no longer."""
        self._losses.by_iteration.clear()
        self.rates = dict(state["rates"])
        self._meter.sizes.clear()
        for name, sizes in state.get("sizes", {}).items():
            self._meter.sizes[name].extend(sizes)
        self.stopwatch.load_state_dict(state["stopwatch"])


def _over_ranks(
    ranks: list[tuple[dict[str, Mean], int | None]],
) -> tuple[dict[str, Mean], int | None]:
    """Average each value over the samples, or else over the ranks, of the ranks that have it.

    Args:
        ranks: For each rank, its means by name, and its number of samples if it is known.

    Returns:
        The means by name, and the number of samples of all ranks, or None if a rank lacks it.
    """
    names = dict.fromkeys(name for means, _ in ranks for name in means)
    by_name = {name: [means[name] for means, _ in ranks if name in means] for name in names}
    known = [samples for _, samples in ranks if samples is not None]
    total = sum(known) if len(known) == len(ranks) else None
    return {name: _joined(means) for name, means in by_name.items()}, total


def _joined(means: list[Mean]) -> Mean:
    sizes = [mean.samples for mean in means if mean.samples is not None]
    if len(sizes) < len(means) or len(set(sizes)) == 1:  # weights would only add roundings
        return Mean(sum(mean.value for mean in means) / len(means), None)
    weighted = [mean.value * size for mean, size in zip(means, sizes, strict=True)]
    return Mean(sum(weighted) / sum(sizes), sum(sizes))


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


def _peak_memory(device: torch.device) -> float | None:
    """Return the peak memory in MB: of the device on CUDA, otherwise of this process.

    Python cannot tell the memory of a process on Windows; None then.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)

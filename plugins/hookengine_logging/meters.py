"""Values on their way to a record, and the time that iterations take."""

from __future__ import annotations

import math
import resource
import sys
from collections import defaultdict
from collections.abc import Mapping
from time import perf_counter
from typing import Any

import torch
from torch import Tensor


class Meters:
    """Values by phase and name, kept as they come and averaged when their record is due."""

    def __init__(self) -> None:
        self._values: dict[str, defaultdict[str, list[Any]]] = {
            phase: defaultdict(list) for phase in ("train", "val", "test")
        }

    def add(self, values: Mapping[str, Any], phase: str = "train") -> None:
        """Keep values; a tensor stays on its device, without its graph."""
        kept = self._values[phase]
        for name, value in values.items():
            attached = isinstance(value, Tensor) and value.requires_grad
            kept[name].append(value.detach() if attached else value)

    def reduce(self, phase: str) -> tuple[dict[str, float], dict[str, Any]]:
        """The averages of the numbers, and of anything else the last one; forgets them all."""
        scalars: dict[str, float] = {}
        media: dict[str, Any] = {}
        for name, values in self._values[phase].items():
            numbers = _numbers(values)
            if numbers is None:
                media[name] = values[-1]
            else:
                scalars[name] = math.fsum(numbers) / len(numbers)
        self._values[phase].clear()
        return scalars, media

    def state_dict(self) -> dict[str, dict[str, list[float]]]:
        """The numbers that wait, as Python floats."""
        return {
            phase: {n: v for n, values in kept.items() if (v := _numbers(values)) is not None}
            for phase, kept in self._values.items()
        }

    def load_state_dict(self, state: Mapping[str, Mapping[str, list[float]]]) -> None:
        """Take them back."""
        for phase, kept in state.items():
            self._values[phase].clear()
            for name, values in kept.items():
                self._values[phase][name].extend(values)


def _numbers(values: list[Any]) -> list[float] | None:
    """``values`` as floats, read from the device in one go; None where they are no numbers."""
    try:
        stacked = torch.stack(values)
    except (TypeError, RuntimeError):
        stacked = None  # no tensors, or not all of them alike
    if stacked is not None and stacked.dim() == 1:
        numbers: list[float] = stacked.tolist()
        return numbers
    if all(_is_number(value) for value in values):
        return [float(value) for value in values]
    return None


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1
    return isinstance(value, (int, float)) or hasattr(value, "__float__")


class Stopwatch:
    """The time of iterations, and the part of it that was spent waiting for data.

    The two events of an iteration move these numbers themselves, without a call.

    Attributes:
        mark: When the present iteration began, in seconds.
        seconds: Time of the iterations since the last record.
        data_seconds: The part of it that went by before their batches were there.
        iterations: How many they are.
        samples: How many samples they had.
    """

    __slots__ = (
        "_session_iterations",
        "_session_seconds",
        "data_seconds",
        "iterations",
        "mark",
        "samples",
        "seconds",
    )

    def __init__(self) -> None:
        self.iterations = 0
        self.restart()

    def restart(self) -> None:
        """Begin a session: the rate of one that was interrupted does not count."""
        self._session_seconds = 0.0
        self._session_iterations = 0
        self.seconds = self.data_seconds = 0.0
        self.samples = 0
        self.mark = perf_counter()

    def start_interval(self) -> None:
        """Begin the next record."""
        self._session_seconds += self.seconds
        self._session_iterations += self.iterations
        self.iterations = self.samples = 0
        self.seconds = self.data_seconds = 0.0

    @property
    def seconds_per_iteration(self) -> float:
        """Over this session."""
        seconds = self._session_seconds + self.seconds
        return seconds / max(self._session_iterations + self.iterations, 1)


def memory(device: torch.device) -> float:
    """The peak memory in MB: the device's allocations on CUDA, else the process's own."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)

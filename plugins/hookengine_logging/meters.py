"""Values on their way to a record, and the time that iterations take."""

from __future__ import annotations

import math
import resource
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from time import perf_counter
from typing import Any

import torch
from torch import Tensor


class Meters:
    """Values by phase and name: numbers as they come, averaged when their record is due.

    What is no number (an image, a table, a text) is a medium; the last one of a name is kept.
    """

    def __init__(self) -> None:
        phases = ("train", "val", "test")
        self._numbers: dict[str, defaultdict[str, list[Any]]] = {
            p: defaultdict(list) for p in phases
        }
        self._media: dict[str, dict[str, Any]] = {phase: {} for phase in phases}

    def add(self, values: Mapping[str, Any], phase: str = "train") -> None:
        """Keep values; a tensor stays on its device, without its graph."""
        kept = self._numbers[phase]
        for name, value in values.items():
            if isinstance(value, Tensor):
                if value.requires_grad:
                    value = value.detach()
                if not value.dim():
                    kept[name].append(value)
                elif value.numel() == 1:
                    kept[name].append(value.reshape(()))
                else:
                    self._media[phase][name] = value
            elif (number := _as_float(value)) is not None:
                kept[name].append(number)
            else:
                self._media[phase][name] = value

    def reduce(self, phase: str) -> tuple[dict[str, float], dict[str, Any]]:
        """(the averages of the numbers, the media) by name; forgets them all."""
        scalars = {
            name: math.fsum(numbers) / len(numbers)
            for name, numbers in _read(self._numbers[phase]).items()
            if numbers
        }
        media = self._media[phase]
        for numbers in self._numbers[phase].values():
            numbers.clear()  # the names stay, in the order in which they came first
        self._media[phase] = {}
        return scalars, media

    def are_finite(self, names: Iterable[str], phase: str = "train") -> bool:
        """Whether none of the numbers of these names is NaN or infinite."""
        read = _read(self._numbers[phase])
        self._numbers[phase] = defaultdict(list, read)  # read from the device once
        return all(math.isfinite(number) for name in names for number in read.get(name, ()))

    def state_dict(self) -> dict[str, dict[str, list[float]]]:
        """The numbers that wait, as Python floats; phases without any are left out."""
        read = {phase: _read(kept) for phase, kept in self._numbers.items()}
        waiting = {p: {n: v for n, v in kept.items() if v} for p, kept in read.items()}
        return {phase: kept for phase, kept in waiting.items() if kept}

    def load_state_dict(self, state: Mapping[str, Mapping[str, list[float]]]) -> None:
        """Take them back."""
        for phase, kept in self._numbers.items():
            kept.clear()
            for name, numbers in state.get(phase, {}).items():
                kept[name].extend(numbers)


def _as_float(value: Any) -> float | None:
    """A Python or NumPy number as a float, None for anything else."""
    if isinstance(value, (str, bytes)) or getattr(value, "size", 1) != 1:
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def _read(kept: Mapping[str, list[Any]]) -> dict[str, list[float]]:
    """The numbers as floats: the tensors among them are read from the device in one go."""
    tensors = [value for values in kept.values() for value in values if isinstance(value, Tensor)]
    try:
        floats = iter(torch.stack(tensors).tolist() if tensors else ())
    except (RuntimeError, TypeError):  # of several devices or types
        floats = iter([tensor.item() for tensor in tensors])
    return {
        name: [next(floats) if isinstance(value, Tensor) else value for value in values]
        for name, values in kept.items()
    }


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
        self.clear()
        self.restart()

    def clear(self) -> None:
        """Forget the iterations since the last record."""
        self.iterations = self.samples = 0
        self.seconds = self.data_seconds = 0.0

    def restart(self) -> None:
        """Begin a session: the rate of one that was interrupted does not count."""
        self._session_seconds = 0.0
        self._session_iterations = 0
        self.mark = perf_counter()

    def start_interval(self) -> None:
        """Begin the next record."""
        self._session_seconds += self.seconds
        self._session_iterations += self.iterations
        self.clear()

    def state_dict(self) -> dict[str, float]:
        """What the iterations since the last record took."""
        names = ("iterations", "samples", "seconds", "data_seconds")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Take it back."""
        for name, value in state.items():
            setattr(self, name, value)

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

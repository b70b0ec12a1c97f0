"""Values on their way to a record, and the time that iterations take."""

from __future__ import annotations

import math
import re
import resource
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from hookengine import Histogram, Image, Table, as_medium

Medium = Histogram | Image | Table | str
_UNFIT = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class Meters:
    """Values by phase and name: numbers as they come, averaged when their record is due.

    What is no number (an image, a table, a text) is a medium, taken as it is at that moment; the
    last one of a name is kept.

    Args:
        refuse: Told the name of a value that is neither, and why.
    """

    def __init__(self, refuse: Callable[[str, str], None]) -> None:
        self._refuse = refuse
        phases = ("train", "val", "test")
        self._numbers: dict[str, defaultdict[str, list[Any]]] = {
            p: defaultdict(list) for p in phases
        }
        self._media: dict[str, dict[str, Medium]] = {phase: {} for phase in phases}

    def add_outputs(self, outputs: Mapping[str, Any]) -> dict[str, Any]:
        """Keep the numbers among what ``train_step`` has returned; returns the losses of them."""
        kept, losses = self._numbers["train"], {}
        for name, value in outputs.items():
            if isinstance(value, Tensor):
                if value.requires_grad:
                    value = value.detach()
                if value.dim() or value.is_complex():
                    if value.numel() != 1 or value.is_complex():
                        continue
                    value = value.reshape(())
            elif (value := _as_float(value)) is None:
                continue
            kept[name].append(value)
            if "loss" in str(name):
                losses[name] = value
        return losses

    def add(self, values: Mapping[str, Any], phase: str = "train") -> None:
        """Keep values; a tensor stays on its device, without its graph.

        Args:
            values: By name.
            phase: Whose record they join.
        """
        kept = self._numbers[phase]
        for name, value in values.items():
            if isinstance(value, Tensor):
                if value.requires_grad:
                    value = value.detach()
                if value.is_complex():
                    self._keep_medium(phase, name, value)  # which refuses it
                elif not value.dim():
                    kept[name].append(value)
                elif value.numel() == 1:
                    kept[name].append(value.reshape(()))
                else:
                    self._keep_medium(phase, name, value)
            elif (number := _as_float(value)) is not None:
                kept[name].append(number)
            else:
                self._keep_medium(phase, name, value)

    def _keep_medium(self, phase: str, name: str, value: Any) -> None:
        try:
            self._media[phase][name] = as_medium(value)
        except Exception as error:  # of a figure that cannot be drawn, too
            kind = type(value).__name__
            shape = f" of shape {list(value.shape)}" if hasattr(value, "shape") else ""
            self._refuse(str(name), f"({kind}{shape}) is left out of the records: {error}")

    def reduce(self, phase: str) -> tuple[dict[str, float], dict[str, Medium]]:
        """(the averages of the numbers, the media) by name; forgets them all.

        A name is a text on one line: what is none becomes its ``str``, and each control character
        or lone surrogate in it an underscore.
        """
        scalars = {
            clean(name): _mean(numbers)
            for name, numbers in _read(self._numbers[phase]).items()
            if numbers
        }
        media = {clean(name): medium for name, medium in self._media[phase].items()}
        for numbers in self._numbers[phase].values():
            numbers.clear()  # the names stay, in the order in which they came first
        self._media[phase] = {}
        return scalars, media

    def are_finite(self, names: Iterable[str], phase: str = "train") -> bool:
        """Whether none of the numbers of these names is NaN or infinite."""
        read = _read(self._numbers[phase])
        self._numbers[phase] = defaultdict(list, read)  # read from the device once
        return all(math.isfinite(number) for name in names for number in read.get(name, ()))

    def waiting(self) -> dict[str, list[str]]:
        """The names of what waits for its record, by phase."""
        kept = {p: [n for n, v in numbers.items() if v] for p, numbers in self._numbers.items()}
        return {p: [*n, *self._media[p]] for p, n in kept.items() if n or self._media[p]}

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
    """A Python or NumPy number as a float, None for anything else; beyond all floats, infinity."""
    if isinstance(value, (str, bytes)) or getattr(value, "size", 1) != 1:
        return None
    try:
        return float(value.item() if hasattr(value, "item") else value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf
    except (TypeError, ValueError):
        return None


def clean(name: Any) -> str:
    """A name as every sink can hold it."""
    return _UNFIT.sub("_", str(name)) or "_"


def _mean(numbers: list[float]) -> float:
    try:
        return math.fsum(numbers) / len(numbers)
    except (OverflowError, ValueError):  # beyond all floats, or infinities of both signs
        return sum(numbers) / len(numbers)


def _read(kept: Mapping[str, list[Any]]) -> dict[str, list[float]]:
    """The numbers as floats: the tensors among them are read from the device in one go."""
    tensors = [value for values in kept.values() for value in values if isinstance(value, Tensor)]
    try:
        # float32 would round whole numbers beyond 2**24
        tensors = [each if each.is_floating_point() else each.double() for each in tensors]
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

"""Logged values, averaged when their record is due."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hookengine import Histogram, Image, Runner, Table, as_medium

Medium = Histogram | Image | Table | str
_UNFIT = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class Rejections:
    """Warn once for each name whose values cannot be recorded.

    Args:
        runner: Whose logger warns.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._warned: set[str] = set()

    def __call__(self, name: str, reason: str) -> None:
        """Warn that the value of this name is left out, unless that was done before."""
        if name not in self._warned:
            self._warned.add(name)
            self._runner.logger.warning(f"{name!r} {reason}")


class Mean(NamedTuple):
    """A mean, and how many samples it is over; None for a mean over values."""

    value: float
    samples: int | None


class Meter:
    """Collect the values of one phase by name.

    Numbers are averaged, over samples if the number of samples is known for each of them; tensors
    among them stay on their device until then. Anything else (an image, a table, a text) is a
    medium, converted at once; the last one of a name is kept.

    Args:
        reject: Called with the name of a value that is neither, and the reason.

    Attributes:
        numbers: By name, in the order in which the names first came: floats, and tensors without
            dimensions.
        sizes: By name, the number of samples in the batch that each of the numbers comes from.
    """

    def __init__(self, reject: Callable[[str, str], None]) -> None:
        self._reject = reject
        self.numbers: defaultdict[str, list[Any]] = defaultdict(list)
        self.sizes: defaultdict[str, list[int]] = defaultdict(list)
        self._media: dict[str, Medium] = {}

    def add(self, values: Mapping[str, Any]) -> None:
        """Collect values by name; a tensor stays on its device, without its graph."""
        numbers = self.numbers
        for name, value in values.items():
            if isinstance(value, Tensor):
                if value.requires_grad:
                    value = value.detach()
                if value.is_complex():
                    self._add_medium(name, value)  # which rejects it
                elif not value.dim():
                    numbers[name].append(value)
                elif value.numel() == 1:
                    numbers[name].append(value.reshape(()))
                else:
                    self._add_medium(name, value)
            elif (number := as_float(value)) is not None:
                numbers[name].append(number)
            else:
                self._add_medium(name, value)

    def _add_medium(self, name: str, value: Any) -> None:
        try:
            self._media[name] = as_medium(value)
        except Exception as error:  # of a figure that cannot be drawn, too
            kind = type(value).__name__
            shape = f" of shape {list(value.shape)}" if hasattr(value, "shape") else ""
            self._reject(str(name), f"({kind}{shape}) is left out of the records: {error}")

    def reduce(self) -> tuple[dict[str, Mean], dict[str, Medium]]:
        """Return the means of the numbers and the media, both by name, and start over.

        Batches without samples do not count; a name that only they gave has no mean. A name that is
        not a text becomes its ``str``; control characters and lone surrogates in it become
        underscores.
        """
        means = {
            _clean(name): mean
            for name, numbers in _read(self.numbers).items()
            if (mean := _mean(numbers, self.sizes.get(name, ()))) is not None
        }
        media = {_clean(name): medium for name, medium in self._media.items()}
        for numbers in self.numbers.values():
            numbers.clear()  # the names stay, and with them their order
        self.sizes.clear()
        self._media = {}
        return means, media

    def are_finite(self, names: Iterable[str]) -> bool:
        """Tell whether none of the numbers of these names is NaN or infinite."""
        self.numbers = defaultdict(list, _read(self.numbers))  # read from the device only once
        return all(math.isfinite(n) for name in names for n in self.numbers.get(name, ()))

    def waiting(self) -> list[str]:
        """Return the names of the values that no record has yet."""
        return [*(name for name, numbers in self.numbers.items() if numbers), *self._media]

    def state_dict(self) -> dict[str, list[float]]:
        """Return the numbers that no record has yet, as Python floats."""
        return {name: numbers for name, numbers in _read(self.numbers).items() if numbers}

    def load_state_dict(self, state: Mapping[str, list[float]]) -> None:
        """Restore what ``state_dict`` returned."""
        self.numbers.clear()
        for name, numbers in state.items():
            self.numbers[name].extend(numbers)


def as_float(value: Any) -> float | None:
    """Return a Python or NumPy number as a float (infinity if too large), else None."""
    if isinstance(value, (str, bytes)) or getattr(value, "size", 1) != 1:
        return None
    try:
        return float(value.item() if hasattr(value, "item") else value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf
    except (TypeError, ValueError):
        return None


def _clean(name: Any) -> str:
    """Turn a name into a text on one line, which every sink can hold."""
    return _UNFIT.sub("_", str(name)) or "_"


def _mean(numbers: Sequence[float], sizes: Sequence[int]) -> Mean | None:
    if not numbers:
        return None
    if len(sizes) != len(numbers):  # logged, or from a batch of unknown size
        return Mean(_sum(numbers) / len(numbers), None)
    counted = [(number, size) for number, size in zip(numbers, sizes, strict=True) if size]
    if not counted:
        return None
    samples = sum(size for _, size in counted)
    if all(size == counted[0][1] for _, size in counted):  # weights would only add roundings
        return Mean(_sum([number for number, _ in counted]) / len(counted), samples)
    return Mean(_sum([number * size for number, size in counted]) / samples, samples)


def _sum(numbers: Sequence[float]) -> float:
    try:
        return math.fsum(numbers)
    except (OverflowError, ValueError):  # too large for a float, or infinities of both signs
        return sum(numbers)


def _read(kept: Mapping[str, list[Any]]) -> dict[str, list[float]]:
    """Return the numbers as floats; tensors are read from the device all at once."""
    tensors = [value for values in kept.values() for value in values if isinstance(value, Tensor)]
    try:
        # float32 would round integers above 2**24
        tensors = [each if each.is_floating_point() else each.double() for each in tensors]
        floats = iter(torch.stack(tensors).tolist() if tensors else ())
    except (RuntimeError, TypeError):  # of several devices or types
        floats = iter([tensor.item() for tensor in tensors])
    return {
        name: [next(floats) if isinstance(value, Tensor) else value for value in values]
        for name, values in kept.items()
    }

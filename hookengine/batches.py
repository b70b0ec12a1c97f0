"""Count the samples in a batch."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Set
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

_MOST_SHAPES = 6
_HINT = (
    "Give the dataloader or the model a function count_samples(batch) that returns the number, as "
    "in dataloader.count_samples = lambda batch: batch[1].shape[0]"
)


class BatchSizeError(ValueError):
    """Raised for a batch whose number of samples cannot be determined."""


def batch_size(batch: Any) -> int:
    """Return the number of samples in a batch of any nesting.

    It is the first dimension on which all tensors of the batch agree, and NumPy arrays with them.
    They may be in dicts and other mappings, in tuples, lists, named tuples and dataclasses, nested
    or not. A packed sequence and a nested tensor hold as many samples as sequences. Tensors without
    dimensions, numbers, texts and None do not count, nor do objects of other classes.

    In a list or tuple inside the batch, each item may also be a sample, if the items are alike: the
    images of object detection beside as many targets, dicts for example. The same goes for a batch
    that is a list of dicts, of texts or of other objects. A batch without tensors holds as many
    samples as the lists in it have items.

    Raises:
        BatchSizeError: The tensors disagree, or the batch holds nothing that could be counted, or
            it can be read in two ways.
    """
    size = _common(batch)
    return _Contents(batch).size() if size is None else size


class SampleCounter:
    """Count the samples in the batches of a dataloader.

    If neither the dataloader nor the model counts them, ``batch_size`` does. Of two ways to read a
    batch, the one that fits the ``batch_size`` of the dataloader is then right.

    Args:
        dataloader: If it has a function ``count_samples(batch)``, that function counts them.
        model: Its ``count_samples`` does so if the dataloader has none.

    Raises:
        TypeError: ``count_samples`` is not a function.
    """

    def __init__(self, dataloader: Any, model: Any) -> None:
        self._usual = _usual_sizes(dataloader)
        self._count: Callable[[Any], Any] | None = None
        for owner in (dataloader, model):
            count = getattr(owner, "count_samples", None)
            if count is None:
                continue
            self._name = f"{type(owner).__name__}.count_samples"
            if not callable(count):
                raise TypeError(
                    f"{self._name} must be a function that takes a batch and returns its number of "
                    f"samples, got {count!r}"
                )
            self._count = count
            break

    def __call__(self, batch: Any) -> int:
        """Return the number of samples in a batch.

        Raises:
            BatchSizeError: As ``batch_size``.
            TypeError: ``count_samples`` has returned something else than a number of samples.
        """
        if self._count is not None:
            return self._counted(self._count, batch)
        size = _common(batch)
        if size is not None and (not self._usual or size in self._usual):
            return size
        return _Contents(batch).size(self._usual)

    def _counted(self, count: Callable[[Any], Any], batch: Any) -> int:
        try:
            number = count(batch)
        except Exception as error:
            error.add_note(f"raised by {self._name}, which counts the samples in a batch")
            raise
        boolean = isinstance(number, bool) or getattr(number, "dtype", None) is torch.bool
        try:
            size = -1 if boolean else operator.index(number)
        except TypeError:
            size = -1
        if size < 0:
            raise TypeError(
                f"{self._name} must return the number of samples in the batch, an integer of 0 or "
                f"more, got {number!r}"
            )
        return size


def _common(batch: Any) -> int | None:
    """Return the size of a batch that holds nothing but tensors of one size; otherwise None.

    This is quick, since it is called in each training iteration.
    """
    if isinstance(batch, Tensor):
        return batch.size(0) if batch.dim() else None
    kind = type(batch)
    if kind is not tuple and kind is not list and kind is not dict:
        return None
    size = None
    for item in batch.values() if kind is dict else batch:
        if not isinstance(item, Tensor) or not item.dim():
            return None
        here = item.size(0)
        if here != size:
            if size is not None:
                return None
            size = here
    return size


class _Contents:
    """What a batch holds, as far as it tells the number of samples.

    Attributes:
        sizes: The numbers of samples that the tensors allow; None if there are no tensors.
        shapes: The shapes of the tensors, and whether each is in a list that may be of samples.
        readings: For each list that may be of samples: its length, and the sizes of its tensors.
        lengths: The lengths of lists that hold no tensors.
        dicts: The lengths of lists of dicts that hold tensors.
        uncertain: Whether the only clue is the length of a list of objects.
    """

    def __init__(self, batch: Any) -> None:
        self.batch = batch
        self.shapes: list[tuple[tuple[Any, ...], bool]] = []
        self.readings: list[tuple[int, set[int]]] = []
        self.lengths: list[int] = []
        self.dicts: set[int] = set()
        self.uncertain = False
        plain = isinstance(batch, (list, tuple)) and _shape(batch) is None and not _named(batch)
        self.sizes = self._look_at_parts(batch) if plain else self._look_at(batch, False)

    def _look_at_parts(self, batch: list[Any] | tuple[Any, ...]) -> set[int] | None:
        """Return the sizes that a list or tuple of inputs and targets allows, or one of samples."""
        sizes = _shared(self._look_at(item, False) for item in batch)
        samples = isinstance(batch, list) and bool(batch) and _are_alike(batch)
        if samples and _named(batch[0]) is not None:
            lengths = set(self.lengths)
            if sizes is None and len(lengths) == 1:
                sizes = lengths
            single = any(_is_single(item) for item in batch)
            sizes = {len(batch)} if single or not sizes else sizes | {len(batch)}
        elif samples and sizes is None and not self.lengths and not _is_number(batch[0]):
            self.uncertain = not isinstance(batch[0], (str, bytes))
            self.lengths.append(len(batch))
        return sizes

    def _look_at(self, value: Any, listed: bool) -> set[int] | None:
        """Return the sizes that a value allows; None if it says nothing."""
        shape = _shape(value)
        if shape is not None:
            self.shapes.append((shape, listed))
            return {shape[0]} if shape else None
        named = _named(value)
        if named is not None:
            return _shared(self._look_at(item, listed) for _, item in named)
        if not isinstance(value, (list, tuple)):
            return None
        known = len(self.lengths)
        sizes = _shared(self._look_at(item, True) for item in value)
        if sizes is None:
            self.lengths[known:] = [len(value)]  # those of nested lists say nothing
        elif _are_alike(value):
            self.readings.append((len(value), sizes))
            if any(_named(item) is not None for item in value):
                self.dicts.add(len(value))
            sizes = sizes | {len(value)}
        return sizes

    def size(self, usual: Set[int] = frozenset()) -> int:
        """Return the number of samples.

        Args:
            usual: The sizes that the batches of the dataloader usually have, if it tells; they
                decide between two ways to read the batch.

        Raises:
            BatchSizeError: It cannot be determined.
        """
        sizes, lengths = self.sizes, set(self.lengths)
        if sizes is None:
            if len(lengths) == 1 and not (self.uncertain and usual and not lengths & usual):
                return lengths.pop()
            raise BatchSizeError(self._problem(lengths))
        sizes = sizes | self._other_readings(sizes)
        if len(sizes) == 1:
            if second := self._second_dimension(sizes, usual):
                raise BatchSizeError(self._problem(sizes | second))
            return sizes.pop()
        for clue in (usual, lengths, self.dicts):
            found = sizes & clue
            if len(found) == 1:
                return found.pop()
        shapes = [shape for shape, _ in self.shapes if shape]
        firsts: set[int] = {shape[0] for shape in shapes}
        if len(firsts) == 1 and len({len(shape) for shape in shapes}) > 1:
            return firsts.pop()  # different tensors that agree are no accident
        raise BatchSizeError(self._problem(sizes))

    def _other_readings(self, sizes: set[int]) -> set[int]:
        """Return the sizes of lists of inputs that a tensor has as its second dimension.

        ``[(x1, x2), y]`` with inputs of shape (8, ...) and a target of shape (2, 8) holds 2
        samples, or 8 with two targets each.
        """
        found = set()
        for length, inner in self.readings:
            for other in inner - sizes:
                together = any(s[:2] == (length, other) for s, listed in self.shapes if not listed)
                if length in sizes and other > 1 and together:
                    found.add(other)
        return found

    def _second_dimension(self, sizes: set[int], usual: Set[int]) -> Set[int]:
        """Return the size that all tensors have as their second dimension, if it is a usual one.

        The first dimension is then most likely time: (T, B, ...) with targets (T, B).
        """
        seconds = {shape[1] if len(shape) > 1 else -1 for shape, _ in self.shapes if shape}
        unusual = bool(usual) and not sizes & {0, *usual}
        return seconds & usual if unusual and len(seconds) == 1 else set()

    def _problem(self, candidates: set[int]) -> str:
        batch, shapes = self.batch, [*_described(self.batch, "batch")]
        start = "hookengine cannot determine the number of samples in a batch: "
        shown = ", ".join(shapes[:_MOST_SHAPES]) + ", ..." * (len(shapes) > _MOST_SHAPES)
        if len(candidates) > 1:
            several = " or ".join(map(str, sorted(candidates)))
            return f"{start}it could be {several} ({shown or 'the lengths of its lists'}). {_HINT}"
        if shapes:
            return f"{start}its tensors differ in their first dimension ({shown}). {_HINT}"
        return f"{start}this {type(batch).__name__} holds no tensor with a dimension. {_HINT}"


def _shape(value: Any) -> tuple[Any, ...] | None:
    """Return the shape of a tensor, an array or a packed sequence; None for anything else."""
    if isinstance(value, Tensor):
        if value.is_nested:  # torch raises an internal error for its shape
            return (value.size(0), *"*" * (value.dim() - 1))
        return value.shape
    if isinstance(value, PackedSequence):
        return (int(value.batch_sizes[0]),)
    if value is None or isinstance(value, (list, tuple, dict, str)):
        return None
    shape = getattr(value, "shape", None)
    if not isinstance(shape, tuple):
        return None
    if isinstance(value, Mapping):  # a TensorDict, which may have no batch dimension
        return shape or None
    return shape if hasattr(value, "dtype") else None


def _named(value: Any) -> list[tuple[str, Any]] | None:
    """Return the values in a mapping, a named tuple or a dataclass, each with its name."""
    if isinstance(value, Mapping):
        return [(f"[{key!r}]", item) for key, item in value.items()]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return [(f".{name}", getattr(value, name)) for name in value._fields]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [
            (f".{field.name}", getattr(value, field.name)) for field in dataclasses.fields(value)
        ]
    return None


def _shared(sizes: Iterable[set[int] | None]) -> set[int] | None:
    """Return the sizes that all values allow; None if none of them says anything."""
    shared: set[int] | None = None
    for each in sizes:
        if each is not None:
            shared = each if shared is None else shared & each
    return shared


def _are_alike(items: Collection[Any]) -> bool:
    """Return whether the items of a list are of one kind, as samples are."""
    there = [item for item in items if item is not None]
    return len({_kind(item) for item in there}) == 1


def _kind(item: Any) -> Any:
    if isinstance(item, Tensor):
        return item.dim(), item.dtype
    if isinstance(item, dict):
        return frozenset(item)
    shape = _shape(item)
    if shape is not None:
        return len(shape), getattr(item, "dtype", None)
    if isinstance(item, Mapping):
        return frozenset(item)
    return type(item)


def _is_single(sample: Any) -> bool:
    """Return whether a dict holds a number or a text, which a batch would hold in a list."""
    values = [item for _, item in _named(sample) or ()]
    return any(_is_number(item) or isinstance(item, (str, bytes)) for item in values)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, complex)) or _shape(value) == ()


def _usual_sizes(dataloader: Any) -> set[int]:
    """Return the size of the full batches of a DataLoader, and that of its last one if known."""
    size = getattr(dataloader, "batch_size", None)
    if not isinstance(size, int) or size < 1:
        return set()
    try:
        return {size, len(dataloader.sampler) % size or size}
    except (TypeError, NotImplementedError, AttributeError):
        return {size}


def _described(value: Any, place: str) -> Iterator[str]:
    """Describe each tensor with its place in the batch."""
    shape = _shape(value)
    if isinstance(value, PackedSequence):
        yield f"{place}: {shape and shape[0]} packed sequences"
    elif shape is not None:
        yield f"{place}: ({', '.join(map(str, shape))}{',' * (len(shape) == 1)})"
    elif (named := _named(value)) is not None:
        for name, item in named:
            yield from _described(item, place + name)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _described(item, f"{place}[{index}]")

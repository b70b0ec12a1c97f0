"""Count the samples in a batch."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Set
from typing import Any, NamedTuple

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


class _Usual(NamedTuple):
    """The sizes that the batches of a dataloader usually have.

    Attributes:
        full: The size of a full batch; 0 if it is unknown.
        sizes: That size, and with it the size of the last batch if that is known.
        is_last_known: Whether it is.
    """

    full: int
    sizes: Set[int]
    is_last_known: bool


_UNKNOWN = _Usual(0, frozenset(), False)


def batch_size(batch: Any) -> int:
    """Return the number of samples in a batch of any nesting.

    It is the first dimension on which all tensors of the batch agree, and NumPy arrays with them.
    They may be in dicts and other mappings, in tuples, lists, named tuples and dataclasses, nested
    or not. A packed sequence and a nested tensor hold as many samples as sequences. Tensors without
    dimensions, numbers, texts and None do not count, nor do objects of other classes.

    In a list or tuple inside the batch, each item may also be a sample, if the items are alike: the
    images of object detection beside as many targets, dicts for example.

    A batch that is a tuple or list holds fields, such as inputs and targets, or samples. A list of
    dicts or tuples of one structure may hold either. It holds samples if an item has a number, a
    text or a tensor without dimensions, of which a field would have one per sample. A list of texts
    or other objects holds samples, too; other tuples and lists hold fields. A batch without tensors
    holds as many samples as the lists in it have items; an empty list holds none.

    Raises:
        BatchSizeError: The tensors disagree, or the batch holds nothing that could be counted, or
            it can be read in two ways.
    """
    size = _common(batch)
    return _Contents(batch).size() if size is None else size


class SampleCounter:
    """Count the samples in the batches of a dataloader.

    If neither the dataloader nor the model counts them, ``batch_size`` does, and the ``batch_size``
    of the dataloader is evidence:

    - Of two ways to read a batch, the one that fits it is right. So is a list of as many tensors.
    - Once a full batch was read as fields, or as a list of samples, so are all others. A list whose
      length changes from batch to batch is one of samples.
    - A batch may hold fewer samples than a full one, or a multiple, because a collate function may
      leave samples out or make several of each. Any other number is not used; a list of texts or
      numbers beside the tensors counts instead, if its length fits. Until a full batch was counted,
      tensors that all have the shape (1, T, ...) do not count either: they may hold all samples.

    Args:
        dataloader: If it has a function ``count_samples(batch)``, that function counts them.
        model: Its ``count_samples`` does so if the dataloader has none.

    Raises:
        TypeError: ``count_samples`` is not a function.
    """

    def __init__(self, dataloader: Any, model: Any) -> None:
        self._usual = _usual_sizes(dataloader)
        self._settled: Set[int] = frozenset()  # sizes to believe; the batches hold fields
        self._are_lists = False  # the batches are lists of samples
        self._by_lists = False  # the lists in the batches tell their sizes, the tensors do not
        self._length: int | None = None  # of the batch before, which could be either
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
        if size is not None and (not self._usual.sizes or size in self._settled):
            return size
        contents = _Contents(batch, bool(self._settled))
        return self._weigh(contents) if self._usual.sizes else contents.size()

    def _weigh(self, contents: _Contents) -> int:
        """Return the size that fits the dataloader and the batches before; learn from it."""
        length, fields = contents.length, contents.fields or set()
        only = next(iter(fields)) if len(fields) == 1 else None
        if length is not None and self._length is not None:
            if length != self._length:
                self._are_lists = True
            elif self._usual.full not in fields and fields & self._usual.sizes:
                self._settled, contents.length = self._usual.sizes, None
        if self._are_lists and length is not None:
            return length
        if self._by_lists and len(contents.lists) == 1:
            return next(iter(contents.lists))
        if self._settled and only is not None and only <= max(self._settled):
            return only
        size = contents.size(self._usual)
        if size not in fields:
            self._are_lists = size == length
            self._by_lists = size in contents.lists
        elif length == size:
            self._length = length
        elif size and size % self._usual.full == 0:
            self._settled = {size // self._usual.full * usual for usual in self._usual.sizes}
        return size

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

    Args:
        batch: The batch.
        are_fields: Whether the batch is known to hold fields if it is a list or tuple.

    Attributes:
        sizes: The numbers of samples that the batch allows; None if there are no tensors.
        fields: Those of them that the tensors allow if the batch is no list of samples.
        length: The length of the batch if it may be a list of samples.
        shapes: The shapes of the tensors, and whether each is in a list that may be of samples.
        readings: For each list that may be of samples: its length, and the sizes of its tensors.
        lengths: The lengths of lists that hold no tensors.
        lists: Those of them that are no tuples of numbers, such as the size of an image.
        dicts: The lengths of lists of dicts that hold tensors.
        uncertain: Whether the only clue is the length of a list of objects.
    """

    def __init__(self, batch: Any, are_fields: bool = False) -> None:
        self.batch, self._are_fields = batch, are_fields
        self.shapes: list[tuple[tuple[Any, ...], bool]] = []
        self.readings: list[tuple[int, set[int]]] = []
        self.lengths: list[int] = []
        self.lists: set[int] = set()
        self.fields: set[int] | None = None
        self.length: int | None = None
        self.dicts: set[int] = set()
        self.uncertain = False
        plain = isinstance(batch, (list, tuple)) and _shape(batch) is None and not _named(batch)
        if plain:
            self.sizes = self._look_at_parts(batch)
        else:
            self.sizes = self.fields = self._look_at(batch, False)

    def _look_at_parts(self, batch: list[Any] | tuple[Any, ...]) -> set[int] | None:
        """Return the sizes that a list or tuple of fields allows, or one of samples."""
        if not batch:
            return {0}
        sizes = self.fields = _shared(self._look_at(item, False) for item in batch)
        if self._are_fields or not _match_all(batch):
            return sizes
        first = next(item for item in batch if item is not None)
        length, is_list, named = len(batch), isinstance(batch, list), _named(first) is not None
        shape = _shape(first)
        if shape is not None or not (named or isinstance(first, (list, tuple))):
            if shape:
                self.length = length
            elif is_list and sizes is None and not self.lengths and not _is_number(first):
                self.uncertain = not isinstance(first, (str, bytes))
                self.lengths.append(length)
            return sizes
        single = any(_is_single(item) for item in batch)
        if sizes is None and named and is_list and len(set(self.lengths)) == 1:
            sizes = self.fields = set(self.lengths)
        self.length = length
        if sizes is None and not named and not _is_mixed(first):
            self.fields = set(self.lengths)
            return None  # texts
        if sizes is None or (is_list and (single or (named and not sizes))):
            return {length}
        # Functions that collate make lists of fields, and datasets make tuples.
        either = single or (is_list and (_are_alike(batch) if named else type(first) is tuple))
        return sizes | {length} if either and sizes else sizes

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
            if isinstance(value, list) or not all(map(_is_number, value)):
                self.lists.add(len(value))
        elif _are_alike(value):
            self.readings.append((len(value), sizes))
            if any(_named(item) is not None for item in value):
                self.dicts.add(len(value))
            sizes = sizes | {len(value)}
        return sizes

    def size(self, usual: _Usual = _UNKNOWN) -> int:
        """Return the number of samples.

        Args:
            usual: The sizes that the batches of the dataloader usually have; they decide between
                two ways to read the batch.

        Raises:
            BatchSizeError: It cannot be determined.
        """
        sizes, lengths = self.sizes, set(self.lengths)
        if sizes is None:
            for size in lengths if len(lengths) == 1 else ():
                if not usual.sizes or (self.uncertain and size in usual.sizes):
                    return size
                if not self.uncertain:
                    return self._fitting(size, usual)
            raise BatchSizeError(self._problem(lengths))
        sizes = sizes | self._other_readings(sizes)
        if len(sizes) == 1:
            if second := self._second_dimension(sizes, usual.sizes):
                raise BatchSizeError(self._problem(sizes | second))
            size = sizes.pop()
            return self._fitting(size, usual) if usual.sizes else size
        if not sizes and self.length is not None and self.length in usual.sizes:
            return self.length  # samples of different sizes
        if self.length == usual.full:  # as that of a tuple of as many tuples
            sizes = sizes | {usual.full}
        samples = self.length in sizes
        for clue in (usual.sizes,) if samples else (usual.sizes, lengths, self.dicts):
            found = sizes & clue
            if len(found) == 1:
                return found.pop()
        shapes = [shape for shape, _ in self.shapes if shape]
        firsts: set[int] = {shape[0] for shape in shapes}
        believed = not samples or (firsts == {usual.full} and _named(self.batch[0]) is not None)
        if believed and len(firsts) == 1 and len({len(shape) for shape in shapes}) > 1:
            return firsts.pop()  # different tensors that agree are no accident
        raise BatchSizeError(self._problem(sizes))

    def _fitting(self, size: int, usual: _Usual) -> int:
        """Return the only size of all tensors, or one that fits the dataloader better.

        Raises:
            BatchSizeError: Neither fits.
        """
        full, length = usual.full, self.length
        if size in (full, length):
            return size
        lists, possible = self.lists - {size}, size < full or size % full == 0
        rivals = lists if length is None or length not in usual.sizes else lists | {length}
        fitting = rivals & usual.sizes
        if size == 1 and self._is_one_row():
            fitting = set()
        elif size in usual.sizes:
            if full not in rivals:
                return size
        elif len(fitting) == 1:
            is_full, short = fitting == {full}, 0 < size < full and usual.is_last_known
            if (is_full and (short or not possible)) or (fitting <= lists and not possible):
                return fitting.pop()
        elif possible and not lists:
            return size
        raise BatchSizeError(self._problem({size, *(fitting or lists)}))

    def _is_one_row(self) -> bool:
        """Return whether all tensors have the shape (1, T, ...), with one T."""
        return len({shape[:2] for shape, _ in self.shapes if shape}) == 1 and all(
            len(shape) > 1 and shape[0] == 1 for shape, _ in self.shapes if shape
        )

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
        if shapes and candidates:
            unfit = f"{min(candidates)} does not fit the batch_size of the dataloader"
            return f"{start}{unfit} ({shown}). {_HINT}"
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


def _match_all(items: Collection[Any]) -> bool:
    """Return whether the items of a batch have the structure of one item, as samples have."""
    there = [item for item in items if item is not None]
    return bool(there) and all(_match(there[0], item) for item in there[1:])


def _match(one: Any, other: Any) -> bool:
    """Compare two items, whose tensors may differ in sizes and dtype; None is like any other."""
    if one is None or other is None:
        return True
    shapes = _shape(one), _shape(other)
    if shapes[0] is not None and shapes[1] is not None:
        return len(shapes[0]) == len(shapes[1])
    if type(one) is not type(other):
        return False
    if isinstance(one, Mapping):
        return one.keys() == other.keys() or bool(one.keys() & other.keys())
    if not isinstance(one, (list, tuple)) or _named(one) is not None:
        return True
    same_length = isinstance(one, list) or len(one) == len(other)
    return same_length and all(map(_match, one, other))


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
    """Return whether an item holds a number or a text, which a batch would hold in a list."""
    named = _named(sample)
    values = sample or () if named is None else [item for _, item in named]
    return any(_is_number(item) or isinstance(item, (str, bytes)) for item in values)


def _is_mixed(values: Collection[Any]) -> bool:
    """Return whether values are of several kinds, as those of a field are not."""
    return len({_kind(value) for value in values if value is not None}) > 1


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, complex)) or _shape(value) == ()


def _usual_sizes(dataloader: Any) -> _Usual:
    """Return the sizes of the batches of a DataLoader."""
    size = getattr(dataloader, "batch_size", None)
    if not isinstance(size, int) or size < 1:
        return _UNKNOWN
    try:
        samples = len(dataloader.sampler)
    except (TypeError, NotImplementedError, AttributeError):
        return _Usual(size, {size}, False)
    if 0 < samples < size:
        return _Usual(samples, {samples}, True)
    last = 0 if getattr(dataloader, "drop_last", False) else samples % size
    return _Usual(size, {size, last or size}, True)


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

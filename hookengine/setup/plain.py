"""Which values a checkpoint can hold; the others would run code when they are loaded."""

from __future__ import annotations

import sys
from collections import Counter, OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

_VALUES = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)


def as_plain(value: Any) -> Any:
    """Return a state with each scalar of NumPy as a Python value that is equal to it.

    Scalars are NumPy's numbers, strings and arrays without dimensions. A scalar that no Python
    value equals, such as a date, and everything else stays as it is. The result shares with
    ``value`` what did not change.

    Args:
        value: A tensor, a plain value, or a nested container of these.
    """
    numpy = sys.modules.get("numpy")  # without it, there are no such scalars
    return value if numpy is None else _as_plain(value, numpy, set())


def _as_plain(value: Any, numpy: Any, above: set[int]) -> Any:
    kind = type(value)
    if isinstance(value, numpy.generic) or (isinstance(value, numpy.ndarray) and not value.ndim):
        item = value.item()
        if isinstance(item, numpy.longdouble) and float(item) == item:
            item = float(item)
        return item if type(item) in _VALUES else value
    if kind not in (dict, OrderedDict, Counter, list, tuple, set) or id(value) in above:
        return value
    above.add(id(value))
    try:
        if not isinstance(value, dict):
            items = [_as_plain(item, numpy, above) for item in value]
            same = all(a is b for a, b in zip(items, value, strict=True))
            return value if same else kind(items)
        pairs = [
            (_as_plain(key, numpy, above), _as_plain(item, numpy, above))
            for key, item in value.items()
        ]
    finally:
        above.discard(id(value))
    if all(
        key is old and item is own
        for (key, item), (old, own) in zip(pairs, value.items(), strict=True)
    ):
        return value
    plain = kind()
    for key, item in pairs:
        plain[key] = item
    if kind is OrderedDict:
        vars(plain).update(vars(value))  # such as the versions that modules save
    return plain


def not_plain(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield the place and value of each part that ``torch.load(weights_only=True)`` refuses.

    Types are compared exactly: restoring a subclass, such as NumPy's ``float64``, runs its code.
    A container that contains itself is refused, too, and so is a tensor that cannot be copied: on
    the device ``meta``, of a lazy layer before its first call, or nested without ``torch.jagged``.

    Args:
        value: A tensor, a plain value, or a nested container of these.
        path: The start of each yielded place, such as ``"the state of plugins"``.
    """
    yield from _not_plain(value, path, set())


def _not_plain(value: Any, path: str, above: set[int]) -> Iterator[tuple[str, Any]]:
    kind = type(value)
    if isinstance(value, Tensor):
        if value.is_meta or is_lazy(value) or (value.is_nested and value.layout == torch.strided):
            yield path, value
        return
    if kind in _VALUES:
        return
    if kind not in (dict, OrderedDict, Counter, list, tuple, set, torch.Size) or id(value) in above:
        yield path, value
        return
    above.add(id(value))
    if isinstance(value, dict):
        for key, item in value.items():
            for _, part in _not_plain(key, "", above):
                yield f"the key {key!r} of {path}", part
            yield from _not_plain(item, f"{path}[{key!r}]", above)
    else:
        for index, item in enumerate(value):
            yield from _not_plain(item, f"{path}[{index}]", above)
    above.discard(id(value))

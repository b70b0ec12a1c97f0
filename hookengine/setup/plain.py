"""Find values that a checkpoint cannot hold, because loading them would run code."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_VALUES = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)


def not_plain(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield the place and value of each part that ``torch.load(weights_only=True)`` refuses.

    Types are compared exactly: restoring a subclass, such as NumPy's ``float64``, runs its code.

    Args:
        value: A tensor, a plain value, or a nested container of these.
        path: The start of each yielded place, such as ``"the state of plugins"``.
    """
    kind = type(value)
    if isinstance(value, Tensor) or kind in _VALUES:
        return
    if kind in (dict, OrderedDict, Counter):
        for key, item in value.items():
            for _, part in not_plain(key, ""):
                yield f"the key {key!r} of {path}", part
            yield from not_plain(item, f"{path}[{key!r}]")
    elif kind in (list, tuple, set, torch.Size):
        for index, item in enumerate(value):
            yield from not_plain(item, f"{path}[{index}]")
    else:
        yield path, value

"""How many samples or valid tokens the loss of a batch is a mean over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hookengine import BatchSizeError, SampleCounter, did_you_mean
from hookengine_accumulate.sums import Weight


def count_samples(counter: SampleCounter, batch: Any) -> float:
    """Return the number of samples in a batch.

    Raises:
        BatchSizeError: The tensors in the batch do not tell it.
        TypeError: The batch is not a tensor, dict, list or tuple, and does not tell it.
    """
    try:
        return float(counter(batch))
    except BatchSizeError as error:
        problem = str(error)
    ways = (
        "Alternatively, pass weight='token' with a function, as in tokens=lambda batch: "
        "batch.num_graphs, or weight='batch' if all micro-batches have the same size"
    )
    if isinstance(batch, (Tensor, Mapping, list, tuple)):
        raise BatchSizeError(f"accumulate: {problem}. {ways}")
    kind = type(batch).__name__
    raise TypeError(f"accumulate: the samples of a {kind} cannot be counted. {problem}. {ways}")


def count_tokens(batch: Any, tokens: Any, ignore_index: int | None) -> Weight:
    """Return the number of valid tokens in a batch.

    Args:
        batch: The training batch.
        tokens: The key or index of a number or a tensor in the batch, or a function of the batch.
        ignore_index: The label to ignore in a tensor of labels.

    Raises:
        KeyError: The batch has no such key.
        TypeError: The value is not a number or a tensor.
        ValueError: The value is not a count.
    """
    if callable(tokens):
        return _as_weight(tokens(batch), tokens)
    try:
        count = batch[tokens]
    except (KeyError, IndexError, TypeError):
        raise KeyError(_lacks(batch, tokens)) from None
    if ignore_index is None:
        return _as_weight(count, tokens)
    if not isinstance(count, Tensor):
        raise TypeError(
            f"accumulate: ignore_index needs labels in a tensor, but tokens={tokens!r} gave a "
            f"{type(count).__name__}. Pass a function instead, as in tokens=lambda batch: ..."
        )
    return _as_weight(count != ignore_index, tokens)


def _as_weight(count: Any, tokens: Any) -> Weight:
    """Return a count as a number, or as a tensor on its device to avoid synchronizing it."""
    if not isinstance(count, Tensor):
        try:
            count = float(count)
        except (TypeError, ValueError):
            raise TypeError(
                f"accumulate: tokens={tokens!r} gave {count!r}; expected a number or a tensor"
            ) from None
    elif count.device.type != "cpu":
        if count.is_floating_point():  # a sum in bfloat16 is rounded
            return count.sum(dtype=torch.float32 if count.device.type == "mps" else torch.float64)
        return count.sum().double() if count.device.type != "mps" else count.sum().float()
    elif count.dtype != torch.bool and (
        bool((count < 0).any()) or (count.squeeze().dim() > 1 and bool((count > 1).any()))
    ):
        raise ValueError(
            f"accumulate: tokens={tokens!r} gave a tensor of shape {tuple(count.shape)} that is "
            f"neither a mask nor lengths: it has values from {count.min()} to {count.max()}. A "
            "tensor is summed. If it holds labels, also pass the label to ignore, as in "
            "ignore_index=-100"
        )
    else:
        count = count.sum(dtype=torch.float64 if count.is_floating_point() else None).item()
    if not count >= 0:
        raise ValueError(f"accumulate: tokens={tokens!r} gave {count}; expected 0 or more")
    return float(count)


def _lacks(batch: Any, key: Any) -> str:
    if isinstance(batch, Mapping):
        names = [name for name in batch if isinstance(name, str)]
        near = did_you_mean(str(key), names)
        return f"accumulate: the batch has no {key!r}.{near} It has {', '.join(names) or 'nothing'}"
    size = f" of {len(batch)}" if isinstance(batch, (list, tuple)) else ""
    return (
        f"accumulate: tokens={key!r} cannot be looked up in the batch, a "
        f"{type(batch).__name__}{size}. Pass a key, an index, or a function of the batch"
    )

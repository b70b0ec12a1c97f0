"""How many samples or valid tokens the loss of a batch is a mean over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hookengine import batch_size, did_you_mean
from hookengine_accumulate.window import Weight


def count_samples(batch: Any) -> float:
    """The samples of a batch.

    Raises:
        TypeError: it is an object that does not tell.
    """
    if not isinstance(batch, (Tensor, Mapping, list, tuple)):
        raise TypeError(
            f"accumulate: the samples of a {type(batch).__name__} cannot be counted: give "
            "weight='token' with a function, as in tokens=lambda batch: batch.num_graphs, or "
            "weight='batch' where all micro-batches are of one size"
        )
    return float(batch_size(batch))


def count_tokens(batch: Any, tokens: Any, ignore_index: int | None) -> Weight:
    """The valid tokens of a batch.

    Args:
        batch: As the dataloader gave it.
        tokens: A key or index in the batch, of a number or a tensor; or a function of the batch.
        ignore_index: What is not counted in a tensor of labels.

    Raises:
        KeyError: the batch has no such key. TypeError, ValueError: what is there is no count.
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
            f"accumulate: ignore_index needs labels in a tensor, tokens={tokens!r} gave a "
            f"{type(count).__name__}: give a function, as in tokens=lambda batch: ..."
        )
    return _as_weight(count != ignore_index, tokens)


def _as_weight(count: Any, tokens: Any) -> Weight:
    """A count as a number; one on a device stays there, since reading it would synchronise."""
    if not isinstance(count, Tensor):
        try:
            count = float(count)
        except (TypeError, ValueError):
            raise TypeError(
                f"accumulate: tokens={tokens!r} gave {count!r}: a number or a tensor is needed"
            ) from None
    elif count.device.type != "cpu":
        return count.sum().double() if count.device.type != "mps" else count.sum().float()
    elif count.dtype != torch.bool and (
        bool((count < 0).any()) or (count.squeeze().dim() > 1 and bool((count > 1).any()))
    ):
        raise ValueError(
            f"accumulate: tokens={tokens!r} gave a tensor of shape {tuple(count.shape)} that is "
            f"neither a mask nor lengths: it has values from {count.min()} to {count.max()}. A "
            "tensor is summed: for labels, of which some are ignored, give ignore_index=-100 (say) "
            "as well"
        )
    else:
        count = count.sum().item()
    if not count >= 0:
        raise ValueError(f"accumulate: tokens={tokens!r} gave {count}, which is no count")
    return float(count)


def _lacks(batch: Any, key: Any) -> str:
    if isinstance(batch, Mapping):
        names = [name for name in batch if isinstance(name, str)]
        near = did_you_mean(str(key), names)
        return f"accumulate: the batch has no {key!r}.{near} It has {', '.join(names) or 'nothing'}"
    size = f" of {len(batch)}" if isinstance(batch, (list, tuple)) else ""
    return (
        f"accumulate: tokens={key!r} cannot be looked up in the batch, a "
        f"{type(batch).__name__}{size}: give a key, an index, or a function of the batch"
    )

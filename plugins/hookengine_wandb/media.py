"""Records and media as W&B has them."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import PIL.Image
import wandb

from hookengine import Histogram, Image, Record, Table


def row(record: Record) -> dict[str, Any]:
    """One row of W&B's history: ``PHASE/NAME``, and where the run stood."""
    named = {**record.scalars, **{name: medium(one) for name, one in record.media.items()}}
    return {
        **{f"{record.phase}/{name}": value for name, value in named.items()},
        f"{record.phase}/iter": record.iter,
        "iter": record.iter,
        "epoch": record.epoch,
        "step": record.step,
        "_timestamp": record.timestamp,
    }


def medium(value: Image | Histogram | Table | str) -> Any:
    """An image, a histogram, a table or a text."""
    if isinstance(value, Image):
        with PIL.Image.open(io.BytesIO(value.png)) as picture:
            return wandb.Image(picture.copy(), caption=value.caption)
    if isinstance(value, Histogram):
        return wandb.Histogram(np_histogram=(np.array(value.counts), np.array(value.edges)))
    if isinstance(value, Table):
        return wandb.Table(columns=[*value.columns], data=value.rows, allow_mixed_types=True)
    return value

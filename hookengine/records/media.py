"""What a record can hold besides numbers: images, histograms, tables and texts."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

Cell: TypeAlias = str | int | float | bool | None

_PNG = b"\x89PNG\r\n\x1a\n"
_CHANNELS = (1, 3, 4)


class Image:
    """Hold a snapshot of a picture; copying from the device and encoding happen later.

    Args:
        data: A tensor or array of shape (H, W), (C, H, W) or (H, W, C) with 1, 3 or 4 channels, or
            a batch of shape (N, C, H, W), which becomes a grid. Floats range from 0 to 1, integers
            from 0 to 255; values outside are clipped and NaN is black. Also accepts a PIL image, a
            matplotlib figure or the bytes of a PNG file.
        caption: A line of text below the picture.

    Raises:
        ValueError: If the shape is not supported, the picture has no pixels, or the bytes are not
            a PNG file.
        TypeError: If ``data`` is of another type, or complex or sparse.
    """

    def __init__(self, data: Any, caption: str | None = None) -> None:
        self.caption = caption
        self._pixels: Tensor | None = None
        self._file: Path | None = None
        self._png = b""
        if isinstance(data, bytes):
            if not data.startswith(_PNG):
                raise ValueError("image bytes must be a PNG file")
            self._png = data
        elif hasattr(data, "savefig"):
            self._png = _saved(data.savefig)
        elif hasattr(data, "getbands"):
            self._png = _saved(_as_png_has_it(data).save)
        else:
            self._pixels = _channels_last(_tensor(data)).clone()

    @classmethod
    def from_file(cls, path: Path, caption: str | None = None) -> Image:
        """Return an image backed by a PNG file, which is read on first access to ``png``."""
        image = cls(_PNG, caption)
        image._file = path
        return image

    @property
    def png(self) -> bytes:
        """The picture as the bytes of a PNG file."""
        if self._file is not None:
            self._png, self._file = self._file.read_bytes(), None
        if self._pixels is not None:
            self._png, self._pixels = _encoded(self._pixels), None
        return self._png

    def __repr__(self) -> str:
        return "Image()" if self.caption is None else f"Image(caption={self.caption!r})"


class Histogram:
    """Count how values are distributed.

    The values are counted on their device; the counts are copied from it later. NaN and infinite
    values are not counted.

    Args:
        values: A tensor or array of any shape, with at least one value.
        bins: The number of bins, all of equal width.

    Raises:
        ValueError: If there are no values or fewer than one bin.
        TypeError: If ``values`` does not hold numbers, or is complex or sparse.
    """

    def __init__(self, values: Any, bins: int = 64) -> None:
        if bins < 1:
            raise ValueError(f"a histogram needs at least one bin, got {bins}")
        tensor = _tensor(values).reshape(-1)
        if not tensor.numel():
            raise ValueError("a histogram needs at least one value")
        self._counts, self._edges = _counted(tensor, bins)

    @classmethod
    def counted(cls, counts: Iterable[float], edges: Iterable[float]) -> Histogram:
        """Return a histogram of values that are already counted.

        Args:
            counts: The number of values in each of N bins.
            edges: The N + 1 edges of the bins, in ascending order.

        Raises:
            ValueError: If the numbers of counts and edges do not match.
        """
        histogram = cls.__new__(cls)
        histogram._counts = torch.tensor([*counts], dtype=torch.float64)
        histogram._edges = torch.tensor([*edges], dtype=torch.float64)
        if len(histogram._edges) != len(histogram._counts) + 1:
            raise ValueError(
                f"N counts need N + 1 edges, got {len(histogram._counts)} counts and "
                f"{len(histogram._edges)} edges"
            )
        return histogram

    @property
    def counts(self) -> list[float]:
        """The number of values in each bin."""
        return [float(count) for count in self._counts.tolist()]

    @property
    def edges(self) -> list[float]:
        """The edges of the bins: one more than the number of bins."""
        return [float(edge) for edge in self._edges.tolist()]

    def __repr__(self) -> str:
        return f"Histogram({len(self._counts)} bins)"


class Table:
    """Hold rows of texts and numbers.

    Args:
        columns: The names of the columns.
        rows: The rows, each as long as ``columns``. A tensor or array without dimensions becomes
            its number, and a cell that is not a text, number, bool or None becomes its ``str``.

    Attributes:
        columns: The names of the columns.
        rows: The rows, as lists of texts, numbers, bools and Nones.

    Raises:
        ValueError: If a row has a different length than ``columns``.
    """

    def __init__(self, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        self.columns = [str(column) for column in columns]
        self.rows: list[list[Cell]] = [[_cell(value) for value in row] for row in rows]
        for number, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(
                    f"row {number} of the table has {len(row)} cells, but there are "
                    f"{len(self.columns)} columns"
                )

    def __repr__(self) -> str:
        return f"Table({self.columns}, {len(self.rows)} rows)"


Medium: TypeAlias = Image | Histogram | Table | str


def as_medium(value: Any) -> Medium:
    """Convert a value that is not a number to the medium that represents it.

    A tensor or array with one dimension becomes a histogram, and one with two to four dimensions an
    image. PIL images and matplotlib figures become images, a pandas DataFrame becomes a table, and
    a string stays a text.

    Raises:
        TypeError: If the type of the value is not supported. The message lists the supported types.
        ValueError: If its shape or content is not supported.
    """
    if isinstance(value, (Image, Histogram, Table, str)):
        return value
    if hasattr(value, "savefig") or hasattr(value, "getbands"):
        return Image(value)
    if hasattr(value, "itertuples") and hasattr(value, "columns"):
        return Table([*value.columns], value.itertuples(index=False))
    if isinstance(value, Tensor) or hasattr(value, "__array__"):
        tensor = _tensor(value)
        return Histogram(tensor) if tensor.dim() == 1 else Image(tensor)
    raise TypeError(
        "expected a number, tensor, image, figure or text; wrap the value in hookengine.Image, "
        "Histogram or Table"
    )


def _tensor(data: Any) -> Tensor:
    if isinstance(data, Tensor):
        tensor = data.detach()
    else:
        try:
            # Copy, because torch does not accept read-only arrays or negative strides.
            tensor = torch.as_tensor(data.copy() if hasattr(data, "strides") else data)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"{type(data).__name__} holds no numbers: {error}") from error
    if tensor.is_complex() or tensor.layout != torch.strided:
        raise TypeError("complex and sparse tensors cannot be shown: pass their parts instead")
    return tensor


def _channels_last(pixels: Tensor) -> Tensor:
    """Return pixels of any supported shape as (H, W, C)."""
    shape = list(pixels.shape)
    if not pixels.numel():
        raise ValueError(f"an image of shape {shape} has no pixels")
    if pixels.dim() == 4 and shape[1] in _CHANNELS:
        pixels = _grid(pixels)
    if pixels.dim() == 2:
        return pixels.unsqueeze(-1)
    if pixels.dim() == 3 and pixels.shape[0] in _CHANNELS:
        return pixels.permute(1, 2, 0)
    if pixels.dim() == 3 and pixels.shape[-1] in _CHANNELS:
        return pixels
    raise ValueError(
        "an image must have shape (H, W), (C, H, W), (H, W, C) or (N, C, H, W) with 1, 3 or 4 "
        f"channels, got {shape}"
    )


def _grid(images: Tensor, gap: int = 2) -> Tensor:
    """Arrange images of shape (N, C, H, W) in a grid, as square as possible, of shape (C, H, W)."""
    number, channels, height, width = images.shape
    columns = math.ceil(math.sqrt(number))
    rows = math.ceil(number / columns)
    down, across = height + gap, width + gap
    grid = images.new_zeros(channels, rows * down - gap, columns * across - gap)
    for index, image in enumerate(images):
        top, left = index // columns * down, index % columns * across
        grid[:, top : top + height, left : left + width] = image
    return grid


def _encoded(pixels: Tensor) -> bytes:
    """Encode pixels of shape (H, W, C) as PNG."""
    import PIL.Image

    if pixels.dtype.is_floating_point:
        pixels = pixels.float().nan_to_num(0.0).clamp(0, 1).mul(255).round()
    elif pixels.dtype == torch.bool:
        pixels = pixels.to(torch.uint8) * 255
    elif pixels.dtype != torch.uint8:
        pixels = pixels.to(torch.int64)  # int8 cannot hold 255, and torch cannot clamp uint16
    pixels = pixels.clamp(0, 255).to("cpu", torch.uint8).contiguous()
    height, width, channels = pixels.shape
    mode = {1: "L", 3: "RGB", 4: "RGBA"}[channels]
    image = PIL.Image.frombytes(mode, (width, height), pixels.numpy().tobytes())
    return _saved(image.save)


def _as_png_has_it(picture: Any) -> Any:
    """Return a PIL image converted to a mode that PNG supports."""
    if picture.mode in ("F", "I"):
        return picture.convert("L")
    return picture.convert("RGB") if picture.mode in ("CMYK", "HSV", "YCbCr", "LAB") else picture


def _saved(save: Any) -> bytes:
    buffer = io.BytesIO()
    save(buffer, format="png")
    return buffer.getvalue()


def _counted(values: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """Return (counts, edges) without synchronizing, working on a million values at a time."""
    parts = torch.split(values, 2**20)
    low, high = (torch.stack(ends).amin(0) for ends in zip(*map(_ends, parts), strict=True))
    high = -high
    low = torch.where(low.isfinite(), low, 0.0)  # if no value is finite, use 0 to 1
    high = torch.where(high.isfinite(), high, 1.0)
    flat = low == high
    low, high = torch.where(flat, low - 0.5, low), torch.where(flat, high + 0.5, high)
    steps = torch.arange(bins + 1, device=values.device, dtype=low.dtype)
    edges = low + steps * ((high - low) / bins)  # like numpy: integer edges stay exact
    edges[-1] = high
    counts = torch.stack([_counts(_wide(part), edges) for part in parts]).sum(0)
    return counts, edges


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.float32 if values.device.type == "mps" else torch.float64)


def _ends(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the smallest and the negated largest of the finite values."""
    values = _wide(values)
    finite = values.isfinite()
    low = torch.where(finite, values, math.inf).amin()
    return low, torch.where(finite, -values, math.inf).amin()


def _counts(values: Tensor, edges: Tensor) -> Tensor:
    # NaN breaks the sort order, and searchsorted may count it.
    ordered = values.nan_to_num(math.inf, math.inf, -math.inf).sort().values
    below = torch.searchsorted(ordered, edges)
    below[-1] = torch.searchsorted(ordered, edges[-1], right=True)
    return below.diff()


def _cell(value: Any) -> Cell:
    if isinstance(value, Tensor) or hasattr(value, "__array__"):
        value = value.item() if getattr(value, "ndim", 1) == 0 else value
    return value if isinstance(value, (str, int, float, bool)) or value is None else str(value)

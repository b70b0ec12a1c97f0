"""Data preprocessors: turn what a dataloader yields into what a model takes, on its device."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, Self

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from hookengine import Phase, Plugin, Runner

__all__ = ["BaseDataPreprocessor", "ImgDataPreprocessor", "Preprocess", "stack_batch"]


class BaseDataPreprocessor(nn.Module):
    """Move a batch to the device of the model that contains this module.

    Args:
        non_blocking: Whether to copy from pinned memory while the host continues.
    """

    _anchor: Tensor

    def __init__(self, non_blocking: bool | None = False) -> None:
        super().__init__()
        self._non_blocking = bool(non_blocking)
        # An empty buffer follows the model, whatever method moves it.
        self.register_buffer("_anchor", torch.empty(0), persistent=False)
        self._device = self._anchor.device

    @property
    def device(self) -> torch.device:
        """The device that batches are moved to."""
        return self._device

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Note the new device. Every method that moves a module calls this on its children too."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._device = self._anchor.device
        return self

    def cast_data(self, data: Any) -> Any:
        """Move a batch of any nesting to the device.

        The items of dicts and other mappings, lists, tuples and namedtuples are moved one by one.
        Tensors, and anything else with a method ``to(device)``, are moved. str, bytes, None and
        everything else are left unchanged.
        """
        device = self._device
        kind = type(data)
        if kind is list or kind is tuple:
            items = []
            for item in data:  # .to() costs microseconds even if it does nothing
                here = isinstance(item, Tensor) and item.device == device
                items.append(item if here else self.cast_data(item))
            return items if kind is list else tuple(items)
        if data is None or isinstance(data, (str, bytes)):
            return data
        if isinstance(data, Tensor):
            return data.to(device, non_blocking=True) if self._non_blocking else data.to(device)
        if callable(move := getattr(data, "to", None)):
            moves = self._non_blocking and _takes_non_blocking(kind)  # type: ignore[arg-type]
            moved = move(device, non_blocking=True) if moves else move(device)
            return data if moved is None else moved  # None: moved in place
        if isinstance(data, (list, tuple)):
            items = [self.cast_data(item) for item in data]
            return kind(*items) if hasattr(data, "_fields") else kind(items)
        if isinstance(data, Mapping):
            return {key: self.cast_data(value) for key, value in data.items()}
        return data

    def forward(self, data: Any, training: bool = False) -> Any:
        """Preprocess a batch.

        Args:
            data: What the dataloader yielded.
            training: Whether the batch is for training; a subclass may then augment it.

        Returns:
            The arguments of the model's ``forward``, as a dict, tuple or list.
        """
        return self.cast_data(data)


@cache
def _takes_non_blocking(kind: type) -> bool:
    """Return whether the method ``to`` of a class takes ``non_blocking``."""
    try:
        parameters = inspect.signature(kind.to).parameters  # type: ignore[attr-defined]
    except (AttributeError, TypeError, ValueError):  # set on the instance, or written in C
        return False
    kinds = {parameter.kind for parameter in parameters.values()}
    return "non_blocking" in parameters or inspect.Parameter.VAR_KEYWORD in kinds


class ImgDataPreprocessor(BaseDataPreprocessor):
    """Normalize, convert and pad images into one batch.

    A batch is a dict with the images under ``inputs``, or a tuple or list with the images as its
    first item. The images are a list of shape (C, H, W) each, which may differ in size, or a
    stacked batch of shape (N, C, H, W), of any dtype. They become float32 of shape (N, C, H', W'):
    their channels are swapped, then they are normalized, then padded at the right and bottom to
    the size of the largest image and to a multiple of ``pad_size_divisor``.

    Args:
        mean: The mean per channel, in the order after the swap; 1 or 3 numbers. None disables
            normalization.
        std: The standard deviation per channel, in the same order; 1 or 3 numbers.
        pad_size_divisor: H' and W' are multiples of it.
        pad_value: The value of the padding, which is added after normalization.
        bgr_to_rgb: Whether to swap the first and the last of 3 channels.
        rgb_to_bgr: Whether to swap them the other way around, which is the same swap.
        non_blocking: See ``BaseDataPreprocessor``.

    Raises:
        ValueError: Both swaps are set, only one of ``mean`` and ``std`` is set, or one of them does
            not have 1 or 3 numbers.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        pad_size_divisor: int = 1,
        pad_value: float = 0,
        bgr_to_rgb: bool = False,
        rgb_to_bgr: bool = False,
        non_blocking: bool | None = False,
    ) -> None:
        super().__init__(non_blocking)
        if bgr_to_rgb and rgb_to_bgr:
            raise ValueError("bgr_to_rgb and rgb_to_bgr are the same swap. Set only one of them")
        if (mean is None) != (std is None):
            raise ValueError("only one of mean and std is set. Set both or neither")
        self._enable_normalize = mean is not None and std is not None
        if mean is not None and std is not None:
            for name, numbers in (("mean", mean), ("std", std)):
                if len(numbers) not in (1, 3):
                    raise ValueError(f"{name} takes 1 or 3 numbers, got {len(numbers)}")
                values = torch.tensor(numbers, dtype=torch.float32).view(-1, 1, 1)
                self.register_buffer(name, values, persistent=False)
        self._channel_conversion = rgb_to_bgr or bgr_to_rgb
        self.pad_size_divisor = pad_size_divisor
        self.pad_value = pad_value

    def forward(self, data: Any, training: bool = False) -> Any:
        """Preprocess a batch; a dict without ``data_samples`` gets ``data_samples=None``."""
        data = self.cast_data(data)
        if isinstance(data, Mapping):
            samples = data.get("data_samples")
            return {**data, "inputs": self._batch(data.get("inputs")), "data_samples": samples}
        if isinstance(data, (list, tuple)) and data:
            return (self._batch(data[0]), *data[1:])
        raise TypeError(_EXPECTED.format(type(data).__name__))

    def _batch(self, images: Any) -> Tensor:
        if isinstance(images, Tensor):
            if images.dim() != 4:
                raise ValueError(
                    f"stacked images must have the shape (N, C, H, W), got {tuple(images.shape)}"
                )
            batch = self._convert(images)
            pad = [-size % self.pad_size_divisor for size in batch.shape[:1:-1]]
            return F.pad(batch, (0, pad[0], 0, pad[1]), value=self.pad_value) if any(pad) else batch
        if isinstance(images, (list, tuple)) and images and isinstance(images[0], Tensor):
            converted = [self._convert(image) for image in images]
            return stack_batch(converted, self.pad_size_divisor, self.pad_value)
        raise TypeError(_EXPECTED.format(type(images).__name__))

    def _convert(self, images: Tensor) -> Tensor:
        """Swap channels, convert to float32 and normalize images of shape (..., C, H, W)."""
        channels = images.shape[-3] if images.dim() >= 3 else 0
        if (self._channel_conversion or self._normalizes_three) and channels != 3:
            raise ValueError(
                "a mean of 3 numbers and channel swaps need images of shape (3, H, W), got "
                f"{tuple(images.shape)}"
            )
        if self._channel_conversion:
            images = images.flip(-3)
        images = images.float()
        return (images - self.mean) / self.std if self._enable_normalize else images

    @property
    def _normalizes_three(self) -> bool:
        return self._enable_normalize and self.mean.shape[0] == 3


_EXPECTED = (
    "ImgDataPreprocessor takes dict(inputs=images, ...) or (images, ...), where images is a list "
    "of tensors or one stacked tensor, got {}"
)


def stack_batch(
    tensor_list: list[Tensor], pad_size_divisor: int = 1, pad_value: float = 0
) -> Tensor:
    """Stack tensors of different sizes, padding the end of each dimension but the first.

    Args:
        tensor_list: Tensors with the same number of dimensions and the same first dimension, such
            as (C, H, W).
        pad_size_divisor: The padded dimensions are multiples of it.
        pad_value: The value of the padding.

    Returns:
        A tensor of shape (N, C, H', W').

    Raises:
        TypeError: ``tensor_list`` is not a list of tensors.
        ValueError: The list is empty, ``pad_size_divisor`` is below 1, or the dimensions do not
            match.
    """
    if not isinstance(tensor_list, list):
        raise TypeError(f"stack_batch takes a list of tensors, got {type(tensor_list).__name__}")
    if wrong := [type(item).__name__ for item in tensor_list if not isinstance(item, Tensor)]:
        raise TypeError(f"stack_batch takes a list of tensors, got a list with {', '.join(wrong)}")
    if not tensor_list or pad_size_divisor < 1:
        raise ValueError(
            "stack_batch needs at least one tensor and a pad_size_divisor of at least 1, got "
            f"{len(tensor_list)} tensors and pad_size_divisor={pad_size_divisor}"
        )
    if len({(tensor.dim(), *tensor.shape[:1]) for tensor in tensor_list}) != 1:
        raise ValueError(
            "the tensors to stack must have equally many dimensions and the same first dimension, "
            f"got shapes {[tuple(tensor.shape) for tensor in tensor_list]}"
        )
    sizes = zip(*(tensor.shape[1:] for tensor in tensor_list), strict=True)
    target = [-(-max(size) // pad_size_divisor) * pad_size_divisor for size in sizes]
    padded = []
    for tensor in tensor_list:
        missing = [t - s for t, s in zip(target, tensor.shape[1:], strict=True)]
        pad = [n for amount in reversed(missing) for n in (0, amount)]
        padded.append(F.pad(tensor, pad, value=pad_value) if any(pad) else tensor)
    return torch.stack(padded)


class Preprocess(Plugin, name="preprocess"):
    """Copy the next training batch to the GPU on a side stream, during the computation.

    On devices other than CUDA, and without ``prefetch``, the plugin does nothing: the model's data
    preprocessor moves the batches.
    """

    prefetch: bool = Field(
        default=False, description="copy the next batch while training on this one"
    )

    def setup_dataloader(self, runner: Runner, dataloader: Iterable[Any], phase: Phase) -> Any:
        """Wrap the training dataloader in one that prefetches."""
        if not self.prefetch or phase != "train":
            return None
        if runner.device.type != "cuda":
            runner.logger.info("prefetch=True has no effect", device=str(runner.device))
            return None
        return CudaPrefetcher(dataloader, runner.device)


class CudaPrefetcher:
    """A dataloader that copies the next batch on a side stream while the last one is in use.

    The copy overlaps with the computation if the batches are in pinned memory
    (``pin_memory=True``).
    """

    def __init__(self, dataloader: Iterable[Any], device: torch.device) -> None:
        self.dataloader = dataloader
        self.device = device
        self._mover = BaseDataPreprocessor(non_blocking=True).to(device)

    def __len__(self) -> int:
        return len(self.dataloader)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        if name == "dataloader":
            raise AttributeError(name)
        return getattr(self.dataloader, name)  # dataset, sampler, seek, ...

    def __iter__(self) -> Iterator[Any]:
        stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        batches = iter(self.dataloader)
        ahead = self._copy(batches, stream)
        while ahead:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(stream)
            batch = ahead[0]
            _record(batch, current)
            ahead = self._copy(batches, stream)
            yield batch

    def _copy(self, batches: Iterator[Any], stream: torch.cuda.Stream) -> list[Any]:
        with torch.cuda.stream(stream):
            return [self._mover.cast_data(batch) for batch in _next(batches)]


def _next(batches: Iterator[Any]) -> list[Any]:
    try:
        return [next(batches)]
    except StopIteration:
        return []


def _record(data: Any, stream: torch.cuda.Stream) -> None:
    """Keep the memory of ``data`` from being reused until ``stream`` has used it."""
    for tensor in _tensors(data, set()):
        if tensor.is_cuda:  # the lengths of packed sequences stay on the CPU
            tensor.record_stream(stream)


def _tensors(data: Any, seen: set[int]) -> Iterator[Tensor]:
    """Yield the tensors that ``cast_data`` has moved.

    Args:
        data: A batch.
        seen: The ids of the objects so far, which may refer to each other.
    """
    if isinstance(data, Tensor):
        yield data
    elif isinstance(data, (Mapping, list, tuple)):
        for item in data.values() if isinstance(data, Mapping) else data:
            yield from _tensors(item, seen)
    elif hasattr(data, "to") and id(data) not in seen:  # it has moved its tensors by itself
        seen.add(id(data))
        for item in getattr(data, "__dict__", {}).values():
            yield from _tensors(item, seen)

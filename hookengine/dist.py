"""Rank, world size, gather: thin helpers over torch.distributed that also work in one process.

They use the existing process group and never create one. A plugin creates it in ``configure``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed as torch_dist
from torch.nn.parameter import is_lazy

T = TypeVar("T")


def is_distributed() -> bool:
    """Return whether a process group exists."""
    return torch_dist.is_available() and torch_dist.is_initialized()


def get_rank() -> int:
    """Return the rank of this process, or 0 without a process group."""
    return torch_dist.get_rank() if is_distributed() else 0


def get_world_size() -> int:
    """Return the number of processes, or 1 without a process group."""
    return torch_dist.get_world_size() if is_distributed() else 1


def is_main_process() -> bool:
    """Return whether this process is rank 0."""
    return get_rank() == 0


def broadcast_object(obj: T, src: int = 0) -> T:
    """Return the object of rank ``src`` on all ranks.

    The object is pickled, and sent only between processes of the same job.
    """
    if not is_distributed():
        return obj
    box: list[Any] = [obj]
    torch_dist.broadcast_object_list(box, src=src, group=_on_the_cpu())
    return box[0]  # type: ignore[no-any-return]


def gather_objects(obj: T, dst: int = 0) -> list[T] | None:
    """Return the objects of all ranks in order on rank ``dst``, and None on the other ranks."""
    if not is_distributed():
        return [obj]
    gathered: list[Any] | None = [None] * get_world_size() if get_rank() == dst else None
    torch_dist.gather_object(obj, gathered, dst=dst, group=_on_the_cpu())
    return gathered


def all_gather_objects(obj: T) -> list[T]:
    """Return the objects of all ranks in order, on all ranks."""
    if not is_distributed():
        return [obj]
    gathered: list[Any] = [None] * get_world_size()
    torch_dist.all_gather_object(gathered, obj, group=_on_the_cpu())
    return gathered


def _on_the_cpu() -> torch_dist.ProcessGroup | None:
    """Return a group that can send objects through CPU memory, since objects may be large.

    None means that the default group can do so, because it has a CPU backend.
    """
    default = torch_dist.group.WORLD
    if default is None or "cpu:" in str(torch_dist.get_backend_config()):
        return None
    if default not in _BESIDE:
        _BESIDE[default] = torch_dist.new_group(backend="gloo")
    beside: torch_dist.ProcessGroup = _BESIDE[default]
    return beside


_BESIDE: WeakKeyDictionary[torch_dist.ProcessGroup, Any] = WeakKeyDictionary()


def collect_results(results: list[T], size: int, consecutive: bool = False) -> list[T] | None:
    """Return the results of all ranks on rank 0, in the order of the dataset, and None elsewhere.

    Args:
        results: The results of this rank.
        size: Length of the dataset. Results of samples that a sampler added as padding are dropped,
            unless ``consecutive`` is set.
        consecutive: Whether each rank has the samples that follow those of the previous rank. If
            False, the sampler deals the samples to the ranks in turn, as ``DistributedSampler``
            does.
    """
    parts = gather_objects(results)
    if parts is None or len(parts) == 1:
        return results if parts else None
    if consecutive:
        return [result for part in parts for result in part]
    turns = itertools.zip_longest(*([[r] for r in part] for part in parts), fillvalue=[])
    return [result for turn in turns for dealt in turn for result in dealt][:size]


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over all ranks, in place, and return it."""
    if is_distributed():
        torch_dist.all_reduce(tensor)
    return tensor


def broadcast_tensors(tensors: Iterable[torch.Tensor], src: int = 0) -> None:
    """Copy the values of rank ``src`` into the tensors of all ranks, in place, for any dtype.

    Args:
        tensors: Tensors in the same order on all ranks. Tensors without values (lazy, meta) are
            skipped.
        src: The rank whose values all ranks receive.
    """
    if not is_distributed():
        return
    # NCCL needs tensors on its own device, and backends support few dtypes, so we send bytes.
    staging = torch.device("cuda") if torch_dist.get_backend() == "nccl" else None
    with torch.no_grad():
        for tensor in tensors:
            if is_lazy(tensor) or tensor.is_meta:
                continue
            values = tensor.detach().to(staging or tensor.device).contiguous()
            torch_dist.broadcast(values.view(-1).view(torch.uint8), src=src)
            if values.data_ptr() != tensor.data_ptr():
                tensor.copy_(values)

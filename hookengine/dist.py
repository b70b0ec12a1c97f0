"""Rank, world size, gather: thin helpers over torch.distributed that also work on one process.

They look at the process group that exists, and never make one: a plugin does, in ``configure``.
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
    """Whether a process group exists."""
    return torch_dist.is_available() and torch_dist.is_initialized()


def get_rank() -> int:
    """The rank of this process, 0 alone."""
    return torch_dist.get_rank() if is_distributed() else 0


def get_world_size() -> int:
    """The number of processes, 1 alone."""
    return torch_dist.get_world_size() if is_distributed() else 1


def is_main_process() -> bool:
    """Whether this is rank 0."""
    return get_rank() == 0


def broadcast_object(obj: T, src: int = 0) -> T:
    """Rank ``src``'s object, on all ranks. Pickled among the job's own processes."""
    if not is_distributed():
        return obj
    box: list[Any] = [obj]
    torch_dist.broadcast_object_list(box, src=src, group=_on_the_cpu())
    return box[0]  # type: ignore[no-any-return]


def gather_objects(obj: T, dst: int = 0) -> list[T] | None:
    """The objects of all ranks in order, on rank ``dst``; None on the others."""
    if not is_distributed():
        return [obj]
    gathered: list[Any] | None = [None] * get_world_size() if get_rank() == dst else None
    torch_dist.gather_object(obj, gathered, dst=dst, group=_on_the_cpu())
    return gathered


def all_gather_objects(obj: T) -> list[T]:
    """The objects of all ranks in order, on all ranks."""
    if not is_distributed():
        return [obj]
    gathered: list[Any] = [None] * get_world_size()
    torch_dist.all_gather_object(gathered, obj, group=_on_the_cpu())
    return gathered


def _on_the_cpu() -> torch_dist.ProcessGroup | None:
    """The group by which objects travel, which may be large: none that has GPUs' memory alone."""
    default = torch_dist.group.WORLD
    if default is None or "cpu:" in str(torch_dist.get_backend_config()):
        return None
    if default not in _BESIDE:
        _BESIDE[default] = torch_dist.new_group(backend="gloo")
    beside: torch_dist.ProcessGroup = _BESIDE[default]
    return beside


_BESIDE: WeakKeyDictionary[torch_dist.ProcessGroup, Any] = WeakKeyDictionary()


def collect_results(results: list[T], size: int, consecutive: bool = False) -> list[T] | None:
    """The results of all ranks on rank 0, in the order of the dataset.

    Args:
        results: This rank's results.
        size: Length of the dataset; what a sampler padded beyond it is dropped.
        consecutive: Each rank has the samples that follow those of the rank before. Without, a
            sampler has dealt them in turn, as ``DistributedSampler`` does.
    """
    parts = gather_objects(results)
    if parts is None or len(parts) == 1:
        return results if parts else None
    if consecutive:
        return [result for part in parts for result in part]
    turns = itertools.zip_longest(*([[r] for r in part] for part in parts), fillvalue=[])
    return [result for turn in turns for dealt in turn for result in dealt][:size]


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all ranks, in place."""
    if is_distributed():
        torch_dist.all_reduce(tensor)
    return tensor


def broadcast_tensors(tensors: Iterable[torch.Tensor], src: int = 0) -> None:
    """Give rank ``src``'s values to the tensors of all ranks, in place, of whatever dtype.

    Args:
        tensors: In the same order on all ranks. Those without values (lazy, meta) are passed over.
        src: The rank whose values all get.
    """
    if not is_distributed():
        return
    # NCCL takes tensors on its own device, and backends know few dtypes: so bytes travel.
    staging = torch.device("cuda") if torch_dist.get_backend() == "nccl" else None
    with torch.no_grad():
        for tensor in tensors:
            if is_lazy(tensor) or tensor.is_meta:
                continue
            values = tensor.detach().to(staging or tensor.device).contiguous()
            torch_dist.broadcast(values.view(-1).view(torch.uint8), src=src)
            if values.data_ptr() != tensor.data_ptr():
                tensor.copy_(values)

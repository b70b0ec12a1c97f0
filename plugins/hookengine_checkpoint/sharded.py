"""Tensors that are sharded across ranks (FSDP), through ``torch.distributed.checkpoint``.

Each rank writes its shards. The rest of the state is in ``state.pth`` as usual, with the name of
each sharded tensor in its place. torch reshards the tensors when another number of ranks reads
them.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as load_shards
from torch.distributed.checkpoint.state_dict_saver import save as save_shards
from torch.distributed.tensor import DTensor, distribute_tensor

from hookengine import RunFolder, Runner, dist
from hookengine_checkpoint.checks import nonfinite
from hookengine_checkpoint.integrity import DamagedError
from hookengine_checkpoint.shard_reader import ShardReader, TensorPlanner
from hookengine_checkpoint.writing import make_folder

_MARK = "hookengine.sharded"


def split(state: Any) -> tuple[Any, dict[str, DTensor]]:
    """Split a state into the rest, with names in place of sharded tensors, and these by name."""
    tensors: dict[str, DTensor] = {}

    def take(value: Any, path: str) -> Any:
        if isinstance(value, DTensor):
            tensors[path] = value
            return {_MARK: path, "shape": list(value.shape)}
        return value

    return _mapped(state, take), tensors


def _mapped(value: Any, leaf: Callable[[Any, str], Any], path: str = "") -> Any:
    """Copy nested containers, with ``leaf(value, path)`` in place of each value."""
    kind = type(value)
    if kind in (dict, OrderedDict) and _MARK not in value:
        items = ((key, _mapped(item, leaf, f"{path}/{key}")) for key, item in value.items())
        mapped = kind(items)
        if kind is OrderedDict:
            vars(mapped).update(vars(value))
        return mapped
    if kind in (list, tuple):
        return kind(_mapped(item, leaf, f"{path}/{i}") for i, item in enumerate(value))
    return leaf(value, path)


def make_shard_folder(runner: Runner) -> Path:
    """Make the folder that all ranks write their shards into; all ranks call it together.

    Raises:
        OSError: Rank 0 cannot make it; raised on all ranks.
    """
    folder, problem = Path(), ""
    if dist.is_main_process():
        try:
            folder = make_folder(RunFolder(runner.make_run_dir()).checkpoints / ".shards.saving")
        except OSError as error:
            problem = str(error)
    folder, problem = dist.broadcast_object((folder, problem))
    if problem:
        raise OSError(problem)
    return folder


class Shards:
    """Writes the shards of this rank from a copy in host memory.

    All ranks construct it together: the threads that write communicate through their own process
    group.
    """

    def __init__(self) -> None:
        self._group: Any = torch_dist.new_group(backend="gloo")
        self._copies: dict[str, DTensor] = {}

    def take(self, tensors: dict[str, DTensor]) -> None:
        """Copy this rank's shards. The copy is valid until the next one is taken."""
        copies: dict[str, DTensor] = {}
        for name, tensor in tensors.items():
            value: Any = tensor.detach()
            copy: Any = self._copies.get(name)
            if copy is None or copy.shape != value.shape or copy.dtype != value.dtype:
                copy = value.cpu() if value.device.type != "cpu" else value.clone()
            else:
                copy.to_local().copy_(value.to_local())
            copies[name] = copy
        self._copies = copies

    def write(self, folder: Path, parameters: list[str]) -> list[str]:
        """Write the copy into a folder; the writing threads of all ranks call it together.

        Args:
            folder: The folder.
            parameters: The names of the model's parameters.

        Returns:
            The names of the parameters with NaN or infinite values on any rank.

        Raises:
            OSError: A rank could not write its shards.
        """
        state = {name: self._copies.get(f"/state_dict/{name}") for name in parameters}
        own = nonfinite({n: t.to_local() for n, t in state.items() if t is not None}, parameters)
        found: list[list[str]] = [[]] * self._group.size()
        try:
            torch_dist.all_gather_object(found, own, group=self._group)
            save_shards(
                dict(self._copies),
                storage_writer=FileSystemWriter(folder),
                process_group=self._group,
            )
        except (Exception, CheckpointException) as error:  # the latter is a BaseException
            raise OSError(f"the shards could not be written: {error}") from error
        return list(dict.fromkeys(name for names in found for name in names))


def load(folder: Path, state: dict[str, Any], runner: Runner) -> dict[str, Any]:
    """Load the sharded tensors of a state as the Runner's ranks hold them; all ranks call it.

    The Runner may have another number of ranks, or tensors that are not sharded.

    Args:
        folder: The folder with the shards.
        state: The first value that ``split`` returned.
        runner: The Runner whose tensors determine the placement.

    Returns:
        The state with its tensors.

    Raises:
        ValueError: The Runner has no tensor of that name or shape.
        DamagedError: The shards cannot be read.
    """
    own = _tensors_of(runner)
    wanted: dict[str, Tensor] = {}

    def find(value: Any, path: str) -> Any:
        if not (isinstance(value, dict) and _MARK in value):
            return value
        name = value[_MARK]
        if name not in own or list(own[name].shape) != value["shape"]:
            here = list(own[name].shape) if name in own else "missing"
            raise ValueError(
                f"the checkpoint has {name} of shape {value['shape']}, but here it is {here}: the "
                "checkpoint is of another model or optimizer. load_from= loads its weights only"
            )
        mine = own[name]
        wanted[name] = mine if isinstance(mine, DTensor) else torch.empty_like(mine, device="cpu")
        return wanted[name]

    whole: dict[str, Any] = _mapped(state, find)
    _read(folder, wanted)
    return whole


def spread(state: dict[str, Any], runner: Runner) -> dict[str, Any]:
    """Shard the tensors of a state as the Runner's ranks hold them; all ranks call it together."""
    own = _tensors_of(runner)

    def shard(value: Any, path: str) -> Any:
        mine = own.get(path)
        if not isinstance(mine, DTensor) or mine.shape != value.shape:
            return value
        return distribute_tensor(value.to(mine.device), mine.device_mesh, mine.placements)

    spread: dict[str, Any] = _mapped(state, shard)
    return spread


def assemble(folder: Path, state: Any) -> Any:
    """Load the sharded tensors of a state in full, without any other rank.

    Args:
        folder: The folder with the shards.
        state: The first value that ``split`` returned, or a part of it.

    Returns:
        The state with its tensors.

    Raises:
        DamagedError: The shards cannot be read.
    """
    known = ShardReader(folder).read_metadata().state_dict_metadata
    wanted: dict[str, Tensor] = {}

    def find(value: Any, path: str) -> Any:
        if not (isinstance(value, dict) and _MARK in value):
            return value
        kind = known.get(value[_MARK])
        if not isinstance(kind, TensorStorageMetadata):
            raise DamagedError(f"{folder} lacks {value[_MARK]}")
        wanted[value[_MARK]] = torch.empty(kind.size, dtype=kind.properties.dtype)
        return wanted[value[_MARK]]

    whole = _mapped(state, find)
    _read(folder, wanted, alone=True)
    return whole


def is_sharded(runner: Runner) -> bool:
    """Return whether the Runner's model is sharded across ranks."""
    return any(isinstance(parameter, DTensor) for parameter in runner.bare_model.parameters())


def _tensors_of(runner: Runner) -> dict[str, Tensor]:
    """Return the tensors of a Runner's state by their path in it, those of optimizers included."""
    for wrapper in runner.optim_wrappers.values():
        get_optimizer_state_dict(
            runner.bare_model, wrapper.optimizer
        )  # creates the state that a step would create
    tensors: dict[str, Tensor] = {}

    def note(value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            tensors[path] = value
        return value

    _mapped(runner.state_dict(), note)
    return tensors


def _read(folder: Path, tensors: dict[str, Tensor], alone: bool = False) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as intended
        try:
            load_shards(
                tensors,
                storage_reader=ShardReader(folder),
                planner=TensorPlanner(),
                no_dist=alone or not dist.is_distributed(),
            )
        except CheckpointException as error:  # a BaseException
            raise DamagedError(f"the shards in {folder} cannot be read: {error}") from error

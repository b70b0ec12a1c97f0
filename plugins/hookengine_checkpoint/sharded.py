"""Tensors that are spread over ranks (FSDP), by ``torch.distributed.checkpoint``.

Each rank writes its shards; everything else of the state goes to ``state.pth`` as ever, where the
place of a sharded tensor holds its name. Read at another number of ranks, torch reshards them.
"""

from __future__ import annotations

import pickle
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as load_shards
from torch.distributed.checkpoint.state_dict_saver import save as save_shards
from torch.distributed.tensor import DTensor, distribute_tensor

from hookengine import dist
from hookengine_checkpoint.checks import nonfinite
from hookengine_checkpoint.files import METADATA
from hookengine_checkpoint.integrity import DamagedError

_MARK = "hookengine.sharded"


def split(state: Any) -> tuple[Any, dict[str, DTensor]]:
    """The state without its sharded tensors, and these by name."""
    tensors: dict[str, DTensor] = {}

    def take(value: Any, path: str) -> Any:
        if isinstance(value, DTensor):
            tensors[path] = value
            return {_MARK: path, "shape": list(value.shape)}
        return value

    return _mapped(state, take), tensors


def _mapped(value: Any, leaf: Callable[[Any, str], Any], path: str = "") -> Any:
    """The same containers, with ``leaf(value, path)`` in the place of what is no container."""
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


class Shards:
    """Writes the shards of a rank, from a copy in host memory, behind the training.

    All ranks make one together: theirs write by a process group of their own.
    """

    def __init__(self) -> None:
        self._group: Any = torch_dist.new_group(backend="gloo")
        self._copies: dict[str, DTensor] = {}

    def take(self, tensors: dict[str, DTensor]) -> None:
        """Copy this rank's shards; the copy is valid until the next one is taken."""
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
        """Write the copy; the writers of all ranks call it together.

        Returns:
            The parameters with NaN or infinite values, on whatever rank.

        Raises:
            OSError: it could not be written, on whatever rank.
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


def load(folder: Path, state: dict[str, Any], runner: Any) -> dict[str, Any]:
    """The state with its sharded tensors, as this Runner's ranks hold them; all call it together.

    They may be held by another number of ranks, or whole.

    Args:
        folder: With the shards.
        state: What ``split`` returned first.
        runner: Its own tensors tell how they are spread.

    Raises:
        ValueError: the Runner has none of that name. DamagedError: they cannot be read.
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
                f"the checkpoint has {name}, of shape {value['shape']}; here it is {here}: it is "
                "of another model or optimizer. load_from= begins with its weights alone"
            )
        mine = own[name]
        wanted[name] = mine if isinstance(mine, DTensor) else torch.empty_like(mine, device="cpu")
        return wanted[name]

    whole: dict[str, Any] = _mapped(state, find)
    _read(folder, wanted)
    return whole


def spread(state: dict[str, Any], runner: Any) -> dict[str, Any]:
    """A state whose tensors are whole, as this Runner's ranks hold them; all call it together."""
    own = _tensors_of(runner)

    def shard(value: Any, path: str) -> Any:
        mine = own.get(path)
        if not isinstance(mine, DTensor) or mine.shape != value.shape:
            return value
        return distribute_tensor(value.to(mine.device), mine.device_mesh, mine.placements)

    spread: dict[str, Any] = _mapped(state, shard)
    return spread


def assemble(folder: Path, state: Any) -> Any:
    """The state with its sharded tensors whole, without any other rank.

    Args:
        folder: With the shards.
        state: What ``split`` returned first, or a part of it.

    Raises:
        DamagedError: they cannot be read.
    """
    known = _Reader(folder).read_metadata().state_dict_metadata
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


def is_sharded(runner: Any) -> bool:
    """Whether the Runner's model is spread over ranks."""
    return any(isinstance(parameter, DTensor) for parameter in runner.bare_model.parameters())


def _tensors_of(runner: Any) -> dict[str, Tensor]:
    """The tensors of a Runner's state by their place in it, those of optimizers included."""
    for wrapper in runner.optim_wrapper.by_name().values() if runner.optim_wrapper else ():
        get_optimizer_state_dict(runner.bare_model, wrapper.optimizer)  # makes what steps make
    tensors: dict[str, Tensor] = {}

    def note(value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            tensors[path] = value
        return value

    _mapped(runner.state_dict(), note)
    return tensors


def _read(folder: Path, tensors: dict[str, Tensor], alone: bool = False) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # which is meant so
        try:
            load_shards(
                tensors,
                storage_reader=_Reader(folder),
                planner=_Planner(),
                no_dist=alone or not dist.is_distributed(),
            )
        except CheckpointException as error:  # a BaseException
            raise DamagedError(f"the shards in {folder} cannot be read: {error}") from error


class _Reader(FileSystemReader):
    """torch's, which reads the metadata by pickle: here by what metadata consist of, alone."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with self.fs.create_stream(self._get_metadata_path(), "rb") as file:
            metadata = _Metadata(file).load()
        if not isinstance(metadata, Metadata):
            raise DamagedError(f"{self.path} holds no metadata of torch.distributed.checkpoint")
        if odd := [
            name
            for name, kind in metadata.state_dict_metadata.items()
            if not isinstance(kind, TensorStorageMetadata)
        ]:
            raise DamagedError(f"{self.path} holds {odd[0]}, which is no tensor; it is not read")
        for info in metadata.storage_data.values():
            if Path(info.relative_path).name != info.relative_path:
                raise DamagedError(f"{self.path} refers to {info.relative_path}, outside of it")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        return metadata


class _Planner(DefaultLoadPlanner):
    """torch's, which unpickles what is no tensor: here there is nothing of that kind."""

    def load_bytes(self, read_item: Any, value: Any) -> None:
        raise DamagedError(f"{read_item.storage_index.fqn} is no tensor; it is not read")


class _Metadata(pickle.Unpickler):
    """Reads the classes of ``torch.distributed.checkpoint``'s metadata, and nothing else."""

    MODULES = (
        "torch.distributed.checkpoint.metadata",
        "torch.distributed.checkpoint.filesystem",
    )
    NAMES = (
        ("torch", "Size"),
        ("torch", "device"),
        ("torch.serialization", "_get_layout"),
        ("collections", "OrderedDict"),
        ("pathlib", "PosixPath"),
        ("pathlib", "WindowsPath"),
        ("pathlib._local", "PosixPath"),
        ("pathlib._local", "WindowsPath"),
    )

    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class(module, name) if self._may(module, name) else None
        is_dtype = module == "torch" and type(found).__name__ == "dtype"
        own = isinstance(found, type) and found.__module__ in self.MODULES
        if own or is_dtype or (module, name) in self.NAMES:
            return found
        raise pickle.UnpicklingError(
            f"{METADATA} refers to {module}.{name}, which could run code; nothing was run"
        )

    def _may(self, module: str, name: str) -> bool:
        return "." not in name and (
            module in self.MODULES or (module, name) in self.NAMES or module == "torch"
        )

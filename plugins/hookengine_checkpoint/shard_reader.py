"""Reading files of ``torch.distributed.checkpoint`` without running code.

torch reads the metadata, and values that are not tensors, by unpickling them. Here the metadata is
unpickled with an allow-list, and everything that is not a tensor is refused.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from hookengine_checkpoint.files import METADATA
from hookengine_checkpoint.integrity import DamagedError


class ShardReader(FileSystemReader):
    """Reads shards, and only such metadata as torch writes for tensors."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Read the metadata.

        Raises:
            DamagedError: It is not metadata of tensors, or refers to files outside of the folder.
            pickle.UnpicklingError: It refers to anything that is not on the allow-list.
        """
        with self.fs.create_stream(self._get_metadata_path(), "rb") as file:
            metadata = _Metadata(file).load()
        if not isinstance(metadata, Metadata):
            raise DamagedError(f"{self.path} holds no metadata of torch.distributed.checkpoint")
        if odd := [
            name
            for name, kind in metadata.state_dict_metadata.items()
            if not isinstance(kind, TensorStorageMetadata)
        ]:
            raise DamagedError(
                f"{self.path} holds {odd[0]}, which is not a tensor; it was not read"
            )
        for info in metadata.storage_data.values():
            if Path(info.relative_path).name != info.relative_path:
                raise DamagedError(
                    f"{self.path} refers to {info.relative_path}, outside the folder"
                )
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        return metadata


class TensorPlanner(DefaultLoadPlanner):
    """Loads tensors, and refuses values of other kinds, which torch would unpickle."""

    def load_bytes(self, read_item: Any, value: Any) -> None:
        """Refuse a value that is not a tensor.

        Raises:
            DamagedError: Always.
        """
        raise DamagedError(f"{read_item.storage_index.fqn} is not a tensor; it was not read")


class _Metadata(pickle.Unpickler):
    """Unpickles the classes of ``torch.distributed.checkpoint``'s metadata, and nothing else."""

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

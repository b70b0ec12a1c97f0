"""What W&B's local files of a run hold: one ``.wandb`` file for each time that it was started.

Such a file is a log of LevelDB's kind: seven bytes that say what it is, then blocks of 32 KiB, in
which each piece of a record has a header of seven bytes (checksum, length, type); a record is a
``Record`` of W&B's protocol.
https://github.com/google/leveldb/blob/main/doc/log_format.md
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

_BLOCK = 32768
_HEADER = struct.Struct("<IHB")
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4
_Record: Any = getattr(wandb_internal_pb2, "Record")  # noqa: B009  (made when it is imported)


def segments(folder: Path, run_id: str) -> list[Path]:
    """The local files of a run, oldest first.

    Args:
        folder: W&B's, in which each start of a run has a folder of its own.
        run_id: Of the run.
    """
    return sorted(folder.glob(f"*run-*-{run_id}/run-{run_id}.wandb"), key=_start)


def _start(file: Path) -> str:
    """When it was started, as the name of its folder tells."""
    return file.parent.name.removeprefix("offline-")


def rows(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of history in one file, as far as it is whole."""
    for data in _records(file.read_bytes()):
        record = _Record.FromString(data)
        if record.HasField("history"):
            yield {
                item.key or "/".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }


def _records(data: bytes) -> Iterator[bytes]:
    position, parts = 7, b""
    while position + _HEADER.size <= len(data):
        if _BLOCK - position % _BLOCK < _HEADER.size:  # no header fits: the rest is padding
            position += _BLOCK - position % _BLOCK
            continue
        checksum, length, kind = _HEADER.unpack_from(data, position)
        position += _HEADER.size
        part = data[position : position + length]
        position += length
        if len(part) < length or zlib.crc32(part, zlib.crc32(bytes([kind]))) != checksum:
            return  # a kill has cut it short
        parts = part if kind in (_FULL, _FIRST) else parts + part
        if kind in (_FULL, _LAST):
            yield parts

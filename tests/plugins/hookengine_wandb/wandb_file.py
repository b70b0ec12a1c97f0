"""Reads what W&B's client has written: a log of LevelDB's kind, of ``wandb.proto`` records."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]


def read(file: Path) -> Iterator[Any]:
    """The records; blocks of 32 KiB hold pieces with a header of 7 bytes: crc, length, type."""
    data = file.read_bytes()
    assert data[:4] == b":W&B"
    whole = b""
    for start in range(0, len(data), 32768):
        block = data[start : start + 32768]
        at = 7 if start == 0 else 0
        while at + 7 <= len(block):
            length, kind = int.from_bytes(block[at + 4 : at + 6], "little"), block[at + 6]
            if kind == 0 or at + 7 + length > len(block):
                break
            whole += block[at + 7 : at + 7 + length]
            at += 7 + length
            if kind in (1, 4):  # full, last
                yield Record.FromString(whole)
                whole = b""


def history(file: Path) -> list[dict[str, Any]]:
    """The rows; a nested key, of a histogram or an image, is ``"NAME/PART"``."""
    return [
        {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
        for record in read(file)
        if record.HasField("history")
    ]


def summary(file: Path) -> dict[str, Any]:
    """What the summary holds at the end."""
    values: dict[str, Any] = {}
    for record in read(file):
        for item in record.summary.update:
            values[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
    return values

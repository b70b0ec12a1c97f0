"""Checkpoints on disk: what they consist of, and how they are read without running code.

A checkpoint is a folder with ``state.pth``, a file of ``torch.save``, and ``manifest.json``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hookengine import RunFolder
from hookengine_checkpoint.integrity import DamagedError, archive_at, crc32, digest, records

FORMAT = 1
STATE = "state.pth"
METADATA = ".metadata"
"""The file of ``torch.distributed.checkpoint`` in a checkpoint with sharded tensors."""


@dataclass(frozen=True)
class Saved:
    """A published checkpoint.

    Attributes:
        path: Its folder.
        manifest: Its manifest.
    """

    path: Path
    manifest: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The name of its folder."""
        return self.path.name

    @property
    def iter(self) -> int:
        """The number of finished iterations."""
        return int(self.manifest["progress"]["iter"])

    @property
    def number(self) -> int:
        """Its place in the order of publication."""
        return int(self.manifest["number"])


def is_checkpoint_folder(path: Path) -> bool:
    """Return whether a path is a folder, not a link, with the name of a checkpoint."""
    named = re.fullmatch(r"(epoch|iter)_\d+(_\d+)?", path.name)
    return named is not None and not path.is_symlink() and path.is_dir()


def published(folder: Path, damaged: Callable[[str], None] | None = None) -> list[Saved]:
    """List the checkpoints in a folder in the order of their publication.

    Args:
        folder: The folder; it may be missing.
        damaged: Called with a text for each checkpoint whose manifest cannot be read.
    """
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        if not is_checkpoint_folder(path):
            continue
        try:
            found.append(read_manifest(path))
        except DamagedError as error:
            if damaged is not None:
                damaged(str(error))
    return sorted(found, key=lambda saved: saved.number)


def has_manifest(path: Path) -> bool:
    """Return whether a folder has the manifest of a checkpoint, intact or damaged.

    Other projects write files of that name, too.
    """
    file = RunFolder.manifest(path)
    try:
        content = json.loads(file.read_bytes())
    except ValueError:  # damaged
        return True
    except OSError:
        return file.exists()
    return isinstance(content, dict) and not {"files", "checksum"}.isdisjoint(content)


def read_manifest(path: Path) -> Saved:
    """Read the manifest of the checkpoint in a folder.

    Raises:
        DamagedError: The manifest is missing, damaged or of a later version.
    """
    file = RunFolder.manifest(path)
    try:
        manifest = json.loads(file.read_bytes())
        expected = manifest.pop("checksum")
        same = expected == digest(manifest)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise DamagedError(f"{path} has no readable {file.name}: {error}") from error
    if not same:
        raise DamagedError(f"{file} is damaged: its checksum differs")
    if manifest["format"] > FORMAT:
        raise DamagedError(
            f"{path} has format {manifest['format']}, of a later hookengine; this version reads "
            f"formats up to {FORMAT}"
        )
    return Saved(path, manifest)


def verify(saved: Saved) -> None:
    """Read all files of a checkpoint and compare them with its manifest.

    Raises:
        DamagedError: A file is missing or differs from what was written.
    """
    for name, expected in saved.manifest["files"].items():
        path = saved.path / name
        if path.is_symlink() or not path.is_file():
            raise DamagedError(f"{path} is missing or not a regular file")
        if (size := path.stat().st_size) != expected["size"]:
            raise DamagedError(f"{path} has {size} bytes instead of {expected['size']}")
        if "records" in expected:
            with archive_at(path) as archive:
                bad = archive.testzip()
                same = bad is None and records(archive, path) == expected["records"]
        else:
            same = crc32(path) == expected["crc32"]
        if not same:
            raise DamagedError(f"{path} is damaged: its checksum differs")


def read_state(path: Path) -> dict[str, Any]:
    """Read the state of a Runner from a file of ``torch.save``, onto the CPU.

    Raises:
        DamagedError: The file cannot be read, holds no state of a Runner, or holds objects that
            only code could restore.
        OSError: The file cannot be opened.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a damaged pickle can fail with any exception
        if named := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise DamagedError(
                f"{path} refers to {named[1]}, which could run code; nothing was loaded or run"
            ) from None  # torch's error advises to load the file regardless
        first = (str(error).strip().splitlines() or [""])[0]
        raise DamagedError(f"{path} cannot be read: {type(error).__name__}: {first}") from error
    if not isinstance(state, dict):
        raise DamagedError(f"{path} is not the state of a Runner")
    return state

"""Checkpoints on disk: published whole or not at all, and read without running anything.

A checkpoint is a folder: ``state.pth``, a file of ``torch.save``, and ``manifest.json``. It is
written under another name, which begins with a dot, and renamed when everything is on the disk.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch

from hookengine_checkpoint.integrity import (
    DamagedError,
    archive_at,
    checksum,
    crc32,
    digest,
    records,
)

FORMAT = 1
STATE = "state.pth"
MANIFEST = "manifest.json"
ABANDONED = "abandoned"
METADATA = ".metadata"
"""Of ``torch.distributed.checkpoint``, where tensors are sharded."""


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
        """The iterations that were finished."""
        return int(self.manifest["progress"]["iter"])

    @property
    def number(self) -> int:
        """Its place in the order of publication."""
        return int(self.manifest["number"])


# -- writing ------------------------------------------------------------------------------------


@contextmanager
def publishing(path: Path) -> Iterator[Path]:
    """A folder to write into, which becomes ``path`` at the end, whole; or nothing, on an error.

    Args:
        path: It must not exist.
    """
    temporary = make_folder(path.with_name(f".{path.name}.saving"))
    try:
        yield temporary
        sync_folder(temporary)
        os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(path.parent)


def publish(
    path: Path, state: Any, manifest: Mapping[str, Any], shards: Path | None = None
) -> Saved:
    """Write a checkpoint: it is there whole, or not at all.

    Args:
        path: Where; it must not exist.
        state: Tensors and plain containers.
        manifest: What it says beside the format and the checksums.
        shards: A folder of further files, which are moved.
    """
    with publishing(path) as folder:
        write_state(folder, state)
        if shards is not None:
            move_all(shards, folder)
        whole = write_manifest(folder, manifest)
    return Saved(path, whole)


def make_folder(path: Path) -> Path:
    """Make an empty folder, whatever a kill has left there."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def move_all(source: Path, folder: Path) -> None:
    """Move the files of one folder to another."""
    for path in source.iterdir():
        path.rename(folder / path.name)
    source.rmdir()


def write_state(folder: Path, state: Any) -> None:
    """Write a state, to the disk."""
    # An open file, since torch's own keeps the interpreter locked while it writes.
    with _Complete(folder / STATE) as file:
        torch.save(state, cast("IO[bytes]", file))


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Write the manifest, with the checksums of all files that are there.

    Returns:
        The manifest.
    """
    files = {p.name: checksum(p) for p in sorted(folder.iterdir()) if p.name != MANIFEST}
    whole: dict[str, Any] = {"format": FORMAT, **manifest, "files": files}
    whole["checksum"] = digest(whole)
    with _Complete(folder / MANIFEST) as file:
        file.write(json.dumps(whole, indent=2).encode() + b"\n")
    return whole


class _Complete:
    """A new file, which is on the disk when it is closed; an error in writing is raised at the end.

    torch's writer takes what a failing ``write`` raises for a reason of its own, so that the error
    which says what to do would be hidden.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("xb", buffering=0)
        self._error: OSError | None = None

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        size, done = len(view), 0
        while done < size and self._error is None:
            try:
                done += self._file.write(view[done:]) or 0
            except OSError as error:
                self._error = error
        return size

    def flush(self) -> None: ...

    def __enter__(self) -> _Complete:
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        try:
            if self._error is not None:
                raise self._error
            if error is None:
                os.fsync(self._file.fileno())
        finally:
            self._file.close()


def sync_folder(folder: Path) -> None:
    """Have what was made, renamed or removed in a folder on the disk."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a checkpoint; under its name it is there whole, or not at all."""
    leaving = path.with_name(f".{path.name}.leaving")
    shutil.rmtree(leaving, ignore_errors=True)
    os.rename(path, leaving)
    shutil.rmtree(leaving, ignore_errors=True)


def rename(saved: Saved, name: str) -> Saved:
    """Give a checkpoint another name, if that is free."""
    path = saved.path.with_name(name)
    if os.path.lexists(path):
        return saved
    os.rename(saved.path, path)
    return Saved(path, saved.manifest)


def clean(folder: Path) -> None:
    """Remove what a kill has left half written or half removed."""
    if folder.is_dir():
        for path in folder.iterdir():
            if re.fullmatch(r"\..+\.(saving|leaving|link)", path.name):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)


def link(folder: Path, name: str, target: str) -> None:
    """Have ``folder/name`` point to a checkpoint; where there are no symbolic links, nothing."""
    temporary = folder / f".{name}.link"
    with suppress(OSError, NotImplementedError):
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(target)
        os.replace(temporary, folder / name)


def free_path(folder: Path, name: str) -> Path:
    """A path in the folder that is not taken: ``name``, or ``name_2`` and so on."""
    path, number = folder / name, 1
    while os.path.lexists(path):
        number += 1
        path = folder / f"{name}_{number}"
    return path


# -- reading ------------------------------------------------------------------------------------


def verify(saved: Saved) -> None:
    """Read all files of a checkpoint and compare them with the manifest.

    Raises:
        DamagedError: one is missing or not what was written.
    """
    for name, expected in saved.manifest["files"].items():
        path = saved.path / name
        if path.is_symlink() or not path.is_file():
            raise DamagedError(f"{path} is missing, or no file of its own")
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


def read_manifest(path: Path) -> Saved:
    """The checkpoint in a folder.

    Raises:
        DamagedError: its manifest is missing or damaged, or of a later version.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        told = manifest.pop("checksum")
        same = told == digest(manifest)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise DamagedError(f"{path} has no readable {MANIFEST}: {error}") from error
    if not same:
        raise DamagedError(f"{path / MANIFEST} is damaged: its checksum differs")
    if manifest["format"] > FORMAT:
        raise DamagedError(
            f"{path} has format {manifest['format']}, of a later hookengine: this one reads up to "
            f"{FORMAT}"
        )
    return Saved(path, manifest)


def is_ours(path: Path) -> bool:
    """Whether it is a folder that has the name of a checkpoint."""
    named = re.fullmatch(r"(epoch|iter)_\d+(_\d+)?", path.name)
    return named is not None and not path.is_symlink() and path.is_dir()


def set_aside(folder: Path, kept: Iterable[str]) -> list[Path]:
    """Move all checkpoints but those of the names given to ``abandoned``; returns the new paths."""
    names, moved = set(kept), []
    for path in sorted(folder.iterdir()):
        if is_ours(path) and path.name not in names:
            (folder / ABANDONED).mkdir(exist_ok=True)
            moved.append(path.rename(free_path(folder / ABANDONED, path.name)))
    return moved


def published(folder: Path, damaged: Callable[[str], None] | None = None) -> list[Saved]:
    """The checkpoints in a folder, in the order of their publication.

    Args:
        folder: It may be missing.
        damaged: Told of those whose manifest cannot be read.
    """
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        if not is_ours(path):
            continue
        try:
            found.append(read_manifest(path))
        except DamagedError as error:
            if damaged is not None:
                damaged(str(error))
    return sorted(found, key=lambda saved: saved.number)


def read_state(path: Path) -> Any:
    """What a file of ``torch.save`` holds.

    Raises:
        DamagedError: it cannot be read, or holds objects that only code could restore.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a damaged pickle fails in every way there is
        if named := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise DamagedError(
                f"{path} refers to {named[1]}, which could run code; nothing was loaded or run"
            ) from None  # the original advises to load it all the same
        first = (str(error).strip().splitlines() or [""])[0]
        raise DamagedError(f"{path} cannot be read: {type(error).__name__}: {first}") from error

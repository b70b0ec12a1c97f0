"""Writing checkpoints so that each one appears on the disk complete or not at all.

A checkpoint is written into a folder whose name begins with a dot, synchronized to the disk, and
renamed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, cast

import torch

from hookengine import RunFolder
from hookengine_checkpoint import files
from hookengine_checkpoint.files import STATE, Saved, is_checkpoint_folder
from hookengine_checkpoint.integrity import checksum, digest

ABANDONED = "abandoned"
"""The folder in ``checkpoints`` for those that a run does not continue from."""


@contextmanager
def publishing(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes ``path`` at the end, or is removed after an error.

    Args:
        path: The final path; it must not exist.
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
    """Write a checkpoint atomically.

    Args:
        path: Its folder, which must not exist.
        state: Tensors and plain containers.
        manifest: What the manifest holds besides the format and the checksums.
        shards: A folder of further files to move into the checkpoint.

    Raises:
        OSError: It could not be written; nothing is left of it.
    """
    with publishing(path) as folder:
        write_state(folder, state)
        if shards is not None:
            _move_files(shards, folder)
        complete = write_manifest(folder, manifest)
    return Saved(path, complete)


def write_state(folder: Path, state: Any) -> None:
    """Write a state into a folder and synchronize it to the disk."""
    # Given a path, torch would hold the interpreter's lock while it writes.
    with _SyncedFile(folder / STATE) as file:
        torch.save(state, cast("IO[bytes]", file))


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Write the manifest with the checksums of all files in the folder.

    Returns:
        The complete manifest.
    """
    path = RunFolder.manifest(folder)
    checksums = {p.name: checksum(p) for p in sorted(folder.iterdir()) if p != path}
    complete: dict[str, Any] = {"format": files.FORMAT, **manifest, "files": checksums}
    complete["checksum"] = digest(complete)
    with _SyncedFile(path) as file:
        file.write(json.dumps(complete, indent=2).encode() + b"\n")
    return complete


class _SyncedFile:
    """A new file that is synchronized to the disk when it is closed.

    A failed write is raised on exit: torch's writer would replace the exception with its own, which
    hides the reason (a full disk, say).
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

    def __enter__(self) -> _SyncedFile:
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
    """Synchronize the entries of a folder (files made, renamed or removed) to the disk."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> Path:
    """Make an empty folder; remove what a killed run has left there."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def _move_files(source: Path, folder: Path) -> None:
    for path in source.iterdir():
        path.rename(folder / path.name)
    source.rmdir()


def remove(path: Path) -> None:
    """Remove a checkpoint atomically: it is renamed first."""
    leaving = path.with_name(f".{path.name}.leaving")
    shutil.rmtree(leaving, ignore_errors=True)
    os.rename(path, leaving)
    shutil.rmtree(leaving, ignore_errors=True)


def rename(saved: Saved, name: str) -> Saved:
    """Rename a checkpoint unless the name is taken; return it under its present name."""
    path = saved.path.with_name(name)
    if os.path.lexists(path):
        return saved
    os.rename(saved.path, path)
    return Saved(path, saved.manifest)


def clean(folder: Path) -> None:
    """Remove what a killed run has left half written or half removed."""
    if folder.is_dir():
        for path in folder.iterdir():
            if re.fullmatch(r"\..+\.(saving|leaving|link)", path.name):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)


def link(folder: Path, name: str, target: str) -> None:
    """Point the symbolic link ``folder/name`` to a checkpoint, if the platform has such links."""
    temporary = folder / f".{name}.link"
    with suppress(OSError, NotImplementedError):
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(target)
        os.replace(temporary, folder / name)


def free_path(folder: Path, name: str) -> Path:
    """Return the first path in the folder that is not taken: ``name``, ``name_2`` and so on."""
    path, number = folder / name, 1
    while os.path.lexists(path):
        number += 1
        path = folder / f"{name}_{number}"
    return path


def abandon(folder: Path, kept: Iterable[str]) -> list[Path]:
    """Move all checkpoints except the named ones to ``abandoned``; return their new paths."""
    names, moved = set(kept), []
    for path in sorted(folder.iterdir()):
        if is_checkpoint_folder(path) and path.name not in names:
            (folder / ABANDONED).mkdir(exist_ok=True)
            moved.append(path.rename(free_path(folder / ABANDONED, path.name)))
    return moved

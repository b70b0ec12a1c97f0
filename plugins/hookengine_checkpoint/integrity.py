"""Checksums, which reveal a file that differs from what was written."""

from __future__ import annotations

import errno
import hashlib
import json
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class DamagedError(ValueError):
    """A checkpoint is missing parts or differs from what was written."""


def checksum(path: Path) -> dict[str, Any]:
    """Return the size and the checksum of a file.

    A file of ``torch.save`` is a zip archive, which already has a CRC-32 of each record. Its
    checksum is a digest of these CRC-32s and of all bytes between the records, so that the data is
    not read again. The checksum of any other file is its CRC-32, also if torch has left out those
    of the records (``torch.serialization.set_crc32_options(False)``).

    Raises:
        DamagedError: The archive cannot be read.
    """
    size = path.stat().st_size
    if path.suffix != ".pth":
        return {"size": size, "crc32": crc32(path)}
    with archive_at(path) as archive:
        if _has_checksums(archive):
            return {"size": size, "records": records(archive, path)}
    return {"size": size, "crc32": crc32(path)}


def _has_checksums(archive: zipfile.ZipFile) -> bool:
    return any(record.CRC for record in archive.infolist())


def records(archive: zipfile.ZipFile, path: Path) -> str:
    """Return a SHA-256 of the CRC-32s of all records and of all bytes that are not their data."""
    hashed = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        end = 0
        for record in sorted(archive.infolist(), key=lambda r: r.header_offset):
            file.seek(record.header_offset + 26)  # the lengths of the name and the extra field
            name, extra = struct.unpack("<HH", file.read(4))
            start = record.header_offset + 30 + name + extra
            file.seek(end)
            hashed.update(file.read(start - end))
            hashed.update(struct.pack("<QQ", record.CRC, record.compress_size))
            end = start + record.compress_size
        file.seek(end)
        hashed.update(file.read())
    return hashed.hexdigest()


def digest(value: Any) -> str:
    """Return the SHA-256 of values that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def crc32(path: Path) -> str:
    """Return the CRC-32 of a file as 8 hexadecimal digits."""
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            value = zlib.crc32(chunk, value)
    return f"{value:08x}"


_UNREADABLE = (
    zipfile.BadZipFile,
    EOFError,
    ValueError,
    RuntimeError,
    struct.error,
    zlib.error,
    OSError,
)


@contextmanager
def archive_at(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open a file of ``torch.save``; errors in reading it are raised as DamagedError."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except _UNREADABLE as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # from a damaged offset
            raise
        raise DamagedError(f"{path} is damaged: {error}. Copy or download it again") from error


def verify_archive(path: Path) -> None:
    """Compare the records of a file of ``torch.save`` with their CRC-32s, if it has any.

    Raises:
        DamagedError: A record differs.
    """
    with path.open("rb") as file:
        is_archive = file.read(4) == b"PK\x03\x04"  # as torch tells it
    if is_archive:
        with archive_at(path) as archive:
            bad = archive.testzip() if _has_checksums(archive) else None
        if bad is not None:
            raise DamagedError(
                f"{path} is damaged: the checksum of {bad} differs. Copy or download it again"
            )

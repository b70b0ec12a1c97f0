"""The images of records: encoded, and kept as PNG files in the folder ``media``."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hookengine import Image, Record, RunFolder
from hookengine_logging.meter import Medium


def keep_encodable(
    media: Mapping[str, Medium], reject: Callable[[str, str], None]
) -> dict[str, Medium]:
    """Return the media without the images that cannot be encoded as PNG.

    Args:
        media: By name.
        reject: Called with the name of such an image, and the reason.
    """
    good: dict[str, Medium] = {}
    for name, medium in media.items():
        try:
            if isinstance(medium, Image):
                len(medium.png)
            good[name] = medium
        except Exception as error:
            reject(name, f"({medium!r}) is left out of the records: {error}")
    return good


class ImageFolder:
    """The folder ``media`` in a run's folder, which is created with the first image.

    Args:
        run_dir: The run's folder.
    """

    def __init__(self, run_dir: Path) -> None:
        self._folder = RunFolder(run_dir).media
        self._warned = False

    def save(self, record: Record, logger: Any) -> dict[str, str]:
        """Write the images of a record; those of a repeated iteration replace the earlier ones.

        Images that cannot be written are left out, and the first one is reported.

        Returns:
            The file of each image, by name, relative to the run's folder.
        """
        saved = {}
        for name, medium in record.media.items():
            if not isinstance(medium, Image):
                continue
            path = self._folder / f"{record.phase}_{record.iter:06}_{_as_file_name(name)}.png"
            file = f"{self._folder.name}/{path.name}"
            try:
                self._folder.mkdir(exist_ok=True)
                path.write_bytes(medium.png)
                saved[name] = file
            except OSError as error:
                if not self._warned:
                    self._warned = True
                    logger.warning(
                        f"cannot write {file}: {error.strerror}. Training continues, and images "
                        "that cannot be written are left out of metrics.jsonl"
                    )
        return saved


def _as_file_name(name: str) -> str:
    """Turn a name into part of a file name; two names never give the same one."""
    plain = re.sub(r"[^A-Za-z0-9_.-]", "_", name)[:80]
    return plain if plain == name else f"{plain}_{zlib.crc32(name.encode()):08x}"

"""The weights that a path stands for, in a checkpoint or in any other file."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hookengine_checkpoint.export import read_weights
from hookengine_checkpoint.find import at


def find_weights(
    path: str | os.PathLike[str], log: Callable[[str], None] = print
) -> Path | Mapping[str, Any]:
    """Find the weights that a path stands for, and check that they are intact.

    A file is compared with the manifest of its checkpoint. Without one, each record of a zip
    archive, as ``torch.save`` writes it, is compared with its CRC-32. Files in other formats have
    no checksums and are not read.

    Args:
        path: A checkpoint, a run, or the folder of its checkpoints, as for ``Runner(resume=...)``;
            or any file with weights.
        log: Called with a text for each damaged checkpoint that is skipped.

    Returns:
        The file that holds the weights; or, if they are sharded, the weights by name.

    Raises:
        FileNotFoundError: There is no checkpoint or file.
        ValueError: The checkpoint or file is damaged.
    """
    found = at(Path(path).expanduser(), log)
    return read_weights(found) if found.is_sharded else found.state

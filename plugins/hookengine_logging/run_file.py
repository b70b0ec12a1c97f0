"""``run.json``: what a run consists of, and how it ended."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hookengine import RunFolder


class RunFile:
    """The file ``run.json``.

    Args:
        path: Where to write it.
        description: What the run consists of, as values that JSON can hold.
    """

    def __init__(self, path: Path, description: Mapping[str, Any]) -> None:
        self._path = path
        self._fields = {**description, "started": round(time.time(), 3)}

    def describe(self, description: Mapping[str, Any]) -> None:
        """Replace the description: plugins may have been added since."""
        self._fields.update(description)

    def write(self, status: str, logger: Any, **more: Any) -> None:
        """Replace the file atomically; if that fails, log a warning.

        Args:
            status: ``running``, or how the run ended.
            logger: The run's logger.
            more: Further fields, as values that JSON can hold.
        """
        fields = {**self._fields, "status": status, **more}
        temporary = self._path.with_suffix(".tmp")
        try:
            temporary.write_text(json.dumps(fields, indent=2) + "\n")
            temporary.replace(self._path)
        except OSError as error:
            logger.warning(f"cannot write {error.filename}: {error.strerror}")


def history_id(folder: RunFolder) -> str | None:
    """Read from a run's folder which history its records belong to; None if that is unknown."""
    try:
        history = json.loads(folder.description.read_text()).get("history")
    except (OSError, ValueError, AttributeError):
        return None
    return str(history) if history is not None else None

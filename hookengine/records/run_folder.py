"""The folder of a run: its name, and the names of what plugins write into it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunFolder:
    """The paths in the folder of a run. None of them needs to exist.

    Args:
        path: The folder, ``runner.run_dir``.
    """

    path: Path

    @property
    def metrics(self) -> Path:
        """``metrics.jsonl``: the history, one record per line; see ``read_records``."""
        return self.path / "metrics.jsonl"

    @property
    def description(self) -> Path:
        """``run.json``: the model, the options, the plugins, and how the run ended."""
        return self.path / "run.json"

    @property
    def log(self) -> Path:
        """``run.log``: the lines of the console and the warnings of Python and torch."""
        return self.path / "run.log"

    @property
    def media(self) -> Path:
        """``media``: the images of the records."""
        return self.path / "media"

    @property
    def checkpoints(self) -> Path:
        """``checkpoints``: one folder per checkpoint."""
        return self.path / "checkpoints"

    @staticmethod
    def manifest(checkpoint: Path) -> Path:
        """``manifest.json`` in the folder of a checkpoint: its metrics, files and checksums."""
        return checkpoint / "manifest.json"


def check_name(name: str) -> str:
    """Return the name of a run, if it can be the name of a folder within ``work_dir``.

    Raises:
        TypeError: ``name`` is not a string.
        ValueError: ``name`` is empty, or leads out of ``work_dir``.
    """
    if not isinstance(name, str):
        raise TypeError(f"the name of a run must be a string, got {name!r}")
    parts = Path(name).parts
    if not parts or ".." in parts or Path(name).is_absolute():
        raise ValueError(
            f"the name of a run must be the name of a folder within work_dir, got {name!r}"
        )
    return name


def make_folder(work_dir: Path, name: str, shared: bool) -> str:
    """Create the folder of a run, and return the name of the run.

    Args:
        work_dir: The folder of all runs.
        name: The wanted name.
        shared: Whether the folder may exist. Otherwise, the run gets another name if it does.

    Raises:
        OSError: The folder cannot be created.
    """
    wanted, number = name, 1
    while True:
        folder = work_dir / name
        try:
            folder.mkdir(parents=True, exist_ok=shared)
        except FileExistsError as error:
            if not shared and folder.is_dir():
                number += 1
                name = f"{wanted}_{number}"
                continue
            raise _unusable(folder, error) from error
        except OSError as error:
            raise _unusable(folder, error) from error
        return name


def _unusable(folder: Path, error: OSError) -> OSError:
    return OSError(
        f"cannot create the folder of the run, {folder}: {error.strerror}. Pass another work_dir"
    )

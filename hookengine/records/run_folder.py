"""The folder of a run: its name, and the names of what plugins write into it."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hookengine import dist


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


class NamedRun:
    """Give the Runner its name, and the folder of that name.

    An unnamed run reserves its folder when the Runner is built, so that no other run gets the name.
    If nothing was written into the folder, it is removed when the Runner closes.
    """

    work_dir: Path
    name: str
    _named = False
    _made = False
    _reserved: Path | None = None
    _first = False

    def _name_run(self, work_dir: str | os.PathLike[str], name: str | None) -> None:
        self.work_dir = absolute_path(work_dir)
        self._named = name is not None
        self.name = time.strftime("%Y%m%d_%H%M%S") if name is None else check_name(name)

    @property
    def named(self) -> bool:
        """Whether the run got its name from you or from an earlier run that it continues."""
        return self._named

    @property
    def run_dir(self) -> Path:
        """The folder of this run, ``work_dir/name``. See ``make_run_dir``."""
        return self.work_dir / self.name

    def make_run_dir(self) -> Path:
        """Create the folder of the run, ``work_dir/name``, and return it.

        A run without a given name never shares a folder: if the folder exists, the run gets another
        name. A run with a given name continues in the existing folder. With several ranks, rank 0
        creates the folder.

        Raises:
            OSError: The folder cannot be created.
        """
        if not self._made:
            shared = self._named or self._reserved is not None or not dist.is_main_process()
            self.name = make_folder(self.work_dir, self.name, shared)
            self._made, self._reserved = True, None
        return self.run_dir

    def use_name(self, name: str) -> None:
        """Give the run another name, and thereby another folder; call it in ``configure``.

        Raises:
            RuntimeError: The folder of the run is already created.
            ValueError: The name cannot be the name of a folder in ``work_dir``.
        """
        if self._made and name != self.name:
            raise RuntimeError(
                f"cannot name the run {name!r}, because its folder {self.run_dir} is already "
                "created. Call use_name or continue_run in configure"
            )
        self._release_folder()
        self.name = check_name(name)

    def continue_run(self, name: str) -> None:
        """Continue in the folder of an earlier run, ``work_dir/name``, even if it exists.

        Raises:
            RuntimeError: The folder of this run is already created.
        """
        self.use_name(name)
        self._named = True

    def _reserve_folder(self) -> None:
        """Create the folder of an unnamed run on rank 0, so that its name is final."""
        if self._named or self._made or not dist.is_main_process():
            return
        self._first = not self.work_dir.exists()
        with suppress(OSError):  # a run that writes nothing needs no folder
            self.name = make_folder(self.work_dir, self.name, shared=False)
            self._reserved = self.run_dir

    def _release_folder(self) -> None:
        """Remove the reserved folder if nothing was written into it."""
        if self._reserved is not None:
            with suppress(OSError):
                self._reserved.rmdir()
                if self._first:
                    self.work_dir.rmdir()  # unless there are other runs
            self._reserved = None


def absolute_path(path: str | os.PathLike[str]) -> Path:
    """Return a path that stays the same when the working directory changes, with ``~`` expanded."""
    return Path(path).expanduser().absolute()


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

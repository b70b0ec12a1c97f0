"""Which checkpoint a run goes on from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hookengine_checkpoint.files import (
    MANIFEST,
    STATE,
    Saved,
    is_ours,
    published,
    read_manifest,
    verify,
)
from hookengine_checkpoint.integrity import DamagedError, verify_archive

FOLDER = "checkpoints"
"""The folder of the checkpoints in that of a run."""


@dataclass(frozen=True)
class Found:
    """What to go on from.

    Attributes:
        path: A checkpoint's folder, or a file of ``torch.save(runner.state_dict())``.
        saved: The checkpoint, where it is one.
        is_newest: Whether nothing was published after it in its folder.
    """

    path: Path
    saved: Saved | None = None
    is_newest: bool = False

    @property
    def run_dir(self) -> Path | None:
        """The folder of the run that saved it, where it still lies there."""
        inside = self.saved is not None and self.path.parent.name == FOLDER
        return self.path.parent.parent if inside else None

    @property
    def state(self) -> Path:
        """The file of the state."""
        return self.path if self.saved is None else self.path / STATE


def newest_under(work_dir: Path, tell: Callable[[str], None]) -> Found | None:
    """The newest checkpoint of all runs in a folder, or None.

    Args:
        work_dir: With a folder for each run.
        tell: Told of damaged ones.
    """
    runs = work_dir.iterdir() if work_dir.is_dir() else ()
    times = {run / FOLDER: _saved_at(run / FOLDER) for run in runs}
    newest = max(times, key=times.__getitem__, default=None)
    return None if newest is None or not times[newest] else newest_in(newest, tell)


def _saved_at(folder: Path) -> str:
    """When the newest checkpoint of a folder was saved, damaged ones included; "" for none."""
    times = [""]
    for path in folder.iterdir() if folder.is_dir() else ():
        if is_ours(path):
            try:
                times.append(str(read_manifest(path).manifest["saved_at"]))
            except DamagedError:
                changed = datetime.fromtimestamp(path.stat().st_mtime, UTC)
                times.append(changed.isoformat())
    return max(times)


def newest_in(folder: Path, tell: Callable[[str], None]) -> Found | None:
    """The newest checkpoint in a folder that is whole, finite where there is one; None if empty.

    Raises:
        DamagedError: there are some, and none is whole.
    """
    damaged: list[str] = []
    there = published(folder, damaged.append)
    last = there[-1].number if there else 0
    ordered = sorted(there, key=lambda s: (bool(s.manifest.get("finite", True)), s.number))
    found = None
    for saved in reversed(ordered):
        try:
            verify(saved)
        except (DamagedError, OSError) as error:
            damaged.append(str(error))
            continue
        found = Found(saved.path, saved, saved.number == last)
        break
    if found is None:
        if damaged:
            raise DamagedError(
                f"no checkpoint in {folder} is whole: {'; '.join(damaged)}. To begin anew, leave "
                "resume= out or move that folder away"
            )
        return None
    for text in damaged:
        tell(f"{text}; it is passed over")
    if found.saved is not None and found.saved.number < last and not damaged:
        tell(
            f"the weights in later checkpoints than {found.path.name} are not finite; they are "
            "passed over"
        )
    return found


def at(path: Path, tell: Callable[[str], None]) -> Found:
    """The checkpoint that a path names.

    Args:
        path: A checkpoint, or its ``state.pth``; the folder of a run or of its checkpoints, or
            ``latest`` in the latter, for the newest one; or a file of
            ``torch.save(runner.state_dict())``.
        tell: Told of damaged ones that were passed over.

    Raises:
        FileNotFoundError: there is none. DamagedError: it is not whole.
    """
    if path.name == "latest" and (path.is_symlink() or not path.exists()):
        path = path.parent
    if path.is_symlink():  # best, say: it is a name of the checkpoint beside it
        target = path.resolve()
        path = path.parent / target.name if target.parent == path.parent.resolve() else target
    if path.is_file() and path.name == STATE and (path.parent / MANIFEST).exists():
        path = path.parent
    if path.is_file():
        verify_archive(path)
        return Found(path)
    if (path / MANIFEST).exists() or (path / STATE).exists():
        saved = read_manifest(path)
        verify(saved)
        last = max((s.number for s in published(path.parent)), default=saved.number)
        return Found(path, saved, saved.number == last)
    folder = path / FOLDER if (path / FOLDER).is_dir() else path
    if (found := newest_in(folder, tell)) is not None:
        return found
    near = path if path.is_dir() else path.parent
    there = ", ".join(saved.name for saved in published(near)) or "none"
    raise FileNotFoundError(f"there is no checkpoint {path}; in {near} there are: {there}")


def find(runner: Any, tell: Callable[[str], None]) -> Found | None:
    """What ``Runner(resume=...)`` asks for; the run continues in the folder that it began in.

    An older checkpoint than the newest of its run begins a run of its own, which leaves that one as
    it is, unless the Runner has the name of that run.
    """
    wanted = runner.resume_from
    if wanted is None:
        return None
    work_dir = runner.work_dir.resolve()
    found: Found | None
    if wanted != "auto":
        found = at(Path(wanted).expanduser(), tell)
    elif runner.named:
        found = newest_in(runner.run_dir / FOLDER, tell)
    else:
        found = newest_under(runner.work_dir, tell)
    if found is None:
        where = runner.run_dir if runner.named else runner.work_dir
        tell(f"resume='auto': there is no checkpoint in {where} yet: the run begins anew")
        return None
    run = found.run_dir
    if run is not None and run.parent.resolve() == work_dir and not runner.named:
        if found.is_newest or wanted == "auto":
            runner.continue_run(run.name)
        else:
            tell(
                f"{found.path.name} is not the newest checkpoint of {run.name}: what follows is a "
                f"run of its own (Runner(name={run.name!r}) goes on in the folder of that one)"
            )
    return found

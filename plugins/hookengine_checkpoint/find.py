"""Which checkpoint a run resumes from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from hookengine import RunFolder, Runner
from hookengine_checkpoint.files import (
    METADATA,
    STATE,
    Saved,
    has_manifest,
    is_checkpoint_folder,
    published,
    read_manifest,
    verify,
)
from hookengine_checkpoint.integrity import DamagedError, verify_archive


@dataclass(frozen=True)
class Found:
    """A checkpoint to resume from.

    Attributes:
        path: The folder of a checkpoint, or a file of ``torch.save(runner.state_dict())``.
        saved: The checkpoint; None for a file.
        is_newest: Whether it is the newest checkpoint in its folder.
    """

    path: Path
    saved: Saved | None = None
    is_newest: bool = False

    @property
    def run_dir(self) -> Path | None:
        """The folder of the run that saved it, if the checkpoint is still there."""
        folder = self.path.parent
        inside = self.saved is not None and folder == RunFolder(folder.parent).checkpoints
        return folder.parent if inside else None

    @property
    def state(self) -> Path:
        """The file with the state."""
        return self.path if self.saved is None else self.path / STATE

    @property
    def is_sharded(self) -> bool:
        """Whether its tensors are sharded."""
        return (self.path / METADATA).exists()

    def continues(self, runner: Runner) -> bool:
        """Return whether the run continues the one that saved it, in the same folder."""
        if self.saved is None or not runner.named:
            return False
        return self.path.parent.resolve() == RunFolder(runner.run_dir).checkpoints.resolve()


def newest_under(work_dir: Path, log: Callable[[str], None]) -> Found | None:
    """Find the newest checkpoint of all runs in a folder, or None.

    Args:
        work_dir: A folder with the folders of runs.
        log: Called with a text for each damaged checkpoint.
    """
    runs = work_dir.iterdir() if work_dir.is_dir() else ()
    folders = [RunFolder(run).checkpoints for run in runs]
    times = {folder: _last_saved_at(folder) for folder in folders}
    newest = max(times, key=times.__getitem__, default=None)
    return None if newest is None or not times[newest] else newest_in(newest, log)


def _last_saved_at(folder: Path) -> str:
    """Return when the newest checkpoint, damaged or not, was saved; "" if there is none."""
    times = [""]
    for path in folder.iterdir() if folder.is_dir() else ():
        if is_checkpoint_folder(path):
            try:
                times.append(str(read_manifest(path).manifest["saved_at"]))
            except DamagedError:
                changed = datetime.fromtimestamp(path.stat().st_mtime, UTC)
                times.append(changed.isoformat())
    return max(times)


def newest_in(folder: Path, log: Callable[[str], None]) -> Found | None:
    """Find the newest intact checkpoint in a folder, or None; finite weights take precedence.

    Args:
        folder: The folder of the checkpoints of a run.
        log: Called with a text for each checkpoint that is skipped.

    Raises:
        DamagedError: All checkpoints are damaged.
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
                f"no checkpoint in {folder} is intact: {'; '.join(damaged)}. To start over, remove "
                "resume= or move that folder away"
            )
        return None
    for text in damaged:
        log(f"{text}; it is skipped")
    if found.saved is not None and found.saved.number < last and not damaged:
        log(f"skipping the checkpoints after {found.path.name}: their weights are not finite")
    return found


def at(path: Path, log: Callable[[str], None]) -> Found:
    """Find the checkpoint at a path.

    Args:
        path: A checkpoint or its ``state.pth``; the folder of a run, of its checkpoints, or
            ``latest`` in the latter, for the newest one; or a file of
            ``torch.save(runner.state_dict())``.
        log: Called with a text for each checkpoint that is skipped.

    Raises:
        FileNotFoundError: There is no checkpoint.
        DamagedError: The checkpoint is damaged.
    """
    if path.name == "latest" and (path.is_symlink() or not path.exists()):
        path = path.parent
    if path.is_symlink():  # such as best, a link to a checkpoint beside it
        target = path.resolve()
        path = path.parent / target.name if target.parent == path.parent.resolve() else target
    if path.is_file() and path.name == STATE and has_manifest(path.parent):
        path = path.parent
    if path.is_file():
        verify_archive(path)
        return Found(path)
    if RunFolder.manifest(path).exists() or (path / STATE).exists():
        saved = read_manifest(path)
        verify(saved)
        last = max((s.number for s in published(path.parent)), default=saved.number)
        return Found(path, saved, saved.number == last)
    inside = RunFolder(path).checkpoints
    if (found := newest_in(inside if inside.is_dir() else path, log)) is not None:
        return found
    near = path if path.is_dir() else path.parent
    there = ", ".join(saved.name for saved in published(near)) or "none"
    raise FileNotFoundError(f"there is no checkpoint {path}; the checkpoints in {near}: {there}")


def find(runner: Runner, log: Callable[[str], None]) -> Found | None:
    """Find the checkpoint that ``Runner(resume=...)`` names, and continue the run that saved it.

    An older checkpoint than the newest of its run starts a new run, which leaves the other one
    unchanged, unless the Runner has the name of that run.

    Args:
        runner: The Runner; ``continue_run`` is called to continue an earlier run.
        log: Called with texts for the log.

    Raises:
        FileNotFoundError: There is no checkpoint at the path.
        DamagedError: The checkpoint is damaged, or all are.
    """
    wanted = runner.resume_from
    if wanted is None:
        return None
    work_dir = runner.work_dir.resolve()
    found: Found | None
    if wanted != "auto":
        found = at(Path(wanted).expanduser(), log)
    elif runner.named:
        found = newest_in(RunFolder(runner.run_dir).checkpoints, log)
    else:
        found = newest_under(runner.work_dir, log)
    if found is None:
        where = runner.run_dir if runner.named else runner.work_dir
        log(f"resume='auto': there is no checkpoint in {where} yet; starting a new run")
        return None
    run = found.run_dir
    if run is not None and run.parent.resolve() == work_dir and not runner.named:
        if found.is_newest or wanted == "auto":
            runner.continue_run(run.name)
        else:
            log(
                f"{found.path.name} is not the newest checkpoint of {run.name}: starting a new run "
                f"(Runner(name={run.name!r}) continues in the folder of that run)"
            )
    return found

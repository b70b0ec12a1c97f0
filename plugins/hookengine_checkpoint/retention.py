"""Which checkpoints of a run are kept."""

from __future__ import annotations

import uuid
from pathlib import Path

from hookengine_checkpoint import writing
from hookengine_checkpoint.files import Saved, published
from hookengine_checkpoint.find import Found


class RunCheckpoints:
    """The checkpoints that a run has published, and may remove.

    Args:
        keep_last: How many of the last ones to keep; None keeps all.

    Attributes:
        kept: The checkpoints on the disk, in the order of their publication.
        lineage: Identifies the run across all its resumes, whatever other runs have saved in the
            same folder.
    """

    def __init__(self, keep_last: int | None) -> None:
        self.keep_last = keep_last
        self.kept: list[Saved] = []
        self.lineage = uuid.uuid4().hex
        self._resumed: tuple[Path, list[str]] | None = None

    @property
    def newest(self) -> Saved | None:
        """The newest checkpoint, or None."""
        return self.kept[-1] if self.kept else None

    def holds(self, number: int | None) -> bool:
        """Return whether the checkpoint of that number is on the disk."""
        return any(saved.number == number for saved in self.kept)

    def adopt(self, found: Found) -> None:
        """Continue the lineage of a resumed checkpoint, with those published up to it."""
        if found.saved is None:
            return
        folder = found.path.parent
        up_to = [saved for saved in published(folder) if saved.number <= found.saved.number]
        self.lineage = str(found.saved.manifest["lineage"])
        self.kept = [saved for saved in up_to if saved.manifest["lineage"] == self.lineage]
        self._resumed = folder, [saved.name for saved in up_to]

    def abandon_later(self) -> list[str]:
        """Move checkpoints that are damaged, or later than the resumed one, out of the way.

        A later start would resume from them otherwise. This is called when training continues, so
        that a run that only validates moves nothing.

        Returns:
            Their new paths.
        """
        if self._resumed is None:
            return []
        (folder, names), self._resumed = self._resumed, None
        return [str(path) for path in writing.abandon(folder, names)]

    def add(self, saved: Saved) -> None:
        """Add a checkpoint that was published; ``latest`` points to the last one that is finite."""
        self.kept.append(saved)
        writing.link(saved.path.parent, "latest", self._latest.name)

    @property
    def _latest(self) -> Saved:
        finite = [saved for saved in self.kept if saved.manifest["finite"]]
        return (finite or self.kept)[-1]

    def prune(self, best: int | None, name: str | None = None) -> None:
        """Remove checkpoints that are no longer kept, and update the links ``latest`` and ``best``.

        Args:
            best: The number of the best checkpoint.
            name: The name for the newest checkpoint, if it is free after the removal.

        Raises:
            OSError: A checkpoint cannot be removed or renamed.
        """
        newest = self.kept[-1]
        latest = self._latest
        # A save after a validation replaces the save before it.
        last = [saved for saved in self.kept if saved is newest or saved.iter != newest.iter]
        if self.keep_last is not None:
            last = last[-self.keep_last :]
        keep = {saved.number for saved in last} | {best, latest.number}
        for saved in [saved for saved in self.kept if saved.number not in keep]:
            self.kept.remove(saved)
            if saved.path.is_dir():
                writing.remove(saved.path)
        if name is not None and name != newest.name:
            self.kept[-1] = writing.rename(newest, name)
        for saved in self.kept:
            if saved.number == latest.number:
                writing.link(newest.path.parent, "latest", saved.name)
            if saved.number == best:
                writing.link(newest.path.parent, "best", saved.name)

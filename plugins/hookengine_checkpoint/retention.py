"""Which checkpoints of a run are kept."""

from __future__ import annotations

import uuid
from pathlib import Path

from hookengine_checkpoint import files
from hookengine_checkpoint.files import Saved
from hookengine_checkpoint.find import Found


class Shelf:
    """The checkpoints that a run has published, and may remove.

    Args:
        keep_last: How many; None for all.

    Attributes:
        kept: Those that are there, in the order of their publication.
        lineage: Names the run from its beginning on, over all resumes, whatever its folder holds
            of others.
    """

    def __init__(self, keep_last: int | None) -> None:
        self.keep_last = keep_last
        self.kept: list[Saved] = []
        self.lineage = uuid.uuid4().hex
        self._aside: tuple[Path, list[str]] | None = None

    @property
    def newest(self) -> Saved | None:
        """The newest one."""
        return self.kept[-1] if self.kept else None

    def holds(self, number: int | None) -> bool:
        """Whether the checkpoint of that number is there."""
        return any(saved.number == number for saved in self.kept)

    def adopt(self, found: Found) -> None:
        """Take those up to the one that a run goes on from."""
        if found.saved is None:
            return
        folder = found.path.parent
        up_to = [s for s in files.published(folder) if s.number <= found.saved.number]
        self.lineage = str(found.saved.manifest["lineage"])
        self.kept = [saved for saved in up_to if saved.manifest["lineage"] == self.lineage]
        self._aside = folder, [saved.name for saved in up_to]

    def set_aside(self) -> list[str]:
        """Set the other ones aside, now that training goes on; returns where each is now.

        They are damaged, or of a future that will not come: a later start would go on from them.
        """
        if self._aside is None:
            return []
        (folder, names), self._aside = self._aside, None
        return [str(path) for path in files.set_aside(folder, names)]

    def put(self, saved: Saved) -> None:
        """Add one that was published."""
        self.kept.append(saved)

    def keep_only(self, best: int | None, name: str | None = None) -> None:
        """Remove what is not to be kept, now that the newest is published; point the links.

        Args:
            best: The number of the best one.
            name: What the newest is to be called, once that is free.
        """
        newest = self.kept[-1]
        good = [saved for saved in self.kept if saved.manifest["finite"]]
        latest = (good or self.kept)[-1]
        # What was saved before a validation gives way to what is saved after it.
        last = [saved for saved in self.kept if saved is newest or saved.iter != newest.iter]
        if self.keep_last is not None:
            last = last[-self.keep_last :]
        keep = {saved.number for saved in last} | {best, latest.number}
        files.link(newest.path.parent, "latest", latest.name)
        for saved in [saved for saved in self.kept if saved.number not in keep]:
            self.kept.remove(saved)
            if saved.path.is_dir():
                files.remove(saved.path)
        if name is not None and name != newest.name:
            self.kept[-1] = files.rename(newest, name)
        for saved in self.kept:
            if saved.number == latest.number:
                files.link(newest.path.parent, "latest", saved.name)
            if saved.number == best:
                files.link(newest.path.parent, "best", saved.name)

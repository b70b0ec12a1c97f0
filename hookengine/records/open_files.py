"""Keep files open until their owner closes them, even if the garbage collector finds them first.

When Python collects a Runner that was not closed, it runs all finalizers in that garbage at once:
that of the Runner, whose plugins then finish, and those of their files, which close the files.
"""

from __future__ import annotations

import io
from typing import Any, TypeVar

F = TypeVar("F", bound=io.IOBase | Any)
_kept: set[Any] = set()


def keep_open(file: F) -> F:
    """Keep an open file of a plugin from being closed before the plugin closes it.

    A plugin that writes to a file until ``unconfigure`` opens it as
    ``self.file = keep_open(path.open("w"))``, and must close it there. Files that are attributes of
    a sink are kept open without this function, until the sink's ``close`` has returned.

    Args:
        file: The file.

    Returns:
        The same file.
    """
    for other in [*_kept]:
        if other.closed:
            _kept.discard(other)
    _kept.add(file)
    return file


def keep_files_of(owner: object) -> None:
    """Keep the files open that are attributes of an object."""
    for file in _files_of(owner):
        keep_open(file)


def release_files_of(owner: object) -> None:
    """Leave the files that are attributes of an object to the garbage collector."""
    _kept.difference_update(_files_of(owner))


def _files_of(owner: object) -> list[io.IOBase]:
    return [value for value in [*vars(owner).values()] if isinstance(value, io.IOBase)]

"""Write the stub of ``hookengine.model``: ``python -m hookengine.model.stub`` prints it.

The names come from the entry points that hookengine's own distribution offers in the group
``hookengine.model``, so that a plugin is added to no list but that one.
"""

from __future__ import annotations

from collections import defaultdict

from hookengine.events.registry import MODELS
from hookengine.model.base_model import BaseModel
from hookengine.model.modules import BaseModule, ModuleDict, ModuleList, Sequential

BASES = (BaseModel, BaseModule, ModuleDict, ModuleList, Sequential)


def stub() -> str:
    """Return the stub: a re-export of each name from the module that defines it."""
    names: defaultdict[str, set[str]] = defaultdict(set)
    for cls in BASES:
        names[cls.__module__].add(cls.__name__)
    for name, point in MODELS.own_entry_points().items():
        names[point.module].add(name)
    lines = ["# Made by `make docs` from the entry points in pyproject.toml.", ""]
    for module in sorted(names, key=lambda name: (not name.startswith("hookengine."), name)):
        lines += [f"from {module} import ("]
        lines += [f"    {name}," for name in sorted(names[module])]
        lines += [")"]
    exported = sorted({name for several in names.values() for name in several})
    lines += ["", "__all__ = ["]
    lines += [f'    "{name}",' for name in exported]
    return "\n".join([*lines, "]"]) + "\n"


if __name__ == "__main__":
    print(stub(), end="")

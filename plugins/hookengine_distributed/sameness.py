"""What must be the same on all ranks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from hookengine import dist


def exchange(what: str, facts: Any) -> list[Any]:
    """What each rank says; all of them call it together.

    Raises:
        ValueError: they are not at the same place: one was built from other parts.
    """
    everybody = dist.all_gather_objects((what, facts))
    for rank, (place, _) in enumerate(everybody):
        if place != everybody[0][0]:
            raise ValueError(
                f"the ranks do different things: rank 0 is at its {everybody[0][0]}, rank {rank} "
                f"at its {place}. All must make the same Runner, and call it alike"
            )
    return [said for _, said in everybody]


def require_same(what: str, facts: Mapping[str, Any]) -> None:
    """Refuse ranks that differ, all of them with the same error.

    Args:
        what: What is compared.
        facts: Plain values by name.

    Raises:
        ValueError: with the first thing that differs, and how.
    """
    everybody = exchange(what, dict(facts))
    for rank, said in enumerate(everybody):
        for name in everybody[0] | said:
            first, other = (
                str(one[name]) if name in one else "missing" for one in (everybody[0], said)
            )
            if first != other:
                raise ValueError(
                    f"the ranks differ in their {what}: {name} is {first} on rank 0 and {other} on "
                    f"rank {rank}. All must run the same script with the same arguments and files"
                )


def described(value: Any) -> str:
    """A value as text that is the same in another process."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(_ordered(value)))


def _ordered(value: Any) -> Any:
    if isinstance(value, (set, frozenset)):
        return sorted(map(repr, value))
    if isinstance(value, dict):
        return {key: _ordered(item) for key, item in value.items()}
    return [_ordered(item) for item in value] if isinstance(value, (list, tuple)) else value

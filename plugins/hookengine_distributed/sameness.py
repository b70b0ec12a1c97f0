"""Checks of what must be the same on all ranks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from hookengine import dist


def exchange(what: str, facts: Any) -> list[Any]:
    """Return the facts of each rank; all ranks call it together.

    Raises:
        ValueError: The ranks are not at the same place, because their Runners have different parts.
    """
    everybody = dist.all_gather_objects((what, facts))
    for rank, (place, _) in enumerate(everybody):
        if place != everybody[0][0]:
            raise ValueError(
                f"the ranks are out of step: rank 0 is at its {everybody[0][0]}, rank {rank} at "
                f"its {place}. All ranks must create the same Runner and make the same calls"
            )
    return [said for _, said in everybody]


def require_same(what: str, facts: Mapping[str, Any]) -> None:
    """Raise the same error on all ranks if they differ.

    Args:
        what: What is compared.
        facts: Plain values by name.

    Raises:
        ValueError: The ranks differ; the message gives the first difference.
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
    """Return a value as text that is the same in every process."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(_ordered(value)))


def _ordered(value: Any) -> Any:
    if isinstance(value, (set, frozenset)):
        return sorted(map(repr, value))
    if isinstance(value, dict):
        return {key: _ordered(item) for key, item in value.items()}
    return [_ordered(item) for item in value] if isinstance(value, (list, tuple)) else value

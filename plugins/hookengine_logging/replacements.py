"""Which plugins replace the same value, one after another."""

from __future__ import annotations

import dis
import inspect
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from hookengine import EVENTS, PluginManager


def replacements(plugins: PluginManager) -> dict[str, list[str]]:
    """Return, per transform with several plugins that replace its value, their names in order.

    A plugin whose method always returns None only observes, and is left out.
    """
    table = {}
    for event, called in plugins.calls().items():
        if EVENTS[event].kind.name == "transform":
            names = [n for n in called if _returns_a_value(getattr(plugins[n], event))]
            if len(names) > 1:
                table[event] = names
    return table


def _returns_a_value(function: Callable[..., Any]) -> bool:
    """Return whether a function can return anything but None, as far as its bytecode tells."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    if code is None:
        return True
    steps = [s for s in dis.get_instructions(code) if s.opname not in ("NOP", "CACHE")]
    returned = [
        before if step.opname == "RETURN_VALUE" else step
        for before, step in pairwise(steps)
        if step.opname in ("RETURN_VALUE", "RETURN_CONST")
    ]
    return not all(
        s.opname in ("LOAD_CONST", "RETURN_CONST") and s.argval is None for s in returned
    )

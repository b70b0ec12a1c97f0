"""What a plugin may be: its methods and their arguments, checked against the events."""

from __future__ import annotations

import difflib
import dis
import inspect
import re
import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from hookengine.events.answers import answer
from hookengine.events.hookspecs import EVENTS
from hookengine.events.registry import unknown


def check_methods(name: str, plugin: object) -> None:
    """Refuse misspelt events and arguments that an event does not have.

    Raises:
        TypeError: with the plugin, the method and the nearest match.
    """
    answered = 0
    for attribute in dir(plugin):
        method = inspect.getattr_static(plugin, attribute, None)
        if attribute.startswith("_") or not inspect.isroutine(method):
            continue
        if attribute not in EVENTS:
            _check_is_no_event(name, attribute)
            continue
        answered += 1
        event = EVENTS[attribute]
        parameters = inspect.signature(getattr(plugin, attribute)).parameters
        if inspect.isfunction(method) and getattr(plugin, attribute) != method:
            first = next(iter(inspect.signature(method).parameters), None)
            if first is None or first in event.arguments:
                raise TypeError(f"plugin {name!r}, event {event}: the method lacks 'self'")
        for argument, parameter in parameters.items():
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                raise TypeError(
                    f"plugin {name!r}, event {event}: name the arguments that {attribute!r} wants "
                    f"instead of *{argument}"
                )
            if argument not in event.arguments:
                problem = unknown("argument", argument, event.arguments)
                raise TypeError(f"plugin {name!r}, event {event}: {problem}")
    if not answered:
        raise TypeError(
            f"plugin {name!r} ({plugin!r}) answers no event: a plugin is an object with methods "
            "named after events, which `hookengine events` lists"
        )


def _check_is_no_event(name: str, attribute: str) -> None:
    near = difflib.get_close_matches(attribute, EVENTS, n=1, cutoff=0.75)
    hint = answer(attribute) or (f"Did you mean {near[0]!r}?" if near else "")
    if re.match(r"(before|after|on)_", attribute):
        raise TypeError(
            f"plugin {name!r}: unknown event {attribute!r}. {hint} `hookengine events` lists them "
            "all; a method that is no event must not be called before_*, after_* or on_*"
        )
    if near and difflib.SequenceMatcher(None, attribute, near[0]).ratio() > 0.9:
        warnings.warn(
            f"plugin {name!r}: the method {attribute!r} is no event and is not called. {hint} "
            "A leading underscore says that it is meant so",
            stacklevel=2,
        )


def returns_a_value(function: Callable[..., Any]) -> bool:
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

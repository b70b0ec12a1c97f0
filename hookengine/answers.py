"""Explain unknown names and invalid options: what replaces them, and what is known."""

from __future__ import annotations

import difflib
import functools
import inspect
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any, ParamSpec

import pydantic

from hookengine.registry import ANSWERS, unknown

P = ParamSpec("P")


def answer(name: str) -> str | None:
    """Return a sentence that says what replaces a name of another framework, or None if unknown.

    This function asks each function in the entry-point group ``hookengine.answers``, and therefore
    imports them: call it only to explain an error. A function that cannot be imported, or that
    raises, knows no answer: it must not hide the error that is being explained.
    """
    for function in ANSWERS.importable():
        with suppress(Exception):
            if (text := function(name)) is not None:
                return str(text)
    return None


def explain_arguments(where: str, given: Mapping[str, Any], known: Iterable[str] = ()) -> str:
    """Explain each argument that ``where`` does not accept: its replacement or the known names."""
    answers = []
    for key, value in given.items():
        name = value if key == "type" and isinstance(value, str) else key
        if (text := answer(name)) is not None:
            answers.append(text)
        elif key != "optimizer" or where == "Runner":
            answers.append(unknown("argument", key, known))
    return f"{where}: {'; '.join(answers)}"


def explained_arguments(
    where: str, neutral: Callable[[Mapping[str, Any]], dict[str, Any]] = dict
) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Decorate an ``__init__`` to explain arguments that it does not have.

    Type checkers see the ``__init__`` unchanged, and report such arguments themselves.

    Args:
        where: The name of the class.
        neutral: Returns the unknown arguments without those that are silently accepted.
    """

    def decorate(init: Callable[P, None]) -> Callable[P, None]:
        known = [*inspect.signature(init).parameters][1:]

        @functools.wraps(init)
        def checked(*args: P.args, **kwargs: P.kwargs) -> None:
            if strange := {key: value for key, value in kwargs.items() if key not in known}:
                if bad := neutral(strange):
                    raise TypeError(explain_arguments(where, bad, known))
                for key in strange:
                    del kwargs[key]
            init(*args, **kwargs)

        return checked

    return decorate


def explain_validation(error: pydantic.ValidationError, known: Iterable[str] = ()) -> str:
    """Summarize pydantic's report in one line: each bad option, its value and what was expected.

    Args:
        error: The report.
        known: The names of the options, to suggest the nearest one.
    """
    parts = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"])
        if item["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            name = item["input"] if where == "type" else where
            parts.append(answer(str(name)) or unknown("option", where, known))
        elif item["type"] == "missing":
            parts.append(f"{where}=... is required")
        elif where:
            parts.append(f"{where}={item['input']!r}: {item['msg']}")
        else:
            parts.append(item["msg"].removeprefix("Value error, "))
    return "; ".join(parts)


def check_is_no_event(plugin: str, method: str, known: Iterable[str]) -> None:
    """Reject a method whose name is reserved for events, and warn if it looks misspelled.

    Args:
        plugin: The plugin's name.
        method: The name of its method, which the framework never calls.
        known: The names of the methods that the framework calls.

    Raises:
        TypeError: The name starts as those of events do.
    """
    near = difflib.get_close_matches(method, known, n=1, cutoff=0.75)
    is_reserved = re.match(r"(before|after|on)_", method)
    is_near = near and difflib.SequenceMatcher(None, method, near[0]).ratio() > 0.9
    if not (is_reserved or is_near):
        return
    text = answer(method)
    hint = f" {text}." if text else f" Did you mean {near[0]!r}?" if near else ""
    if is_reserved:
        raise TypeError(
            f"plugin {plugin!r}: unknown event {method!r}.{hint} `hookengine events` lists all "
            "events; other methods must not be named before_*, after_* or on_*"
        )
    warnings.warn(
        f"plugin {plugin!r}: the method {method!r} is not an event and is never called."
        f"{hint} To silence this warning, start its name with an underscore",
        stacklevel=3,
    )


def warn_of_priority(name: str, kind: Any) -> None:
    """Warn if a class sets ``priority``, as MMEngine's hooks do: it has no effect here."""
    own = vars(kind) if isinstance(kind, type) else {}
    annotations = own.get("__annotations__")
    is_option = isinstance(annotations, dict) and "priority" in annotations
    if isinstance(own.get("priority"), str) and not is_option and (text := answer("priority")):
        warnings.warn(f"plugin {name!r}: {text}", stacklevel=2)

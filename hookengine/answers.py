"""Explain unknown names and invalid options: what replaces them, and what is known."""

from __future__ import annotations

import functools
import inspect
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
    for known in ANSWERS.names():
        with suppress(Exception):
            if (text := ANSWERS.get(known)(name)) is not None:
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


def warn_of_priority(name: str, kind: Any) -> None:
    """Warn if a class sets ``priority``, as MMEngine's hooks do: it has no effect here."""
    own = vars(kind) if isinstance(kind, type) else {}
    annotations = own.get("__annotations__")
    is_option = isinstance(annotations, dict) and "priority" in annotations
    if isinstance(own.get("priority"), str) and not is_option and (text := answer("priority")):
        warnings.warn(f"plugin {name!r}: {text}", stacklevel=2)

"""Check the methods of a plugin, and their arguments, against the events."""

from __future__ import annotations

import difflib
import inspect
import re
import warnings
from numbers import Integral

from hookengine.answers import answer
from hookengine.events.hookimpl import hook_options_of, names
from hookengine.events.hookspecs import EVENTS, Event
from hookengine.registry import did_you_mean, unknown


def check_methods(name: str, plugin: object, source: str) -> None:
    """Reject misspelled events, arguments that an event does not have, and impossible rhythms.

    Args:
        name: The plugin's name.
        plugin: The plugin.
        source: Its distribution and version, or its module, for warnings of deprecated events.

    Raises:
        TypeError: The message names the plugin, the method and the nearest match.
    """
    for side in ("after", "before"):
        try:
            names(getattr(plugin, side, None))
        except TypeError as error:
            raise TypeError(f"plugin {name!r}, attribute {side!r}: {error}") from None
    implemented = 0
    for attribute in dir(plugin):
        method = inspect.getattr_static(plugin, attribute, None)
        if attribute.startswith("_") or not inspect.isroutine(method):
            continue
        if attribute not in EVENTS:
            _check_is_no_event(name, attribute)
            continue
        implemented += 1
        event = EVENTS[attribute]
        parameters = inspect.signature(getattr(plugin, attribute)).parameters
        if inspect.isfunction(method) and getattr(plugin, attribute) != method:
            first = next(iter(inspect.signature(method).parameters), None)
            if first is None or first in event.arguments:
                raise TypeError(f"plugin {name!r}, event {event}: the method has no 'self'. Add it")
        for argument, parameter in parameters.items():
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                raise TypeError(
                    f"plugin {name!r}, event {event}: name the arguments that {attribute!r} uses "
                    f"instead of *{argument}"
                )
            bound = parameter.default is not parameter.empty  # as in def hook(runner, model=model)
            if bound and not did_you_mean(argument, event.arguments, cutoff=0.6):
                continue
            if argument not in event.arguments:
                problem = unknown("argument", argument, event.arguments)
                raise TypeError(f"plugin {name!r}, event {event}: {problem}")
        for what, advice in event.kind.deprecations.items():
            if not what or what in parameters:
                argument = f"the argument {what!r} of " if what else ""
                warnings.warn(
                    f"plugin {name!r} ({source}): {argument}the event {event.name!r} is "
                    f"deprecated: {advice}",
                    FutureWarning,
                    stacklevel=2,
                )
        _check_rhythm(name, plugin, event)
    if not implemented:
        raise TypeError(
            f"plugin {name!r} ({plugin!r}) implements no event. A plugin is an object with methods "
            "named after events; `hookengine events` lists them"
        )


def _check_rhythm(name: str, plugin: object, event: Event) -> None:
    every = hook_options_of(plugin, event.name).every
    if every is None:
        return
    where = f"plugin {name!r}, event {event.name!r}"
    if event.kind.counter is None:
        counted = [e.name for e in EVENTS.values() if e.kind.counter is not None]
        raise TypeError(
            f"{where}: every={every!r} needs an event with a counter, and this event has none. "
            f"Count in the method itself, or use one of {', '.join(counted)}"
        )
    if isinstance(every, str):
        if not hasattr(plugin, every):
            known = [n for n in {**vars(type(plugin)), **vars(plugin)} if n.isidentifier()]
            known = [n for n in known if n[0] != "_" and not callable(getattr(plugin, n))]
            raise TypeError(
                f"{where}: {unknown('option in every', every, known)}. Annotate an option, or set "
                "the attribute in __post_init__"
            )
        value = getattr(plugin, every)
        number = isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 0
        if value is not None and not number:
            raise TypeError(
                f"{where}: every={every!r} names an option whose value is {value!r}; it must be a "
                "whole number, at least 0, or None"
            )


def _check_is_no_event(name: str, attribute: str) -> None:
    near = difflib.get_close_matches(attribute, EVENTS, n=1, cutoff=0.75)
    is_reserved = re.match(r"(before|after|on)_", attribute)
    is_near = near and difflib.SequenceMatcher(None, attribute, near[0]).ratio() > 0.9
    if not (is_reserved or is_near):
        return
    text = answer(attribute)
    hint = f"{text}." if text else f"Did you mean {near[0]!r}?" if near else ""
    if is_reserved:
        raise TypeError(
            f"plugin {name!r}: unknown event {attribute!r}. {hint} `hookengine events` lists all "
            "events; other methods must not be named before_*, after_* or on_*"
        )
    warnings.warn(
        f"plugin {name!r}: the method {attribute!r} is not an event and is never called. "
        f"{hint} To silence this warning, start its name with an underscore",
        stacklevel=2,
    )

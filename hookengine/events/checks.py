"""Check the methods of a plugin, and their arguments, against the events."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from numbers import Integral
from typing import Any

from hookengine.answers import check_is_no_event
from hookengine.events.hookimpl import hook_options_of, is_function, names
from hookengine.events.hookspecs import EVENTS, Event
from hookengine.events.plugin import Plugin
from hookengine.registry import did_you_mean, unknown

STATE_METHODS = ("state_dict", "load_state_dict", "rank_state_dict", "load_rank_state_dict")


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
    check_state(name, plugin)
    implemented = 0
    for attribute in dir(plugin):
        method = inspect.getattr_static(plugin, attribute, None)
        if attribute not in EVENTS:
            if attribute[0] != "_" and inspect.isroutine(method) and attribute not in STATE_METHODS:
                check_is_no_event(name, attribute, [*EVENTS, *STATE_METHODS])
            continue
        event, bound = EVENTS[attribute], getattr(plugin, attribute)
        where = f"plugin {name!r}, event {event}"
        if isinstance(method, property) or not is_function(bound):
            if callable(bound) and hasattr(type(plugin), attribute):
                raise TypeError(f"{where}: write a method with def, not {method!r}")
            continue  # data that happens to have this name
        implemented += 1
        if getattr(bound, "__self__", None) is not None:
            function = getattr(method, "__func__", method)  # of a classmethod
            first = next(iter(inspect.signature(function).parameters), None)
            if first is None or first in event.arguments:
                own = "self" if function is method else "cls"
                raise TypeError(f"{where}: the method has no {own!r}. Add it")
        _check_runs(where, bound, event.kind.answer)
        parameters = inspect.signature(bound).parameters
        for argument, parameter in parameters.items():
            if parameter.kind not in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
                raise TypeError(
                    f"{where}: name the arguments that {attribute!r} uses, without * or **; got "
                    f"{inspect.signature(bound)}"
                )
            given = parameter.default is not parameter.empty  # as in def hook(runner, model=model)
            if given and not did_you_mean(argument, event.arguments, cutoff=0.6):
                continue
            if argument not in event.arguments:
                problem = unknown("argument", argument, event.arguments)
                raise TypeError(f"{where}: {problem}")
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


def _check_runs(where: str, function: Callable[..., Any], answer: Any = object) -> None:
    """Reject a function whose body a plain call does not run; warn if a decorator hides it."""
    for one in (function, inspect.unwrap(function)):
        yields = inspect.isgeneratorfunction(one) and answer is not Iterable
        if yields or inspect.iscoroutinefunction(one) or inspect.isasyncgenfunction(one):
            fix = "Use " + ("return instead of yield" if yields else "def instead of async def")
            if one is function:
                raise TypeError(f"{where}: a call does not run the body of this function. {fix}")
            if answer is not AbstractContextManager:  # @contextmanager is right there
                text = f"{where}: the body does not run unless the decorator runs it. {fix}"
                warnings.warn(text, stacklevel=3)


def check_state(name: str, plugin: object) -> None:
    """Reject methods that would lose the plugin's state, or that cannot be called."""
    for base in type(plugin).__mro__[::-1] if isinstance(plugin, Plugin) else ():
        if base is Plugin:
            break
        stubs = [m for m in STATE_METHODS if getattr(type(plugin), m) is vars(Plugin)[m]]
        if hidden := [method for method in stubs if method in vars(base)]:
            raise TypeError(
                f"plugin {name!r}: Plugin hides {hidden[0]!r} of {base.__name__}. Name "
                f"{base.__name__} before Plugin: class {type(plugin).__name__}({base.__name__}, "
                "Plugin)"
            )
    for save, load in (STATE_METHODS[:2], STATE_METHODS[2:]):
        found = {}
        for method, arguments in ((save, ()), (load, ({},))):
            bound = getattr(plugin, method, None)
            if bound is None or getattr(bound, "__func__", None) is vars(Plugin)[method]:
                continue
            found[method], where = bound, f"plugin {name!r}, method {method!r}"
            _check_runs(where, bound)
            try:
                inspect.signature(bound).bind(*arguments)
            except TypeError as error:
                takes = "one argument, the state" if arguments else "no argument"
                raise TypeError(f"{where} must be a method that takes {takes}: {error}") from None
        if len(found) == 1:
            (missing,) = {save, load} - {*found}
            near = did_you_mean(missing, {*dir(plugin)} - {*STATE_METHODS}, cutoff=0.75)
            raise TypeError(
                f"plugin {name!r} defines only one of {save!r} and {load!r}, so its state would be "
                f"lost when a run resumes: it has no {missing!r}.{near} Define both"
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

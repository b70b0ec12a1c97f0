"""Plugins: what they are, what they are called, and in which order they come."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import graphlib
import inspect
import re
import types
import warnings
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self, dataclass_transform

import pydantic
from pydantic.dataclasses import dataclass as pydantic_dataclass

from hookengine import migration
from hookengine.config import explain
from hookengine.hookspecs import EVENTS
from hookengine.registry import PLUGINS, unknown

DEFAULT_PLUGINS = (
    "distributed",
    "seed",
    "preprocess",
    "init",
    "logging",
    "progress_bar",
    "checkpoint",
)
"""On without being named; each is inert where it has nothing to do. Names only."""

CONFIG = pydantic.ConfigDict(extra="forbid", arbitrary_types_allowed=True)


def _snake_case(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


@dataclass_transform(
    kw_only_default=True, eq_default=False, field_specifiers=(pydantic.Field, dataclasses.field)
)
class Plugin:
    """Base class of plugins: annotated fields are options, methods named after events are hooks.

    Each subclass becomes a keyword-only pydantic dataclass: options are validated, an unknown one
    is refused. Anything else is a plain attribute (``self.best = 0``). Equality and hash are
    identity. A subclass with an ``__init__`` of its own stays as it is written.

    ::

        class Stopwatch(Plugin, name="stopwatch"):
            every: int = Field(10, gt=0, description="iterations")

            def after_train_iter(self, runner): ...

    Args:
        name: (class keyword) The plugin's name; by default the class's in snake case.
    """

    plugin_name: ClassVar[str] = "plugin"
    """The name by which it is switched off, ordered, blamed and its state kept; also an option,
    ``Clip(plugin_name="second")``, to have two of one class."""
    after: ClassVar[tuple[str, ...]] = ()
    """Names of plugins that are called before this one."""
    before: ClassVar[tuple[str, ...]] = ()
    """Names of plugins that are called after this one."""
    _by_keyword: ClassVar[bool] = True

    def __init_subclass__(cls, *, name: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.plugin_name = name or _snake_case(cls.__name__)
        cls._by_keyword = cls._by_keyword and "__init__" not in cls.__dict__
        if cls._by_keyword:
            pydantic_dataclass(cls, config=CONFIG, eq=False, kw_only=True, repr=True)
            cls.__init__ = _explaining(cls.__init__)  # type: ignore[method-assign]

    def __new__(cls, *args: Any, **options: Any) -> Self:
        """Refuse options by position, which pydantic lets pass where a default is a Field."""
        if args and cls._by_keyword:
            raise TypeError(f"{cls.__name__} takes its options by name, not {args!r}")
        return super().__new__(cls)

    def state_dict(self) -> dict[str, Any]:
        """What the plugin needs to go on after a resume: tensors and plain containers."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what ``state_dict`` returned."""

    def rank_state_dict(self) -> dict[str, Any]:
        """The part of the state that differs from rank to rank; kept for each of them."""
        return {}

    def load_rank_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what ``rank_state_dict`` returned on this rank."""


def _explaining(init: Callable[..., None]) -> Callable[..., None]:
    """An ``__init__`` that reports bad options in one line, and takes ``plugin_name``."""

    @functools.wraps(init)
    def explaining(self: Plugin, **options: Any) -> None:
        name = options.pop("plugin_name", None)
        try:
            init(self, **options)
        except pydantic.ValidationError as error:
            cls = type(self)
            known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
            text = explain(error, known)
            if plain := [n for n in options if n not in known and n in vars(cls)]:
                text += f". To make {plain[0]!r} an option, annotate it: {plain[0]}: int = ..."
            raise TypeError(f"plugin {name or cls.plugin_name!r}: {text}") from error
        if name is not None:
            self.__dict__["plugin_name"] = name

    return explaining


def options_of(plugin: object) -> dict[str, Any]:
    """The options of a plugin as JSON would hold them; what JSON cannot, as its repr."""
    if not dataclasses.is_dataclass(plugin) or isinstance(plugin, type):
        return {}
    values = {f.name: getattr(plugin, f.name) for f in dataclasses.fields(plugin)}
    return {name: as_json(value) for name, value in values.items()}


def as_json(value: Any) -> Any:
    """A value as JSON would hold it; what JSON cannot hold, as its repr."""
    try:
        return pydantic.TypeAdapter(Any).dump_python(value, mode="json", fallback=repr)
    except (ValueError, RecursionError):  # of bytes that are no text, or a circle
        return repr(value)


def name_of(plugin: object) -> str:
    """The name of a plugin (or class): its ``plugin_name``, or the class's in snake case."""
    named = getattr(plugin, "plugin_name", None)
    if isinstance(named, str):
        return named
    if isinstance(plugin, types.ModuleType):
        return plugin.__name__
    return _snake_case((plugin if isinstance(plugin, type) else type(plugin)).__name__)


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
    hint = migration.answer(attribute) or (f"Did you mean {near[0]!r}?" if near else "")
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


def resolve_order(plugins: Mapping[str, object]) -> list[str]:
    """Order plugins: as given, subject to their ``after`` and ``before``.

    A pure function of what is declared: each comes in its turn, and just before it those that it
    says it comes after.

    Raises:
        ValueError: the constraints form a cycle, which the message prints.
    """
    _check_known(plugins)
    meant = _meanings(plugins)
    earlier: dict[str, list[str]] = {name: [] for name in plugins}
    for name, plugin in plugins.items():
        for other in _names(plugin, "after"):
            earlier[name] += [one for one in meant.get(other, ()) if one != name]
        for other in _names(plugin, "before"):
            for one in meant.get(other, ()):
                if one != name:
                    earlier[one].append(name)
    try:
        graphlib.TopologicalSorter(earlier).prepare()
    except graphlib.CycleError as error:
        cycle = " -> ".join(reversed(error.args[1]))
        raise ValueError(
            f"the order of the plugins is a cycle: {cycle} (each says that it is called after the "
            "next). Drop one of these 'after' or 'before' declarations"
        ) from None
    order: dict[str, None] = {}

    def place(name: str) -> None:
        if name not in order:
            for other in earlier[name]:
                place(other)
            order[name] = None

    for name in plugins:
        place(name)
    return list(order)


def _meanings(plugins: Mapping[str, object]) -> dict[str, list[str]]:
    """What a name in ``after`` or ``before`` stands for.

    The plugin of that name, and those of the class of that name, or derived from it, that were
    given another one.
    """
    meant: dict[str, list[str]] = {}
    for name, plugin in plugins.items():
        bases = [c for c in type(plugin).__mro__ if issubclass(c, Plugin) and c is not Plugin]
        for called in {name, name_of(type(plugin)), *map(name_of, bases)}:
            meant.setdefault(called, []).append(name)
    return meant


def _check_known(plugins: Mapping[str, object]) -> None:
    """Warn of a place that is declared relative to what looks like a misspelt plugin."""
    for name, plugin in plugins.items():
        for other in (*_names(plugin, "after"), *_names(plugin, "before")):
            if other in plugins or other in PLUGINS:
                continue
            known = {*plugins, *PLUGINS.names()}
            if near := difflib.get_close_matches(other, known, n=1, cutoff=0.8):
                warnings.warn(
                    f"plugin {name!r}, in 'after' or 'before': there is no plugin {other!r}. Did "
                    f"you mean {near[0]!r}?",
                    stacklevel=2,
                )


def _names(plugin: object, attribute: str) -> tuple[str, ...]:
    value = getattr(plugin, attribute, ())
    return (value,) if isinstance(value, str) else tuple(value) if value else ()

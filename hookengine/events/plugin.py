"""The base class of plugins, their names and options, and plugins made of one function."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
import re
import types
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self, dataclass_transform

import pydantic
from pydantic.dataclasses import dataclass as pydantic_dataclass

from hookengine.answers import explain_validation
from hookengine.events.hookimpl import HookArguments, HookOptions
from hookengine.events.hookspecs import EVENTS
from hookengine.registry import unknown

DEFAULT_PLUGINS = (
    "distributed",
    "seed",
    "preprocess",
    "init",
    "logging",
    "progress_bar",
    "checkpoint",
)
"""Names of the plugins enabled by default. Each does nothing where it is not needed."""

PLUGIN_NAMES: set[str] = set()
"""Names of the plugin classes defined so far, enabled or not."""

CONFIG = pydantic.ConfigDict(extra="forbid", arbitrary_types_allowed=True)


def snake_case(name: str) -> str:
    """Return a name in snake case: ``HTTPServer`` becomes ``http_server``."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


@dataclass_transform(
    kw_only_default=True, eq_default=False, field_specifiers=(pydantic.Field, dataclasses.field)
)
class _Options:
    """Tell type checkers that the annotated fields of ``Plugin`` and its subclasses are options."""


class Plugin(_Options):
    """Base class of plugins: annotated fields are options, methods named after events are hooks.

    Each subclass becomes a keyword-only pydantic dataclass, which validates its options and
    rejects unknown ones. Attributes without an annotation are plain attributes
    (``self.best = 0``). Plugins are compared and hashed by identity. A subclass that defines
    ``__init__`` is left unchanged.

    ::

        class Stopwatch(Plugin, name="stopwatch"):
            every: int = Field(default=10, gt=0, description="iterations")

            def after_train_iter(self, runner): ...

    Args:
        name: (class keyword) The plugin's name; by default the name of the class in snake case.
    """

    if TYPE_CHECKING:  # pydantic must not see a field
        plugin_name: str = "plugin"
        """The name that disables and orders a plugin, identifies its state, and appears in errors.

        It is also an option: ``Clip(plugin_name="second")`` allows two plugins of one class."""
    else:
        plugin_name: ClassVar[str] = "plugin"
    after: ClassVar[str | Sequence[str]] = ()
    """Names of the plugins that are called before this one, in every event that both implement.

    A method may differ, with ``@hookimpl(after=...)``.
    """
    before: ClassVar[str | Sequence[str]] = ()
    """Names of the plugins that are called after this one, in every event that both implement."""
    _by_keyword: ClassVar[bool] = True

    def __init_subclass__(cls, *, name: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.plugin_name = name or snake_case(cls.__name__)
        PLUGIN_NAMES.add(cls.plugin_name)
        cls._by_keyword = cls._by_keyword and "__init__" not in cls.__dict__
        if cls._by_keyword:
            pydantic_dataclass(cls, config=CONFIG, eq=False, kw_only=True, repr=True)
            cls.__init__ = _explaining(cls.__init__)  # type: ignore[method-assign]

    def __new__(cls, *args: Any, **options: Any) -> Self:
        """Reject positional options, which pydantic accepts where a default is a ``Field``."""
        if args and cls._by_keyword:
            raise TypeError(f"{cls.__name__} takes its options by name, got {args!r} by position")
        return super().__new__(cls)

    def state_dict(self) -> dict[str, Any]:
        """Return the state that the plugin needs to resume, as tensors and plain containers."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that ``state_dict`` returned."""

    def rank_state_dict(self) -> dict[str, Any]:
        """Return the part of the state that differs between ranks, which is saved per rank."""
        return {}

    def load_rank_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that ``rank_state_dict`` returned on this rank."""


def _explaining(init: Callable[..., None]) -> Callable[..., None]:
    """Wrap an ``__init__`` to report bad options in one line and to accept ``plugin_name``."""

    @functools.wraps(init)
    def explaining(self: Plugin, **options: Any) -> None:
        name = options.pop("plugin_name", None)
        try:
            init(self, **options)
        except pydantic.ValidationError as error:
            cls = type(self)
            known = [field.name for field in dataclasses.fields(cls)]
            text = explain_validation(error, known)
            if plain := [n for n in options if n not in known and n in vars(cls)]:
                text += f". To make {plain[0]!r} an option, annotate it: {plain[0]}: int = ..."
            raise TypeError(f"plugin {name or cls.plugin_name!r}: {text}") from error
        if name is not None:
            self.__dict__["plugin_name"] = name

    return explaining


def name_of(plugin: object) -> str:
    """Return a plugin's (or class's) ``plugin_name``, or the class's name in snake case."""
    named = getattr(plugin, "plugin_name", None)
    if isinstance(named, str):
        return named
    if isinstance(plugin, types.ModuleType):
        return plugin.__name__
    return snake_case((plugin if isinstance(plugin, type) else type(plugin)).__name__)


class FunctionPlugin:
    """A plugin made of one function, which implements one event.

    Args:
        event: The event that the function implements.
        function: The function.
        options: Its place and rhythm; see ``hookimpl``.

    Raises:
        KeyError: The event does not exist.
        TypeError: ``function`` is not a function, or an option is invalid.
        ValueError: The options contradict each other.
    """

    def __init__(self, event: str, function: Callable[..., Any], options: HookArguments) -> None:
        if event not in EVENTS:
            raise KeyError(unknown("event", event, EVENTS))
        if not inspect.isroutine(function):
            raise TypeError(f"expected a function for {event!r}, got {function!r}")
        name = function.__name__
        if name == "<lambda>":  # named by file and line, so that a rerun cell replaces it
            code = inspect.unwrap(function).__code__
            name = f"<lambda, {os.path.basename(code.co_filename)}:{code.co_firstlineno}>"
        self.plugin_name = f"{event}:{name}"
        self.function = function
        self.hookengine_options = HookOptions.checked(options) if options else None
        if isinstance(options.get("every"), str):
            raise TypeError("a function has no options: give it a number, as in every=100")
        setattr(self, event, function)

    def __repr__(self) -> str:
        return f"FunctionPlugin({self.plugin_name!r})"

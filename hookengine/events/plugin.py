"""What a plugin is, what it is called, and which options it has."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
import re
import types
from collections.abc import Callable
from typing import Any, ClassVar, Self, dataclass_transform

import pydantic
from pydantic.dataclasses import dataclass as pydantic_dataclass

from hookengine.events.answers import explain_validation
from hookengine.events.hookspecs import EVENTS
from hookengine.events.registry import unknown

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


def snake_case(name: str) -> str:
    """Return a name in snake case: ``HTTPServer`` becomes ``http_server``."""
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
        cls.plugin_name = name or snake_case(cls.__name__)
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
            text = explain_validation(error, known)
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
    return snake_case((plugin if isinstance(plugin, type) else type(plugin)).__name__)


class FunctionPlugin:
    """One function as a plugin; its options are kept here, since the function may serve twice.

    Args:
        event: The event that it answers.
        function: The function.
        tryfirst: See ``hookimpl``.
        trylast: Likewise.
    """

    def __init__(
        self, event: str, function: Callable[..., Any], tryfirst: bool, trylast: bool
    ) -> None:
        if event not in EVENTS:
            raise KeyError(unknown("event", event, EVENTS))
        if not inspect.isroutine(function):
            raise TypeError(f"a function is needed for {event!r}, got {function!r}")
        name = function.__name__
        if name == "<lambda>":  # of the same place, so that a cell that is run again replaces it
            code = inspect.unwrap(function).__code__
            name = f"<lambda, {os.path.basename(code.co_filename)}:{code.co_firstlineno}>"
        self.plugin_name = f"{event}:{name}"
        self.function = function
        self.tryfirst = tryfirst
        self.trylast = trylast
        setattr(self, event, function)

    def __repr__(self) -> str:
        return f"FunctionPlugin({self.plugin_name!r})"

"""Registries map names to objects: those registered by decorator, then entry points.

A registry looks a name up first among the objects registered in this process, then among the entry
points of the installed distributions. It imports only the requested entry point.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points, version
from typing import Any, TypeVar, overload

from packaging.requirements import Requirement

T = TypeVar("T")


def did_you_mean(name: object, known: Iterable[str], cutoff: float = 0.5) -> str:
    """Return `` Did you mean 'NAME'?`` with the known name closest to ``name``, or an empty string.

    Args:
        name: The unknown name; case is ignored.
        known: The names to suggest from.
        cutoff: The similarity a suggestion needs, as in ``difflib.get_close_matches``: 1 means
            identical.
    """
    folded = {known_name.casefold(): known_name for known_name in known}
    near = difflib.get_close_matches(str(name).casefold(), folded, n=1, cutoff=cutoff)
    return f" Did you mean {folded[near[0]]!r}?" if near else ""


def unknown(what: str, name: object, known: Iterable[str]) -> str:
    """Return an error message about an unknown name, with the closest match and all known names."""
    names = sorted(known)
    return (
        f"unknown {what} {name!r}.{did_you_mean(name, names)} Known: {', '.join(names) or 'none'}"
    )


def distribution_of(entry_point: EntryPoint) -> str:
    """Return the distribution that provides an entry point, as ``name version``."""
    dist = entry_point.dist
    return f"{dist.name} {dist.version}" if dist is not None else "an unnamed distribution"


def _identity(obj: object) -> tuple[object, object]:
    return getattr(obj, "__module__", None), getattr(obj, "__qualname__", id(obj))


class Registry:
    """Map the names of one group to objects.

    Args:
        group: The entry-point group, such as ``hookengine.plugins``.
        kind: The word for an object of the group in messages, such as ``plugin``.
    """

    def __init__(self, group: str, kind: str) -> None:
        self.group = group
        self.kind = kind
        self._registered: dict[str, Any] = {}
        self._entry_points: dict[str, EntryPoint] = {}
        self._searched: tuple[str, ...] = ()
        self._loaded: dict[str, tuple[EntryPoint, Any]] = {}

    def __repr__(self) -> str:
        return f"Registry({self.group!r})"

    def entry_points(self) -> dict[str, EntryPoint]:
        """Return the entry points of the group by name, from metadata, without importing any."""
        found: dict[str, EntryPoint] = {}
        self._disputed: dict[str, EntryPoint] = {}
        for point in entry_points(group=self.group):
            if found.setdefault(point.name, point).value != point.value:
                self._disputed[point.name] = point
        self._entry_points, self._searched = dict(sorted(found.items())), tuple(sys.path)
        return self._entry_points

    def own_entry_points(self) -> dict[str, EntryPoint]:
        """Return the entry points of hookengine's own distribution by name."""
        points = self._known().items()
        return {n: p for n, p in points if p.dist is not None and p.dist.name == "hookengine"}

    def entry_point(self, name: str) -> EntryPoint | None:
        """Return the entry point called ``name``, or None.

        The metadata is read again if the name is not known yet or ``sys.path`` has changed.

        Raises:
            ValueError: If two distributions provide different objects under this name.
        """
        if name not in self._entry_points or self._searched != tuple(sys.path):
            self.entry_points()
        point = self._entry_points.get(name)
        if point is not None and (other := self._disputed.get(name)) is not None:
            raise ValueError(
                f"two distributions offer the {self.kind} {name!r}: {distribution_of(point)} "
                f"({point.value}) and {distribution_of(other)} ({other.value}); uninstall one of "
                "them"
            )
        return point

    def offered_as(self, obj: Any) -> EntryPoint | None:
        """Return the entry point that provides this class or function, or None."""
        value = f"{obj.__module__}:{obj.__qualname__}"
        return next((point for point in self._known().values() if point.value == value), None)

    def _known(self) -> dict[str, EntryPoint]:
        """Return the entry points found last time, or search again if ``sys.path`` has changed."""
        known = self._searched == tuple(sys.path)
        return self._entry_points if known else self.entry_points()

    def names(self) -> list[str]:
        """Return all names, sorted, without importing anything."""
        return sorted({*self._registered, *self.entry_points()})

    def objects(self) -> Iterator[Any]:
        """Yield the object of each name, importing each entry point that is not yet loaded."""
        yield from self._registered.values()
        for name, point in self._known().items():
            if name not in self._registered:
                yield self._load(point)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and (
            name in self._registered or self.entry_point(name) is not None
        )

    @overload
    def register_module(
        self, name: str | None = ..., *, force: bool = ..., module: None = ...
    ) -> Callable[[T], T]: ...
    @overload
    def register_module(self, name: str | None = ..., *, force: bool = ..., module: T) -> T: ...
    def register_module(
        self, name: str | None = None, *, force: bool = False, module: Any = None
    ) -> Any:
        """Register a class or function, as a decorator or with ``module=``.

        Args:
            name: The name to register; the default is the ``__name__`` of the object.
            force: Replace another object of the same name. You do not need it to define the same
                object again, as when you rerun a notebook cell.
            module: The object to register, if you do not use the decorator.

        Raises:
            KeyError: If another object has the name.
            TypeError: If ``name`` is not a string.
        """
        if name is not None and not isinstance(name, str):
            raise TypeError(
                f"register_module() got {name!r} instead of a name: write the decorator with "
                "parentheses, as in @REGISTRY.register_module()"
            )

        def register(obj: Any) -> Any:
            key = name or obj.__name__
            other = self._registered.get(key)
            if other is not None and not force and _identity(other) != _identity(obj):
                raise KeyError(
                    f"the {self.kind} {key!r} is already registered as {other!r}; "
                    "choose another name or pass force=True"
                )
            self._registered[key] = obj
            return obj

        return register(module) if module is not None else register

    def get(self, name: str) -> Any:
        """Return the object called ``name``, importing its module if it is an entry point.

        Raises:
            KeyError: If the name is unknown; the message lists the known names and the closest
                match.
            ImportError: If the entry point cannot be loaded; the message names the distribution
                and the fix.
        """
        if name in self._registered:
            return self._registered[name]
        point = self.entry_point(name)
        if point is None:
            raise KeyError(unknown(self.kind, name, self.names()))
        return self._load(point)

    def build(self, cfg: Mapping[str, Any], **defaults: Any) -> Any:
        """Call ``cfg["type"]`` with the rest of ``cfg`` as keyword arguments; return the result.

        Args:
            cfg: ``dict(type=NAME or class, **kwargs)``.
            defaults: Arguments that ``cfg`` may override.

        Raises:
            TypeError: If ``cfg`` is not a dict.
            KeyError: If ``cfg`` has no ``type``, or its type is an unknown name.
        """
        if not isinstance(cfg, Mapping):
            raise TypeError(f"expected dict(type=..., ...) for a {self.kind}, got {cfg!r}")
        if "type" not in cfg:
            raise KeyError(f"a {self.kind} needs a 'type' (a name or a class), got {dict(cfg)!r}")
        arguments = {**defaults, **cfg}
        target = arguments.pop("type")
        factory = self.get(target) if isinstance(target, str) else target
        try:
            return factory(**arguments)
        except Exception as error:
            label = target if isinstance(target, str) else getattr(target, "__name__", target)
            error.add_note(f"while building the {self.kind} {label!r} with {arguments!r}")
            raise

    def _load(self, point: EntryPoint) -> Any:
        loaded = self._loaded.get(point.name)
        if loaded is not None and loaded[0] is point:
            return loaded[1]
        dist = distribution_of(point)
        self._check_requirement(point, dist)
        try:
            obj = point.load()
        except Exception as error:
            if isinstance(error, ModuleNotFoundError) and point.extras and point.dist is not None:
                fix = f'pip install "{point.dist.name}[{",".join(point.extras)}]"'
            elif isinstance(error, AttributeError):
                fix = f"its module has no {point.attr!r}; install a newer version or report this"
            else:
                fix = f"repair or uninstall it, or do not use {point.name!r}"
            raise ImportError(
                f"the {self.kind} {point.name!r} of {dist} ({point.value}) cannot be imported: "
                f"{type(error).__name__}: {error}. Fix: {fix}"
            ) from error
        self._loaded[point.name] = point, obj
        return obj

    def _check_requirement(self, point: EntryPoint, dist: str) -> None:
        """Raise an ImportError if the distribution requires another version of hookengine."""
        for line in (point.dist.requires if point.dist is not None else None) or ():
            requirement = Requirement(line)
            if requirement.name == "hookengine" and requirement.marker is None:
                mine = version("hookengine")
                if not requirement.specifier.contains(mine, prereleases=True):
                    raise ImportError(
                        f"the {self.kind} {point.name!r} of {dist} requires {requirement}, but "
                        f"hookengine {mine} is installed. Fix: install compatible versions"
                    )


PLUGINS = Registry("hookengine.plugins", "plugin")
MODELS = Registry("hookengine.model", "model")
WEIGHT_INITIALIZERS = Registry("hookengine.weight_initializers", "weight initializer")
MODEL_WRAPPERS = Registry("hookengine.model_wrappers", "model wrapper")
ANSWERS = Registry("hookengine.answers", "answer")

"""Names -> objects: what user code registered by decorator, then entry points.

A name is looked up first among the objects that were registered in this process, then among the
entry points of the installed distributions, of which only the one asked for is imported.
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
    """`` Did you mean 'NAME'?`` of the known name that is most like ``name``, or nothing.

    Args:
        name: What was written; upper and lower case are alike.
        known: What might have been meant.
        cutoff: How alike they must be, as difflib counts it, 1 for the same.
    """
    folded = {known_name.casefold(): known_name for known_name in known}
    near = difflib.get_close_matches(str(name).casefold(), folded, n=1, cutoff=cutoff)
    return f" Did you mean {folded[near[0]]!r}?" if near else ""


def unknown(what: str, name: object, known: Iterable[str]) -> str:
    """Say that ``name`` is unknown, with the nearest match and all the known names."""
    names = sorted(known)
    return (
        f"unknown {what} {name!r}.{did_you_mean(name, names)} Known: {', '.join(names) or 'none'}"
    )


def distribution_of(entry_point: EntryPoint) -> str:
    """The distribution that offers an entry point, as ``name version``."""
    dist = entry_point.dist
    return f"{dist.name} {dist.version}" if dist is not None else "an unnamed distribution"


def _identity(obj: object) -> tuple[object, object]:
    return getattr(obj, "__module__", None), getattr(obj, "__qualname__", id(obj))


class Registry:
    """One group of names.

    Args:
        group: The entry-point group, for instance ``hookengine.plugins``.
        kind: What the names stand for, in messages.
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
        """The entry points of the group by name, from metadata alone: nothing is imported."""
        found: dict[str, EntryPoint] = {}
        self._disputed: dict[str, EntryPoint] = {}
        for point in entry_points(group=self.group):
            if found.setdefault(point.name, point).value != point.value:
                self._disputed[point.name] = point
        self._entry_points, self._searched = dict(sorted(found.items())), tuple(sys.path)
        return self._entry_points

    def own_entry_points(self) -> dict[str, EntryPoint]:
        """Return the entry points that hookengine's own distribution offers, by name."""
        points = self._known().items()
        return {n: p for n, p in points if p.dist is not None and p.dist.name == "hookengine"}

    def entry_point(self, name: str) -> EntryPoint | None:
        """The entry point of that name, or None; looks anew for a new name or on a new path.

        Raises:
            ValueError: two distributions offer different objects under that name.
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
        """The entry point that offers this class or function, or None."""
        value = f"{obj.__module__}:{obj.__qualname__}"
        return next((point for point in self._known().values() if point.value == value), None)

    def _known(self) -> dict[str, EntryPoint]:
        """The entry points as they were last found, where the path is still the same."""
        known = self._searched == tuple(sys.path)
        return self._entry_points if known else self.entry_points()

    def names(self) -> list[str]:
        """All names, sorted; nothing is imported."""
        return sorted({*self._registered, *self.entry_points()})

    def objects(self) -> Iterator[Any]:
        """What all the names stand for; imports each."""
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
        """Register a class or function, as a decorator or by ``module=``.

        Args:
            name: The name; by default the object's own.
            force: Replace another object of that name. The same object defined again (a notebook
                cell that is run again) replaces itself without it.
            module: The object, where no decorator is wanted.

        Raises:
            KeyError: the name is taken by another object.
        """
        if name is not None and not isinstance(name, str):
            raise TypeError(
                f"register_module() takes a name, not {name!r}: as a decorator it is written with "
                "parentheses, @REGISTRY.register_module()"
            )

        def register(obj: Any) -> Any:
            key = name or obj.__name__
            other = self._registered.get(key)
            if other is not None and not force and _identity(other) != _identity(obj):
                raise KeyError(
                    f"the {self.kind} {key!r} is registered already, as {other!r}; "
                    "choose another name or pass force=True"
                )
            self._registered[key] = obj
            return obj

        return register(module) if module is not None else register

    def get(self, name: str) -> Any:
        """The object of that name; imports its module if it is an entry point's.

        Raises:
            KeyError: unknown; the message has the known names and the nearest match.
            ImportError: the entry point cannot be loaded; the message names the distribution and
                says what to do.
        """
        if name in self._registered:
            return self._registered[name]
        point = self.entry_point(name)
        if point is None:
            raise KeyError(unknown(self.kind, name, self.names()))
        return self._load(point)

    def build(self, cfg: Mapping[str, Any], **defaults: Any) -> Any:
        """Call what ``cfg["type"]`` names, or is, with the rest of ``cfg`` as keyword arguments.

        Args:
            cfg: ``dict(type=NAME or class, **kwargs)``.
            defaults: Arguments that ``cfg`` may override.

        Raises:
            TypeError: ``cfg`` is not a dict.
            KeyError: it has no ``type``, or an unknown one.
        """
        if not isinstance(cfg, Mapping):
            raise TypeError(f"expected dict(type=..., ...) for a {self.kind}, got {cfg!r}")
        if "type" not in cfg:
            raise KeyError(f"a {self.kind} needs a 'type', a name or a class; got {dict(cfg)!r}")
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
                fix = f"its module has no {point.attr!r}: tell its authors, or install a newer one"
            else:
                fix = f"repair or uninstall it, or do not name {point.name!r}"
            raise ImportError(
                f"the {self.kind} {point.name!r} of {dist} ({point.value}) cannot be imported: "
                f"{type(error).__name__}: {error}. Fix: {fix}"
            ) from error
        self._loaded[point.name] = point, obj
        return obj

    def _check_requirement(self, point: EntryPoint, dist: str) -> None:
        """Refuse a distribution that asks for another version of hookengine."""
        for line in (point.dist.requires if point.dist is not None else None) or ():
            requirement = Requirement(line)
            if requirement.name == "hookengine" and requirement.marker is None:
                mine = version("hookengine")
                if not requirement.specifier.contains(mine, prereleases=True):
                    raise ImportError(
                        f"the {self.kind} {point.name!r} of {dist} needs {requirement}, and this "
                        f"is hookengine {mine}. Fix: install versions that fit one another"
                    )


PLUGINS = Registry("hookengine.plugins", "plugin")
MODELS = Registry("hookengine.model", "model")
WEIGHT_INITIALIZERS = Registry("hookengine.weight_initializers", "weight initializer")
MODEL_WRAPPERS = Registry("hookengine.model_wrappers", "model wrapper")
ANSWERS = Registry("hookengine.answers", "answer")

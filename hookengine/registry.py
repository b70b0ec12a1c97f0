"""Registries map names to objects: those registered by decorator, then entry points.

A registry looks a name up first among the objects registered in this process, then among the entry
points of the installed distributions. It imports only the requested entry point.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar, overload

from hookengine.distributions import OWN, distribution_of, exact_name, is_from, load, object_of

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


def _is_at(obj: Any, point: EntryPoint) -> bool:
    """Return whether an entry point provides this object, also from where it is re-exported."""
    where = f"{getattr(obj, '__module__', None)}:{getattr(obj, '__qualname__', None)}"
    return point.value == where or object_of(point) is obj


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
        self._points: dict[str, list[EntryPoint]] = {}
        self._searched: tuple[str, ...] = ()
        self._loaded: dict[tuple[str, str], tuple[EntryPoint, Any]] = {}

    def __repr__(self) -> str:
        return f"Registry({self.group!r})"

    def entry_points(self) -> dict[str, EntryPoint]:
        """Return the entry points of the group by name, from metadata, without importing any.

        Of several with one name, hookengine's own comes first; see ``offers``.
        """
        return {name: points[0] for name, points in self._search().items()}

    def own_entry_points(self) -> dict[str, EntryPoint]:
        """Return the entry points of hookengine's own distribution by name."""
        return {n: p[0] for n, p in self._known().items() if is_from(p[0], OWN)}

    def offers(self) -> list[EntryPoint]:
        """Return all entry points of the group, sorted by name; several may have the same name."""
        return [point for points in self._search().values() for point in points]

    def entry_point(self, name: str) -> EntryPoint | None:
        """Return the entry point called ``name``, or None.

        The metadata is read again if the name is not known yet or ``sys.path`` has changed.

        Args:
            name: A name, or ``DISTRIBUTION:NAME``, which is never ambiguous.

        Raises:
            ValueError: If two distributions provide different objects under this name.
        """
        points = self._offered(name)
        if len(points) > 1:
            each = " and ".join(f"{distribution_of(p)} ({p.value})" for p in points)
            names = " or ".join(repr(exact_name(point)) for point in points)
            raise ValueError(
                f"several distributions offer the {self.kind} {name!r}: {each}. Choose one by its "
                f"full name, {names}, as in dict(type={exact_name(points[0])!r}), or uninstall one"
            )
        return points[0] if points else None

    def short_name(self, name: str) -> str:
        """Return NAME for ``DISTRIBUTION:NAME``, and any other name unchanged."""
        dist, _, short = name.partition(":")
        if not dist or not short or name in self._registered or name in self._known():
            return name
        return short if any(is_from(p, dist) for p in self._known().get(short, ())) else name

    def own_name(self, name: str) -> str:
        """Return the name under which to look up what hookengine itself provides as ``name``.

        Another distribution that offers the same name then makes no difference. An object that this
        process has registered under the name still comes first.
        """
        points = [] if name in self._registered else self._offered(name)
        return exact_name(points[0]) if len(points) > 1 and is_from(points[0], OWN) else name

    def own(self, name: str) -> Any:
        """Return what hookengine itself provides as ``name``; see ``own_name``."""
        return self.get(self.own_name(name))

    def offered_as(self, obj: Any) -> EntryPoint | None:
        """Return the entry point that provides an object or its class, or None.

        No module is imported. If there are several, one that has the object's ``plugin_name`` is
        preferred.
        """
        points = [point for points in self._known().values() for point in points]
        name = getattr(obj, "plugin_name", None)
        for wanted in (obj, type(obj)):
            if found := [point for point in points if _is_at(wanted, point)]:
                return min(found, key=lambda point: point.name != name)
        return None

    def _offered(self, name: str) -> list[EntryPoint]:
        """Return the entry points called ``name`` that differ, hookengine's own first."""
        if self.short_name(name) not in self._known():
            self._search()
        short = self.short_name(name)
        points = self._known().get(short, [])
        if short != name:
            return [point for point in points if is_from(point, name.partition(":")[0])][:1]
        return [p for i, p in enumerate(points) if p.value not in [q.value for q in points[:i]]]

    def _known(self) -> dict[str, list[EntryPoint]]:
        """Return the entry points found last time, or search again if ``sys.path`` has changed."""
        return self._points if self._searched == tuple(sys.path) else self._search()

    def _search(self) -> dict[str, list[EntryPoint]]:
        found: dict[str, list[EntryPoint]] = {}
        for point in sorted(entry_points(group=self.group), key=lambda p: not is_from(p, OWN)):
            others = found.setdefault(point.name, [])
            if (point.value, exact_name(point)) not in [(p.value, exact_name(p)) for p in others]:
                others.append(point)
        self._points, self._searched = dict(sorted(found.items())), tuple(sys.path)
        return self._points

    def names(self) -> list[str]:
        """Return all names, sorted, without importing anything."""
        return sorted({*self._registered, *self.entry_points()})

    def objects(self) -> Iterator[Any]:
        """Yield the object of each name.

        hookengine's own are imported. Those of another distribution are left out unless something
        has already imported their module.
        """
        yield from self._registered.values()
        for name, points in self._known().items():
            for point in points if name not in self._registered else ():
                if is_from(point, OWN):
                    yield self._load(point)
                elif (obj := object_of(point)) is not None:
                    yield obj

    def importable(self) -> Iterator[Any]:
        """Yield every object, importing each; leave out those that cannot be imported."""
        yield from self._registered.values()
        for points in [*self._known().values()]:
            for point in points:
                obj = None
                with suppress(Exception):
                    obj = self._load(point)
                if obj is not None:
                    yield obj

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and (name in self._registered or bool(self._offered(name)))

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

        Args:
            name: A name, or ``DISTRIBUTION:NAME`` if several distributions offer the name.

        Raises:
            KeyError: If the name is unknown; the message lists the known names and the closest
                match.
            ValueError: If several distributions offer the name.
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
        key = point.name, point.value
        if key in self._loaded and self._loaded[key][0] is point:
            return self._loaded[key][1]
        obj = load(point, self.kind)
        self._loaded[key] = point, obj
        return obj


PLUGINS = Registry("hookengine.plugins", "plugin")
MODELS = Registry("hookengine.model", "model")
WEIGHT_INITIALIZERS = Registry("hookengine.weight_initializers", "weight initializer")
MODEL_WRAPPERS = Registry("hookengine.model_wrappers", "model wrapper")
ANSWERS = Registry("hookengine.answers", "answer")

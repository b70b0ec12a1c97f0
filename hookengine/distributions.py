"""The distributions behind entry points: their names, and what to install if an import fails."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import Distribution, EntryPoint, PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

OWN = "hookengine"


def distribution_of(point: EntryPoint) -> str:
    """Return the distribution that provides an entry point, as ``name version``."""
    name = _name_of(point)
    return f"{name} {_version_in(point.dist)}" if name and point.dist else "an unnamed distribution"


def exact_name(point: EntryPoint) -> str:
    """Return ``DISTRIBUTION:NAME``, the name that only this entry point has."""
    name = _name_of(point)
    return f"{name}:{point.name}" if name else point.name


def is_from(point: EntryPoint, name: str) -> bool:
    """Return whether the distribution called ``name`` provides an entry point.

    As for pip, case does not matter, nor do the differences between ``-``, ``_`` and ``.``.
    """
    return canonicalize_name(_name_of(point)) == canonicalize_name(name)


def object_of(point: EntryPoint) -> Any:
    """Return the object of an entry point if its module is already imported, or None."""
    try:
        obj: Any = sys.modules.get(point.module)
    except AttributeError:  # the value of the entry point is malformed
        return None
    for attribute in point.attr.split(".") if point.attr else ():
        obj = getattr(obj, attribute, None)
    return obj


def load(point: EntryPoint, kind: str) -> Any:
    """Import an entry point and return its object.

    Args:
        point: The entry point.
        kind: The word for such an object in messages, such as ``plugin``.

    Raises:
        ImportError: It cannot be imported. The message names the distribution and the fix.
    """
    what = f"the {kind} {point.name!r} of {distribution_of(point)}"
    _check_own_version(point, what)
    try:
        return point.load()
    except (Exception, SystemExit) as error:
        raise ImportError(
            f"{what} ({point.value}) cannot be imported: {type(error).__name__}: {error}. Fix: "
            f"{_how_to_import(point, error)}"
        ) from error


def _name_of(point: EntryPoint) -> str:
    """Return the name of an entry point's distribution, or "" if its metadata is broken."""
    return "" if point.dist is None else _name_in_metadata(point.dist)


@functools.lru_cache
def _version_in(dist: Distribution) -> str:
    return dist.version


@functools.lru_cache  # each look at the name reads and parses the metadata
def _name_in_metadata(dist: Distribution) -> str:
    try:
        return dist.name or ""
    except Exception:
        return ""


def _how_to_import(point: EntryPoint, error: BaseException) -> str:
    """Return what the user can do after importing an entry point raised ``error``.

    For a missing module, this names the requirement of the distribution that is not installed. The
    name of a module does not always tell which distribution provides it.
    """
    repair = f"repair or uninstall it, or do not use {point.name!r}"
    try:
        own, module = point.module, getattr(error, "name", None)
    except AttributeError:
        return f"its entry point is malformed; report this, or do not use {point.name!r}"
    if isinstance(error, AttributeError) and own in sys.modules:
        return f"its module has no {point.attr!r}; install a newer version or report this"
    if not isinstance(error, ImportError) or not module:
        return repair
    top = module.partition(".")[0]
    if top == own.partition(".")[0]:
        missing = isinstance(error, ModuleNotFoundError)
        owner = _name_of(point) or "its distribution"
        return f"its installation is incomplete; reinstall {owner}" if missing else repair
    if top in sys.modules or find_spec(top) is not None:
        return f"install versions of {top!r} and {distribution_of(point)} that fit each other"
    missing_ones = [*_missing(point.dist, point.extras)] if point.dist is not None else []
    if point.extras and any(extra for _, extra in missing_ones):
        return f'pip install "{_name_of(point)}[{",".join(point.extras)}]"'
    names = [str(requirement) for requirement, _ in missing_ones]
    of_module = canonicalize_name(top)
    exact = [str(r) for r, _ in missing_ones if canonicalize_name(r.name) == of_module]
    if exact or names:
        return " ".join(["pip install", *(f'"{name}"' for name in exact or names)])
    return (
        f"install the package that provides the module {top!r}, on which it depends without "
        "declaring it"
    )


def _check_own_version(point: EntryPoint, what: str) -> None:
    """Raise an ImportError if the distribution requires another version of hookengine."""
    for requirement in _requirements(point.dist):
        if canonicalize_name(requirement.name) == OWN and requirement.marker is None:
            mine = version(OWN)
            if not requirement.specifier.contains(mine, prereleases=True):
                raise ImportError(
                    f"{what} requires {requirement}, but hookengine {mine} is installed. Fix: "
                    "install compatible versions"
                )


def _requirements(dist: Distribution | None) -> Iterator[Requirement]:
    for line in (dist.requires if dist is not None else None) or ():
        with suppress(InvalidRequirement):
            yield Requirement(line)


def _missing(dist: Distribution, extras: list[str]) -> Iterator[tuple[Requirement, bool]]:
    """Yield each requirement that is not installed, and whether it belongs to one of ``extras``."""
    for requirement in _requirements(dist):
        marker = requirement.marker
        always = marker is None or marker.evaluate({"extra": ""})
        if not (always or any(marker and marker.evaluate({"extra": e}) for e in extras)):
            continue
        try:
            version(requirement.name)
        except PackageNotFoundError:
            requirement.marker = None
            yield requirement, not always

"""The distributions behind entry points: their names, and what to install if an import fails."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import Distribution, EntryPoint, PackageNotFoundError, version

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

OWN = "hookengine"


def distribution_of(point: EntryPoint) -> str:
    """Return the distribution that provides an entry point, as ``name version``."""
    dist = point.dist
    return f"{dist.name} {dist.version}" if dist is not None else "an unnamed distribution"


def exact_name(point: EntryPoint) -> str:
    """Return ``DISTRIBUTION:NAME``, the name that only this entry point has."""
    return f"{point.dist.name}:{point.name}" if point.dist is not None else point.name


def is_from(point: EntryPoint, name: str) -> bool:
    """Return whether the distribution called ``name`` provides an entry point.

    As for pip, case does not matter, nor do the differences between ``-``, ``_`` and ``.``.
    """
    return point.dist is not None and canonicalize_name(point.dist.name) == canonicalize_name(name)


def how_to_import(point: EntryPoint, error: Exception) -> str:
    """Return what the user can do after importing an entry point raised ``error``.

    For a missing module, this names the requirement of the distribution that is not installed. The
    name of a module does not always tell which distribution provides it.
    """
    if isinstance(error, AttributeError):
        return f"its module has no {point.attr!r}; install a newer version or report this"
    module = getattr(error, "name", None)
    if not isinstance(error, ImportError) or not module:
        return f"repair or uninstall it, or do not use {point.name!r}"
    top = module.partition(".")[0]
    if top == point.module.partition(".")[0]:
        owner = point.dist.name if point.dist is not None else "its distribution"
        return f"its installation is incomplete; reinstall {owner}"
    if not isinstance(error, ModuleNotFoundError):
        return f"install versions of {top!r} and {distribution_of(point)} that fit each other"
    missing = [*_missing(point.dist, point.extras)] if point.dist is not None else []
    if point.dist is not None and point.extras and any(extra for _, extra in missing):
        return f'pip install "{point.dist.name}[{",".join(point.extras)}]"'
    names = [requirement for requirement, _ in missing]
    exact = [n for n in names if canonicalize_name(Requirement(n).name) == canonicalize_name(top)]
    if exact or names:
        return " ".join(["pip install", *(f'"{name}"' for name in exact or names)])
    return (
        f"install the package that provides the module {top!r}, on which it depends without "
        "declaring it"
    )


def check_own_version(point: EntryPoint, what: str) -> None:
    """Raise an ImportError if the distribution requires another version of hookengine."""
    for line in (point.dist.requires if point.dist is not None else None) or ():
        requirement = Requirement(line)
        if canonicalize_name(requirement.name) == OWN and requirement.marker is None:
            mine = version(OWN)
            if not requirement.specifier.contains(mine, prereleases=True):
                raise ImportError(
                    f"{what} requires {requirement}, but hookengine {mine} is installed. Fix: "
                    "install compatible versions"
                )


def _missing(dist: Distribution, extras: list[str]) -> Iterator[tuple[str, bool]]:
    """Yield each requirement that is not installed, and whether it belongs to one of ``extras``."""
    for line in dist.requires or ():
        requirement = Requirement(line)
        marker = requirement.marker
        always = marker is None or marker.evaluate({"extra": ""})
        if not (always or any(marker and marker.evaluate({"extra": e}) for e in extras)):
            continue
        try:
            version(requirement.name)
        except PackageNotFoundError:
            requirement.marker = None
            yield str(requirement), not always

"""Run the tests on the lowest allowed versions of all packages, and on the newest.

    python tests/matrix.py                         # all cells
    python tests/matrix.py lowest-3.11             # one of them
    python tests/matrix.py newest-3.13 -- -k ema   # with arguments for pytest

A cell is a virtual environment under ``.venv-matrix/``: ``lowest`` has exactly the lower bounds of
pyproject.toml, on the lowest Python; ``newest`` has the newest of everything, on each Python of the
classifiers. Pythons that are not installed are skipped. pip's own configuration says where packages
come from. A cell needs about 6 GB, and as long as ``make test``.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".venv-matrix"
EXTRA = "test"
"""The extra that holds all that the tests use, with the other extras."""

Project = Mapping[str, Any]
"""The table ``project`` of a pyproject.toml."""


# -- what pyproject.toml says -------------------------------------------------------------------


def read_project() -> Project:
    """Return the table ``project`` of this project's pyproject.toml."""
    project: Project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return project


def requirements(project: Project, *extras: str) -> list[Requirement]:
    """Return the dependencies of the project with some of its extras, each requirement once.

    Extras that include others, as ``hookengine[vision]``, are resolved.
    """
    found = {text: Requirement(text) for text in project["dependencies"]}
    seen: set[str] = set()
    waiting = [*extras]
    while waiting:
        extra = waiting.pop(0)
        if extra in seen:
            continue
        seen.add(extra)
        for text in project["optional-dependencies"][extra]:
            requirement = Requirement(text)
            if canonicalize_name(requirement.name) == canonicalize_name(project["name"]):
                waiting += sorted(requirement.extras)
            else:
                found[text] = requirement
    return [*found.values()]


def lowest(specifier: SpecifierSet) -> Version | None:
    """Return the lowest version that a specifier names and allows, or None without such a bound."""
    bounds = [Version(one.version) for one in specifier if one.operator in (">=", "==", "~=")]
    bound = max(bounds, default=None)
    return bound if bound is not None and specifier.contains(bound, prereleases=True) else None


def lowest_pins(found: Iterable[Requirement]) -> list[str]:
    """Return each requirement with exactly its lowest version, one per package, sorted by name.

    Raises:
        ValueError: A package has no lower bound.
    """
    pins: dict[str, tuple[Version, Requirement]] = {}  # by canonical name
    for requirement in found:
        version = lowest(requirement.specifier)
        if version is None:
            raise ValueError(
                f"{str(requirement)!r} in pyproject.toml has no lower bound that it allows. Name "
                "the lowest version with which the tests pass, as in 'NAME>=1.2'"
            )
        name = canonicalize_name(requirement.name)
        if name not in pins or version > pins[name][0]:
            pins[name] = version, requirement
    lines = []
    for package, (version, requirement) in sorted(pins.items()):
        extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
        marker = f"; {requirement.marker}" if requirement.marker else ""
        lines.append(f"{package}{extras}=={version}{marker}")
    return lines


def pythons(project: Project) -> list[str]:
    """Return the versions of Python in the classifiers, lowest first."""
    pattern = re.compile(r"Programming Language :: Python :: (\d+\.\d+)")
    matches = map(pattern.fullmatch, project["classifiers"])
    return sorted((match[1] for match in matches if match), key=Version)


# -- the cells ----------------------------------------------------------------------------------


class Cell(NamedTuple):
    """One environment to test in.

    Attributes:
        name: ``lowest-3.11``, and so on.
        python: The version of Python.
        install: What pip installs besides the project itself, as lines of a requirements file.
    """

    name: str
    python: str
    install: tuple[str, ...]

    @property
    def folder(self) -> Path:
        """The virtual environment."""
        return FOLDER / self.name

    @property
    def log(self) -> Path:
        """What pip and pytest have printed."""
        return FOLDER / f"{self.name}.log"


def cells(project: Project) -> list[Cell]:
    """Return all cells: the lowest versions on the lowest Python, the newest on each Python."""
    versions = pythons(project)
    low = Cell(f"lowest-{versions[0]}", versions[0], (*lowest_pins(requirements(project, EXTRA)),))
    return [low, *(Cell(f"newest-{version}", version, ()) for version in versions)]


def find_python(version: str) -> str | None:
    """Return the path of a Python of that version, or None: this one, or one on the PATH."""
    candidates = [sys.executable]
    for folder in os.get_exec_path():
        candidates += filter(None, [shutil.which(f"python{version}", path=folder)])
    # A shim of pyenv starts the Python that PYENV_VERSION names.
    environment = {**os.environ, "PYENV_VERSION": version}
    code = "import sys; print('%d.%d' % sys.version_info[:2], sys.executable)"
    for candidate in candidates:
        done = subprocess.run(
            [candidate, "-c", code], capture_output=True, text=True, check=False, env=environment
        )
        found, _, path = done.stdout.strip().partition(" ")
        if done.returncode == 0 and found == version:
            return path
    return None


class CellError(Exception):
    """A cell could not be installed, or its tests failed; the message says which."""


class Run:
    """The installation and the tests of one cell.

    Args:
        cell: What to install.
        python: The path of the Python to make its environment with.
    """

    def __init__(self, cell: Cell, python: str) -> None:
        self.cell = cell
        self._base = python
        self._python = cell.folder / ("Scripts" if os.name == "nt" else "bin") / "python"

    def install(self) -> None:
        """Create the environment, or bring one with the same requirements up to date."""
        folder, wanted = self.cell.folder, "".join(f"{line}\n" for line in self.cell.install)
        stamp = folder / "requirements.txt"
        # Packages that an earlier version has brought along would stay, so other pins begin again.
        if not stamp.exists() or stamp.read_text() != wanted:
            self._call("venv", self._base, "-m", "venv", "--clear", str(folder))
        command = ["-m", "pip", "install", "--upgrade", "--editable", f".[{EXTRA}]"]
        if wanted:
            (folder / "pins.txt").write_text(wanted)
            command += ["--requirement", str(folder / "pins.txt")]
        else:
            command += ["--upgrade-strategy", "eager"]
        self._call("pip", str(self._python), *command)
        stamp.write_text(wanted)

    def test(self, arguments: Sequence[str]) -> None:
        """Run pytest, which fails if any test does."""
        self._call("pytest", str(self._python), "-m", "pytest", "--numprocesses", "2", *arguments)

    def versions(self) -> str:
        """Return the version of torch, or nothing if it is not installed."""
        code = "from importlib.metadata import version; print(version('torch'))"
        done = subprocess.run(
            [self._python, "-c", code], capture_output=True, text=True, check=False
        )
        return done.stdout.strip()

    def _call(self, what: str, *command: str) -> None:
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
        with self.cell.log.open("a") as log:
            print("$", *command, file=log, flush=True)
            done = subprocess.run(
                command,
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                check=False,
                env=environment,
            )
        if done.returncode:
            raise CellError(f"{what} failed with exit code {done.returncode}")


def summary(log: str) -> str:
    """Return pytest's closing line without its frame, or nothing if there is none."""
    lines = re.findall(r"^=* ?(\d+ (?:passed|failed|error).*? in [\d.]+s)", log, re.MULTILINE)
    return lines[-1] if lines else ""


# -- the table ----------------------------------------------------------------------------------


class Row(NamedTuple):
    """The result of a cell; ``ok`` is None if it did not run."""

    cell: str
    torch: str
    ok: bool | None
    result: str
    minutes: float

    def __str__(self) -> str:
        word = {True: "passed", False: "FAILED", None: "not run"}[self.ok]
        minutes = f"{self.minutes:.0f} min" if self.ok is not None else ""
        return f"{self.cell:<13} {self.torch:<8} {word:<8} {minutes:<7} {self.result}".rstrip()


def run(cell: Cell, arguments: Sequence[str]) -> Row:
    """Install and test one cell."""
    begin = time.monotonic()
    python = find_python(cell.python)
    if python is None:
        return Row(cell.name, "", None, f"no python{cell.python} on the PATH", 0)
    FOLDER.mkdir(exist_ok=True)
    cell.log.write_text("")
    one = Run(cell, python)
    ok, result = True, ""
    try:
        print(f"{cell.name}: installing; {cell.log.relative_to(ROOT)} shows how far", flush=True)
        one.install()
        print(f"{cell.name}: testing with torch {one.versions()}", flush=True)
        one.test(arguments)
    except CellError as error:
        ok, result = False, str(error)
        print("\n".join(_end(cell.log.read_text())), flush=True)
    result = "; ".join(filter(None, [result, summary(cell.log.read_text())]))
    return Row(cell.name, one.versions(), ok, result, (time.monotonic() - begin) / 60)


def _end(log: str) -> Iterator[str]:
    """Yield what explains a failure: pip's errors or the failed tests, else the last lines."""
    lines = log.splitlines()
    found = [line for line in lines if re.match(r"(ERROR|FAILED)[: ]", line)]
    yield from (found or lines)[-40:]


def main(argv: Sequence[str]) -> int:
    """Run the cells, and print a table; return 1 if one failed, or none ran."""
    before, after = [*argv], []
    if "--" in before:
        split = before.index("--")
        before, after = before[:split], before[split + 1 :]
    known = {cell.name: cell for cell in cells(read_project())}
    parser = argparse.ArgumentParser(
        description="Run the tests on the lowest and the newest versions of all packages.",
        epilog="Arguments after -- go to pytest.",
    )
    parser.add_argument("cells", nargs="*", metavar="CELL", help=f"of {', '.join(known)}; all")
    parser.add_argument(
        "--list", action="store_true", help="print what the cells install, and exit"
    )
    options = parser.parse_args(before)
    if unknown := [name for name in options.cells if name not in known]:
        parser.error(f"unknown cell {unknown[0]!r}; known: {', '.join(known)}")
    chosen = [known[name] for name in options.cells or known]
    if options.list:
        for cell in chosen:
            print(f"{cell.name}: {' '.join(cell.install) or 'the newest of everything'}")
        return 0
    rows = [run(cell, after) for cell in chosen]
    print("\n" + "\n".join(map(str, rows)))
    return 1 if any(row.ok is False for row in rows) or all(row.ok is None for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""What `make matrix` installs in each cell, as pyproject.toml says; nothing is installed here."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests import matrix

ROOT = Path(__file__).parents[1]
TOML = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = TOML["project"]


def example(**extras: list[str]) -> dict[str, Any]:
    return {
        "name": "some-project",
        "dependencies": ["torch>=2.1,!=2.1.1", "Pillow>=10"],
        "optional-dependencies": extras,
        "classifiers": [
            "Programming Language :: Python :: 3",
            "Programming Language :: Python :: 3.9",
            "Programming Language :: Python :: 3.10",
            "Typing :: Typed",
        ],
    }


def test_the_lowest_versions_are_those_of_the_dependencies_and_of_the_extras() -> None:
    project = example(
        test=["Some_Project[plots,more]", "pytest>=8"],
        plots=["some.project[more]", "matplotlib[svg]>=3.8; python_version < '4'"],
        more=["pillow>=10.1", "exact==1.2", "compatible~=2.3.1"],
        other=["not-asked-for"],
    )
    assert matrix.lowest_pins(matrix.requirements(project, "test")) == [
        "compatible==2.3.1",
        "exact==1.2",
        'matplotlib[svg]==3.8; python_version < "4"',
        "pillow==10.1",
        "pytest==8",
        "torch==2.1",
    ]
    assert matrix.lowest_pins(matrix.requirements(project)) == ["pillow==10", "torch==2.1"]


def test_extras_that_include_each_other_end() -> None:
    project = example(a=["some-project[b]", "x>=1"], b=["some-project[a]", "y>=2"])
    pins = matrix.lowest_pins(matrix.requirements(project, "a"))
    assert pins == ["pillow==10", "torch==2.1", "x==1", "y==2"]


@pytest.mark.parametrize(
    ("specifier", "version"),
    [
        (">=1.2", "1.2"),
        (">=1.2,<2", "1.2"),
        (">=1.2,>=1.10", "1.10"),
        (">=2.0rc1", "2.0rc1"),
        ("==1.0", "1"),
        ("~=1.4.2", "1.4.2"),
        ("", None),
        ("<2", None),
        (">1", None),
        ("!=1.1", None),
        (">=1.2,!=1.2", None),
        (">=3,<2", None),
    ],
)
def test_the_lowest_version_of_a_specifier(specifier: str, version: str | None) -> None:
    expected = None if version is None else Version(version)
    assert matrix.lowest(SpecifierSet(specifier)) == expected


def test_a_dependency_without_a_lower_bound_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"'torch<3' in pyproject.toml has no lower bound"):
        matrix.lowest_pins([Requirement("torch<3")])


def test_every_dependency_has_a_lower_bound() -> None:
    everything = matrix.requirements(PROJECT, *PROJECT["optional-dependencies"])
    assert len(everything) > 25
    everything += map(Requirement, TOML["build-system"]["requires"])
    assert not [str(one) for one in everything if matrix.lowest(one.specifier) is None]


def test_the_cells_test_everything_that_users_can_install() -> None:
    """What only measures or checks the source is left out."""
    wanted = matrix.lowest_pins(matrix.requirements(PROJECT, "all"))
    low, *new = matrix.cells(PROJECT)
    assert {*wanted} <= {*low.install}
    names = {canonicalize_name(line.partition("==")[0]) for line in low.install}
    assert {"torch", "numpy", "wandb", "pytest"} <= names
    assert not names & {"hookengine", "mypy", "ruff", "lightning"}
    assert all(line.count("==") == 1 for line in low.install)
    assert all(not cell.install for cell in new)


def test_the_cells_cover_every_python() -> None:
    assert matrix.pythons(example()) == ["3.9", "3.10"]
    versions = matrix.pythons(PROJECT)
    assert SpecifierSet(PROJECT["requires-python"]).contains(versions[0])
    names = [cell.name for cell in matrix.cells(PROJECT)]
    assert names == [f"lowest-{versions[0]}", *(f"newest-{version}" for version in versions)]


def test_the_environments_are_in_a_folder_that_git_ignores() -> None:
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    for cell in matrix.cells(PROJECT):
        for path in (cell.folder, cell.log):
            assert f"{path.relative_to(ROOT).parts[0]}/" in ignored


def test_the_rows_of_the_table() -> None:
    rows = [
        matrix.Row("lowest-3.11", "2.10.0", True, "5 passed in 3.20s", 4.2),
        matrix.Row("newest-3.12", "", False, "pip failed with exit code 1", 0.2),
        matrix.Row("newest-3.13", "", None, "no python3.13 on the PATH", 0),
    ]
    assert [str(row) for row in rows] == [
        "lowest-3.11   2.10.0   passed   4 min   5 passed in 3.20s",
        "newest-3.12            FAILED   0 min   pip failed with exit code 1",
        "newest-3.13            not run          no python3.13 on the PATH",
    ]


@pytest.mark.parametrize(
    ("log", "found"),
    [
        ("....\n==== 3 passed, 1 skipped in 2.50s ====\n", "3 passed, 1 skipped in 2.50s"),
        ("2 failed, 3 passed in 61.20s (0:01:01)\n", "2 failed, 3 passed in 61.20s"),
        ("1 error in 0.10s", "1 error in 0.10s"),
        ("ERROR: no matching distribution", ""),
    ],
)
def test_the_closing_line_of_pytest_is_found(log: str, found: str) -> None:
    assert matrix.summary(log) == found


def table(monkeypatch: pytest.MonkeyPatch, results: dict[str, bool | None]) -> int:
    def run(cell: matrix.Cell, arguments: Any) -> matrix.Row:
        return matrix.Row(cell.name, "", results[cell.name], " ".join(arguments), 0)

    monkeypatch.setattr(matrix, "run", run)
    return matrix.main([*results, "--", "-k", "ema"])


def test_the_exit_code_is_1_if_a_cell_failed_or_none_ran(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    low, *new = [cell.name for cell in matrix.cells(PROJECT)]
    assert table(monkeypatch, {low: True}) == 0
    assert "-k ema" in capsys.readouterr().out
    assert table(monkeypatch, {low: True, new[0]: None}) == 0
    assert table(monkeypatch, {low: True, new[0]: False}) == 1
    assert table(monkeypatch, {new[0]: None}) == 1


def test_an_unknown_cell_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        matrix.main(["newest-2.7"])
    assert "unknown cell 'newest-2.7'; known: lowest-3.11, " in capsys.readouterr().err


@pytest.mark.process
def test_a_python_is_found_and_one_that_is_missing_or_broken_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("python3.99", "python3.98"):  # the first is no Python, the second another one
        (tmp_path / name).write_text("#!/bin/sh\nexit 127\n" if name.endswith("9") else "")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "python3.98").unlink()
    (tmp_path / "python3.98").symlink_to(sys.executable)
    monkeypatch.setenv("PATH", str(tmp_path))
    here = ".".join(map(str, sys.version_info[:2]))
    found = matrix.find_python(here)
    assert found is not None
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    done = subprocess.run([found, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == here
    assert matrix.find_python("3.99") is matrix.find_python("3.98") is None


@pytest.mark.process
def test_a_cell_without_its_python_is_not_run() -> None:
    row = matrix.run(matrix.Cell("newest-3.99", "3.99", ()), ())
    assert row == matrix.Row("newest-3.99", "", None, "no python3.99 on the PATH", 0)

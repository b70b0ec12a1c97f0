"""What a package index shows: links that work, and addresses without secrets."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

import hatch_build
from tests.test_house import ROOT

HOME = "https://forge.example/them/hookengine"
README = (ROOT / "README.md").read_text()


def metadata_of(root: Path) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    hatch_build.Metadata(str(root), {}).update(metadata)
    return metadata


@pytest.mark.process
def test_the_address_comes_from_git_without_secrets(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(README)
    assert metadata_of(tmp_path)["urls"] == {}
    subprocess.run(["git", "-C", tmp_path, "init", "--quiet"], check=True)
    assert metadata_of(tmp_path)["urls"] == {}
    git = ["git", "-C", str(tmp_path), "remote"]
    subprocess.run([*git, "add", "origin", "x"], check=True)
    for remote, home in {
        HOME: HOME,
        f"{HOME}.git": HOME,
        f"{HOME}/": HOME,
        "https://me:token@forge.example/them/hookengine.git": HOME,
        "git@forge.example:them/hookengine.git": HOME,
        "ssh://git@forge.example/them/hookengine": HOME,
        "ssh://git@forge.example:2222/them/hookengine.git": HOME,
        "/srv/git/hookengine.git": None,
        "../hookengine": None,
        "file:///srv/git/hookengine.git": None,
        "C:\\git\\hookengine": None,
    }.items():
        subprocess.run([*git, "set-url", "origin", remote], check=True)
        found = metadata_of(tmp_path)["urls"]
        assert found.get("Repository") == home, remote
        assert "token" not in str(found)
    (tmp_path / "PKG-INFO").write_text(f"Name: x\nProject-URL: Repository, {HOME}\n\ntext")
    assert metadata_of(tmp_path)["urls"]["Repository"] == HOME  # an unpacked sdist


@pytest.mark.parametrize("home", [HOME, None])
def test_no_link_of_the_readme_is_relative(home: str | None) -> None:
    text = hatch_build.with_absolute_links(README, home)
    targets = re.findall(r"\]\(([^)]+)\)", text)
    assert all(target.startswith(("https://", "#")) for target in targets)
    relative = [t for t in re.findall(r"\]\(([^)]+)\)", README) if "://" not in t and t[0] != "#"]
    assert len(relative) > 10
    if home is None:
        assert "docs/events.md documents all events" in text
        return
    for target in relative:
        assert (ROOT / target.partition("#")[0]).exists(), target
        assert f"/HEAD/{target})" in text
    assert f"![The report that make demo writes]({HOME}/raw/HEAD/docs/report.png)" in text

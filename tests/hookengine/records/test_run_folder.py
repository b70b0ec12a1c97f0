"""Tests of ``hookengine/records/run_folder.py``."""

from __future__ import annotations

from pathlib import Path

import pytest

from hookengine import RunFolder
from hookengine.records.run_folder import make_folder
from tests.fixtures import MakeRunner


def test_it_names_what_a_run_leaves(make: MakeRunner) -> None:
    runner = make(defaults=("logging", "checkpoint"), validate=True)
    runner.train()
    runner.close()
    folder = RunFolder(runner.run_dir)
    for path in (folder.metrics, folder.description, folder.log):
        assert path.is_file()
    checkpoint = folder.checkpoints / "latest"
    assert folder.manifest(checkpoint).is_file()
    assert folder.media.name == "media"


def test_a_run_without_a_given_name_never_shares_a_folder(tmp_path: Path) -> None:
    names = [make_folder(tmp_path / "all", "run", shared=False) for _ in range(3)]
    assert names == ["run", "run_2", "run_3"]
    assert make_folder(tmp_path / "all", "run", shared=True) == "run"


def test_a_folder_that_cannot_be_made_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for shared in (False, True):
        with pytest.raises(OSError, match=r"cannot create the folder.*Pass another work_dir"):
            make_folder(tmp_path / "file", "run", shared)
        with pytest.raises(OSError, match="cannot create the folder"):
            make_folder(tmp_path, "file", shared=True)

"""Tests of ``hookengine/records/run_folder.py``."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from hookengine_logging.replay import main as replay_past
from hookengine_report.runs import find_runs

from hookengine import Plugin, RunFolder, Runner, read_records
from hookengine.records.run_folder import make_folder
from tests.fixtures import MakeRunner, Toy, toy_data


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


def test_the_folder_of_an_unnamed_run_is_final_once_the_runner_is_built(
    make: MakeRunner, tmp_path: Path
) -> None:
    quiet: dict[str, Any] = dict(defaults=("checkpoint",), work_dir=tmp_path / "all")
    runners = [make(**quiet) for _ in range(4)]
    folders = [runner.run_dir for runner in runners]
    assert len({*folders}) == 4
    for runner in runners[:2]:
        runner.train()
    runners[2].close()
    assert [runner.run_dir for runner in runners] == folders
    assert [folder.is_dir() for folder in folders] == [True, True, False, True]  # no litter
    assert all((folder / "checkpoints" / "epoch_2").is_dir() for folder in folders[:2])
    assert make(**quiet).run_dir not in folders[:2]


def test_a_runner_that_writes_nothing_leaves_no_folder(make: MakeRunner, tmp_path: Path) -> None:
    runner = make(work_dir=tmp_path / "new" / "all")
    runner.train()
    runner.close()
    assert not (tmp_path / "new" / "all").exists()
    (tmp_path / "mine").mkdir()
    make(work_dir=tmp_path / "mine").close()
    assert (tmp_path / "mine").is_dir()  # it was there before
    kept = make(work_dir=tmp_path / "kept")
    (kept.run_dir / "note.txt").write_text("mine")
    kept.close()
    assert (kept.run_dir / "note.txt").exists()
    with pytest.raises(LookupError):
        make(work_dir=tmp_path / "failed", plugins=[Fails()])
    assert not (tmp_path / "failed").exists()
    (tmp_path / "file").write_text("")
    make(work_dir=tmp_path / "file").train()  # it needs no folder


class Fails(Plugin):
    def resume(self) -> None:
        raise LookupError("no")


def start_and_save(work_dir: str) -> str:
    from torch.utils.data import DataLoader

    from hookengine import Runner

    runner = Runner(
        Toy(),
        work_dir,
        train_dataloader=DataLoader(toy_data(), batch_size=4),
        train_cfg=dict(max_epochs=2),
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.1)),
        plugins=["no:logging", "no:progress_bar"],
    )
    before = runner.run_dir
    runner.train()
    runner.close()
    assert runner.run_dir == before
    assert (before / "checkpoints" / "epoch_2" / "state.pth").is_file()
    return before.name


@pytest.mark.process
def test_processes_that_start_together_each_get_their_own_folder(tmp_path: Path) -> None:
    with ProcessPoolExecutor(3, multiprocessing.get_context("fork")) as pool:
        names = list(pool.map(start_and_save, [str(tmp_path / "all")] * 6))
    assert len({*names}) == 6
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == sorted(names)


def test_a_change_of_the_working_directory_changes_no_path(
    make: MakeRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the run, of the checkpoints, of what to start from; in a hook and between two Runners."""
    for name in ("here", "there", "home"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    options: dict[str, Any] = dict(
        defaults=("checkpoint", "logging"), plugins=[], work_dir="runs", name="run"
    )

    class Moves(Plugin):
        def before_train_epoch(self, runner: Runner) -> None:
            os.chdir(tmp_path / "there")

    first = make(**{**options, "plugins": [Moves()]})
    first.train()
    first.close()
    assert first.work_dir == tmp_path / "here" / "runs"
    assert [path.name for path in (tmp_path / "there").iterdir()] == []
    monkeypatch.chdir(tmp_path / "here")
    resumed = make(**options, resume="auto", train_cfg=dict(max_epochs=3))
    assert resumed.progress.epoch == 2
    several: list[dict[str, Any]] = [dict(resume="runs/run"), dict(load_from="runs/run")]
    for given in several:

        class Elsewhere(Plugin):
            def configure(self) -> None:
                os.chdir(tmp_path / "there")

        other = make(**{**options, "plugins": [Elsewhere()], "name": None}, **given)
        weights, expected = other.bare_model.net.weight, first.bare_model.net.weight
        assert torch.equal(weights, expected)
        monkeypatch.chdir(tmp_path / "here")


def test_the_home_folder_is_meant_by_a_tilde_everywhere(
    make: MakeRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    options: dict[str, Any] = dict(
        defaults=("checkpoint", "logging"), plugins=["report", "ema"], work_dir="~/runs", name="a"
    )
    first = make(**options)
    first.train()
    first.plugins["ema"].export("~/weights.pth")
    first.close()
    assert first.run_dir == tmp_path / "runs" / "a"
    assert (tmp_path / "weights.pth").is_file()
    assert not (tmp_path / "~").exists()
    assert len(list(read_records("~/runs/a"))) > 0
    assert find_runs("~/runs")[0].name == "a"
    several: list[dict[str, Any]] = [
        dict(resume="~/runs/a"),
        dict(resume=Path("~/runs/a/checkpoints/epoch_2")),
        dict(load_from="~/runs/a"),
        dict(load_from=dict(checkpoint="~/weights.pth")),
        dict(resume=True, load_from="~/runs/a"),
    ]
    for given in several:
        make(**{**options, "name": None}, **given)
    with pytest.raises(typer.Exit) as ended:
        replay_past(Path("~/runs/a"), ["report"])
    assert ended.value.exit_code == 0
    assert not (tmp_path / "~").exists()

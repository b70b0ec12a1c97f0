"""Tests of ``hookengine/records/open_files.py``."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest

from hookengine import Plugin, Record, Runner, Sink, keep_open
from tests.fixtures import MakeRunner
from tests.hookengine.leaks import abandon, collect, held


class ToFile(Sink):
    """Writes lines to a file that only an attribute holds, and a last one at the end."""

    def open(self, runner: Any) -> None:
        self.file = (runner.run_dir / "lines").open("w")

    def write(self, runner: Any, record: Record) -> None:
        self.file.write(f"{record.phase} {record.iter}\n")

    def close(self, runner: Any) -> None:
        self.file.write("closed\n")
        self.file.close()


def test_a_sink_writes_to_its_file_until_it_is_closed(tmp_path: Path) -> None:
    sink = ToFile()
    abandon(tmp_path, name="run", plugins=["logging", sink])
    del sink
    before = held()["files"]
    collect()
    lines = (tmp_path / "run" / "lines").read_text().splitlines()
    assert lines == ["train 5", "val 5", "train 10", "val 10", "closed"]
    assert str(tmp_path / "run" / "lines") in before
    assert str(tmp_path / "run" / "lines") not in held()["files"]


@pytest.mark.filterwarnings("ignore:unclosed file")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_file_of_a_sink_that_never_closes_it_is_not_kept_for_ever(tmp_path: Path) -> None:
    class Careless(ToFile):
        def close(self, runner: Any) -> None:
            pass

    abandon(tmp_path, name="run", plugins=["logging", Careless()])
    collect()
    assert str(tmp_path / "run" / "lines") not in held()["files"]


def test_a_plugin_may_keep_its_file_open(tmp_path: Path) -> None:
    class Last(Plugin):
        def configure(self) -> None:
            self.file = keep_open((tmp_path / "last").open("w"))

        def unconfigure(self) -> None:
            self.file.write("the end")
            self.file.close()

    abandon(tmp_path, Runner.train, plugins=[Last()])
    collect()
    assert (tmp_path / "last").read_text() == "the end"


def test_closed_files_are_forgotten(make: MakeRunner, tmp_path: Path) -> None:
    first = keep_open((tmp_path / "first").open("w"))
    first.close()
    second = keep_open((tmp_path / "second").open("w"))
    assert not any(type(holder) is set for holder in gc.get_referrers(first))
    assert any(type(holder) is set for holder in gc.get_referrers(second))
    second.close()

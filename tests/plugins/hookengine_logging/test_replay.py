"""Records of a finished run that are written to a sink: what is promised if that fails."""

from __future__ import annotations

import pytest
from hookengine_logging.replay import replay

from hookengine import Record, Sink
from tests.fixtures import MakeRunner


class Broken(Sink):
    def write(self, record: Record) -> None:
        raise OSError("gone")


def test_what_a_replay_loses_is_still_in_the_file(
    make: MakeRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    runner = make(plugins=["logging"])
    runner.train()
    runner.close()
    capsys.readouterr()
    assert replay(runner.run_dir, Broken()) == 2
    assert f"{runner.run_dir / 'metrics.jsonl'} has them all" in capsys.readouterr().out

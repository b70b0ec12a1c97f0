"""The command ``hookengine``."""

from __future__ import annotations

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from hookengine.cli import app, events_page


@pytest.mark.process
def test_plugins_are_listed_without_being_imported() -> None:
    code = (
        "import sys; from hookengine.cli import plugins; plugins();"
        "assert not [m for m in sys.modules if m.startswith('hookengine_')]"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for word in ("progress_bar", "hookengine", "yes"):
        assert word in done.stdout


def test_events_are_listed_and_printed_as_a_page() -> None:
    listed = CliRunner().invoke(app, ["events"], env={"COLUMNS": "200"})
    assert listed.exit_code == 0
    assert "after_train_iter(runner, batch_idx, data_batch, outputs)" in listed.output
    assert "transform data_batch" in listed.output
    page = CliRunner().invoke(app, ["events", "--markdown"])
    assert page.output == events_page()


def test_the_environment_is_printed() -> None:
    shown = CliRunner().invoke(app, ["env"])
    assert shown.exit_code == 0
    assert "torch" in shown.output

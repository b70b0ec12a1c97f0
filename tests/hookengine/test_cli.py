"""The command ``hookengine``."""

from __future__ import annotations

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from hookengine import PLUGINS
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


def invoke(*arguments: str) -> str:
    done = CliRunner().invoke(app, [*arguments], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    return done.output


def test_the_order_of_an_event_is_shown_with_reasons() -> None:
    shown = invoke("order", "scale_loss", "-p", "amp", "-p", "accumulate")
    rows = [line for line in shown.splitlines() if "trylast" in line]
    assert "accumulate" in rows[0]
    assert "trylast, after accumulate" in rows[1]
    assert "before_optim_step" not in shown
    every = invoke("order")
    for event in ("before_optim_step", "unconfigure", "after_val_epoch"):
        assert event in every
    assert "every (option every)" in every
    assert "None of these plugins implements 'backward'" not in every
    assert "clip" not in invoke("order", "before_optim_step", "-p", "watch", "-p", "no:logging")
    assert "logging" not in invoke("order", "-p", "no:logging")
    bad = CliRunner().invoke(app, ["order", "before_optimstep"])
    assert bad.exit_code == 2
    assert "Did you mean 'before_optim_step'" in " ".join(bad.output.replace("│", "").split())


@pytest.mark.parametrize("name", PLUGINS.own_entry_points())
def test_a_plugin_is_described_with_its_hooks_and_state(name: str) -> None:
    shown = invoke("plugins", name)
    for title in ("Options", "Hooks", "State: ", "Clean-up (unconfigure): "):
        assert title in shown
    if name == "accumulate":
        assert "finish_gradients  │ tryfirst, after amp" in shown
        assert "State: saved in checkpoints (state_dict)" in shown
        assert "Reset the window lengths" in shown.partition("Clean-up")[2]
        assert "required" in shown
    if name == "seed":
        assert "saved for each rank (rank_state_dict)" in shown
    if name == "mixup":
        assert "State: none" in shown

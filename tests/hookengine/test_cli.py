"""The command ``hookengine``."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from hookengine import PLUGINS
from hookengine.cli import app, events_page
from tests.fixtures import Install


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
        assert re.search(r"finish_gradients +│ tryfirst, after amp", shown)
        assert "State: saved in checkpoints (state_dict)" in shown
        assert "Reset the window lengths" in shown.partition("Clean-up")[2]
        assert "required" in shown
    if name == "seed":
        assert "saved for each rank (rank_state_dict)" in shown
    if name == "mixup":
        assert "State: none" in shown


def test_names_that_several_distributions_offer_are_marked_and_resolved(install: Install) -> None:
    source = """
    from hookengine import Plugin
    class Log(Plugin):
        'Mine.'
        def before_run(self): ...
    """
    install(source, points="logging = greeter_package:Log\nclip = greeter_package:Log")
    listed = invoke("plugins")
    marked = [line for line in listed.splitlines() if "(clash)" in line]
    assert [line.split()[1] for line in marked] == ["clip", "clip", "logging", "logging"]
    assert ["yes" in line for line in marked] == [False, False, True, False]
    for name in ("hookengine:logging", "greeter-dist:logging", "hookengine:clip"):
        assert repr(name) in listed
    assert "Mine." in invoke("plugins", "greeter-dist:logging")
    assert "Mine." not in invoke("plugins", "hookengine:logging")
    assert "several distributions offer the plugin 'logging'" in refused("plugins", "logging")
    shown = CliRunner().invoke(app, ["order"], env={"COLUMNS": "300"})
    assert shown.exit_code == 0  # hookengine's own
    assert "logging" in shown.output
    assert "several distributions offer the plugin 'clip'" in refused("order", "-p", "clip")


def refused(*arguments: str) -> str:
    done = CliRunner().invoke(app, [*arguments], env={"COLUMNS": "300"})
    assert done.exit_code == 2, done.output
    assert "Traceback" not in done.output
    return " ".join(done.output.replace("│", "").split())


OBJECTS = """
import enum
import torch
from hookengine import Plugin

class Kind(enum.Enum):
    a = 1

class Typed(Plugin):
    'Typed options.'
    device: torch.device
    dtype: torch.dtype = torch.float32
    kind: Kind = Kind.a
    module: type[torch.nn.Module] = torch.nn.Identity
    def before_run(self): ...

class ByHand(Plugin):
    'Its own init.'
    def __init__(self, size, *rest, rate: float = 0.5): ...
    def before_run(self): ...

class Plain:
    'No base class.'
    def before_run(self):
        'Say hello.'

def make(size: int, rate=0.5):
    'Make one.'

plain = Plain()
number = 3
"""


@pytest.mark.parametrize(
    ("point", "shown"),
    [
        (":Typed", ["Typed options.", "device", "required", "torch.float32", "before_run"]),
        (":ByHand", ["Its own init.", "size", "required", "rate", "0.5", "before_run"]),
        (":Plain", ["No base class.", "Say hello."]),
        (":plain", ["No base class.", "Say hello."]),
        (":make", ["Make one.", "size", "int", "required", "rate", "A function makes this plugin"]),
        ("", ["thing"]),
    ],
)
def test_whatever_makes_a_plugin_is_described(
    install: Install, point: str, shown: list[str]
) -> None:
    more = "\ndef before_run(runner):\n    'Say hello.'\n" * (not point)
    install(OBJECTS + more, points=f"thing = greeter_package{point}")
    described = invoke("plugins", "thing")
    for text in shown:
        assert text in described


@pytest.mark.parametrize("source", [OBJECTS, "1 / 0", "import absent_library", "def ("])
def test_what_is_no_plugin_is_an_error_without_a_traceback(install: Install, source: str) -> None:
    install(source, points="thing = greeter_package:number")
    text = refused("plugins", "thing")
    assert "is not a plugin: it is 3" in text or "cannot be imported" in text


def test_the_order_leaves_out_plugins_that_cannot_be_imported(install: Install) -> None:
    install("import absent_library", points="thing = greeter_package:Thing")
    shown = CliRunner().invoke(app, ["order"], env={"COLUMNS": "300"})
    assert shown.exit_code == 0
    assert "left out: the plugin 'thing' of greeter-dist 1.5" in shown.output
    assert "cannot be imported" in refused("order", "-p", "thing")

"""A distribution of somebody else's: listed, switched on, ordered, blocked, broken."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hookengine import PLUGINS, PluginManager
from tests.fixtures import MakeRunner

GOOD = """
from hookengine import Plugin

class Greeter(Plugin, name="greeter"):
    text: str = "hello"
    before = "logging"

    def before_train(self, runner):
        print(self.text)
"""

Install = Callable[..., Path]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Put a distribution into a temporary folder on the path, as pip would."""

    def put(
        source: str | None,
        points: str = "greeter = greeter_package:Greeter",
        requires: tuple[str, ...] = (),
        name: str = "greeter-dist",
        group: str = "hookengine.plugins",
    ) -> Path:
        folder = tmp_path / name
        info = folder / f"{name.replace('-', '_')}-1.5.dist-info"
        info.mkdir(parents=True)
        lines = [f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.5\n"]
        lines += [f"Requires-Dist: {line}\n" for line in requires]
        (info / "METADATA").write_text("".join(lines))
        (info / "entry_points.txt").write_text(f"[{group}]\n{points}\n")
        if source is not None:
            (folder / "greeter_package.py").write_text(textwrap.dedent(source))
        monkeypatch.syspath_prepend(str(folder))
        monkeypatch.delitem(sys.modules, "greeter_package", raising=False)
        return folder

    yield put
    sys.modules.pop("greeter_package", None)
    PLUGINS.entry_points()


@pytest.mark.process
def test_it_is_listed_without_being_imported(install: Install) -> None:
    install("raise SystemExit('imported')")
    assert "greeter" in PLUGINS.names()
    assert "greeter_package" not in sys.modules
    listed = subprocess.run(
        [sys.executable, "-c", "from hookengine.cli import app; app(['plugins'])"],
        env={"PYTHONPATH": ":".join(sys.path), "COLUMNS": "200"},
        capture_output=True,
        text=True,
    )
    assert "greeter-dist 1.5" in listed.stdout, listed.stderr


def test_installed_is_not_active(install: Install) -> None:
    install("raise SystemExit('imported')")
    assert "greeter" not in PluginManager()


def test_it_is_switched_on_by_name_with_options(
    install: Install, make: MakeRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    install(GOOD)
    runner = make(plugins=["greeter"])
    runner.train()
    assert capsys.readouterr().out == "hello\n"
    assert runner.plugins.source("greeter") == "greeter-dist 1.5"
    make(plugins=[dict(type="greeter", text="good evening")]).train()
    assert capsys.readouterr().out == "good evening\n"
    with pytest.raises(TypeError, match=r"plugin 'greeter': unknown option 'txt'. Did you mean"):
        make(plugins=[dict(type="greeter", txt="x")])


def test_it_is_ordered_by_what_it_declares(install: Install) -> None:
    install(GOOD)
    calls = PluginManager(["greeter"]).calls()
    assert calls["before_train"] == ["distributed", "checkpoint", "greeter", "logging", "seed"]


def test_it_is_blocked_without_being_imported(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("raise SystemExit('imported')")
    monkeypatch.setenv("HOOKENGINE_DISABLE", "greeter")
    assert "greeter" not in PluginManager(["greeter"])
    assert "greeter_package" not in sys.modules


def test_an_error_in_it_names_it(install: Install, make: MakeRunner) -> None:
    install(GOOD.replace("print(self.text)", "raise LookupError('no')"))
    with pytest.raises(LookupError) as caught:
        make(plugins=["greeter"]).train()
    assert caught.value.__notes__ == [
        "raised by plugin 'greeter' (greeter-dist 1.5), event 'before_train', epoch 0, iteration 0"
    ]


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (dict(source=None), "ModuleNotFoundError: No module named 'greeter_package'.*repair or"),
        (dict(source="1 / 0"), "ZeroDivisionError: division by zero.*repair or uninstall"),
        (dict(source="def ("), "SyntaxError"),
        (dict(source="x = 1"), "has no 'Greeter'"),
        (
            dict(source="import absent_library", points="greeter = greeter_package:Greeter [fast]"),
            r'No module named .absent_library.*pip install "greeter-dist\[fast\]"',
        ),
        (
            dict(source=GOOD, requires=("hookengine>=99",)),
            r"requires hookengine>=99, but hookengine 0\.\S+ is installed",
        ),
    ],
)
def test_one_that_cannot_be_imported_is_reported_well(
    install: Install, make: MakeRunner, broken: Any, message: str
) -> None:
    install(**broken)
    with pytest.raises(ImportError, match=message) as caught:
        make(plugins=["greeter"])
    text = str(caught.value)
    assert "the plugin 'greeter' of greeter-dist 1.5" in text
    assert "Fix: " in text


def test_one_whose_requirement_fits_is_imported(install: Install) -> None:
    install(GOOD, requires=("hookengine>=0.1", "torch", "hookengine[x]>=99; extra == 'x'"))
    assert "greeter" in PluginManager(["greeter"])


def test_one_that_is_misspelt_is_reported_well(install: Install, make: MakeRunner) -> None:
    install(GOOD.replace("before_train", "before_trian"))
    with pytest.raises(TypeError, match="plugin 'greeter': unknown event 'before_trian'"):
        make(plugins=["greeter"])


def test_two_distributions_of_one_name_are_reported(install: Install) -> None:
    install(GOOD)
    install(None, points="greeter = other_package:Greeter", name="other-dist")
    with pytest.raises(ValueError, match="two distributions offer the plugin 'greeter'") as caught:
        PluginManager(["greeter"])
    assert "greeter-dist 1.5" in str(caught.value)
    assert "other-dist 1.5" in str(caught.value)
    assert "greeter" in PLUGINS.names()
    assert "logging" in PluginManager()  # the dispute is nobody else's


def test_it_contributes_models_too(install: Install) -> None:
    install(
        "class Special: pass", points="Special = greeter_package:Special", group="hookengine.model"
    )
    from hookengine.model import Special  # type: ignore[attr-defined]

    assert Special.__module__ == "greeter_package"

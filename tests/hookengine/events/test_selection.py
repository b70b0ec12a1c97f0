"""Tests of ``hookengine/events/selection.py``."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest

from hookengine import DEFAULT_PLUGINS, Plugin, PluginManager
from tests.hookengine.events.notes import Note, named


def test_defaults_are_on_without_being_named() -> None:
    assert [*PluginManager()] == list(DEFAULT_PLUGINS)
    assert [*PluginManager(defaults=())] == []


def test_a_plugin_is_a_name_a_dict_an_instance_or_no_name() -> None:
    manager = PluginManager(
        ["no:progress_bar", dict(type=Note, size=3), dict(type="logging", interval=7), named("x")]
    )
    assert [*manager] == [
        "distributed",
        "seed",
        "preprocess",
        "init",
        "logging",
        "checkpoint",
        "note",
        "x",
    ]
    assert manager["note"].size == 3
    assert manager["logging"].interval == 7  # naming a default gives its options


def test_environment_blocks_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOOKENGINE_DISABLE", "logging, note")
    assert [*PluginManager([Note()])] == [
        "distributed",
        "seed",
        "preprocess",
        "init",
        "progress_bar",
        "checkpoint",
    ]


@pytest.mark.parametrize(
    ("plugins", "error", "message"),
    [
        (["loging"], KeyError, "Did you mean 'logging'"),
        (["no:loging"], KeyError, "Did you mean 'logging'"),
        ([Note(), Note()], ValueError, "'note' is given twice"),
        (["logging", "logging"], ValueError, "'logging' is given twice"),
        ([dict(type=Note, size=0)], TypeError, "plugin 'note': size=0"),
        ([dict(type=Note, sise=0)], TypeError, "unknown option 'sise'. Did you mean 'size'"),
        ([dict(size=0)], KeyError, "needs a 'type'"),
        ([Note], TypeError, r"pass an instance, Note\(...\)"),
        ("logging", TypeError, r"Write plugins=\[...\]"),
    ],
)
def test_mistakes_get_one_clear_error(plugins: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        PluginManager(plugins)


class Ordered(Plugin):
    """Declares its place."""

    after: ClassVar[tuple[str, ...]] = ("note",)

    def before_run(self) -> None: ...


def test_an_active_plugin_is_found_by_name() -> None:
    manager = PluginManager([Ordered(), Note()], defaults=())
    assert list(manager) == ["ordered", "note"]
    assert [name for name, _ in manager.items()] == ["ordered", "note"]
    assert manager.calls()["before_run"] == ["note", "ordered"]
    assert "note" in manager
    with pytest.raises(KeyError, match="Did you mean 'note'"):
        manager["noet"]


def test_a_plugin_is_named_by_the_option_too() -> None:
    plugins = [Note(), Note(plugin_name="second"), dict(type=Note, plugin_name="third", size=2)]
    manager = PluginManager(plugins, defaults=())
    assert [*manager] == ["note", "second", "third"]
    assert manager["third"].size == 2


def test_an_instance_has_the_name_and_the_source_of_its_entry_point() -> None:
    from hookengine_logging import Logging

    manager = PluginManager([Logging(interval=3)])
    assert [*manager] == list(DEFAULT_PLUGINS)
    assert manager.source("logging").startswith("hookengine ")

    class Preprocess(Plugin):  # of the same name, and not the same
        def before_run(self) -> None: ...

    assert PluginManager([Preprocess()]).source("preprocess") == __name__
    with pytest.raises(TypeError, match="the plugin 'hidden' is a class"):
        PluginManager([type("Hidden", (), {})])

"""A distribution of somebody else's: listed, switched on, ordered, blocked, broken."""

from __future__ import annotations

import subprocess
import sys

import pytest

import hookengine.model
from hookengine import DEFAULT_PLUGINS, PLUGINS, PluginManager
from hookengine.answers import answer
from tests.fixtures import Install, MakeRunner

GOOD = """
from hookengine import Plugin

class Greeter(Plugin, name="greeter"):
    text: str = "hello"
    before = "logging"

    def before_train(self, runner):
        print(self.text)
"""


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


def test_one_whose_requirement_fits_is_imported(install: Install) -> None:
    install(GOOD, requires=("hookengine>=0.1", "torch", "hookengine[x]>=99; extra == 'x'"))
    assert "greeter" in PluginManager(["greeter"])


def test_one_that_is_misspelt_is_reported_well(install: Install, make: MakeRunner) -> None:
    install(GOOD.replace("before_train", "before_trian"))
    with pytest.raises(TypeError, match="plugin 'greeter': unknown event 'before_trian'"):
        make(plugins=["greeter"])


IMPOSTOR = """
from hookengine import Plugin

class Logging(Plugin):
    text: str = "other"

    def before_train(self, runner):
        print(self.text)
"""


def test_a_name_of_two_distributions_is_an_error_where_it_is_used(install: Install) -> None:
    install(GOOD)
    install(None, points="greeter = other_package:Greeter", name="other-dist", module="other")
    with pytest.raises(
        ValueError, match="several distributions offer the plugin 'greeter'"
    ) as caught:
        PluginManager(["greeter"])
    for text in ("greeter-dist 1.5", "other-dist 1.5", "'greeter-dist:greeter'"):
        assert text in str(caught.value)
    assert "greeter" in PLUGINS
    assert "greeter" in PLUGINS.names()
    assert "logging" in PluginManager()  # other names still work
    for entry in (
        "greeter-dist:greeter",
        "Greeter_Dist:greeter",
        dict(type="greeter-dist:greeter"),
    ):
        manager = PluginManager([entry])
        assert manager.source("greeter") == "greeter-dist 1.5"
    with pytest.raises(ImportError, match=r"of other-dist 1\.5"):
        PluginManager(["other-dist:greeter"])
    with pytest.raises(KeyError, match="unknown plugin 'no-dist:greeter'"):
        PluginManager(["no-dist:greeter"])


def test_the_defaults_are_hookengines_own_whatever_else_is_installed(
    install: Install,
    make: MakeRunner,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A distribution that offers the names of all defaults, and more, changes nothing."""
    names = (*DEFAULT_PLUGINS, "ema", "clip")
    points = "\n".join(f"{name} = greeter_package:Logging" for name in names)
    install(IMPOSTOR, points=points, name="a-dist")
    runner = make(defaults=DEFAULT_PLUGINS, plugins=["no:progress_bar"])
    assert runner.plugins.source("logging").startswith("hookengine ")
    assert "greeter_package" not in sys.modules
    runner.train()
    monkeypatch.setenv("HOOKENGINE_DISABLE", "logging,ema")
    assert "logging" not in PluginManager()
    monkeypatch.delenv("HOOKENGINE_DISABLE")
    capsys.readouterr()
    with pytest.raises(ValueError, match="'hookengine:logging' or 'a-dist:logging', as in dict"):
        PluginManager([dict(type="logging", interval=5)])
    own = PluginManager([dict(type="hookengine:logging", interval=5)])
    assert own["logging"].interval == 5
    assert [*own].count("logging") == 1
    other = make(plugins=[dict(type="a-dist:logging", text="mine")])
    other.train()
    assert capsys.readouterr().out == "mine\n"
    assert other.plugins.source("logging") == "a-dist 1.5"


@pytest.mark.parametrize(
    ("group", "name"),
    [
        ("hookengine.model", "BaseDataPreprocessor"),
        ("hookengine.model", "init_weights"),
        ("hookengine.model", "is_model_wrapper"),
        ("hookengine.model", "param_groups"),
        ("hookengine.model", "ExponentialMovingAverage"),
        ("hookengine.model_wrappers", "DistributedDataParallel"),
        ("hookengine.weight_initializers", "Xavier"),
        ("hookengine.answers", "mmengine"),
    ],
)
def test_nor_does_one_that_offers_the_name_of_anything_else(
    install: Install, make: MakeRunner, group: str, name: str
) -> None:
    install("raise SystemExit('imported')", points=f"{name} = greeter_package:x", group=group)
    optimizer = dict(optimizer=dict(type="SGD", lr=0.1), paramwise=dict(norm_decay_mult=0.0))
    make(plugins=["ema"], defaults=("init", "distributed"), optim_wrapper=optimizer).train()
    if group == "hookengine.model":
        assert getattr(hookengine.model, name).__module__.startswith("hookengine_")
    if group != "hookengine.answers":
        assert "greeter_package" not in sys.modules


def test_the_answers_of_all_distributions_are_asked(install: Install) -> None:
    source = "def answer(name): return f'use X instead of {name}' if name == 'theirs' else None"
    install(source, points="mmengine = greeter_package:answer", group="hookengine.answers")
    assert answer("theirs") == "use X instead of theirs"
    assert "clip" in str(answer("clip_grad"))


def test_a_broken_model_wrapper_of_another_distribution_breaks_no_run(
    install: Install, make: MakeRunner
) -> None:
    group = "hookengine.model_wrappers"
    install("1 / 0", points="Theirs = greeter_package:Theirs", group=group)
    make(defaults=("distributed", "init")).train()


FORMS = """
import functools
from hookengine import Plugin

class Greeter(Plugin, name="other_name"):
    text: str = "hello"

    def before_train(self, runner):
        print(self.text)

class Plain:
    def before_train(self, runner):
        print("plain")

def make(text="made"):
    return Greeter(text=text)

partial = functools.partial(Greeter, text="partial")
instance, plain = Greeter(text="instance"), Plain()

def before_train(runner):
    print("module")

class Numbers:
    count = 3

numbers = Numbers()

def nothing():
    return None
"""


@pytest.mark.parametrize(
    ("point", "printed"),
    [
        (":Greeter", "hello"),
        (":make", "made"),
        (":partial", "partial"),
        (":instance", "instance"),
        (":plain", "plain"),
        ("", "module"),
    ],
)
def test_an_entry_point_may_be_a_class_a_function_or_an_object_and_has_the_last_word_on_the_name(
    install: Install,
    make: MakeRunner,
    capsys: pytest.CaptureFixture[str],
    point: str,
    printed: str,
) -> None:
    install(FORMS, points=f"greeter = greeter_package{point}")
    runner = make(plugins=["greeter"])
    runner.train()
    assert capsys.readouterr().out == f"{printed}\n"
    assert [*runner.plugins] == ["greeter"]
    assert runner.plugins.source("greeter") == "greeter-dist 1.5"
    if point in (":make", ":partial", ":Greeter"):
        make(plugins=[dict(type="greeter", text="given")]).train()
        assert capsys.readouterr().out == "given\n"
    else:
        with pytest.raises(TypeError, match="'greeter' is an object, which has no options"):
            make(plugins=[dict(type="greeter", text="given")])


@pytest.mark.parametrize(
    ("point", "message"),
    [
        (":numbers", "'greeter' of greeter-dist 1.5 cannot be used: .*Numbers object"),
        (":Numbers.count", "'greeter' of greeter-dist 1.5 cannot be used: 3 is neither a class"),
        (":Numbers", "implements no event"),
        (":nothing", "'greeter' of greeter-dist 1.5 cannot be used: <function nothing"),
        (":before_train", "'greeter' of greeter-dist 1.5 cannot be used: <function before_train"),
    ],
)
def test_an_entry_point_that_is_no_plugin_is_an_error_that_names_it(
    install: Install, make: MakeRunner, point: str, message: str
) -> None:
    install(FORMS, points=f"greeter = greeter_package{point}")
    with pytest.raises(TypeError, match=message):
        make(plugins=["greeter"])


def test_an_object_has_the_name_of_its_entry_point_wherever_its_class_is_defined(
    install: Install, make: MakeRunner
) -> None:
    """Its state is found by that name, however the plugin was enabled."""
    install(FORMS, points="inner = greeter_package:Greeter", name="inner-dist")
    package = "from greeter_package import Greeter, instance"
    install(package, points="greeter = outer:Greeter\nready = outer:instance", module="outer")
    import greeter_package  # type: ignore[import-not-found]

    assert [*PluginManager([greeter_package.Greeter()], ())] == ["inner"]
    import outer  # type: ignore[import-not-found]

    manager = PluginManager([outer.instance], ())
    assert [*manager] == ["ready"]
    assert manager.source("ready") == "greeter-dist 1.5"


def test_a_full_name_stands_for_the_name_wherever_a_plugin_is_named(
    install: Install, make: MakeRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(GOOD)
    manager = PluginManager(
        defaults=("hookengine:logging", "seed"), plugins=["greeter-dist:greeter"]
    )
    assert [*manager] == ["logging", "seed", "greeter"]
    assert manager["greeter"].plugin_name == "greeter"
    manager.remove("greeter-dist:greeter")
    assert [*manager] == ["logging", "seed"]
    assert "logging" not in PluginManager(["no:hookengine:logging"])
    monkeypatch.setenv("HOOKENGINE_DISABLE", "hookengine:logging, greeter-dist:greeter")
    assert {"logging", "greeter"} - {*PluginManager(["greeter"])} == {"logging", "greeter"}
    monkeypatch.delenv("HOOKENGINE_DISABLE")
    later = type("Later", (), {"before_train": lambda self: None, "before": "greeter-dist:greeter"})
    calls = PluginManager(["greeter", later()], defaults=()).calls()
    assert calls["before_train"] == ["later", "greeter"]
    named = dict(type="greeter", plugin_name="greeter-dist:greeter")  # a name of one's own
    assert [*PluginManager(["greeter", named], defaults=())] == ["greeter", "greeter-dist:greeter"]


def test_a_name_with_a_colon_that_was_registered_or_offered_is_that_name(install: Install) -> None:
    install(GOOD, points="team:greeter = greeter_package:Greeter")
    assert [*PluginManager(["team:greeter"], ())] == ["team:greeter"]
    assert [*PluginManager(["greeter-dist:team:greeter"], ())] == ["team:greeter"]
    PLUGINS.register_module(name="hookengine:clip", module=object)
    try:
        assert PLUGINS.short_name("hookengine:clip") == "hookengine:clip"
    finally:
        del PLUGINS._registered["hookengine:clip"]


@pytest.mark.parametrize("metadata", [None, "", "Version: 1.5\n"])
@pytest.mark.parametrize("group", ["hookengine.plugins", "hookengine.model"])
def test_a_distribution_with_broken_metadata_breaks_nothing_else(
    install: Install, make: MakeRunner, metadata: str | None, group: str
) -> None:
    path = next(install(None, group=group).glob("*/METADATA"))
    path.unlink() if metadata is None else path.write_text(metadata)
    make(defaults=DEFAULT_PLUGINS, plugins=["no:progress_bar", "ema"]).train()
    if group == "hookengine.plugins":
        with pytest.raises(ImportError, match="'greeter' of an unnamed distribution"):
            PluginManager(["greeter"])


@pytest.mark.parametrize("value", [":Greeter", "greeter package:Greeter", "greeter_package:", ""])
def test_a_malformed_entry_point_breaks_nothing_else(
    install: Install, make: MakeRunner, value: str
) -> None:
    install(GOOD, points=f"other = {value}")
    hello = type("Hello", (), {"before_train": lambda self: None})
    make(defaults=DEFAULT_PLUGINS, plugins=["no:progress_bar", hello()]).train()
    with pytest.raises(ImportError, match=r"'other' of greeter-dist 1\.5"):
        PluginManager(["other"])


def test_requirements_that_cannot_be_read_are_left_out(install: Install) -> None:
    install(GOOD, requires=("not a requirement !!", "torch"))
    assert "greeter" in PluginManager(["greeter"])


def test_it_contributes_models_too(install: Install) -> None:
    install(
        "class Special: pass", points="Special = greeter_package:Special", group="hookengine.model"
    )
    from hookengine.model import Special  # type: ignore[attr-defined]

    assert Special.__module__ == "greeter_package"

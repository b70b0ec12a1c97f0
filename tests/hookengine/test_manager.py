"""Which plugins are on, changes in mid-run, states, and who is to blame."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
from pydantic import Field

from hookengine import DEFAULT_PLUGINS, Plugin, PluginManager, hookimpl
from tests.fixtures import MakeRunner, Toy


class Note(Plugin):
    """A plugin that notes what it is told."""

    size: int = Field(default=1, gt=0)

    def __post_init__(self) -> None:
        self.log: list[str] = []

    def configure(self) -> None:
        self.log.append("configure")

    def before_run(self) -> None:
        self.log.append("before_run")

    def before_train(self) -> None:
        self.log.append("before_train")

    def before_train_epoch(self) -> None:
        self.log.append("before_train_epoch")

    def after_train_iter(self) -> None:
        self.log.append("after_train_iter")

    def unconfigure(self) -> None:
        self.log.append("unconfigure")


def named(name: str, **methods: Any) -> Any:
    plugin = type("Some", (), methods or {"after_run": lambda self: None})()
    plugin.plugin_name = name
    return plugin


def test_defaults_are_on_without_being_named() -> None:
    assert PluginManager().order == list(DEFAULT_PLUGINS)
    assert PluginManager(defaults=()).order == []


def test_a_plugin_is_a_name_a_dict_an_instance_or_no_name() -> None:
    manager = PluginManager(
        ["no:progress_bar", dict(type=Note, size=3), dict(type="logging", interval=7), named("x")]
    )
    assert manager.order == [
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
    assert PluginManager([Note()]).order == [
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
        ("logging", TypeError, r"write plugins=\[...\]"),
    ],
)
def test_mistakes_get_one_clear_error(plugins: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        PluginManager(plugins)


def test_order_is_printed_per_event() -> None:
    def hook(self: Any) -> None: ...

    first = named("first", after_train_iter=hook, unconfigure=hook)
    second = named("second", after_train_iter=hook, unconfigure=hook)
    eager = named("eager", after_train_iter=hookimpl(tryfirst=True)(lambda self: None))
    manager = PluginManager([first, second, eager], defaults=())
    assert manager.calls() == {
        "unconfigure": ["second", "first"],
        "after_train_iter": ["eager", "first", "second"],
    }


def test_order_does_not_depend_on_when_a_plugin_was_added() -> None:
    def hook(self: Any) -> None: ...

    late = named("late", after_train_iter=hook)
    late.before = ("early",)
    manager = PluginManager([named("early", after_train_iter=hook)], defaults=())
    manager.add(late)
    assert manager.calls()["after_train_iter"] == ["late", "early"]


def test_who_is_added_in_mid_run_is_told_what_is_open(make: MakeRunner) -> None:
    note = Note()
    runner = make()

    @runner.on("after_train_iter")
    def add(runner: Any) -> None:
        if runner.progress.iter == 2:
            runner.plugins.add(note)

    @runner.on("safe_point")
    def remove(runner: Any) -> None:
        if runner.progress.iter == 4:
            runner.plugins.remove("note")

    runner.train()
    opened = ["configure", "before_run", "before_train", "before_train_epoch"]
    assert note.log == [*opened, "after_train_iter", "after_train_iter", "unconfigure"]


def test_a_plugin_with_build_events_is_refused_in_a_built_runner(make: MakeRunner) -> None:
    runner = make()
    with pytest.raises(ValueError, match=r"convert_model.*is built already"):
        runner.plugins.add(named("late", convert_model=lambda self, model: None))
    assert "late" not in runner.plugins


def test_a_plugin_that_is_refused_changes_nothing(make: MakeRunner) -> None:
    runner = make(plugins=[Note()])
    with pytest.raises(TypeError, match="after_train_itr"):
        runner.plugins.add(named("bad", after_train_itr=lambda self: None))
    circular = named("circular", after_train_iter=lambda self: None)
    circular.after, circular.before = ("note",), ("note",)
    with pytest.raises(ValueError, match="cycle"):
        runner.plugins.add(circular)
    assert runner.plugins.order == ["note"]
    runner.train()


def test_a_function_of_the_same_name_replaces_the_one_before(make: MakeRunner) -> None:
    runner = make()
    log = []

    def cell(text: str) -> None:
        @runner.on("after_train_epoch")
        def note() -> None:
            log.append(text)

    cell("old")
    cell("new")
    runner.train()
    assert log == ["new", "new"]


def test_one_function_serves_two_events_with_options_of_its_own(make: MakeRunner) -> None:
    runner = make()
    log = []

    def first() -> None:
        log.append("first")

    runner.on("before_train")(lambda: log.append("lambda"))
    runner.on("before_train", tryfirst=True)(first)
    runner.on("after_train")(first)
    runner.on("after_train", tryfirst=True)(lambda: log.append("lambda"))
    runner.train()
    assert log == ["first", "lambda", "lambda", "first"]
    with pytest.raises(KeyError, match="Did you mean 'after_train'"):
        runner.on("after_trian")(first)
    with pytest.raises(TypeError, match="expected a function"):
        runner.on("after_train")(3)  # type: ignore[type-var]


def test_states_are_collected_by_name_and_given_back() -> None:
    class Counter(Plugin):
        count = 0

        def after_run(self) -> None: ...

        def state_dict(self) -> dict[str, Any]:
            return {"count": self.count}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.count = state["count"]

        def rank_state_dict(self) -> dict[str, Any]:
            return {"rank": self.count}

        def load_rank_state_dict(self, state: dict[str, Any]) -> None:
            self.rank = state["rank"]

    manager = PluginManager([counter := Counter(), Note()], defaults=())
    counter.count = 5
    states = manager.state_dict()
    assert states == {"counter": {"count": 5}}
    assert manager.rank_state_dict() == {"counter": {"rank": 5}}
    other = PluginManager([restored := Counter(), Note()], defaults=())
    other.load_state_dict(states)
    other.load_rank_state_dict(manager.rank_state_dict())
    assert (restored.count, restored.rank) == (5, 5)

    with pytest.raises(ValueError, match="state of 'counter', which is not on"):
        PluginManager([Note()], defaults=()).load_state_dict(states)
    PluginManager([Note()], defaults=()).load_state_dict(states, allow=["counter"])
    with pytest.raises(ValueError, match="no state of 'counter'"):
        other.load_state_dict({})
    other.load_state_dict({}, allow=["counter"])


def test_an_error_names_the_plugin_the_event_and_the_iteration(make: MakeRunner) -> None:
    class Broken(Plugin):
        def after_train_iter(self, runner: Any) -> None:
            if runner.progress.iter == 3:
                self.helper()

        def helper(self) -> None:
            raise LookupError("no")

    with pytest.raises(LookupError, match="no") as caught:
        make(plugins=[Broken()]).train()
    (note,) = caught.value.__notes__
    assert note == (
        f"raised by plugin 'broken' ({__name__}), event 'after_train_iter', epoch 1, iteration 3"
    )
    assert caught.traceback[-1].name == "helper"


def test_of_two_plugins_of_one_class_the_right_one_is_blamed(make: MakeRunner) -> None:
    class Broken(Plugin):
        fails: bool = False

        def before_run(self) -> None:
            if self.fails:
                raise LookupError("no")

    good, bad = Broken(), Broken(fails=True)
    bad.plugin_name = "bad"
    for order in ([good, bad], [bad, good]):
        with pytest.raises(LookupError) as caught:
            make(plugins=order).train()
        assert "plugin 'bad'" in caught.value.__notes__[0]


def test_a_function_and_a_wrapped_function_are_blamed(make: MakeRunner) -> None:
    import functools

    def wrap(function: Any) -> Any:
        @functools.wraps(function)
        def wrapper(*args: Any) -> Any:
            return function(*args)

        return wrapper

    runner = make()

    @runner.on("before_train")
    @wrap
    def fail(runner: Any) -> None:
        raise LookupError("no")

    with pytest.raises(LookupError) as caught:
        runner.train()
    assert "plugin 'before_train:fail'" in caught.value.__notes__[0]


def test_an_error_of_the_users_model_blames_nobody(make: MakeRunner) -> None:
    class Failing(Toy):
        def forward(self, inputs: Any, labels: Any, mode: str = "tensor") -> Any:
            raise LookupError("no")

    with pytest.raises(LookupError) as caught:
        make(model=Failing(), plugins=[Note()]).train()
    assert not getattr(caught.value, "__notes__", [])


def test_an_observer_wraps_each_implementation_until_it_is_stopped() -> None:
    seen = []

    def observer(event: str, impl: Any, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            seen.append((event, impl.plugin_name))
            return function(*args, **kwargs)

        return call

    note = Note()
    manager = PluginManager([note], defaults=())
    stop = manager.observe(observer)
    manager.hooks.before_train(None)  # type: ignore[arg-type]
    manager.configure()
    stop()
    manager.hooks.before_train(None)  # type: ignore[arg-type]
    assert seen == [("before_train", "note"), ("configure", "note")]
    assert note.log == ["before_train", "configure", "before_train"]


def test_unconfigure_is_told_once_in_reverse_and_in_spite_of_errors() -> None:
    log: list[str] = []

    class Closing(Plugin):
        label: str
        fails: bool = False

        def configure(self) -> None:
            pass

        def unconfigure(self) -> None:
            log.append(self.label)
            if self.fails:
                raise LookupError(self.label)

    plugins = []
    for label, fails in (("a", True), ("b", False), ("c", True)):
        plugin = Closing(label=label, fails=fails)
        plugin.plugin_name = label
        plugins.append(plugin)
    manager = PluginManager(plugins, defaults=())
    manager.configure()
    with pytest.raises(BaseExceptionGroup) as caught:
        manager.unconfigure()
    assert [error.args[0] for error in caught.value.exceptions] == ["c", "a"]
    manager.unconfigure()
    assert log == ["c", "b", "a"]


class Ordered(Plugin):
    """Declares its place."""

    after: ClassVar[tuple[str, ...]] = ("note",)

    def after_run(self) -> None: ...


def test_an_active_plugin_is_found_by_name() -> None:
    manager = PluginManager([Ordered(), Note()], defaults=())
    assert list(manager) == ["note", "ordered"]
    assert [name for name, _ in manager.items()] == ["note", "ordered"]
    assert "note" in manager
    with pytest.raises(KeyError, match="Did you mean 'note'"):
        manager["noet"]


def test_configure_follows_the_printed_order(make: MakeRunner) -> None:
    log: list[str] = []

    def note(event: str, name: str, **order: bool) -> Any:
        return hookimpl(**order)(lambda self: log.append(f"{event} {name}"))

    a = named("a", configure=note("configure", "a"), unconfigure=note("unconfigure", "a"))
    b = named(
        "b",
        configure=note("configure", "b", tryfirst=True),
        unconfigure=note("unconfigure", "b", tryfirst=True),
    )
    runner = make(plugins=[a, b])
    calls = runner.plugins.calls()
    runner.close()
    assert log == [
        *(f"configure {name}" for name in calls["configure"]),
        *(f"unconfigure {name}" for name in calls["unconfigure"]),
    ]
    assert calls["configure"] == ["b", "a"]


def test_a_plugin_that_fails_to_configure_or_unconfigure_is_off_afterwards(
    make: MakeRunner,
) -> None:
    def fail(self: Any) -> None:
        raise LookupError("no")

    runner = make()
    told = []
    undo = {"unconfigure": lambda self: told.append("unconfigure")}
    with pytest.raises(LookupError) as caught:
        runner.plugins.add(named("bad", configure=fail, after_train_iter=fail, **undo))
    assert runner.plugins.order == []
    assert told == ["unconfigure"]  # as one that fails in the construction
    assert "plugin 'bad'" in caught.value.__notes__[0]
    runner.plugins.add(named("bad", unconfigure=fail, after_train_iter=fail))
    with pytest.raises(LookupError):
        runner.plugins.remove("bad")
    assert runner.plugins.order == []
    runner.train()


def test_a_replacement_that_is_refused_leaves_the_old_one(make: MakeRunner) -> None:
    runner = make()

    def cell(source: str) -> None:
        namespace: dict[str, Any] = {}
        exec(source, namespace)
        runner.on("after_train_epoch")(namespace["note"])

    cell("def note(runner): pass")
    with pytest.raises(TypeError, match="Did you mean 'runner'"):
        cell("def note(runer): pass")
    assert runner.plugins.order == ["after_train_epoch:note"]
    runner.plugins.remove("note")
    assert runner.plugins.order == []


def test_two_lambdas_are_two_and_a_missing_parenthesis_is_said(make: MakeRunner) -> None:
    runner = make()
    log: list[str] = []
    runner.on("after_train")(lambda: log.append("one"))
    runner.on("after_train")(lambda: log.append("two"))
    runner.train()
    assert log == ["one", "two"]
    with pytest.raises(TypeError, match=r'@runner\.on\("before_run"\)'):

        @runner.on  # type: ignore[arg-type]
        def hook() -> None: ...


def test_a_plugin_is_named_by_the_option_too() -> None:
    plugins = [Note(), Note(plugin_name="second"), dict(type=Note, plugin_name="third", size=2)]
    manager = PluginManager(plugins, defaults=())
    assert manager.order == ["note", "second", "third"]
    assert manager["third"].size == 2


def test_what_looks_misspelled_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    def hook(self: Any) -> None: ...

    near = named("near", safe_points=hook, after_run=hook)
    with pytest.warns(UserWarning, match="'safe_points' is not an event.*'safe_point'"):
        PluginManager([near], defaults=())
    late = named("late", after_run=hook)
    late.after = ("loging", "some_plugin_that_may_be_installed")
    with pytest.warns(UserWarning, match="unknown plugin 'loging'. Did you mean 'logging'"):
        PluginManager([late])
    monkeypatch.setenv("HOOKENGINE_DISABLE", "progres_bar")
    with pytest.warns(UserWarning, match="HOOKENGINE_DISABLE: unknown plugin 'progres_bar'"):
        PluginManager()


def test_a_method_without_self_is_an_error() -> None:
    def after_train_iter(runner: Any) -> None: ...

    with pytest.raises(TypeError, match="has no 'self'"):
        PluginManager([named("x", after_train_iter=after_train_iter)], defaults=())


def test_an_instance_has_the_name_and_the_source_of_its_entry_point() -> None:
    from hookengine_logging import Logging

    manager = PluginManager([Logging(interval=3)])
    assert manager.order == list(DEFAULT_PLUGINS)
    assert manager.source("logging").startswith("hookengine ")

    class Preprocess(Plugin):  # of the same name, and not the same
        def before_run(self) -> None: ...

    assert PluginManager([Preprocess()]).source("preprocess") == __name__
    with pytest.raises(TypeError, match="the plugin 'hidden' is a class"):
        PluginManager([type("Hidden", (), {})])


def test_a_group_of_errors_out_of_a_plugin_is_blamed(make: MakeRunner) -> None:
    class Group(Plugin):
        def before_train(self) -> None:
            raise ExceptionGroup("several", [ValueError("a")])

    with pytest.raises(ExceptionGroup) as caught:
        make(plugins=[Group()]).train()
    assert "plugin 'group'" in caught.value.__notes__[0]

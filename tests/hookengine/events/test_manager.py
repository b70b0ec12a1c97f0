"""Which plugins are on, changes in mid-run, states, and who is to blame."""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from hookengine import Plugin, PluginManager
from tests.fixtures import MakeRunner
from tests.hookengine.events.notes import Note, named


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
    with pytest.raises(ValueError, match=r"convert_model.*is already built"):
        runner.plugins.add(named("late", convert_model=lambda self, model: None))
    assert "late" not in runner.plugins


def test_a_plugin_that_is_refused_changes_nothing(make: MakeRunner) -> None:
    runner = make(plugins=[Note()])
    with pytest.raises(TypeError, match="after_train_itr"):
        runner.plugins.add(named("bad", after_train_itr=lambda self: None))
    circular = named("circular", after_train_iter=lambda self: None)
    circular.after, circular.before = ("note",), ("note",)
    with pytest.raises(ValueError, match="contradict each other"):
        runner.plugins.add(circular)
    assert [*runner.plugins] == ["note"]
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

    PluginManager([Note()], defaults=()).load_state_dict(states)  # leaves out what has no plugin


def test_a_plugin_that_was_removed_has_no_source() -> None:
    manager = PluginManager([dict(type="clip", max_norm=1.0), Note()], defaults=())
    assert manager.source("clip").startswith("hookengine ")
    assert manager.source("note") == __name__.rpartition(".")[0] + ".notes"
    manager.remove("clip")
    with pytest.raises(KeyError, match="unknown active plugin 'clip'"):
        manager.source("clip")


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
        plugin.plugin_name = label  # type: ignore[misc]
        plugins.append(plugin)
    manager = PluginManager(plugins, defaults=())
    manager.configure()
    with pytest.raises(BaseExceptionGroup) as caught:
        manager.unconfigure()
    assert [error.args[0] for error in caught.value.exceptions] == ["c", "a"]
    manager.unconfigure()
    assert log == ["c", "b", "a"]


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
    assert [*runner.plugins] == []
    assert told == ["unconfigure"]  # as one that fails in the construction
    assert "plugin 'bad'" in caught.value.__notes__[0]
    runner.plugins.add(named("bad", unconfigure=fail, after_train_iter=fail))
    with pytest.raises(LookupError):
        runner.plugins.remove("bad")
    assert [*runner.plugins] == []
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
    assert [*runner.plugins] == ["after_train_epoch:note"]
    runner.plugins.remove("note")
    assert [*runner.plugins] == []


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


def test_what_looks_misspelled_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    def hook(self: Any) -> None: ...

    near = named("near", safe_points=hook, after_run=hook)
    with pytest.warns(UserWarning, match="'safe_points' is not an event.*'safe_point'"):
        PluginManager([near], defaults=())
    monkeypatch.setenv("HOOKENGINE_DISABLE", "progres_bar")
    with pytest.warns(UserWarning, match="HOOKENGINE_DISABLE: unknown plugin 'progres_bar'"):
        PluginManager()


def test_a_method_without_self_is_an_error() -> None:
    def after_train_iter(runner: Any) -> None: ...

    with pytest.raises(TypeError, match="has no 'self'"):
        PluginManager([named("x", after_train_iter=after_train_iter)], defaults=())


@pytest.mark.parametrize(
    ("plugin", "message"),
    [
        ("def before_run(): ...", "has no 'self'"),
        ("def before_run(runner): ...", "has no 'self'"),
        ("@classmethod\n    def before_run(): ...", "has no 'cls'"),
        ("@classmethod\n    def before_run(runner): ...", "has no 'cls'"),
        ("async def before_run(self): ...", "Use def instead of async def"),
        ("async def before_run(self, runner): yield", "Use def instead of async def"),
        ("@staticmethod\n    async def before_run(): ...", "Use def instead of async def"),
        ("def before_run(self, runner): yield", "Use return instead of yield"),
        ("def forward_context(self): yield", "Use return instead of yield"),
    ],
)
def test_a_hook_that_could_not_run_is_refused_with_plugin_and_event(
    plugin: str, message: str
) -> None:
    namespace: dict[str, Any] = {}
    exec(f"class Wrong:\n    {plugin}", namespace)
    event = "forward_context" if "forward_context" in plugin else "before_run"
    with pytest.raises(TypeError, match=rf"plugin 'wrong', event {event}\(.*{message}"):
        PluginManager([namespace["Wrong"]()], defaults=())


def test_hooks_without_self_that_can_run_and_a_generator_of_records_are_accepted() -> None:
    class Fine:
        @staticmethod
        def before_run(runner: Any) -> None: ...

        @classmethod
        def after_run(cls, runner: Any) -> None: ...

        def history(self) -> Any:
            yield from ()

    manager = PluginManager([Fine()], defaults=())
    assert list(manager.calls()) == ["before_run", "after_run", "history"]


def test_an_async_function_is_refused_too(make: MakeRunner) -> None:
    with pytest.raises(TypeError, match=r"'before_run:note'.*Use def instead of async def"):

        @make().on("before_run")
        async def note(runner: Any) -> None: ...


SAVES, LOADS = "def state_dict(self): return {'n': 1}", "def load_state_dict(self, state): ..."
RANK_SAVES = "def rank_state_dict(self): return {'n': 1}"


@pytest.mark.parametrize("base", ["", "(Plugin)"])
@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ([SAVES], "lost when a run resumes: it has no 'load_state_dict'"),
        ([LOADS], "lost when a run resumes: it has no 'state_dict'"),
        ([RANK_SAVES], "it has no 'load_rank_state_dict'"),
        ([SAVES, LOADS, RANK_SAVES], "it has no 'load_rank_state_dict'"),
        ([SAVES, LOADS.replace("load_state_dict", "load_statedict")], "mean 'load_statedict'"),
        ([SAVES, LOADS.replace("load_", "restore_")], "it has no 'load_state_dict'"),
        ([SAVES, "def load_state_dict(self): ..."], "takes one argument, the state"),
        ([SAVES, "def load_state_dict(self, state, strict): ..."], "takes one argument, the state"),
        (["def state_dict(self, runner): return {}", LOADS], "takes no argument"),
        (["async def state_dict(self): return {}", LOADS], "Use def instead of async def"),
        (["def state_dict(self): yield 1", LOADS], "Use return instead of yield"),
        (["state_dict = 3", LOADS], "must be a method that takes no argument"),
    ],
)
def test_a_state_that_could_not_be_saved_and_loaded_is_refused(
    base: str, methods: list[str], message: str
) -> None:
    namespace: dict[str, Any] = {"Plugin": Plugin}
    body = "\n    ".join(["def before_run(self): ...", *methods])
    exec(f"class Wrong{base}:\n    {body}", namespace)
    with pytest.raises(TypeError, match=rf"plugin 'wrong'.*{message}"):
        PluginManager([namespace["Wrong"]()], defaults=())


def test_states_defined_apart_are_accepted() -> None:
    class Saves(Plugin):
        def before_run(self) -> None: ...

        def state_dict(self) -> dict[str, Any]:
            return {"n": 1}

        def load_state_dict(self, state: dict[str, Any]) -> None: ...

    class Inherits(Saves, name="inherits"):
        def state_dict(self) -> dict[str, Any]:
            return {"n": 2}

    class OnTheObject:
        def __init__(self) -> None:
            self.state_dict = lambda: {"n": 3}
            self.load_state_dict = lambda state: None

        def before_run(self) -> None: ...

    class Layer(torch.nn.Linear):
        def before_run(self) -> None: ...

    manager = PluginManager([Inherits(), OnTheObject(), Layer(1, 1)], defaults=())
    assert [*manager.state_dict()] == ["inherits", "on_the_object", "layer"]
    with pytest.warns(UserWarning, match="'stat_dict' is not an event.*Did you mean 'state_dict'"):
        PluginManager([named("near", before_run=print_nothing, stat_dict=print_nothing)], ())


def print_nothing(self: Any) -> None: ...


@pytest.mark.parametrize(
    "method", ["state_dict", "rank_state_dict", "load_state_dict", "load_rank_state_dict"]
)
def test_an_error_in_a_state_method_is_blamed_on_its_plugin_not_on_the_one_that_saves(
    make: MakeRunner, tmp_path: Path, method: str
) -> None:
    class Stateful(Plugin):
        broken: bool = False

        def before_run(self) -> None: ...

        def _do(self, name: str) -> dict[str, Any]:
            if self.broken and name == method:
                raise LookupError("no")
            return {"n": 1}

        def state_dict(self) -> dict[str, Any]:
            return self._do("state_dict")

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self._do("load_state_dict")

        def rank_state_dict(self) -> dict[str, Any]:
            return self._do("rank_state_dict")

        def load_rank_state_dict(self, state: dict[str, Any]) -> None:
            self._do("load_rank_state_dict")

    def run(broken: bool, **more: Any) -> None:
        plugins = [Stateful(broken=broken), "checkpoint"]
        make(plugins=plugins, work_dir=tmp_path, name="run", **more).train()

    with pytest.raises(LookupError) as caught:
        if method.startswith("load"):
            run(broken=False)
        run(broken=True, resume="auto")
    notes = [note for note in caught.value.__notes__ if note.startswith("raised by plugin")]
    assert len(notes) == 1
    assert notes[0].startswith(f"raised by plugin 'stateful' ({__name__}), method {method!r}")


@pytest.mark.parametrize("state", [[1], 3, torch.ones(2), "text", True])
def test_a_state_that_is_no_dict_names_the_plugin(make: MakeRunner, state: Any) -> None:
    def load(self: Any, state: Any) -> None: ...

    methods = dict(before_run=print_nothing, state_dict=lambda self: state, load_state_dict=load)
    runner = make(plugins=[named("odd", **methods)])
    with pytest.raises(TypeError, match="state_dict must return a dict, got") as caught:
        runner.state_dict()
    assert "raised by plugin 'odd'" in caught.value.__notes__[0]


MIXIN = """
class Mixin:
    def state_dict(self): return {'n': 1}
    def load_state_dict(self, state): ...
"""


@pytest.mark.parametrize(
    ("bases", "body", "fits"),
    [
        ("Plugin, Mixin", "", False),
        ("Mixin, Plugin", "", True),
        ("Plugin, Mixin", "state_dict, load_state_dict = Mixin.state_dict, print", True),
    ],
)
def test_a_mixin_behind_plugin_whose_state_would_be_hidden_is_refused(
    bases: str, body: str, fits: bool
) -> None:
    namespace: dict[str, Any] = {"Plugin": Plugin}
    body = f"{body}\n    def before_run(self): ..."
    exec(f"{MIXIN}\nclass Mixed({bases}):\n    {body}", namespace)
    if fits:
        assert PluginManager([namespace["Mixed"]()], ()).state_dict() == {"mixed": {"n": 1}}
        return
    with pytest.raises(TypeError, match=r"hides 'state_dict' of Mixin.*class Mixed\(Mixin, Plugin"):
        PluginManager([namespace["Mixed"]()], ())


def test_a_state_method_set_in_configure_is_checked_when_it_is_used(make: MakeRunner) -> None:
    class Late(Plugin):
        def configure(self) -> None:
            self.state_dict = lambda: {"n": 1}  # type: ignore[method-assign]

    runner = make(plugins=[Late()])
    with pytest.raises(TypeError, match="it has no 'load_state_dict'") as caught:
        runner.state_dict()
    assert "raised by plugin 'late'" in caught.value.__notes__[0]


def test_none_instead_of_a_state_method_means_no_state(make: MakeRunner) -> None:
    none = named("none", before_run=print_nothing, state_dict=None, load_state_dict=None)
    assert make(plugins=[none]).state_dict()["plugins"] == {}


class Hook:
    def __call__(self) -> None: ...


@pytest.mark.parametrize(
    "hook",
    [
        functools.partialmethod(print_nothing),
        functools.lru_cache(print_nothing),
        Hook(),
        property(lambda self: print_nothing),
    ],
)
def test_what_is_called_like_an_event_but_cannot_be_a_hook_is_refused(hook: Any) -> None:
    with pytest.raises(TypeError, match=r"plugin 'x', event before_run\(runner\): write a method"):
        PluginManager([named("x", before_run=hook, after_run=print_nothing)], ())


def test_data_called_like_an_event_is_left_alone() -> None:
    class Holds(Plugin):
        resume: bool = False

        def before_run(self) -> None:
            self.history = [1]

        @property
        def log(self) -> list[int]:
            return [2]

    holds = Holds()
    holds.write = print  # type: ignore[attr-defined]
    assert [*PluginManager([holds], ()).calls()] == ["before_run"]


def test_hooks_by_keyword_only_are_refused() -> None:
    def before_run(self: Any, *, runner: Any) -> None: ...

    with pytest.raises(TypeError, match=r"without \* or \*\*; got \(\*, runner"):
        PluginManager([named("x", before_run=before_run)], ())


def test_a_decorator_that_may_hide_a_coroutine_is_warned_of() -> None:
    async def before_run(self: Any) -> None: ...

    with pytest.warns(UserWarning, match="does not run unless the decorator runs it. Use def"):
        PluginManager([named("x", before_run=torch.no_grad()(before_run))], ())

    @contextlib.contextmanager
    def forward_context(self: Any) -> Any:
        yield

    PluginManager([named("x", forward_context=forward_context)], ())
    with pytest.warns(UserWarning, match="does not run unless the decorator runs it. Use return"):
        PluginManager([named("x", before_run=forward_context)], ())

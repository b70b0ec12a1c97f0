"""Generated calls do what pluggy does, and transforms what a fold does."""

from __future__ import annotations

import copy
import pickle
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hookengine import hookimpl
from hookengine.events.dispatch import COMPILED, SILENT, compile_event
from hookengine.events.hookspecs import EVENTS, Indexable
from hookengine.events.manager import PluginManager

KINDS: dict[str, list[str]] = {}


for _event in COMPILED:
    KINDS.setdefault(_event.kind.name, []).append(_event.name)


# These two are told apart: they call everybody although one raises.
PLAIN = [name for name in KINDS["event"] if not EVENTS[name].kind.closing]

Drawn = dict[str, Any]
MODULES = {f"p{index}": nn.Identity() for index in range(5)}
TENSORS = {f"p{index}": torch.tensor(float(index)) for index in range(5)}


def answer_of(event: str, what: Drawn) -> Any:
    """What a drawn implementation returns: of the type that the event expects."""
    if what["result"] != "value":
        return what["result"]
    by_type: dict[Any, Any] = {
        object: ("value", what["name"]),
        Mapping: {"value": what["name"]},
        Iterable: ["value", what["name"]],
        Iterable | Indexable: ["value", what["name"]],
        nn.Module: MODULES[what["name"]],
        torch.Tensor: TENSORS[what["name"]],
    }
    return by_type[EVENTS[event].kind.answer]


@st.composite
def implementations(draw: st.DrawFn, event: str, rhythms: bool = False) -> list[Drawn]:
    """Random implementations of one event: arguments, defaults, place, rhythm, what they do."""
    arguments, answer = EVENTS[event].arguments, EVENTS[event].kind.answer
    results: list[Any] = ["value"]
    if answer in (object, bool):
        results = [True, False] if answer is bool else ["value", 0, False, True]
    names = [f"p{index}" for index in range(draw(st.integers(0, 5)))]
    hidden = draw(st.permutations(names))  # an order that all constraints agree with
    several = []
    for name in names:
        options: Drawn = draw(st.sampled_from([{}, {"tryfirst": True}, {"trylast": True}]))
        at = hidden.index(name)
        for side, others in (("after", hidden[:at]), ("before", hidden[at + 1 :])):
            if draw(st.booleans()) and others:
                options = {**options, side: draw(st.sampled_from(others))}
        if rhythms and EVENTS[event].kind.counter is not None and draw(st.booleans()):
            options = {**options, "every": draw(st.sampled_from([1, 2, 3, "interval"]))}
        if rhythms and draw(st.integers(0, 3)) == 0:
            options = {**options, "once": True}
        chosen = draw(st.lists(st.sampled_from(arguments), unique=True))
        several.append(
            {
                "name": name,
                "arguments": chosen,
                "defaulted": draw(st.integers(0, len(chosen))),
                "options": options,
                "interval": draw(st.sampled_from([None, 0, 1, 2])),
                "result": draw(st.sampled_from([None, None, *results])),
                "raises": draw(st.integers(0, 9)) == 0,
            }
        )
    return several


def make_plugin(event: str, what: Drawn, log: list[Any]) -> Any:
    """A plugin object with one method of exactly the drawn signature."""
    plain = what["arguments"][: len(what["arguments"]) - what["defaulted"]]
    defaulted = what["arguments"][len(plain) :]
    signature = ", ".join(["self", *plain, *(f"{name}='default'" for name in defaulted)])
    received = ", ".join(f"{name!r}: {name}" for name in what["arguments"])
    namespace: Drawn = {"_what": what, "_log": log, "_answer": answer_of(event, what)}
    exec(
        f"def {event}({signature}):\n"
        f"    _log.append((_what['name'], {{{received}}}))\n"
        "    if _what['raises']: raise ValueError(_what['name'])\n"
        "    return _answer\n",
        namespace,
    )
    method = hookimpl(**what["options"])(namespace[event])
    members = {event: method, "plugin_name": what["name"], "interval": what["interval"]}
    return type("Drawn", (), members)()


def given_values(event: str, count: int = 0) -> Drawn:
    """An argument for each parameter; the counters of those that have one stand at ``count``."""
    values: Drawn = {name: f"given {name}" for name in EVENTS[event].arguments}
    progress = types.SimpleNamespace(iter=count, epoch=count)
    values["runner"] = types.SimpleNamespace(progress=progress)
    if "optim_wrapper" in values:
        values["optim_wrapper"] = types.SimpleNamespace(steps=count)
    if "batch_idx" in values:
        values["batch_idx"] = count - 1
    return values


def outcome(call: Callable[[], Any]) -> tuple[str, Any]:
    try:
        return "returned", call()
    except ValueError as error:
        return "raised", error.args


def both(event: str, several: list[Drawn]) -> tuple[Any, Any]:
    """(what pluggy does, what the generated call does), each with the log of the calls."""
    log: list[Any] = []
    manager = PluginManager([make_plugin(event, what, log) for what in several], defaults=())
    values = given_values(event)
    by_pluggy = outcome(lambda: getattr(manager.hook, event)(**values)), list(log)
    log.clear()
    generated = outcome(lambda: getattr(manager.hooks, event)(*values.values())), list(log)
    return by_pluggy, generated


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_events_are_called_as_pluggy_calls_them(data: st.DataObject) -> None:
    event = data.draw(st.sampled_from(PLAIN))
    (expected, calls), (found, generated_calls) = both(event, data.draw(implementations(event)))
    assert generated_calls == calls
    assert found[0] == expected[0]
    if found[0] == "raised":
        assert found == expected


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_decisions_are_taken_as_pluggy_takes_them(data: st.DataObject) -> None:
    event = data.draw(st.sampled_from(KINDS["decision"]))
    expected, found = both(event, data.draw(implementations(event)))
    assert found == expected


def is_due(what: Drawn, count: int, called: set[str]) -> bool:
    every = what["options"].get("every")
    every = what["interval"] if every == "interval" else every
    turned_off = "every" in what["options"] and not every
    counted = not turned_off and count % (every or 1) == 0
    return counted and not (what["options"].get("once") and what["name"] in called)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_whatever_changes_in_mid_run_only_those_that_are_due_are_called_and_in_order(
    data: st.DataObject,
) -> None:
    """Constraints, groups, rhythms; plugins that leave, come back and are replaced."""
    event = data.draw(st.sampled_from([e.name for e in COMPILED]))
    several = data.draw(implementations(event, rhythms=True))
    for what in several:
        what["raises"], what["result"] = False, None
    log: list[Any] = []
    manager = PluginManager([make_plugin(event, what, log) for what in several], defaults=())
    on, called = {what["name"]: what for what in several}, set[str]()
    for count in range(1, 8):
        if data.draw(st.booleans()) and several:
            what = data.draw(st.sampled_from(several))
            if data.draw(st.booleans()) and what["name"] in on:
                manager.remove(what["name"])
                del on[what["name"]]
            else:
                manager.add(make_plugin(event, what, log), replace=True)
                on[what["name"]] = what
            called.discard(what["name"])  # `once` counts per plugin object
        values = given_values(event, count)
        log.clear()
        getattr(manager.hook, event)(**values)  # pluggy knows no rhythm
        order = [name for name, _ in log]
        assert order == manager.calls().get(event, [])
        fresh = PluginManager([make_plugin(event, w, log) for w in on.values()], defaults=())
        assert order == fresh.calls().get(event, [])  # it does not depend on what was before
        log.clear()
        getattr(manager.hooks, event)(*values.values())
        due = [name for name in order if is_due(on[name], count, called)]
        assert [name for name, _ in log] == due
        called |= {name for name in due if on[name]["options"].get("once")}


def ordered(event: str, several: list[Drawn]) -> Iterator[Drawn]:
    manager = PluginManager([make_plugin(event, what, []) for what in several], defaults=())
    for name in manager.calls().get(event, []):
        yield next(what for what in several if what["name"] == name)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_transforms_are_a_fold(data: st.DataObject) -> None:
    event = data.draw(st.sampled_from(KINDS["transform"]))
    several = data.draw(implementations(event, rhythms=True))
    argument = EVENTS[event].kind.argument
    assert argument is not None
    count = data.draw(st.integers(1, 6))
    log: list[Any] = []
    manager = PluginManager([make_plugin(event, what, log) for what in several], defaults=())
    values = given_values(event, count)
    due = [what for what in ordered(event, several) if is_due(what, count, set())]

    def fold() -> Any:
        value: Any = values[argument]
        for what in due:
            if what["raises"]:
                raise ValueError(what["name"])
            if what["result"] is not None:
                value = answer_of(event, what)
        return value

    assert outcome(lambda: getattr(manager.hooks, event)(*values.values())) == outcome(fold)
    seen: Any = values[argument]
    for (name, received), what in zip(log, due, strict=False):
        assert name == what["name"]
        if argument in received:
            assert received[argument] == seen
        if what["result"] is not None:
            seen = answer_of(event, what)


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_a_veto_asks_everybody_who_is_due_and_one_false_is_enough(data: st.DataObject) -> None:
    several = data.draw(implementations("should_step", rhythms=True))
    for what in several:
        what["raises"] = False
    count, log = data.draw(st.integers(1, 6)), list[Any]()
    plugins = [make_plugin("should_step", what, log) for what in several]
    values = given_values("should_step", count)
    found = PluginManager(plugins, defaults=()).hooks.should_step(*values.values())
    due = [what for what in several if is_due(what, count, set())]
    assert sorted(name for name, _ in log) == [what["name"] for what in due]
    assert found == (not any(what["result"] is not None and not what["result"] for what in due))


def test_contexts_are_those_that_are_not_none() -> None:
    a, b = nullcontext(), nullcontext()
    for results in ([], [None], [a], [a, None, b]):
        manager = PluginManager(defaults=())
        for index, result in enumerate(results):
            method = (lambda r: lambda self: r)(result)
            plugin = type(f"P{index}", (), {"forward_context": method})()
            manager.add(plugin)
        hooks: Any = manager.hooks
        expected = tuple(result for result in results if result is not None)
        assert hooks.forward_context(None, None, None, "train") == expected


WRONG = {
    bool: ["later", 1, 0, (), torch.tensor(True)],
    Mapping: ["later", 1, False, [("a", 1)], nn.Identity()],
    Iterable: [1, True, nn.Identity()],
    Iterable | Indexable: [1, True, nn.Identity()],
    nn.Module: ["later", 1, False, nn.Identity, lambda x: x],
    torch.Tensor: ["later", 2.0, False, [torch.ones(1)]],
    AbstractContextManager: ["later", True, nullcontext, [nullcontext()]],
}
STRICT = [(e.name, wrong) for e in COMPILED for wrong in WRONG.get(e.kind.answer, ())]


@pytest.mark.parametrize(("event", "wrong"), STRICT)
def test_a_wrong_answer_names_the_plugin_that_gave_it(event: str, wrong: Any) -> None:
    def plugin(name: str, answer: Any) -> Any:
        return type(name, (), {event: lambda self: answer})()

    manager = PluginManager([plugin("Silent", None), plugin("Wrong", wrong)], defaults=())
    with pytest.raises(TypeError, match=f"^{event} of the plugin 'wrong' must return ") as caught:
        getattr(manager.hooks, event)(*given_values(event).values())
    manager.blame(caught.value)
    assert "raised by plugin 'wrong'" in caught.value.__notes__[0]


def test_every_decision_veto_and_transform_checks_its_answers_but_those_of_any_batch() -> None:
    free = [e.name for e in COMPILED if e.kind.name != "event" and e.kind.answer is object]
    assert free == ["before_train_iter", "before_val_iter", "before_test_iter"]


def test_a_dataloader_may_be_anything_that_python_iterates_over() -> None:
    class Batches:
        def __getitem__(self, index: int) -> int:
            return [1, 2][index]

    batches = Batches()

    class Replaces:
        def setup_dataloader(self, dataloader: Any) -> Any:
            return batches

    hooks = cast(Any, PluginManager([Replaces()], defaults=()).hooks)
    assert hooks.setup_dataloader(None, [1], "train") is batches


def test_closing_events_call_everybody_and_report_all_errors() -> None:
    called = []

    def failing(name: str) -> Any:
        def after_run(self: Any) -> None:
            called.append(name)
            raise ValueError(name)

        return type(name, (), {"after_run": after_run})()

    manager = PluginManager([failing("a"), failing("b")], defaults=())
    with pytest.raises(BaseExceptionGroup) as caught:
        manager.hooks.after_run(None)  # type: ignore[arg-type]
    assert called == ["a", "b"]
    assert [error.args for error in caught.value.exceptions] == [("a",), ("b",)]


@pytest.mark.parametrize("event", EVENTS.values(), ids=str)
def test_an_event_without_implementation_costs_one_shared_empty_function(event: Any) -> None:
    function = compile_event(event, ())
    assert function is compile_event(event, ())
    values = list(range(len(event.arguments)))
    result = function(*values)
    expected = {"veto": True, "contexts": ()}.get(event.kind.name)
    if event.kind.argument is not None:
        expected = values[event.arguments.index(event.kind.argument)]
    assert result == expected


def test_a_traceback_shows_the_generated_line(capsys: pytest.CaptureFixture[str]) -> None:
    import traceback

    class Broken:
        def before_run(self) -> None:
            raise ValueError("broken")

    manager = PluginManager([Broken()], defaults=())
    try:
        manager.hooks.before_run(None)  # type: ignore[arg-type]
    except ValueError:
        text = traceback.format_exc()
    assert "<hookengine event before_run>" in text
    assert "f0()" in text


def test_a_copy_of_hooks_is_silent() -> None:
    hooks = PluginManager(defaults=()).hooks
    assert copy.deepcopy(hooks) is SILENT
    assert pickle.loads(pickle.dumps(hooks)) is SILENT

"""Generated calls do what pluggy does, and transforms what a fold does."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pluggy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hookengine import hookimpl
from hookengine.events.dispatch import COMPILED, SILENT, Hooks, compile_event, resolve
from hookengine.events.hookspecs import EVENTS, PROJECT, HookSpecs
from hookengine.events.manager import PluginManager

KINDS: dict[str, list[str]] = {}


for _event in COMPILED:
    KINDS.setdefault(_event.kind.name, []).append(_event.name)


# These two are told apart: they call everybody although one raises.
PLAIN = [name for name in KINDS["event"] if not EVENTS[name].kind.closing]


@st.composite
def implementations(draw: st.DrawFn, event: str) -> list[dict[str, Any]]:
    """Random implementations of one event: arguments, defaults, order, what they do."""
    arguments = EVENTS[event].arguments
    several = []
    for index in range(draw(st.integers(0, 5))):
        chosen = draw(st.lists(st.sampled_from(arguments), unique=True))
        defaulted = draw(st.integers(0, len(chosen)))
        several.append(
            {
                "index": index,
                "arguments": chosen,
                "defaulted": defaulted,
                "order": draw(st.sampled_from([{}, {"tryfirst": True}, {"trylast": True}])),
                "result": draw(st.sampled_from([None, None, "value", 0, False, True])),
                "raises": draw(st.integers(0, 9)) == 0,
            }
        )
    return several


def make_plugin(event: str, what: dict[str, Any], log: list[Any]) -> object:
    """A plugin object with one method of exactly the drawn signature."""
    plain = what["arguments"][: len(what["arguments"]) - what["defaulted"]]
    defaulted = what["arguments"][len(plain) :]
    signature = ", ".join(["self", *plain, *(f"{name}='default'" for name in defaulted)])
    received = ", ".join(f"{name!r}: {name}" for name in what["arguments"])
    namespace: dict[str, Any] = {"_what": what, "_log": log}
    exec(
        f"def {event}({signature}):\n"
        f"    _log.append((_what['index'], {{{received}}}))\n"
        "    if _what['raises']: raise ValueError(_what['index'])\n"
        "    return ('value', _what['index']) if _what['result'] == 'value' else _what['result']\n",
        namespace,
    )
    method = hookimpl(**what["order"])(namespace[event])
    return type(f"Plugin{what['index']}", (), {event: method})()


def outcome(call: Any) -> tuple[str, Any]:
    try:
        return "returned", call()
    except ValueError as error:
        return "raised", error.args


def both(event: str, several: list[dict[str, Any]]) -> tuple[Any, Any]:
    """(what pluggy does, what the generated call does), each with the log of the calls."""
    log: list[Any] = []
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(HookSpecs)
    for what in several:
        manager.register(make_plugin(event, what, log), name=f"plugin{what['index']}")
    values = {name: f"given {name}" for name in EVENTS[event].arguments}
    by_pluggy = outcome(lambda: getattr(manager.hook, event)(**values)), list(log)
    log.clear()
    hooks = Hooks()
    resolve(hooks, manager.hook)
    generated = outcome(lambda: getattr(hooks, event)(*values.values())), list(log)
    return by_pluggy, generated


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_events_are_called_as_pluggy_calls_them(data: st.DataObject) -> None:
    event = data.draw(st.sampled_from(PLAIN))
    (expected, calls), (found, generated_calls) = both(event, data.draw(implementations(event)))
    assert generated_calls == calls
    assert found[0] == expected[0]
    if found[0] == "raised":
        assert found == expected


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_decisions_are_taken_as_pluggy_takes_them(data: st.DataObject) -> None:
    event = data.draw(st.sampled_from(KINDS["decision"]))
    expected, found = both(event, data.draw(implementations(event)))
    assert found == expected


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_transforms_are_a_fold(data: st.DataObject) -> None:
    event = data.draw(st.sampled_from(KINDS["transform"]))
    several = data.draw(implementations(event))
    argument = EVENTS[event].kind.argument
    assert argument is not None
    log: list[Any] = []
    manager = PluginManager(defaults=())
    for what in reversed(several):
        manager.register(make_plugin(event, what, log), name=f"plugin{what['index']}")
    resolve(manager._hooks, manager.hook)
    values = {name: f"given {name}" for name in EVENTS[event].arguments}
    last = [what for what in several if what["order"].get("trylast")]
    first = [what for what in several if what["order"].get("tryfirst")]
    ordered = [*first, *(what for what in several if not what["order"]), *reversed(last)]

    def fold() -> Any:
        value: Any = values[argument]
        for what in ordered:
            if what["raises"]:
                raise ValueError(what["index"])
            result = what["result"]
            if result is not None:
                value = ("value", what["index"]) if result == "value" else result
        return value

    assert outcome(lambda: getattr(manager.hooks, event)(*values.values())) == outcome(fold)
    seen: Any = values[argument]
    for (index, received), what in zip(log, ordered, strict=False):
        assert index == what["index"]
        if argument in received:
            assert received[argument] == seen
        if what["result"] is not None:
            seen = ("value", index) if what["result"] == "value" else what["result"]


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_a_veto_asks_everybody_and_one_false_is_enough(data: st.DataObject) -> None:
    several = data.draw(implementations("should_step"))
    for what in several:
        what["raises"] = False
    _, (found, calls) = both("should_step", several)
    assert len(calls) == len(several)
    vetoed = any(what["result"] is not None and not what["result"] for what in several)
    assert found == ("returned", not vetoed)


def test_contexts_are_those_that_are_not_none() -> None:
    for results in ([], [None], ["a"], ["a", None, "b"]):
        manager = PluginManager(defaults=())
        for index, result in enumerate(results):
            method = (lambda r: lambda self: r)(result)
            plugin = type(f"P{index}", (), {"forward_context": method})()
            manager.add(plugin)
        hooks: Any = manager.hooks
        expected = tuple(result for result in results if result is not None)
        assert hooks.forward_context(None, None, None, "train") == expected


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

"""A sink's method may take any of its arguments, however it is written."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest

from hookengine import Record, Sink
from tests.fixtures import MakeRunner
from tests.hookengine.records.keeping import record

SEEN: list[tuple[Any, ...]] = []


def note(*seen: Any) -> None:
    SEEN.append(tuple(one.iter if isinstance(one, Record) else one for one in seen))


def passing_on(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return method(*args, **kwargs)

    return wrapper


def by_position(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def wrapper(*args: Any) -> Any:
        return method(*args)

    return wrapper


def by_name(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def wrapper(self: Any, **kwargs: Any) -> Any:
        return method(self, **kwargs)

    return wrapper


def replaced(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def wrapper(self: Any, record: Record) -> Any:
        return method(self, "own", record)

    return wrapper


class Object:
    def __call__(self, record: Record) -> None:
        note(record)


class Forms:
    """Ways to write ``write``, each with what it sees of the record of iteration 1."""

    def both(self, runner: Any, record: Record) -> None:
        note(runner.name, record)

    def turned(self, record: Record, runner: Any) -> None:
        note(runner.name, record)

    def alone(self, record: Record) -> None:
        note(record)

    def none(self) -> None:
        note()

    def named(self, *, record: Record) -> None:
        note(record)

    def placed(self, record: Record, /) -> None:
        note(record)

    def with_more(self, record: Record, stream: str = "out") -> None:
        note(stream, record)

    def with_default(self, runner: Any = None, record: Any = None) -> None:
        note(runner.name, record)

    def starred(self, *args: Any) -> None:
        note(args[0].name, args[1])

    def all_named(self, **kwargs: Any) -> None:
        note(*sorted(kwargs), kwargs["record"])

    def mixed(self, record: Record, *args: Any, **kwargs: Any) -> None:
        note(*sorted(kwargs), record)

    @staticmethod
    def static(record: Record) -> None:
        note(record)

    @classmethod
    def of_class(cls, record: Record) -> None:
        note(record)

    partial = functools.partial(note, "partial")
    bound = functools.partialmethod(alone)
    instance = Object()
    decorated = passing_on(alone)
    decorated_by_position = by_position(turned)
    decorated_by_name = by_name(both)
    changed = replaced(lambda self, text, record: note(text, record))


@pytest.mark.parametrize(
    ("form", "seen"),
    [
        ("both", ("run", 1)),
        ("turned", ("run", 1)),
        ("alone", (1,)),
        ("none", ()),
        ("named", (1,)),
        ("placed", (1,)),
        ("with_more", ("out", 1)),
        ("with_default", ("run", 1)),
        ("starred", ("run", 1)),
        ("all_named", ("record", "runner", 1)),
        ("mixed", ("runner", 1)),
        ("static", (1,)),
        ("of_class", (1,)),
        ("bound", (1,)),
        ("instance", (1,)),
        ("decorated", (1,)),
        ("decorated_by_position", ("run", 1)),
        ("decorated_by_name", ("run", 1)),
        ("changed", ("own", 1)),
    ],
)
def test_write_may_take_any_of_its_arguments(
    make: MakeRunner, form: str, seen: tuple[Any, ...]
) -> None:
    SEEN.clear()
    sink = type("Formed", (Sink,), {"write": vars(Forms)[form]})()
    runner = make(plugins=[sink], name="run")
    runner.hooks.write(runner, record(1))
    runner.close()
    assert (sink.failures, SEEN) == (0, [seen])


@pytest.mark.parametrize("name", ["open", "close", "skip", "cut"])
@pytest.mark.parametrize("form", ["none", "starred", "decorated", "static"])
def test_so_may_the_other_methods(make: MakeRunner, name: str, form: str) -> None:
    class Base(Sink):
        def write(self, record: Record) -> None: ...

    seen: list[Any] = []
    forms: dict[str, Any] = {
        "none": lambda self: seen.append(name),
        "starred": lambda self, *args: seen.append(name),
        "decorated": passing_on(lambda self: seen.append(name)),
        "static": staticmethod(lambda: seen.append(name)),
    }
    sink = type("Formed", (Base,), {name: forms[form]})()
    runner = make(plugins=[sink])
    for iteration in (1, 1):
        runner.hooks.write(runner, record(iteration))
        runner.hooks.after_run(runner)
        sink.held.update(train=1)
    sink.replay(runner, [record(0)])
    runner.close()
    assert sink.failures == 0
    assert set(seen) == {name}


@pytest.mark.parametrize(
    ("name", "method", "message"),
    [
        ("write", lambda self, rec: None, "unknown argument 'rec'. Did you mean 'record'?"),
        ("write", lambda self, runner, recrod: None, "unknown argument 'recrod'. Did you mean"),
        ("write", lambda self, record, recrod=None: None, "unknown argument 'recrod'"),
        ("write", lambda record: None, "it has no 'self'"),
        ("write", lambda: None, "it has no 'self'"),
        ("write", "a text", "expected a method, got 'a text'"),
        ("write", passing_on(lambda self, rec: None), "unknown argument 'rec'"),
        ("write", staticmethod(lambda rec: None), "unknown argument 'rec'"),
        ("open", lambda self, runer: None, "unknown argument 'runer'. Did you mean 'runner'?"),
        ("close", lambda self, record: None, "unknown argument 'record'"),
        ("skip", lambda self, rec: None, "unknown argument 'rec'"),
        ("cut", lambda self, keep: None, "unknown argument 'keep'. Did you mean 'kept'?"),
    ],
)
def test_what_cannot_be_called_is_refused_before_training(
    make: MakeRunner, name: str, method: Any, message: str
) -> None:
    methods = {"write": lambda self: None, name: method}
    kind = type("Formed", (Sink,), methods)
    with pytest.raises(TypeError, match=f"the sink Formed, method '{name}': ") as raised:
        make(plugins=[dict(type=kind)])
    assert message in str(raised.value)


async def _async(self: Any, record: Record) -> None: ...


async def _async_event(self: Any, runner: Any) -> None: ...


def _generator(self: Any) -> Any:
    yield


class AsyncObject:
    async def __call__(self) -> None: ...


@pytest.mark.parametrize(
    ("name", "method", "message"),
    [
        ("write", _async, "it is async, and nothing awaits it"),
        ("write", AsyncObject(), "it is async, and nothing awaits it"),
        ("open", _generator, "it is a generator, and nothing runs it"),
        ("after_run", _async_event, "it is async, and nothing awaits it"),
        ("state_dict", _generator, "it is a generator, and nothing runs it"),
    ],
)
def test_what_nothing_would_run_is_refused(name: str, method: Any, message: str) -> None:
    kind = type("Formed", (Sink,), {"write": lambda self: None, name: method})
    with pytest.raises(TypeError, match=message):
        kind()


def test_a_coroutine_that_comes_back_is_a_failure(
    make: MakeRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    sink = type("Formed", (Sink,), {"write": lambda self, record: _async(self, record)})()
    runner = make(plugins=["logging", sink])
    runner.hooks.write(runner, record(1))
    runner.close()
    assert sink.failures == 1
    assert "write has returned a coroutine" in capsys.readouterr().out


class Alone(Sink):
    """Takes the record alone."""

    def __post_init__(self) -> None:
        self.seen: list[Any] = []

    def open(self) -> None:  # type: ignore[override]
        self.seen.append("open")

    def write(self, record: Record) -> None:
        self.seen.append(record.iter)

    def close(self) -> None:  # type: ignore[override]
        self.seen.append("close")


def test_super_may_be_called_with_any_arguments(make: MakeRunner) -> None:
    class Calling(Alone):
        def open(self, runner: Any) -> None:  # type: ignore[override]
            super().open(runner)  # type: ignore[call-arg]
            super().open()

        def write(self, runner: Any, record: Record) -> None:  # type: ignore[override]
            super().write(record)
            super().write(runner, record)  # type: ignore[call-arg, arg-type]
            super().write(record=record)
            super().write()  # type: ignore[call-arg]

        def skip(self) -> None:  # type: ignore[override]
            super().skip()  # type: ignore[call-arg]

        def close(self, runner: Any) -> None:  # type: ignore[override]
            super().close(runner)  # type: ignore[call-arg]
            Sink.close(self)  # type: ignore[call-arg]

    sink = Calling()
    runner = make(plugins=[sink])
    runner.hooks.write(runner, record(1))
    runner.hooks.after_run(runner)
    sink.held.update(train=1)
    runner.hooks.write(runner, record(1))
    runner.close()
    assert (sink.failures, sink.seen) == (0, ["open", "open", 1, 1, 1, 1, "close"])


def test_another_method_may_write_a_record(make: MakeRunner) -> None:
    class Twice(Alone):
        def after_train_iter(self, runner: Any) -> None:
            self.write(record(runner.progress.iter))

    sink = Twice()
    runner = make(plugins=[sink], train_cfg=dict(max_iters=2))
    runner.train()
    runner.close()
    assert (sink.failures, sink.seen) == (0, ["open", 1, 2, "close"])


class Mixed:
    """Methods of a class that knows nothing of sinks."""

    seen: list[str]

    def write(self, record: Record) -> None:
        import threading

        self.seen.append(threading.current_thread().name)
        raise SystemExit("no")

    def after_train_iter(self, runner: Any) -> None:
        raise OSError("no")


def test_methods_of_other_base_classes_are_isolated(make: MakeRunner) -> None:
    class Both(Mixed, Sink):
        def __post_init__(self) -> None:
            self.seen = []

    sink = Both()
    runner = make(plugins=[sink], train_cfg=dict(max_iters=2))
    runner.hooks.write(runner, record(1))
    runner.train()
    runner.close()
    assert sink.seen == ["sink both"]
    assert sink.failures == 3


def test_a_misspelled_write_is_named() -> None:
    class Wirter(Sink):
        def wirte(self, record: Record) -> None: ...

    with pytest.raises(TypeError, match=r"has no write\(self, runner, record\).*rename 'wirte'"):
        Wirter()

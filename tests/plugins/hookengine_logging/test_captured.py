"""Warnings of Python and torch become lines of the log."""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from tests import forks
from tests.fixtures import MakeRunner
from tests.plugins.hookengine_logging.runs import SCRIPT, logging_runner


def warn_once(runner: Any, text: str) -> None:
    runner.on("before_train")(lambda: warnings.warn(text, stacklevel=1))


WARNS = (
    SCRIPT
    + """
import logging, warnings
@runner.on("before_train")
def speak():
    for _ in range(2): warnings.warn("by Python")
    logging.getLogger("torch.something").warning("by %s", "torch")
    logging.getLogger("torch.distributed.elastic").error("by distributed")
    logging.getLogger("torch.nn").info("too quiet")
    logging.raiseExceptions = False
    logging.getLogger("torch.nn").warning("%d", "what does not fit")
runner.train()
runner.close()
warnings.warn("afterwards")
"""
)


@pytest.mark.process
def test_warnings_are_logged_once_and_printed_once(tmp_path: Path) -> None:
    done = forks.run(WARNS, str(tmp_path))
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*/run.log")
    log = path.read_text()
    assert log.count("WARNING UserWarning: by Python  where=<string>:") == 1
    assert log.count("WARNING torch.something: by torch") == 1
    assert log.count("ERROR torch.distributed.elastic: by distributed") == 1
    assert "too quiet" not in log
    assert done.stdout.count("by Python") == 1
    assert "by Python" not in done.stderr
    for text in ("by torch", "by distributed"):  # torch's own handler prints them
        assert text not in done.stdout
        assert done.stderr.count(text) == 1
    assert "UserWarning: afterwards" in done.stderr
    assert "afterwards" not in log + done.stdout


def test_code_that_records_warnings_still_gets_them(
    make: MakeRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    def train() -> list[Any]:
        runners = [logging_runner(make), logging_runner(make)]
        warn_once(runners[0], "recorded")
        runners[0].train()
        return runners

    with pytest.warns(UserWarning, match="recorded") as caught:
        runner, another = train()
    assert len(caught) == 1
    with warnings.catch_warnings(record=True) as kept:
        warnings.simplefilter("always")
        runner.train(max_epochs=3)
    assert [str(one.message) for one in kept] == ["recorded"]
    runner.close()
    another.close()
    log = (runner.run_dir / "run.log").read_text()
    assert log.count("recorded") == 1  # the second time, Python passed it only to the recorder
    assert capsys.readouterr().out.count("recorded") == 1


def hooked() -> list[Any]:
    """Return everything that listens to warnings."""
    torchs = [
        logger
        for name, logger in logging.root.manager.loggerDict.items()
        if name.partition(".")[0] == "torch" and isinstance(logger, logging.Logger)
    ]
    handlers = [handler for logger in torchs for handler in logger.handlers]
    return [warnings.showwarning, handlers, [handler.filters[:] for handler in handlers]]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0)])
def test_closing_all_runners_in_any_order_restores_everything(
    make: MakeRunner, order: tuple[int, ...]
) -> None:
    before = hooked()
    runners = [logging_runner(make) for _ in range(3)]
    assert hooked() != before
    for number in order:
        assert hooked() != before
        runners[number].close()
        runners[number].close()
    assert hooked() == before


def test_of_several_runners_the_one_that_runs_gets_the_warnings(
    make: MakeRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        first, second = (logging_runner(make, name=name) for name in ("first", "second"))
        warn_once(first, "of the first")
        warn_once(second, "of the second")
        first.train()
        second.train()
        second.close()
        first.train(max_epochs=3)
    first.close()
    logs = [(runner.run_dir / "run.log").read_text() for runner in (first, second)]
    counts = [[log.count(f"of the {name}") for name in ("first", "second")] for log in logs]
    assert counts == [[2, 0], [0, 1]]
    assert capsys.readouterr().out.count("of the") == 3


def test_another_showwarning_is_left_in_place(make: MakeRunner) -> None:
    seen: list[str] = []
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        runner = logging_runner(make)
        own = warnings.showwarning

        def mine(message: Any, *rest: Any) -> None:
            seen.append(str(message))
            own(message, *rest)

        warnings.showwarning = mine  # type: ignore[assignment]
        warn_once(runner, "heard")
        runner.train()
        runner.close()
        assert warnings.showwarning is mine
    assert seen == ["heard"]
    assert "heard" in (runner.run_dir / "run.log").read_text()


def test_a_function_that_wraps_showwarning_is_called_once(
    make: MakeRunner, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = logging_runner(make)
    monkeypatch.setattr(warnings, "_showwarnmsg_impl", lambda message: None)
    inner = warnings.showwarning
    seen = []

    def wrapper(*arguments: Any, **options: Any) -> None:
        seen.append(str(arguments[0]))
        inner(*arguments, **options)

    monkeypatch.setattr(warnings, "showwarning", wrapper)
    first.close()
    second = logging_runner(make)
    warnings.showwarning(UserWarning("hello"), UserWarning, "a.py", 1, sys.stderr)
    second.close()
    assert seen == ["hello"]

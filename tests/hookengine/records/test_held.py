"""What a sink holds is recognized in the history, or not."""

from __future__ import annotations

import math
from typing import Any

import pytest

from hookengine import Record, RecordHistory
from hookengine.records.held import Held
from tests.hookengine.records.keeping import record


def held(last: dict[str, int], **values: dict[str, float]) -> Held:
    of_sink = Held()
    of_sink.iterations.update(last)
    of_sink.values.update(values)
    return of_sink


HISTORY = RecordHistory(
    [record(1, loss=1.0), record(2, loss=0.5), record(2, "val", accuracy=0.1)],
    [record(3, loss=0.4), record(4, loss=0.3), record(4, "val", accuracy=0.2)],
)


@pytest.mark.parametrize(
    ("of_sink", "same", "beyond"),
    [
        (held({}), True, False),
        (held({"train": 2}), True, False),
        (held({"train": 2}, train={"loss": 0.5, "time": 7.0}), True, False),
        (held({"train": 2}, train={"loss": 0.6}), False, False),
        (held({"train": 4, "val": 2}, train={"loss": 0.3}), True, True),
        (held({"train": 4, "val": 2}, train={"loss": 0.5}), False, True),
        (held({"train": 6}), True, True),
        (held({"train": 6}, train={"loss": 0.1}), False, True),  # of an attempt nobody knows
        (held({"train": 3}, train={"loss": 0.4}), True, True),
        (held({"train": 1, "val": 1}, val={"accuracy": 0.1}), False, False),
        (held({"train": 1, "val": 1}), True, False),  # nothing tells whose it is
    ],
)
def test_what_is_held_is_looked_for_in_the_history(of_sink: Held, same: bool, beyond: bool) -> None:
    assert of_sink.compare(HISTORY, 2) is same
    assert of_sink.is_beyond() is beyond


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (0.1, 0.10000000149011612, True),  # in single precision
        (0.1, 0.1001, False),
        (math.nan, math.nan, True),
        (math.inf, 1e300, True),
        (math.inf, -1e300, False),
        (math.inf, 1.0, False),
        (0.0, 1e-46, True),
        (math.nan, 1.0, False),
    ],
)
def test_numbers_may_have_been_rounded(one: float, other: float, same: bool) -> None:
    of_sink = held({"train": 1}, train={"loss": one})
    assert of_sink.compare(RecordHistory([record(1, loss=other)]), 1) is same


def repeating(last: dict[str, int]) -> Held:
    of_sink = held(last)
    assert of_sink.compare(HISTORY, 2)
    assert of_sink.expect_repetition()
    return of_sink


def test_what_is_repeated_is_held_and_then_all_is_new() -> None:
    of_sink = repeating({"train": 4, "val": 4})
    assert of_sink.is_repeating
    again = [record(3, loss=0.4, time=9.0), record(4, loss=0.3), record(4, "val", accuracy=0.2)]
    assert [of_sink.meet(each) for each in again] == ["held"] * 3
    assert not of_sink.is_repeating
    assert of_sink.meet(record(5)) == "new"
    assert of_sink.kept == {"train": 4, "val": 4}


@pytest.mark.parametrize(
    "other",
    [
        record(3, loss=0.41),
        record(4, loss=0.3),
        record(3, "val", loss=0.4),
        record(3, loss=0.4, more=1.0),
        record(3),
        record(3, loss=math.nan),
        Record("train", 1, 3, 3, {"loss": 0.4}),
        Record("train", 0, 3, 3, {"loss": 0.4}, {"text": "a"}),
        record(9),
    ],
)
def test_the_first_other_record_is_different(other: Record) -> None:
    of_sink = repeating({"train": 4, "val": 2})
    assert of_sink.meet(other) == "different"
    of_sink.cut(of_sink.kept)
    assert of_sink.iterations == {"train": 2, "val": 2}
    assert of_sink.meet(other) == "new"


def test_the_rest_of_an_interval_at_the_stop_may_be_missing() -> None:
    history = RecordHistory([record(2)], [record(3, loss=0.4)])
    of_sink = held({"train": 3})
    assert of_sink.compare(history, 3)
    assert of_sink.expect_repetition()
    assert not of_sink.is_repeating
    assert of_sink.meet(record(4)) == "new"


def test_another_record_of_the_iteration_of_the_stop_is_different() -> None:
    history = RecordHistory([record(3)], [record(3, "val", accuracy=0.1)])
    of_sink = held({"train": 3, "val": 3})
    assert of_sink.compare(history, 3)
    assert of_sink.expect_repetition()
    assert of_sink.meet(record(3, "val", accuracy=0.2)) == "different"


def test_what_nobody_knows_cannot_be_repeated() -> None:
    of_sink = held({"train": 6, "val": 4})
    assert of_sink.compare(HISTORY, 2)
    assert not of_sink.expect_repetition()


@pytest.mark.parametrize("medium", ["a", "b"])
def test_media_are_compared(medium: Any) -> None:
    of_sink = held({"train": 3})
    one, other = (Record("train", 0, 3, 3, {}, {"text": text}) for text in ("a", medium))
    assert of_sink.compare(RecordHistory([], [one]), 2)
    assert of_sink.expect_repetition()
    assert of_sink.meet(other) == ("held" if medium == "a" else "different")


def test_written_records_count_once_they_may_come_again() -> None:
    of_sink = Held()
    of_sink.note(record(3, loss=0.5))
    assert of_sink.meet(record(3)) == "new"
    of_sink.include_written()
    assert of_sink.meet(record(3)) == "held"
    assert of_sink.values == {"train": {"loss": 0.5}}
    of_sink.cut({"train": 1})
    assert (of_sink.iterations, of_sink.values) == ({"train": 1}, {})
    assert of_sink.lacks({"train": 2})
    of_sink.cut({})
    assert of_sink.iterations == {}

"""A record is a line of ``metrics.jsonl`` and comes back from it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hookengine import Histogram, Image, Record, Table, read_records

RESERVED = ["phase", "epoch", "iter", "step", "timestamp", "media"]


def strict(line: str) -> dict[str, Any]:
    """As any parser of JSON reads it."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    fields: dict[str, Any] = json.loads(line, parse_constant=refuse)
    return fields


def same(one: float, other: float) -> bool:
    return one == other or (math.isnan(one) and math.isnan(other))


names = st.text(max_size=8) | st.sampled_from(RESERVED).flatmap(
    lambda name: st.sampled_from([name, f"value/{name}", f"value/value/{name}"])
)


@given(scalars=st.dictionaries(names, st.floats(width=64), max_size=8))
def test_every_number_of_every_name_comes_back(scalars: dict[str, float]) -> None:
    record = Record("val", 3, 40, 20, scalars, timestamp=1234.5)
    line = record.to_line({})
    assert "\n" not in line
    strict(line)
    back = Record.from_line(line, Path())
    counters = (back.phase, back.epoch, back.iter, back.step, back.timestamp)
    assert counters == ("val", 3, 40, 20, 1234.5)
    assert back.scalars.keys() == scalars.keys()
    assert all(same(back.scalars[name], scalars[name]) for name in scalars)


def test_what_json_does_not_have_is_a_text() -> None:
    record = Record("train", 1, 1, 1, {"a": math.nan, "b": math.inf, "c": -math.inf, "epoch": 0.5})
    fields = strict(record.to_line({}))
    assert (fields["a"], fields["b"], fields["c"]) == ("nan", "inf", "-inf")
    assert (fields["epoch"], fields["value/epoch"]) == (1, 0.5)


def test_every_kind_of_medium_comes_back(tmp_path: Path) -> None:
    image = Image(torch.zeros(2, 2), caption="black")
    (tmp_path / "media").mkdir()
    (tmp_path / "media" / "a.png").write_bytes(image.png)
    media: dict[str, Any] = {
        "image": image,
        "plain": Image(torch.zeros(2, 2)),
        "not saved": Image(torch.zeros(1, 1)),
        "counts": Histogram([0.0, 1.0, 1.0], bins=2),
        "table": Table(["name", "score"], [["cat", 0.5], [None, True], ["nan", math.nan]]),
        "text": "two\nlines \ud800 and a half",
        "media": "a name of the record's own",
    }
    record = Record("train", 1, 5, 5, {}, media)
    line = record.to_line({"image": "media/a.png", "plain": "media/a.png"})
    strict(line)
    back = Record.from_line(line, tmp_path).media
    assert back.keys() == media.keys() - {"not saved"}
    first, plain, counts, table = (back[n] for n in ("image", "plain", "counts", "table"))
    assert isinstance(first, Image)
    assert isinstance(plain, Image)
    assert (first.png, first.caption, plain.caption) == (image.png, "black", None)
    assert isinstance(counts, Histogram)
    assert (counts.counts, counts.edges) == ([1, 2], [0, 0.5, 1])
    assert isinstance(table, Table)
    assert table.columns == ["name", "score"]
    assert table.rows == [["cat", 0.5], [None, True], ["nan", "nan"]]
    assert (back["text"], back["media"]) == (media["text"], media["media"])


def line(**fields: Any) -> str:
    return json.dumps(dict(phase="train", epoch=1, iter=2, step=2, **fields))


def test_an_image_that_is_missing_is_left_out(tmp_path: Path) -> None:
    packed = {"gone": {"image": "media/gone.png"}, "folder": {"image": "."}, "note": {"text": "x"}}
    record = Record.from_line(line(loss=0.5, media=packed), tmp_path)
    assert dict(record.media) == {"note": "x"}
    assert dict(record.scalars) == {"loss": 0.5}


def test_no_file_outside_of_the_folder_is_read(tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(Image(torch.zeros(1, 1)).png)
    run = tmp_path / "run"
    (run / "media").mkdir(parents=True)
    (run / "media" / "link.png").symlink_to(secret)
    (tmp_path / "run2").mkdir()
    (tmp_path / "run2" / "a.png").write_bytes(secret.read_bytes())
    outside = ["../secret.png", str(secret), "media/../../secret.png", "media/link.png"]
    packed = {path: {"image": path} for path in [*outside, "../run2/a.png"]}
    assert dict(Record.from_line(line(media=packed), run).media) == {}


def test_a_line_of_a_time_before_timestamps_is_read(tmp_path: Path) -> None:
    record = Record.from_line(line(loss=0.5), tmp_path)
    assert math.isnan(record.timestamp)
    assert dict(record.scalars) == {"loss": 0.5}
    assert "timestamp" not in strict(record.to_line({}))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nonsense",
        "null",
        "[]",
        "3",
        "{}",
        '{"phase": "train", "epoch": 1, "iter": 2}',
        line(loss="high"),
        line(loss=None),
        line(loss=[1]),
        line(media=3),
        line(media={"a": {"unknown": 1}}),
        line(media={"a": {"histogram": {"counts": [1], "edges": [1]}}}),
        line(media={"a": {"image": 3}}),
        line(timestamp="noon"),
        line()[:-3],
    ],
)
def test_what_is_no_record_is_said_so(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a record"):
        Record.from_line(text, tmp_path)
    with pytest.raises(ValueError, match="not a record"):
        Record.from_line(text.encode() + b"\xff", tmp_path)


def test_the_records_of_a_run_are_read_in_order_without_what_a_kill_cut_short(
    tmp_path: Path,
) -> None:
    whole = [Record("train", 1, i, i, {"loss": i / 2}).to_line({}) for i in range(1, 4)]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*whole, whole[0][:30]]))
    assert [record.iter for record in read_records(tmp_path)] == [1, 2, 3]
    # a run that went on has ended the half line
    (tmp_path / "metrics.jsonl").write_text("\n".join([whole[0], whole[0][:30], whole[1], ""]))
    assert [record.iter for record in read_records(str(tmp_path))] == [1, 2]
    (tmp_path / "metrics.jsonl").write_text("")
    assert [*read_records(tmp_path)] == []


def test_a_folder_without_records_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"metrics\.jsonl"):
        next(read_records(tmp_path))


ONE = Record("train", 1, 2, 3, {"loss": 0.5, "nan": math.nan, "time": 1.0}, {"text": "a"}, 7.0)


@pytest.mark.parametrize(
    ("other", "same"),
    [
        (Record("train", 1, 2, 3, {"nan": math.nan, "loss": 0.5}, {"text": "a"}, 9.0), True),
        (Record("val", 1, 2, 3, ONE.scalars, ONE.media), False),
        (Record("train", 1, 2, 4, ONE.scalars, ONE.media), False),
        (Record("train", 1, 2, 3, {"loss": 0.5}, ONE.media), False),
        (Record("train", 1, 2, 3, {"loss": 0.6, "nan": math.nan}, ONE.media), False),
    ],
)
def test_a_record_is_repeated_if_all_but_the_times_are_the_same(other: Record, same: bool) -> None:
    assert ONE.repeats(other) is other.repeats(ONE) is same
    assert (ONE.digest() == other.digest()) is same


@pytest.mark.parametrize("value", [0, 1])
def test_media_are_compared_by_their_content(value: int) -> None:
    def with_media(value: int) -> Record:
        media: dict[str, Any] = {
            "image": Image(torch.full((2, 2), value)),
            "bins": Histogram.counted([1], [0, 1]),
        }
        return Record("train", 1, 2, 3, {}, media)

    assert with_media(0).repeats(with_media(value)) is (value == 0)
    assert not with_media(0).repeats(Record("train", 1, 2, 3, {}))

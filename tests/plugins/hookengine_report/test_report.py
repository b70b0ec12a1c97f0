"""The report of a run: one page of HTML and one picture, read off the run's folder."""

from __future__ import annotations

import io
import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import PIL.Image
import pytest
import torch
from hookengine_report import Report, write_report
from hookengine_report.charts import charts_of
from hookengine_report.page import page
from hookengine_report.picture import picture
from hookengine_report.runs import find_runs, read_run
from hookengine_report.scale import trace, value_scale
from hookengine_report.summary import best_values, differences, seconds_by_phase, total_seconds
from hookengine_report.text import duration, iteration_texts, number, tick_texts

from hookengine import Histogram, Image, Table
from tests import forks
from tests.fixtures import MakeRunner

HOSTILE = "<script>alert(1)</script>"
LOGGING = ("logging",)


class Page(HTMLParser):
    """What a browser would make of it: texts, tags, and what they refer to."""

    VOID = ("meta", "img", "br")

    def __init__(self, source: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.scripts: list[str] = []
        self._open: list[str] = []
        self.feed(source)
        self.close()
        assert self._open == [], "every tag is closed"

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        where = self._open[-1] if self._open else ""
        (self.scripts if where == "script" else self.texts).append(data)

    @property
    def text(self) -> str:
        return " ".join(self.texts)

    def curves(self) -> dict[str, list[tuple[float, float]]]:
        """What the readout is told, by label; the first chart with that label."""
        found: dict[str, list[tuple[float, float]]] = {}
        for _, attributes in self.tags:
            if "data-x" in attributes:
                pairs = zip(attributes["data-x"].split(), attributes["data-y"].split(), strict=True)
                points = [(float(x), float(y)) for x, y in pairs]
                found.setdefault(attributes["data-name"], points)
        return found


def record(phase: str, iteration: int, **values: Any) -> dict[str, Any]:
    fields = {"phase": phase, "epoch": 1, "iter": iteration, "step": iteration}
    return {**fields, "timestamp": 1000.0 + iteration, **values}


def write_run(folder: Path, records: Any, **info: Any) -> Path:
    folder.mkdir(parents=True)
    lines = "".join(json.dumps(one) + "\n" for one in records)
    (folder / "metrics.jsonl").write_text(lines)
    (folder / "run.json").write_text(json.dumps({"name": folder.name, **info}))
    return folder


def drawn(folder: Path) -> Page:
    return Page((folder / "report.html").read_text())


def pixels(png: bytes) -> Any:
    return np.asarray(PIL.Image.open(io.BytesIO(png)).convert("RGB"))


def reporting(make: MakeRunner, **options: Any) -> Any:
    report = options.pop("report", None) or Report()
    plugins = [dict(type="logging", interval=2), *options.pop("plugins", []), report]
    return make(defaults=LOGGING, plugins=plugins, **options)


def of_command(*arguments: str | Path, cwd: Path | None = None) -> Any:
    return forks.run_module("hookengine_report", *map(str, arguments), strict=True, cwd=cwd)


# -- the plugin ---------------------------------------------------------------------------------


def test_the_end_of_a_run_leaves_a_page_with_its_numbers_and_a_picture(make: MakeRunner) -> None:
    runner = reporting(make, validate=True, val_cfg=dict(loss=True), name="first")
    runner.train()
    html = drawn(runner.run_dir)
    lines = (runner.run_dir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    for phase, word in (("train", "training"), ("val", "validation")):
        told = html.curves()[word]
        expected = [(r["iter"], r["loss"]) for r in records if r["phase"] == phase]
        assert [x for x, _ in told] == [x for x, _ in expected]
        assert [y for _, y in told] == pytest.approx([y for _, y in expected], rel=1e-4)
    best = max(r["accuracy"] for r in records if r["phase"] == "val")
    assert "best accuracy" in html.text
    assert number(best) in html.texts
    for expected_text in ("first", "Toy", "15", "finished", "before_train_iter", "SGD", "python"):
        assert any(expected_text in text for text in html.texts), expected_text
    for name in runner.plugins:
        assert name in html.texts
    image = pixels((runner.run_dir / "report.png").read_bytes())
    assert image.shape == (900, 1600, 3)
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 50


def test_the_page_says_how_the_run_ended(make: MakeRunner) -> None:
    runner = reporting(make)
    runner.on("after_train_iter")(lambda runner: runner.stop("a <plateau>"))
    runner.train()
    assert {"stopped", "Stopped", ": a <plateau>"} <= {*drawn(runner.run_dir).texts}


def test_a_run_that_raised_is_drawn_too(make: MakeRunner) -> None:
    runner = reporting(make)

    @runner.on("after_train_iter")
    def fail(runner: Any) -> None:
        if runner.progress.iter == 7:
            raise RuntimeError("the disk is on fire")

    with pytest.raises(RuntimeError, match="on fire"):
        runner.train()
    html = drawn(runner.run_dir)
    assert {"failed", ": RuntimeError: the disk is on fire"} <= {*html.texts}
    assert [x for x, _ in html.curves()["training"]] == [2, 4, 5, 7]


def test_each_call_of_train_draws_anew(make: MakeRunner) -> None:
    runner = reporting(make)
    runner.train()
    runner.train(max_epochs=3)
    assert drawn(runner.run_dir).curves()["training"][-1][0] == 15


def test_a_run_that_goes_on_is_drawn_every_so_many_validations(make: MakeRunner) -> None:
    runner = reporting(make, report=Report(every=2), validate=True, train_cfg=dict(max_epochs=4))
    report = runner.plugins["report"]
    seen = []

    @runner.on("after_train_epoch")
    def look(runner: Any) -> None:
        report._sink_delivery.flush(60)
        seen.append((runner.run_dir / "report.html").exists())

    runner.train()
    assert seen == [False, False, True, True]


def test_a_run_without_a_log_is_told_what_is_missing(
    make: MakeRunner, caplog: pytest.LogCaptureFixture
) -> None:
    report = Report()
    runner = make(plugins=[report])
    runner.train()
    assert (runner.progress.iter, report.failures) == (10, 0)
    assert "sink 'report': no enabled plugin makes records" in caplog.text
    assert "Enable 'logging'" in caplog.text
    assert "failed" not in caplog.text
    with pytest.raises(FileNotFoundError, match="that the plugin 'logging' writes"):
        write_report([runner.run_dir], runner.run_dir)


def test_a_folder_that_cannot_be_written_does_not_end_training(
    make: MakeRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    runner = reporting(make)
    runner.on("before_train")(lambda runner: (runner.run_dir / "report.html").mkdir())
    runner.train()
    assert runner.progress.iter == 10
    assert "sink 'report' failed" in capsys.readouterr().out
    assert not list(runner.run_dir.glob(".*")), "nothing half written is left"


def test_drawing_leaves_the_weights_as_they_are(make: MakeRunner) -> None:
    plain = make(validate=True)
    plain.train()
    watched = reporting(make, report=Report(every=1), validate=True)
    watched.train()
    for one, other in zip(plain.model.parameters(), watched.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_what_hooks_have_logged_is_shown(make: MakeRunner) -> None:
    runner = reporting(make, validate=True)

    @runner.on("after_train_iter")
    def look(runner: Any) -> None:
        runner.log(
            {
                "picture": Image(torch.rand(3, 8, 8), caption="of <noise>"),
                "weights": Histogram(torch.arange(10.0), bins=5),
                "confusions": Table(["digit", "taken for"], [[8, "a <three>"]]),
                "words": "two\nlines",
                "temperature": 0.25 * runner.progress.iter,
            }
        )

    runner.train()
    html = drawn(runner.run_dir)
    (source,) = (a["src"] for tag, a in html.tags if tag == "img")
    assert source.startswith("data:image/png;base64,")
    assert {"of <noise>", "a <three>", "two\nlines", "temperature"} <= {*html.texts}
    assert any(a.get("class") == "bars s0" and a["d"].count("Z") == 5 for _, a in html.tags)


def test_the_best_checkpoint_and_the_newest_are_named(make: MakeRunner) -> None:
    runner = make(
        defaults=("logging", "checkpoint"),
        plugins=[dict(type="checkpoint", keep_best="accuracy"), Report()],
        validate=True,
        train_cfg=dict(max_epochs=3),
    )
    runner.train()
    html = drawn(runner.run_dir)
    shelf = runner.run_dir / "checkpoints"
    for name in ("best", "latest"):
        assert f"checkpoints/{(shelf / name).resolve().name}" in html.texts
    run = read_run(runner.run_dir)
    (best,) = (b for b in best_values(run) if b.name == "accuracy")
    assert f"accuracy {number(best.value)}" in html.texts


# -- the page -----------------------------------------------------------------------------------


def hostile_run(tmp_path: Path) -> Path:
    values = {HOSTILE: 1.0, f"{HOSTILE}/lr": 0.1, f"loss {HOSTILE}": 2.0, '" onload="x': 3.0}
    media = {
        HOSTILE: {"text": HOSTILE},
        "t": {"table": {"columns": [HOSTILE], "rows": [[HOSTILE]]}},
    }
    records = [record("train", 1, **values), record("val", 1, **{HOSTILE: 3.0}, media=media)]
    plugin = {"name": HOSTILE, "source": HOSTILE, "options": {HOSTILE: HOSTILE, "b": [HOSTILE]}}
    info: dict[str, Any] = dict(
        model=HOSTILE,
        status=f"failed: {HOSTILE}",
        plugins=[plugin],
        hooks={HOSTILE: [HOSTILE], "before_run": [HOSTILE]},
        environment={"python": HOSTILE, "command": [HOSTILE], "packages": {HOSTILE: HOSTILE}},
        optimizers={HOSTILE: {"type": HOSTILE, HOSTILE: HOSTILE}},
        train_cfg={HOSTILE: HOSTILE},
    )
    folder = write_run(tmp_path / "hostile", records, **info)
    (folder / "run.json").write_text(json.dumps({**info, "name": HOSTILE}))
    return folder


@pytest.mark.parametrize("count", [1, 2])
def test_what_users_name_stays_text(tmp_path: Path, count: int) -> None:
    folder = hostile_run(tmp_path)
    html = (write_report([folder] * count, tmp_path / "out")[0]).read_text()
    parsed = Page(html)
    assert HOSTILE not in html
    assert len(parsed.scripts) == 1
    assert HOSTILE in parsed.texts
    assert not any(name.startswith("on") for _, attributes in parsed.tags for name in attributes)


def test_the_page_refers_to_nothing_outside(make: MakeRunner) -> None:
    runner = reporting(make, validate=True)
    runner.train()
    source = (runner.run_dir / "report.html").read_text()
    html = Page(source)
    for tag, attributes in html.tags:
        assert tag not in ("link", "iframe", "object", "base", "form")
        assert "href" not in attributes
        assert attributes.get("src", "data:image/png;base64,").startswith("data:image/png;base64,")
    assert not re.search(r"https?:|url\(|@import|@font-face", source)
    (policy,) = (a["content"] for tag, a in html.tags if "content-security" in str(a).lower())
    assert policy.startswith("default-src 'none'")
    assert "'sha256-" in policy


def test_light_and_dark_are_one_drawing(make: MakeRunner) -> None:
    runner = reporting(make)
    runner.train()
    source = (runner.run_dir / "report.html").read_text()
    style, body = source.split("</style>")
    light, dark = style.split("prefers-color-scheme: dark", 1)
    names = re.findall(r"(--[\w-]+):", dark.split("}")[0])
    assert names
    assert names == re.findall(r"(--[\w-]+):", light.split("}")[0])
    assert not re.search(r"#[0-9a-f]{6}\b", body), "the body has no colours of its own"


def test_values_that_are_not_finite_are_gaps(tmp_path: Path) -> None:
    losses = [1.0, "nan", 0.5, 0.25, "inf", "-inf"]
    records = [record("train", i, loss=value) for i, value in enumerate(losses, start=1)]
    folder = write_run(tmp_path / "run", [*records, record("val", 6, accuracy="nan")])
    html = Page(page([read_run(folder)]))
    assert html.curves()["training"] == [(1, 1.0), (3, 0.5), (4, 0.25)]
    paths = [a["d"] for _, a in html.tags if a.get("data-name") == "training"]
    assert paths[0].count("M") == 2
    assert "nan" not in " ".join(paths)
    assert "last 0.25, 3 not finite" in html.texts
    assert "never finite" in html.texts
    assert pixels(picture([read_run(folder)])).std() > 0


@pytest.mark.parametrize(
    "records",
    [
        [],
        [record("train", 1, loss=0.5)],
        [record("val", 0, accuracy=0.5, seconds=1.0)],
        [record("test", 3, epoch=0, accuracy=0.5)],
        [record("train", i, loss=0.0) for i in range(1, 4)],
        [record("train", i, loss=1e308 * (-1) ** i) for i in range(1, 4)],
        [record("train", 1, loss=5e-324), record("train", 2, loss=1e-320)],
        [record("train", 1, loss=5e-324), record("train", 2, loss=1e300)],
        [record("train", 1, loss=1e-300), record("train", 2, loss=1e300)],
        [record("train", i, loss=10.0 ** (-100 * i)) for i in range(1, 4)],
        [record("train", 1, time="nan", samples_per_second="inf", memory="nan")],
        [record("train", 1, **{"": 1.0, "/": 2.0, "a/": 3.0, "/lr": 4.0, "$x_$": 5.0, "中": 1})],
        [record("nonsense", 1, loss=1.0)],
    ],
)
def test_any_history_can_be_drawn(tmp_path: Path, records: list[dict[str, Any]]) -> None:
    folder = write_run(tmp_path / "run", records, status="running")
    written = write_report([folder, folder], tmp_path) + write_report([folder], folder)
    assert all(path.stat().st_size > 1000 for path in written)
    Page(written[2].read_text())


def test_parts_of_a_folder_are_enough(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [record("train", 1, loss=0.5)])
    (folder / "run.json").write_text('{"name": "half a li')
    assert read_run(folder).name == "run"
    assert "0.5" in Page(page([read_run(folder)])).texts
    (folder / "metrics.jsonl").unlink()
    assert "No record was written." in Page(page([read_run(folder)])).texts
    odd = {"plugins": 1, "hooks": [2], "optimizers": "x", "started": "y", "environment": None}
    (folder / "run.json").write_text(json.dumps({**odd, "status": None, "parameters": "many"}))
    Page(page([read_run(folder)]))
    picture([read_run(folder)])


def test_a_long_run_stays_a_small_page_and_loses_no_peak(tmp_path: Path) -> None:
    def records() -> Iterator[dict[str, Any]]:
        for i in range(1, 50_001):
            loss = 100.0 if i == 31_234 else 1 + math.sin(i)
            yield record("train", i, loss=loss, lr=0.1, **{f"m{k}": i * k for k in range(8)})

    folder = write_run(tmp_path / "run", records())
    html, png = write_report([folder], folder)
    assert html.stat().st_size < 500_000
    assert png.stat().st_size < 500_000
    (loss, *_), left_out = charts_of([read_run(folder)])
    assert max(loss.lines[0].trace.values) == 100.0
    assert not left_out
    assert "mean and range of each 167 records" in Page(html.read_text()).texts


def test_there_is_a_limit_to_the_charts_and_it_is_said(tmp_path: Path) -> None:
    values = {f"scalar_{k}": float(k) for k in range(300)}
    folder = write_run(tmp_path / "run", [record("train", i, **values) for i in (1, 2)])
    html = Page(page([read_run(folder)]))
    assert "268 more scalars without a chart" in html.text
    assert sum(tag == "figure" for tag, _ in html.tags) == 32


def test_several_losses_and_optimizers_have_a_line_each(tmp_path: Path) -> None:
    values = {"loss_g": 1.0, "loss_d": 2.0, "generator/lr": 0.1, "discriminator/lr": 0.2}
    folder = write_run(tmp_path / "gan", [record("train", i, **values) for i in (1, 2)])
    charts, _ = charts_of([read_run(folder)])
    labels = {chart.title: [line.label for line in chart.lines] for chart in charts}
    assert labels == {
        "Losses": ["loss_g", "loss_d"],
        "Learning rate": ["generator/lr", "discriminator/lr"],
    }


def test_metrics_that_belong_together_share_a_chart(tmp_path: Path) -> None:
    train = {"loss": 1.0, "loss_box": 0.5, "accuracy": 0.4, "temperature": 1.0}
    val = {"loss": 1.5, "accuracy": 0.3, "ema/accuracy": 0.5, "f1/macro": 0.1, "f1/micro": 0.2}
    records = [record("train", 1, **train), record("val", 1, **val)]
    charts, _ = charts_of([read_run(write_run(tmp_path / "run", records))])
    labels = {chart.title: [line.label for line in chart.lines] for chart in charts}
    assert labels == {
        "Loss": ["training", "validation"],
        "Terms of the loss": ["training"],
        "accuracy": ["accuracy, training", "accuracy, validation", "ema/accuracy, validation"],
        "f1": ["f1/macro", "f1/micro"],
        "temperature": ["training"],
    }


# -- numbers ------------------------------------------------------------------------------------


def test_the_time_of_each_phase_is_the_sum_over_the_records(tmp_path: Path) -> None:
    records = [
        record("train", 10, time=0.5, data_time=0.1),
        record("train", 14, time=1.0, data_time=0.5),
        record("val", 14, seconds=2.5),
        record("train", 20, time="nan", data_time=0.0),
        record("val", 20, seconds=1.5),
        record("test", 20, seconds=3.0),
    ]
    run = read_run(write_run(tmp_path / "run", records, started=900.0, ended=930.0))
    seconds = seconds_by_phase(run)
    assert seconds == pytest.approx(
        {"training": 6.0, "waiting for data": 3.0, "validation": 4.0, "test": 3.0, "other": 14.0}
    )
    assert total_seconds(run) == pytest.approx(30.0)


def test_the_time_of_a_run_that_went_on_is_that_of_its_records(tmp_path: Path) -> None:
    records = [record("train", 100, time=0.5, data_time=0.0)]
    run = read_run(write_run(tmp_path / "run", records, started=5000.0, ended=5001.0))
    assert seconds_by_phase(run) == {"training": 50.0}
    assert total_seconds(run) == 50.0


def test_the_best_value_goes_by_the_direction_of_the_name(tmp_path: Path) -> None:
    rows = [(0.5, 2.0, 7.0), (0.9, "nan", 8.0), (0.9, 1.0, 9.0), ("inf", 3.0, 1.0)]
    records = [
        record("val", 10 * i, epoch=i, accuracy=a, loss=b, flavour=c)
        for i, (a, b, c) in enumerate(rows, start=1)
    ]
    best = best_values(read_run(write_run(tmp_path / "run", records)))
    told = [(b.name, b.value, b.iteration, b.word) for b in best]
    assert told == [
        ("accuracy", 0.9, 20, "best"),
        ("loss", 1.0, 30, "best"),
        ("flavour", 1.0, 40, "last"),
    ]


def test_a_trace_is_the_curve_or_its_mean_and_range() -> None:
    points = [(float(i), float(i % 10)) for i in range(100)]
    assert trace(points, 100).points == points
    thin = trace(points, 30)
    assert thin.together == 10
    assert thin.points[0] == (4.5, 4.5)
    assert thin.band == [(10 * i + 4.5, 0.0, 9.0) for i in range(10)]
    gaps = trace([(0.0, math.nan), (1.0, math.inf), (2.0, 5.0), (3.0, math.nan)], 3)
    assert gaps.missing == 3


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (-3, 5), (1e-12, 2e-12), (1e6, 3e7), (5, 5), (0, 0), (-1e300, 1e300)]
)
def test_a_scale_has_room_for_its_values_and_some_ticks(low: float, high: float) -> None:
    scale = value_scale([low, high, math.nan, math.inf])
    assert 0 <= scale.place(low) <= scale.place(high) <= 1
    assert 2 <= len(scale.ticks) <= 8
    assert all(-1e-9 <= scale.place(tick) <= 1 + 1e-9 for tick in scale.ticks)
    assert len({*tick_texts(scale.ticks)}) == len(scale.ticks)
    assert scale.low >= 0 or low < 0


def test_a_logarithmic_scale_is_taken_where_values_span_much() -> None:
    assert not value_scale([1.0, 40.0], may_be_log=True).log
    assert not value_scale([0.0, 400.0], may_be_log=True).log
    assert not value_scale([1.0, 400.0]).log
    scale = value_scale([0.001, 10.0], may_be_log=True)
    assert scale.log
    assert scale.place(0.1) == pytest.approx(0.5)
    assert [*scale.ticks] == [0.001, 0.01, 0.1, 1.0, 10.0]


def test_numbers_are_written_for_people() -> None:
    assert [number(v) for v in (0, 0.12345, 99.166, 12345.6, 4.7e-8, math.nan, -math.inf)] == [
        "0", "0.1235", "99.17", "12,346", "4.7e\u22128", "\u2013", "\u2212\u221e",
    ]  # fmt: skip
    assert [duration(s) for s in (0.05, 1.44, 59.99, 200, 18120, 183600, math.nan)] == [
        "50 ms", "1.4 s", "1 min", "3 min 20 s", "5 h 2 min", "2 d 3 h", "\u2013",
    ]  # fmt: skip
    assert tick_texts([0, 0.0005, 0.001]) == ["0", "0.0005", "0.001"]
    assert tick_texts([0, 5000, 10000]) == ["0", "5k", "10k"]
    assert tick_texts([0, 2e-4, 4e-4]) == ["0", "2e\u22124", "4e\u22124"]
    assert iteration_texts([45, 12_000]) == ["45", "12,000"]
    assert iteration_texts([39_096, 120_000, 2_500_000]) == ["39.1k", "120k", "2.5M"]


# -- the picture --------------------------------------------------------------------------------


@contextmanager
def odd_settings() -> Iterator[None]:
    settings: Any = {
        "text.usetex": True,
        "axes.facecolor": "black",
        "axes.grid": True,
        "axes.edgecolor": "red",
        "figure.facecolor": "black",
        "font.size": 40,
        "font.family": ["no such font"],
        "lines.marker": "x",
        "savefig.bbox": "tight",
        "legend.fontsize": 40,
        "legend.frameon": True,
        "xtick.labelsize": 40,
        "xtick.top": True,
        "lines.linestyle": ":",
        "lines.linewidth": 9,
        "lines.markeredgecolor": "red",
        "lines.markeredgewidth": 5,
        "lines.solid_capstyle": "round",
        "lines.antialiased": False,
        "patch.antialiased": False,
        "patch.force_edgecolor": True,
        "text.antialiased": False,
        "legend.numpoints": 3,
        "legend.handleheight": 4,
    }
    with matplotlib.rc_context(settings):
        yield


def test_the_picture_does_not_depend_on_the_settings_of_the_user(tmp_path: Path) -> None:
    records = [record("train", i, epoch=i, loss=1 / i, lr=0.1, time=1.0) for i in range(1, 9)]
    records += [record("val", i, epoch=i, loss=2 / i, accuracy=i) for i in range(1, 9)]
    runs = [read_run(write_run(tmp_path / "run", records, train_cfg={"max_epochs": 8}))]
    before = dict(matplotlib.rcParams)
    plain = picture(runs)
    assert dict(matplotlib.rcParams) == before
    with odd_settings():
        assert np.array_equal(pixels(picture(runs)), pixels(plain))


# -- several runs -------------------------------------------------------------------------------


def test_runs_are_compared_in_the_same_plots(make: MakeRunner, tmp_path: Path) -> None:
    folders = []
    for name, lr, clipped in (("slow", 0.01, False), ("fast", 0.5, True)):
        runner = make(
            defaults=LOGGING,
            plugins=["logging", *([dict(type="clip", max_norm=0.25)] if clipped else [])],
            optim_wrapper=dict(optimizer=dict(type="SGD", lr=lr)),
            validate=True,
            name=name,
        )
        runner.train()
        folders.append(runner.run_dir)
    html, png = write_report(folders, tmp_path / "both.html")
    assert (html, png) == (tmp_path / "both.html", tmp_path / "both.png")
    parsed = Page(html.read_text())
    assert "2 runs compared" in parsed.texts
    assert {"slow", "fast", "slow, training"} & {*parsed.curves()} >= {"slow", "fast"}
    found = differences([read_run(folder) for folder in folders])
    assert found["optimizers.optimizer.lr"] == ["0.01", "0.5"]
    assert found["plugins.clip"] == ["\u2013", "max_norm 0.25, norm_type 2"]
    assert "plugins.logging.interval" not in found
    for text in ("optimizers.optimizer.lr", "0.01", "0.5", "max_norm 0.25, norm_type 2"):
        assert text in parsed.texts
    assert pixels(png.read_bytes()).shape == (900, 1600, 3)


def test_the_best_of_several_runs_stands_out(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path / f"run{i}", [record("val", 1, accuracy=value, loss=value)])
        for i, value in enumerate((0.5, 0.75, 0.25))
    ]
    cells = re.findall(
        r'<td class="number best">([^<]*)<', page([read_run(folder) for folder in folders])
    )
    assert cells == ["0.75", "0.25"]


def test_a_schedule_does_not_make_a_learning_rate_differ(tmp_path: Path) -> None:
    optimizers = [{"lr": 0.001, "initial_lr": 0.1}, {"lr": 0.1}]
    runs = [
        read_run(write_run(tmp_path / f"{i}", [], name="x", optimizers={"optimizer": one}))
        for i, one in enumerate(optimizers)
    ]
    assert differences(runs) == {}


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / work / "run", [record("train", 1, loss=1.0)]) for work in "ab"]
    html, _ = write_report([*folders, folders[0]], tmp_path)
    assert {*Page(html.read_text()).curves()} == {"a/run", "b/run", "a/run (2)"}


# -- the command --------------------------------------------------------------------------------


@pytest.mark.process
def test_the_command_draws_a_run_into_its_folder_and_says_where(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [record("train", 1, loss=0.5)])
    command = [sys.executable, "-W", "error", "-m", "hookengine_report", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(folder / "report.html"), str(folder / "report.png")]
    assert "0.5" in drawn(folder).texts


@pytest.mark.process
def test_the_command_takes_a_work_dir_several_runs_and_a_place(tmp_path: Path) -> None:
    work_dir = tmp_path / "work_dir"
    folders = [write_run(work_dir / name, [record("train", 1, loss=1)]) for name in ("a", "b")]
    done = of_command(work_dir, "--all", "--out", tmp_path / "new" / "pair.png")
    assert done.returncode == 0, done.stderr
    assert "2 runs compared" in (tmp_path / "new" / "pair.html").read_text()
    done = of_command(*folders, folders[0], cwd=tmp_path)
    assert done.stdout.split() == ["report.html", "report.png"]
    assert "2 runs compared" in (tmp_path / "report.html").read_text()


def test_of_a_work_dir_the_run_that_wrote_last_is_taken(tmp_path: Path) -> None:
    import os

    folders = [write_run(tmp_path / name, []) for name in ("c", "a", "b")]
    for age, folder in enumerate(folders):
        for file in folder.iterdir():
            os.utime(file, (1000 - age, 1000 - age))
    (tmp_path / "something else").mkdir()
    assert find_runs(tmp_path) == [tmp_path / "c"]
    assert find_runs(tmp_path, every=True) == [tmp_path / "b", tmp_path / "a", tmp_path / "c"]


@pytest.mark.process
@pytest.mark.parametrize("kind", ["missing", "empty", "unwritable"])
def test_the_command_says_what_is_wrong(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "there"
    out: list[str | Path] = []
    if kind == "empty":
        folder.mkdir()
    elif kind == "unwritable":
        write_run(folder, [])
        (tmp_path / "file").write_text("")
        out = ["--out", tmp_path / "file" / "inside"]
    done = of_command(folder, *out)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    message = {
        "missing": "is not a folder. Pass the folder of a run",
        "empty": "is neither the folder of a run",
        "unwritable": "file/inside: ",
    }
    assert message[kind] in done.stderr


def test_runs_that_say_ranks_are_compared_with_those_that_say_world_size(tmp_path: Path) -> None:
    records = [record("train", 1, loss=1.0)]
    older = write_run(tmp_path / "older", records, environment={"python": "3"}, ranks=2)
    newer = write_run(tmp_path / "newer", records, environment={"python": "3"}, world_size=4)
    runs = [read_run(older), read_run(newer)]
    assert [run.info["world_size"] for run in runs] == [2, 4]
    assert differences(runs) == {"world_size": ["2", "4"]}

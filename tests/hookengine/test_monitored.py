"""A metric that some validations lack: skipped, unless no validation can report it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from hookengine import BaseMetric, MonitoredMetric
from tests.fixtures import MakeRunner, ToyAccuracy


class Scripted(BaseMetric):
    """Reports one dict after the other, as a detector that finds boxes now and then."""

    def __init__(self, reports: Sequence[dict[str, Any]], prefix: str | None = None) -> None:
        super().__init__(prefix)
        self.reports = iter(reports)

    def process(self, data_batch: Any, data_samples: Any) -> None:
        self.results.append(1)

    def compute_metrics(self, results: list[Any]) -> dict[str, Any]:
        return next(self.reports)


PLUGINS: dict[str, Any] = {
    "keep_best": lambda name: dict(type="checkpoint", keep_best=name, greater_is_better=True),
    "early_stop": lambda name: dict(type="early_stop", metric=name, rule="greater", patience=2),
    "plateau": lambda name: dict(
        type="schedule",
        scheduler=dict(type="ReduceLROnPlateau", mode="max", patience=1, factor=0.5),
        metric=name,
    ),
}


def run(make: MakeRunner, plugin: Any, evaluator: Any, epochs: int, **options: Any) -> Any:
    runner = make(
        plugins=[plugin, *options.pop("plugins", [])],
        validate=True,
        val_evaluator=evaluator,
        train_cfg=dict(max_epochs=epochs),
        **options,
    )
    runner.train()
    return runner


def end(runner: Any) -> dict[str, Any]:
    """What the plugins have made of the validations."""
    plugins = runner.plugins
    found: dict[str, Any] = {"epoch": runner.progress.epoch}
    if "checkpoint" in plugins and plugins["checkpoint"].best is not None:
        found["best"] = plugins["checkpoint"].best["value"]
    if "early_stop" in plugins:
        state = plugins["early_stop"].state_dict()
        found |= {key: state[key] for key in ("best", "waited")}
    if "schedule" in plugins:
        scheduler = plugins["schedule"]._tracks["optimizer"].scheduler
        assert isinstance(scheduler, ReduceLROnPlateau)
        found |= {"best": scheduler.best, "bad": scheduler.num_bad_epochs}
    return found


@pytest.mark.parametrize("missing", [{}, {"boxes": 0}, {"mAP": None}], ids=["{}", "other", "None"])
@pytest.mark.parametrize("plugin", PLUGINS)
def test_a_validation_without_the_metric_is_skipped(
    make: MakeRunner, plugin: str, missing: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """As if that validation had not been."""
    reports = [{"mAP": 0.3}, missing, {"mAP": 0.2}, missing, missing]
    with_gaps = run(make, PLUGINS[plugin]("mAP"), Scripted(reports), 5)
    assert caplog.text.count("metric 'mAP'") == 3
    assert ("it reports nothing" in caplog.text) == (missing == {})
    without = run(make, PLUGINS[plugin]("mAP"), Scripted([{"mAP": 0.3}, {"mAP": 0.2}]), 2)
    assert {**end(with_gaps), "epoch": 2} == end(without)
    assert with_gaps.progress.epoch == 5


@pytest.mark.parametrize("plugin", PLUGINS)
def test_the_first_validations_may_report_nothing(make: MakeRunner, plugin: str) -> None:
    reports: list[dict[str, Any]] = [{}, {}, {"mAP": 0.3}, {}]
    runner = run(make, PLUGINS[plugin]("coco/mAP"), Scripted(reports, prefix="coco"), 4)
    assert end(runner)["best"] == 0.3
    both = [ToyAccuracy(), Scripted(reports, prefix="coco")]
    runner = run(make, PLUGINS[plugin]("coco/mAP"), both, 4, val_cfg=dict(loss=True))
    assert end(runner)["best"] == 0.3


@pytest.mark.parametrize("plugin", PLUGINS)
def test_a_name_that_no_validation_can_have_is_an_error_at_the_first_one(
    make: MakeRunner, plugin: str
) -> None:
    silent: list[dict[str, Any]] = [{}, {}]
    cases: list[tuple[str, Any, str]] = [
        ("acuracy", ToyAccuracy(), "Did you mean 'accuracy'"),
        ("nothing_alike", ToyAccuracy(), "Known: accuracy"),
        # one metric is silent, but its names begin otherwise
        ("acuracy", [ToyAccuracy(), Scripted(silent, "coco")], "Did you mean 'accuracy'"),
    ]
    for name, evaluator, text in cases:
        with pytest.raises(KeyError, match=f"unknown metric '{name}'.*{text}") as caught:
            run(make, PLUGINS[plugin](name), evaluator, 2)
        assert any("epoch 1" in note for note in caught.value.__notes__)


@pytest.mark.parametrize("plugin", PLUGINS)
def test_a_wrong_name_is_found_when_the_metric_reports_for_the_first_time(
    make: MakeRunner, plugin: str
) -> None:
    reports: list[dict[str, Any]] = [{}, {"mAP": 0.3}]
    with pytest.raises(KeyError, match=r"unknown metric 'map50'.*Did you mean 'mAP'") as caught:
        run(make, PLUGINS[plugin]("map50"), Scripted(reports), 3)
    assert any("epoch 2" in note for note in caught.value.__notes__)


@pytest.mark.parametrize("plugin", PLUGINS)
def test_a_resumed_run_knows_the_metric(make: MakeRunner, plugin: str, tmp_path: Path) -> None:
    """The first validation after the resume may be one that lacks it, in every try."""

    def build(reports: list[dict[str, Any]], epochs: int, **options: Any) -> Any:
        options["plugins"] = [] if plugin == "keep_best" else ["checkpoint"]
        evaluator = Scripted(reports)
        return run(make, PLUGINS[plugin]("mAP"), evaluator, epochs, name="run", **options)

    build([{"mAP": 0.3}], 1).close()
    build([{"boxes": 0}], 2, resume="auto").close()
    runner = build([{"boxes": 0}, {"mAP": 0.2}], 4, resume="auto")
    assert end(runner)["best"] == 0.3


@pytest.mark.parametrize("plugin", PLUGINS)
def test_nan_is_never_the_best_and_ends_no_comparison(make: MakeRunner, plugin: str) -> None:
    reports = [{"mAP": value} for value in (math.nan, 0.2, math.nan, 0.3)]
    options = PLUGINS[plugin]("mAP")
    if plugin == "early_stop":
        options.update(check_finite=False, patience=10)
    assert end(run(make, options, Scripted(reports), 4))["best"] == 0.3


@pytest.mark.parametrize("value", ["much", [0.1, 0.2], torch.ones(2)], ids=["text", "list", "many"])
@pytest.mark.parametrize("plugin", PLUGINS)
def test_what_is_no_number_is_an_error_unless_it_was_one(
    make: MakeRunner, plugin: str, value: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(TypeError, match="the metric 'mAP' is not a number"):
        run(make, PLUGINS[plugin]("mAP"), Scripted([{"mAP": value}]), 1)
    runner = run(make, PLUGINS[plugin]("mAP"), Scripted([{"mAP": 0.3}, {"mAP": value}]), 2)
    assert end(runner)["best"] == 0.3
    assert "reports no number as the metric 'mAP'" in caplog.text


def test_a_metric_is_read_as_a_python_number(make: MakeRunner) -> None:
    runner = make(validate=True)
    metric = MonitoredMetric("accuracy", "mine")
    assert not metric.seen
    assert metric.read(runner, {"accuracy": torch.tensor(0.5)}) == 0.5
    assert metric.seen
    assert metric.read(runner, {"loss": 1.0}) is None

"""A run ends when its metric gets no better."""

from __future__ import annotations

from typing import Any

import pytest
from hookengine_early_stop import EarlyStop

from hookengine import Plugin
from tests.fixtures import MakeRunner


class Scripted(Plugin):
    """Tells the validations what they have found."""

    name: str = "accuracy"
    values: tuple[float, ...] = ()

    def evaluated_models(self) -> None: ...

    def after_val_epoch(self, runner: Any, metrics: Any) -> None:
        metrics[self.name] = self.values[runner.progress.epoch - 1]


NAN = float("nan")


@pytest.mark.parametrize(
    ("name", "values", "options", "epochs"),
    [
        ("accuracy", [1, 2, 2, 2, 3], dict(patience=2), 4),
        ("accuracy", [1, 2, 2, 3, 3], dict(patience=2), 5),
        ("val_loss", [3, 2, 2.1, 1.9, 2], dict(patience=1), 3),
        ("val_loss", [3, 2, 1.95, 1.9, 1], dict(patience=2, min_delta=0.2), 4),
        ("distance", [3, 2, 2, 2, 1], dict(patience=1, rule="less"), 3),
        ("distance", [3, 2, 2, 2, 1], dict(patience=1, rule="greater"), 2),
        ("accuracy", [1, 2, 3, 4, 5], dict(threshold=3), 3),
        ("loss", [5, 4, 3, 2, 1], dict(threshold=2), 4),
        ("accuracy", [1, NAN, 3, 4, 5], dict(), 2),
        ("accuracy", [1, NAN, 3, NAN, NAN], dict(check_finite=False, patience=2), 5),
        ("accuracy", [1, 2, 3, 4, 5], dict(patience=1), 5),
    ],
)
def test_when_it_stops(make: MakeRunner, name: str, values: Any, options: Any, epochs: int) -> None:
    scripted = Scripted(name=name, values=values)
    stop = EarlyStop(metric=name, **options)
    runner = make(plugins=[stop, scripted], train_cfg=dict(max_epochs=5), validate=True)
    runner.train()
    assert runner.progress.epoch == epochs
    stopped = runner.progress.stopped
    if epochs < 5 or options.get("check_finite") is False:  # the last, in its last epoch
        assert name in stopped
    else:
        assert stopped is None


def test_the_reason_is_told(make: MakeRunner, caplog: pytest.LogCaptureFixture) -> None:
    stop = EarlyStop(metric="loss", patience=2)
    runner = make(
        plugins=[Scripted(name="loss", values=(2, 1, 3, 4)), stop],
        train_cfg=dict(max_epochs=4),
        validate=True,
    )
    with caplog.at_level("INFO"):
        runner.train()
    assert runner.progress.stopped == "early_stop: loss has not improved on 1 for 2 validations"
    assert "training stops" in caplog.text


def test_it_goes_on_where_the_run_was_cut(make: MakeRunner) -> None:
    def runner(epochs: int) -> Any:
        plugins = [Scripted(values=(2, 1, 1, 1, 1)), EarlyStop(metric="accuracy", patience=3)]
        return make(plugins=plugins, train_cfg=dict(max_epochs=epochs), validate=True)

    first, second = runner(3), runner(5)
    first.train()
    second.load_state_dict(first.state_dict())
    second.train()
    assert second.progress.epoch == 4


def test_who_trains_on_after_a_stop_has_patience_anew(make: MakeRunner) -> None:
    plugins = [Scripted(values=(2, 1, 1, 1, 1, 1, 1)), EarlyStop(metric="accuracy", patience=2)]
    runner = make(plugins=plugins, train_cfg=dict(max_epochs=7), validate=True)
    for epochs in (3, 5, 7):
        runner.train()
        assert runner.progress.epoch == epochs


def test_a_run_that_was_killed_after_the_stop_stops_again(make: MakeRunner) -> None:
    states = []

    def runner() -> Any:
        made = make(
            plugins=[Scripted(values=(2, 1, 1, 1, 1)), EarlyStop(metric="accuracy", patience=2)],
            train_cfg=dict(max_epochs=5),
            validate=True,
        )
        made.on("safe_point")(lambda runner: states.append(runner.state_dict()))
        return made

    first, second = runner(), runner()
    first.train()
    assert first.progress.epoch == 3
    second.load_state_dict(states[-1])
    second.train()
    assert second.progress.epoch == 3
    assert "had stopped here" in second.progress.stopped
    second.train()
    assert second.progress.epoch == 5


def test_validations_by_hand_do_not_count(make: MakeRunner) -> None:
    runner = make(plugins=[EarlyStop(metric="accuracy", patience=1)], validate=True)
    for _ in range(3):
        runner.val()
    assert runner.state_dict()["plugins"]["early_stop"]["waited"] == 0


def test_what_cannot_be_is_refused(make: MakeRunner) -> None:
    with pytest.raises(TypeError, match="metric='distance' does not tell"):
        EarlyStop(metric="distance")
    with pytest.raises(TypeError, match=r"metric=\.\.\. is required"):
        EarlyStop()  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="patience=0"):
        EarlyStop(metric="loss", patience=0)
    with pytest.raises(TypeError, match="'monitor' comes from MMEngine"):
        EarlyStop(monitor="loss")  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="this Runner does not validate"):
        make(plugins=[EarlyStop(metric="accuracy")])
    runner = make(plugins=[EarlyStop(metric="loss")], validate=True)
    with pytest.raises(KeyError, match=r"unknown metric 'loss'.*Known: accuracy"):
        runner.train()


def test_stopped_by_a_threshold_it_stays_stopped_after_a_resume(make: MakeRunner) -> None:
    options: dict[str, Any] = dict(
        plugins=["checkpoint", dict(type="early_stop", metric="accuracy", threshold=0.0)],
        validate=True,
        train_cfg=dict(max_epochs=3),
        name="run",
        resume="auto",
    )
    first = make(**options)
    first.train()
    first.close()
    assert first.progress.epoch == 1
    second = make(**options)
    second.train()
    assert second.progress.iter == first.progress.iter
    second.train()  # who asks again goes on
    assert second.progress.iter > first.progress.iter


@pytest.mark.parametrize(
    ("later", "over"),
    [
        (dict(metric="loss"), False),
        (dict(metric="accuracy"), True),
        (dict(metric="loss", rule="greater"), True),
    ],
)
def test_another_metric_after_a_resume_starts_over_and_says_so(
    make: MakeRunner, capsys: pytest.CaptureFixture[str], later: dict[str, Any], over: bool
) -> None:
    """The best loss, 1.05, is no measure for an accuracy."""

    def build(options: dict[str, Any], epochs: int) -> Any:
        stop = dict(type="early_stop", patience=2, **options)
        return make(
            plugins=[stop, "logging"],
            validate=True,
            val_cfg=dict(loss=True),
            train_cfg=dict(max_epochs=epochs),
        )

    first = build(dict(metric="loss"), 1)
    first.train()
    state = first.state_dict()
    second = build(later, 4)
    second.load_state_dict(state)
    second.train()
    plugin = second.plugins["early_stop"]
    said = "the patience starts over" in capsys.readouterr().out
    assert said is over
    if over and later["metric"] == "accuracy":
        assert 0 <= plugin._best <= 1
    assert plugin.state_dict()["monitored"].startswith(later["metric"])


def test_a_state_of_the_version_before_is_that_of_the_same_metric(make: MakeRunner) -> None:
    plugin = EarlyStop(metric="loss")
    make(plugins=[plugin], validate=True, val_cfg=dict(loss=True))
    plugin.load_state_dict({"best": -0.5, "waited": 3, "stopped": False})
    assert (plugin._best, plugin._waited) == (-0.5, 3)


LESS: dict[str, Any] = dict(rule="less")
CHANGED: dict[str, Any] = {
    # the values, the options of the first run, those of the second, in which epoch that one ends
    "a raised threshold": ([1, 3, 4, 6, 7], dict(threshold=3), dict(threshold=6), 4),
    "a lower one": ([5, 3, 2, 1], dict(threshold=3, **LESS), dict(threshold=1, **LESS), 4),
    "no threshold": ([1, 3, 4], dict(threshold=3), {}, 3),
    "the same threshold": ([1, 3, 4], dict(threshold=3), dict(threshold=3), 2),
    "a threshold that is still reached": ([1, 3, 4], dict(threshold=3), dict(threshold=2), 2),
    "not finite": ([1, NAN, 3], {}, dict(check_finite=False), 3),
    "not finite, without patience": ([1, NAN, 3], {}, dict(check_finite=False, patience=1), 2),
    "a raised patience": ([2, 1, 1, 1], dict(patience=2), dict(patience=3), 4),
    "a smaller min_delta": ([2, 3, 4, 3, 3], dict(patience=2, min_delta=5), dict(patience=2), 5),
    "a larger min_delta": ([2, 1, 1, 3], dict(patience=2), dict(patience=2, min_delta=9), 3),
    "another rule": ([2, 1, 0, 0, 0], dict(patience=2), dict(patience=2, rule="less"), 5),
}


@pytest.mark.parametrize(("values", "first", "later", "epoch"), CHANGED.values(), ids=[*CHANGED])
def test_options_that_undo_the_stop_let_a_resumed_run_continue(
    make: MakeRunner,
    capsys: pytest.CaptureFixture[str],
    values: Any,
    first: Any,
    later: Any,
    epoch: int,
) -> None:
    def run(options: dict[str, Any], state: Any = None) -> Any:
        plugins = [EarlyStop(metric="accuracy", **options), Scripted(values=values), "logging"]
        runner = make(plugins=plugins, validate=True, train_cfg=dict(max_epochs=len(values)))
        if state is not None:
            runner.load_state_dict(state)
        runner.train()
        return runner

    stopped = run(first)
    assert stopped.progress.stopped.startswith("early_stop: accuracy")
    capsys.readouterr()
    resumed = run(later, stopped.state_dict())
    text = " ".join("".join(capsys.readouterr()).split())
    assert resumed.progress.epoch == epoch
    continues = epoch > stopped.progress.epoch
    assert ("it continues" in text or "starts over" in text) is continues
    assert ("call train() again to continue" in text) is not continues


def test_options_that_a_resumed_run_does_not_fulfill_stop_it_with_their_reason(
    make: MakeRunner,
) -> None:
    def build(patience: int, epochs: int) -> Any:
        plugins = [Scripted(values=(2, 1, 1, 1)), EarlyStop(metric="accuracy", patience=patience)]
        return make(plugins=plugins, validate=True, train_cfg=dict(max_epochs=epochs))

    first, second = build(5, 3), build(1, 4)
    first.train()
    second.load_state_dict(first.state_dict())
    second.train()
    assert second.progress.stopped == (
        "early_stop: by the options of this run, accuracy has not improved on 2 for 2 validations"
    )
    second.train()
    assert second.progress.epoch == 4

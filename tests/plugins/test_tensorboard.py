"""What TensorBoard itself reads back is what the run has written, also of one that was killed."""

from __future__ import annotations

import copy
import io
import json
import math
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from hookengine import Histogram, Image, Table, read_records
from tests import forks
from tests.fixtures import MakeRunner

ROOT = Path(__file__).parents[2]
COUNTERS = ("phase", "epoch", "iter", "step", "timestamp", "media")
EVERYTHING = dict.fromkeys(("scalars", "images", "histograms", "tensors"), 0)
HPARAMS = "_hparams_/"


def read(folder: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder), size_guidance=EVERYTHING)
    accumulator.Reload()
    return accumulator


def local(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def scalars(folder: Path) -> dict[tuple[str, int], tuple[float, float]]:
    """(wall time, value) by tag and step; each of them once."""
    accumulator = read(folder)
    found = {}
    for tag in accumulator.Tags()["scalars"]:
        for event in accumulator.Scalars(tag):
            if not tag.startswith(HPARAMS):
                assert (tag, event.step) not in found
                found[tag, event.step] = (event.wall_time, event.value)
    return found


def expected(folder: Path) -> dict[tuple[str, int], tuple[float, float]]:
    """The same of ``metrics.jsonl``."""
    return {
        (f"{record.phase}/{name}", record.iter): (record.timestamp, value)
        for record in read_records(folder)
        for name, value in record.scalars.items()
    }


def is_whole(folder: Path) -> bool:
    """Whether each value of the local history is there, once, with its step and time."""
    there, wanted = scalars(folder), expected(folder)
    assert there.keys() == wanted.keys()
    for key, (time, value) in wanted.items():
        assert there[key][0] == pytest.approx(time, abs=1e-3)
        single = float(torch.tensor(value, dtype=torch.float32))  # which is what it keeps
        assert there[key][1] == pytest.approx(single, nan_ok=True)
    return True


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("events.out.tfevents.*"))


def events(folder: Path) -> list[Any]:
    return [e for file in files(folder) for e in LegacyEventFileLoader(str(file)).Load()]


def hparams(folder: Path) -> list[Any]:
    """What the HParams page is given, in order."""
    found = []
    for event in events(folder):
        for value in event.summary.value:
            if value.tag.startswith(HPARAMS):
                content = value.metadata.plugin_data.content
                found.append(HParamsPluginData.FromString(content))
    return found


def train(make: MakeRunner, *plugins: Any, **options: Any) -> Any:
    options.setdefault("validate", True)
    log = dict(type="logging", interval=2)
    runner = make(plugins=[log, *plugins, "tensorboard"], **options)
    runner.train()
    runner.close()
    return runner


def test_each_scalar_is_there_with_its_step_and_time(make: MakeRunner) -> None:
    runner = train(make, dict(type="clip", max_norm=1.0))
    assert is_whole(runner.run_dir)
    assert ("train/grad_norm", 10) in scalars(runner.run_dir)
    assert ("val/accuracy", 10) in scalars(runner.run_dir)


def test_a_record_is_one_event(make: MakeRunner) -> None:
    runner = train(make)
    assert len(files(runner.run_dir)) == 1
    first, *rest = events(runner.run_dir)
    assert first.file_version == "brain.Event:2"
    tags = [[value.tag for value in event.summary.value] for event in rest]
    plain = [names for names in tags if not names[0].startswith(HPARAMS)]
    assert plain == [
        [f"{record['phase']}/{name}" for name in record if name not in COUNTERS]
        for record in local(runner.run_dir)
    ]


class Hands:
    """Hands one thing of each kind over, with names and values of every kind."""

    def after_val(self, runner: Any) -> None:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(1, 1), dpi=50)
        figure.add_subplot().plot([0, 1])
        image = torch.linspace(0, 1, 12).reshape(3, 4)
        runner.log(
            {
                "image": image,
                "captioned": Image(torch.zeros(3, 2, 2), "black"),
                "figure": figure,
                "values": torch.tensor([0.0, 1.0, 1.0, math.nan]),
                "counted": Histogram.counted([2, 3], [0, 1, 2]),
                "table": Table(["name", "a|b"], [["cat", 0.5], ["dog\nnew", None]]),
                "text": "hello \ud800",
                "nan": math.nan,
                "inf": -math.inf,
                "huge": 10**400,
                "beyond": 1e300,
                "a\nb@1 é/x \ud800": 1.0,
                "": 2.0,
                "epoch": 0.25,
            }
        )
        image.zero_()


def test_what_hooks_hand_over_arrives(make: MakeRunner, capsys: pytest.CaptureFixture[str]) -> None:
    runner = train(make, Hands())
    accumulator: Any = read(runner.run_dir)
    (image,) = accumulator.Images("train/image")
    (saved,) = (runner.run_dir / "media").glob("*_image.png")
    assert image.encoded_image_string == saved.read_bytes()
    assert (image.step, image.width, image.height) == (7, 4, 3)
    with PIL.Image.open(io.BytesIO(image.encoded_image_string)) as picture:
        assert np.array(picture).max() == 255
    (figure,) = accumulator.Images("train/figure")
    assert (figure.width, figure.height) == (50, 50)
    (histogram,) = accumulator.Histograms("train/values")
    value = histogram.histogram_value
    assert (value.min, value.max, value.num, sum(value.bucket)) == (0, 1, 3, 3)
    assert len(value.bucket) == len(value.bucket_limit) == 64
    counted = accumulator.Histograms("train/counted")[0].histogram_value
    assert ([*counted.bucket], [*counted.bucket_limit]) == ([2, 3], [1, 2])
    assert (counted.num, counted.sum, counted.sum_squares) == (5, 5.5, 2 * 0.25 + 3 * 2.25)
    texts = {
        name: accumulator.Tensors(f"train/{name}")[0].tensor_proto.string_val[0].decode()
        for name in ("text", "table")
    }
    assert texts["text"] == "hello \\ud800"
    assert texts["table"] == "\n".join(
        ["| name | a\\|b |", "| --- | --- |", "| cat | 0.5 |", "| dog new | None |"]
    )
    there = {tag: value for (tag, step), (_, value) in scalars(runner.run_dir).items() if step == 7}
    assert math.isnan(there["train/nan"])
    assert there["train/inf"] == -math.inf
    assert there["train/huge"] == there["train/beyond"] == math.inf
    assert there["train/a_b@1 é/x _"] == 1.0
    assert there["train/_"] == 2.0
    assert there["train/epoch"] == 0.25
    assert "sink 'tensorboard'" not in capsys.readouterr().out


# -- hyperparameters ----------------------------------------------------------------------------


def test_the_hyperparameters_and_the_metrics_are_told(make: MakeRunner) -> None:
    runner = train(make, dict(type="clip", max_norm=0.5))
    experiment, start, end = hparams(runner.run_dir)
    metrics = [metric.name.tag for metric in experiment.experiment.metric_infos]
    assert metrics == ["val/accuracy"]
    given = start.session_start_info.hparams
    assert given["optimizer/type"].string_value == "SGD"
    assert given["optimizer/lr"].number_value == 0.1
    assert given["clip/max_norm"].number_value == 0.5
    assert given["train/max_epochs"].number_value == 2
    assert given["parameters"].number_value == 15
    assert {info.name for info in experiment.experiment.hparam_infos} == set(given)
    assert end.session_end_info.status == 1  # success


def test_a_run_that_is_never_evaluated_has_hyperparameters_too(make: MakeRunner) -> None:
    runner = train(make, validate=False)
    _, start, end = hparams(runner.run_dir)
    assert start.session_start_info.hparams["optimizer/lr"].number_value == 0.1
    assert end.session_end_info.status == 1


def test_a_run_that_fails_says_so_until_it_is_trained_again(make: MakeRunner) -> None:
    def broken(runner: Any) -> None:
        if runner.progress.iter == 7 and not runner.progress.stopped:
            raise LookupError("no")

    runner = make(plugins=["logging", "tensorboard"], validate=True)
    runner.on("after_train_iter")(broken)
    with pytest.raises(LookupError):
        runner.train()
    runner.close()
    assert hparams(runner.run_dir)[-1].session_end_info.status == 2  # failure
    again = make(plugins=["logging", "tensorboard"], validate=True)
    again.on("after_train_iter")(broken)
    with pytest.raises(LookupError):
        again.train()
    again.plugins.remove("after_train_iter:broken")
    again.val()
    again.close()
    assert hparams(again.run_dir)[-1].session_end_info.status == 1


def test_without_records_there_is_no_file(make: MakeRunner) -> None:
    runner = make(plugins=["tensorboard"])
    runner.train()
    runner.close()
    assert files(runner.run_dir) == []


# -- folders ------------------------------------------------------------------------------------


def test_one_runner_after_another_moves_the_earlier_run_aside(make: MakeRunner) -> None:
    for number in range(3):
        runner = train(make, name="run", train_cfg=dict(max_epochs=number + 1))
        assert is_whole(runner.run_dir)
        assert len(files(runner.run_dir)) == 1
    last_steps = [
        max(step for _, step in scalars(runner.run_dir / f"tensorboard_{number}"))
        for number in (1, 2)
    ]
    assert last_steps == [5, 10]


def test_train_and_test_of_one_runner_are_one_file(make: MakeRunner) -> None:
    runner = make(plugins=["logging", "tensorboard"], validate=True, test=True)
    runner.train()
    runner.test()
    runner.train(max_epochs=3)
    runner.close()
    assert len(files(runner.run_dir)) == 1
    assert is_whole(runner.run_dir)
    assert len(hparams(runner.run_dir)) == 3


def test_a_folder_that_takes_no_file_costs_nothing(
    make: MakeRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    runner = make(plugins=["logging", "tensorboard"], name="run")
    runner.run_dir.mkdir(parents=True)
    (runner.run_dir / "events.out.tfevents.0.here.0.0").write_bytes(b"")
    (runner.run_dir / "tensorboard_1").write_text("in the way")
    runner.train()
    runner.close()
    assert (runner.run_dir / "tensorboard_2").is_dir()
    assert is_whole(runner.run_dir)


# -- a run that goes on -------------------------------------------------------------------------


def state_after(make: MakeRunner, iteration: int, upto: int) -> Any:
    """A run that was left after ``upto``, in its folder; its state after ``iteration``."""
    runner = make(
        name="run", plugins=[dict(type="logging", interval=1), "tensorboard"], validate=True
    )
    states: dict[int, Any] = {}

    @runner.on("safe_point")
    def keep(runner: Any) -> None:
        if runner.progress.iter == iteration and not runner.progress.val_due:
            states[iteration] = copy.deepcopy(runner.state_dict())
        if runner.progress.iter == upto:
            runner.stop()

    runner.train()
    runner.close()
    return states[iteration]


def resumed(make: MakeRunner, state: Any) -> Any:
    runner = make(
        name="run", plugins=[dict(type="logging", interval=1), "tensorboard"], validate=True
    )
    runner.load_state_dict(state)
    runner.train()
    runner.close()
    return runner


@pytest.mark.parametrize("cut", [0, 1, 30, 2000, 10**9])
def test_a_file_that_was_cut_short_is_made_up_for(make: MakeRunner, cut: int) -> None:
    state = state_after(make, 6, upto=8)
    folder = make(name="run").run_dir
    (file,) = files(folder)
    whole = file.read_bytes()
    file.write_bytes(whole[: max(len(whole) - cut, 0)])
    runner = resumed(make, state)
    there = scalars(folder)
    assert there.keys() == expected(folder).keys()
    assert sum(plain.HasField("session_start_info") for plain in hparams(folder)) == 1
    for key, (_, value) in expected(runner.run_dir).items():
        if key[0].split("/")[1] in ("loss", "lr", "accuracy"):
            assert there[key][1] == pytest.approx(value, rel=1e-6)


def test_a_run_that_was_left_before_its_first_validation_has_hyperparameters(
    make: MakeRunner,
) -> None:
    runner = resumed(make, state_after(make, 2, upto=3))
    starts = [plain for plain in hparams(runner.run_dir) if plain.HasField("session_start_info")]
    assert [start.session_start_info.hparams["optimizer/lr"].number_value for start in starts] == [
        0.1
    ]


PROGRAM = """
import os, sys
from tests.conftest import *

kill = int(sys.argv[2])
torch.set_num_threads(1)
runner = Runner(
    Toy, work_dir=sys.argv[1], name="run", resume="auto",
    train_dataloader=DataLoader(toy_data(), batch_size=4, shuffle=True),
    train_cfg=dict(max_epochs=6), optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.1)),
    val_dataloader=DataLoader(toy_data(10, seed=1), batch_size=4), val_evaluator=ToyAccuracy(),
    plugins=[
        dict(type="seed", seed=0), dict(type="logging", interval=2),
        dict(type="checkpoint", every="7 iterations"), "tensorboard",
    ],
)

@runner.on("after_train_iter")
def die(runner):
    if runner.progress.iter == kill:
        if sys.argv[3] == "written":  # all that there is so far is in the sink
            runner.plugins["tensorboard"].after_run(runner)
        os.kill(os.getpid(), 9)

runner.train()
runner.close()
"""


def run(folder: Path, kill: int = 0, state: str = "") -> None:
    """Train in a process of its own, which is killed after that iteration."""
    done = forks.run(PROGRAM, str(folder), str(kill), state)
    assert done.returncode == (-signal.SIGKILL if kill else 0), done.stderr


@pytest.mark.process
def test_a_run_that_was_killed_twice_has_each_value_once(tmp_path: Path) -> None:
    run(tmp_path, kill=17, state="written")
    last = files(tmp_path / "run")[-1]
    last.write_bytes(last.read_bytes()[:-20])  # in the middle of an event
    run(tmp_path, kill=24, state="waiting")
    run(tmp_path)
    assert is_whole_of_a_repeated_run(tmp_path / "run")


def is_whole_of_a_repeated_run(folder: Path) -> bool:
    """As ``is_whole``; a value that was repeated may have the time of either."""
    there, wanted = scalars(folder), expected(folder)
    assert there.keys() == wanted.keys()
    timing = ("time", "data_time", "samples_per_second", "memory", "eta", "seconds")
    for (tag, step), (_, value) in wanted.items():
        if tag.partition("/")[2] not in timing:
            assert there[tag, step][1] == pytest.approx(value, rel=1e-6)
    per_phase = Counter(tag for tag, _ in there)
    assert (per_phase["train/loss"], per_phase["val/accuracy"]) == (18, 6)
    return True


# -- replayed -----------------------------------------------------------------------------------


def replay(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hookengine_logging.replay", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ})


def replay_here(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """The same in this process."""
    import typer
    from hookengine_logging.replay import main

    app = typer.Typer()
    app.command()(main)
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        app([*arguments], standalone_mode=True)
    return int(str(ended.value.code)), str(capsys.readouterr().err)


@pytest.mark.process
def test_a_run_is_replayed_into_an_empty_folder_and_only_once(
    make: MakeRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    runner = make(plugins=["logging", Hands()], validate=True, name="run")
    runner.train()
    runner.close()
    folder = runner.run_dir
    done = replay(str(folder), "--to", "tensorboard")
    assert (done.returncode, done.stderr) == (0, "")
    assert is_whole(folder)
    accumulator: Any = read(folder)
    assert {"train/image", "train/figure"} <= {*accumulator.Tags()["images"]}
    first = [event for event in events(folder) if event.summary.value]
    assert replay_here(capsys, str(folder), "--to", "tensorboard")[0] == 0
    assert is_whole(folder)
    again = [event for event in events(folder) if event.summary.value]
    new = [v.tag for event in again[len(first) :] for v in event.summary.value]
    assert new == ["_hparams_/session_end_info"]
    assert replay_here(capsys, str(folder), "--to", "tensorboard", "--anew")[0] == 0
    assert is_whole(folder)
    assert len(files(folder)) == 1
    assert len(files(folder / "tensorboard_1")) == 2


def test_a_run_that_says_ranks_is_replayed(
    make: MakeRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    runner = make(plugins=["logging"], name="run")
    runner.train()
    runner.close()
    file = runner.run_dir / "run.json"
    described = json.loads(file.read_text())
    described["ranks"] = described.pop("world_size")  # as it was called at first
    file.write_text(json.dumps(described))
    assert replay_here(capsys, str(runner.run_dir), "--to", "tensorboard")[0] == 0
    (start,) = (p for p in hparams(runner.run_dir) if p.HasField("session_start_info"))
    assert start.session_start_info.hparams["world_size"].number_value == 1


def test_a_run_that_failed_is_replayed_as_one_that_failed(
    make: MakeRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    runner = make(plugins=["logging"], validate=True, name="run")

    @runner.on("after_train_iter")
    def fail(runner: Any) -> None:
        if runner.progress.iter == 7:
            raise LookupError("no")

    with pytest.raises(LookupError):
        runner.train()
    runner.close()
    assert replay_here(capsys, str(runner.run_dir), "--to", "tensorboard")[0] == 0
    assert hparams(runner.run_dir)[-1].session_end_info.status == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing", "--to", "tensorboard"], "is not a run's folder: it has no metrics.jsonl"),
        (["RUN", "--to", "tensorbord"], "'tensorbord'"),
        (["RUN", "--to", "clip", "--option", "max_norm=1"], "'clip' is not a sink"),
        (["RUN", "--to", "tensorboard", "--option", "colour"], "--option must be NAME=VALUE"),
        (["RUN", "--to", "tensorboard", "--option", "colour=1"], "colour"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    make: MakeRunner, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    runner = make(plugins=["logging"], name="run")
    runner.train()
    runner.close()
    given = [str(runner.run_dir) if each == "RUN" else each for each in arguments]
    code, err = replay_here(capsys, *given)
    assert code == 2
    assert message in err
    assert len(err.splitlines()) == 1, err
    assert files(runner.run_dir) == []


# -- a run that goes back -----------------------------------------------------------------------


def branch(make: MakeRunner, state: Any, **options: Any) -> Any:
    """Resume with other options than before, which gives other values."""
    interval = options.pop("interval", 1)
    on = options.pop("on", True)
    limits = options.pop("train", {})
    options.setdefault("optim_wrapper", dict(optimizer=dict(type="SGD", lr=0.4)))
    sinks = ["tensorboard"] * on
    plugins = [dict(type="logging", interval=interval), *sinks, *options.pop("plugins", ())]
    runner = make(name="run", plugins=plugins, validate=True, **options)
    runner.load_state_dict(copy.deepcopy(state))
    runner.optim_wrapper.optimizer.param_groups[0]["lr"] = 0.4
    states: dict[int, Any] = {}

    @runner.on("safe_point")
    def keep(runner: Any) -> None:
        states[runner.progress.iter] = copy.deepcopy(runner.state_dict())

    runner.train(**limits)
    runner.close()
    return states


def shows_the_history(folder: Path) -> bool:
    """Whether it shows what ``metrics.jsonl`` holds, and no hidden record besides."""
    assert is_whole(folder)
    found = [
        (phase, event.step)
        for event in events(folder)
        for phase in {value.tag.partition("/")[0] for value in event.summary.value}
        if phase in ("train", "val", "test")
    ]
    assert sorted(found) == sorted((r.phase, r.iter) for r in read_records(folder))
    return True


@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize("at", [2, 5, 7])
def test_what_a_run_has_left_is_gone(make: MakeRunner, interval: int, at: int) -> None:
    state = state_after(make, at, upto=9)
    branch(make, state, interval=interval)
    assert shows_the_history(make(name="run").run_dir)


def test_a_run_may_go_back_again_and_again(make: MakeRunner) -> None:
    first = state_after(make, 3, upto=9)
    second = branch(make, first, interval=2)
    third = branch(make, second[6], interval=1)
    branch(make, third[8], interval=5)
    branch(make, first, interval=4)
    assert shows_the_history(make(name="run").run_dir)


def test_a_run_that_goes_back_and_ends_earlier_is_shorter(make: MakeRunner) -> None:
    branch(make, state_after(make, 3, upto=10), train=dict(max_epochs=1))
    folder = make(name="run").run_dir
    assert shows_the_history(folder)
    assert max(step for _, step in scalars(folder)) == 5


def test_what_happened_without_the_plugin_is_shown(make: MakeRunner) -> None:
    states = branch(make, state_after(make, 3, upto=9), on=False)
    branch(make, states[7])
    assert shows_the_history(make(name="run").run_dir)


def test_one_runner_may_go_back(make: MakeRunner) -> None:
    runner = make(plugins=[dict(type="logging", interval=1), "tensorboard"], validate=True)
    states: dict[int, Any] = {}

    @runner.on("safe_point")
    def keep(runner: Any) -> None:
        states.setdefault(runner.progress.iter, copy.deepcopy(runner.state_dict()))

    runner.train()
    runner.load_state_dict(states[3])
    runner.optim_wrapper.optimizer.param_groups[0]["lr"] = 0.4
    runner.train()
    runner.close()
    assert shows_the_history(runner.run_dir)


def test_an_evaluation_alone_leaves_what_there_is(make: MakeRunner) -> None:
    state = state_after(make, 5, upto=10)
    runner = make(
        name="run", plugins=[dict(type="logging", interval=1), "tensorboard"], validate=True
    )
    runner.load_state_dict(state)
    runner.val()
    runner.close()
    assert {step for _, step in scalars(runner.run_dir)} == {*range(1, 11)}


def test_a_run_that_goes_back_is_replayed(
    make: MakeRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    branch(make, state_after(make, 3, upto=9), on=False)
    folder = make(name="run").run_dir
    assert replay_here(capsys, str(folder), "--to", "tensorboard")[0] == 0
    assert shows_the_history(folder)


def test_a_file_that_another_program_writes_is_left_alone(make: MakeRunner) -> None:
    from torch.utils.tensorboard.writer import SummaryWriter

    state = state_after(make, 3, upto=9)
    folder = make(name="run").run_dir
    with SummaryWriter(str(folder)) as writer:  # type: ignore[no-untyped-call]
        writer.add_scalar("train/mine", 1.0, 500)  # type: ignore[no-untyped-call]
        branch(make, state)
        writer.add_scalar("train/mine", 2.0, 501)  # type: ignore[no-untyped-call]
    there = scalars(folder)
    mine = {step: there.pop(("train/mine", step))[1] for step in (500, 501)}
    assert mine == {500: 1.0, 501: 2.0}
    assert there.keys() == expected(folder).keys()

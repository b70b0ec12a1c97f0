"""What is written: the console, metrics.jsonl, run.log, run.json."""

from __future__ import annotations

import json
import logging as standard
import os
import re
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from hookengine import Plugin, Record, Runner, Sink
from tests.ranks import on_ranks

LOGGING = ("logging",)


def lines(runner: Any, phase: str | None = None) -> list[dict[str, Any]]:
    text = (runner.run_dir / "metrics.jsonl").read_text()
    records = [json.loads(line) for line in text.splitlines()]
    return [r for r in records if phase in (None, r["phase"])]


def logging(make: Any, **options: Any) -> Any:
    interval = options.pop("interval", 2)
    plugins = [dict(type="logging", interval=interval), *options.pop("plugins", [])]
    return make(defaults=LOGGING, plugins=plugins, **options)


class Losses(Plugin):
    """Keeps the losses as they come."""

    def __post_init__(self) -> None:
        self.values: list[float] = []

    def after_train_iter(self, outputs: Any) -> None:
        self.values.append(outputs["loss"].item())


def test_training_is_averaged_over_intervals_and_epochs(make: Any) -> None:
    losses = Losses()
    runner = logging(make, plugins=[losses], validate=True)
    runner.train()
    records = lines(runner, "train")
    assert [r["iter"] for r in records] == [2, 4, 5, 7, 9, 10]
    starts = [0, 2, 4, 5, 7, 9]
    for record, start in zip(records, starts, strict=True):
        values = losses.values[start : record["iter"]]
        assert record["loss"] == pytest.approx(sum(values) / len(values), rel=1e-12)
        assert record["lr"] == 0.1
        assert 0 <= record["data_time"] <= record["time"]
        assert record["samples_per_second"] > 0
        assert record["memory"] > 0
    assert [r["epoch"] for r in records] == [1, 1, 1, 2, 2, 2]
    assert records[-1]["step"] == 10
    assert records[-1]["eta"] == 0
    val = lines(runner, "val")
    assert [(r["epoch"], r["iter"]) for r in val] == [(1, 5), (2, 10)]
    assert val[-1]["accuracy"] == runner.val_loop.metrics["accuracy"]


def test_an_iteration_based_run_is_written_by_iterations(make: Any) -> None:
    runner = logging(make, interval=4, train_cfg=dict(max_iters=11))
    runner.train()
    assert [r["iter"] for r in lines(runner)] == [4, 8, 11]


def test_a_run_of_unknown_length_has_no_eta_and_loses_nothing(make: Any, data: Any) -> None:
    class Unknown:
        def __iter__(self) -> Any:
            return iter([data(4).tensors] * 3)

    runner = logging(make, train_dataloader=Unknown())
    runner.train()
    assert [r["iter"] for r in lines(runner)] == [2, 3, 5, 6]
    assert "eta" not in lines(runner)[0]


def test_no_value_is_read_from_the_device_between_records(make: Any, monkeypatch: Any) -> None:
    reads = []
    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy"):
        original = getattr(Tensor, name)

        def watched(self: Tensor, *a: Any, _name: str = name, _f: Any = original, **k: Any) -> Any:
            reads.append((runner.progress.iter, _name))
            return _f(self, *a, **k)

        monkeypatch.setattr(Tensor, name, watched)
    runner = logging(make, interval=5, train_cfg=dict(max_iters=10))
    reads.clear()
    runner.train()
    # At the start of an epoch (here at 0 and 5) the DataLoader draws its seed.
    assert {iteration for iteration, _ in reads} == {0, 5, 10}


def test_what_runner_log_is_given_joins_the_next_record(make: Any) -> None:
    runner = logging(make, validate=True)

    @runner.on("after_train_iter")
    def note(runner: Any) -> None:
        kept = torch.tensor(float(runner.progress.iter), requires_grad=True) * 2
        runner.log({"double": kept, "count": 1, "text": "x", "image": torch.zeros(2, 2)})

    @runner.on("after_val_iter")
    def note_val(runner: Any) -> None:
        runner.log({"seen": 1.0}, phase="val")

    media = []
    runner.on("write")(lambda record: media.append(dict(record.media)))
    runner.train()
    first = lines(runner, "train")[0]
    assert first["double"] == 3.0
    assert first["count"] == 1.0
    assert "text" not in first
    assert media[0]["text"] == "x"
    assert media[0]["image"].png.startswith(b"\x89PNG")
    assert first["media"]["text"] == {"text": "x"}
    assert (runner.run_dir / first["media"]["image"]["image"]).read_bytes() == media[0]["image"].png
    assert lines(runner, "val")[0]["seen"] == 1.0


def test_console_lines_are_readable(make: Any, capsys: Any) -> None:
    runner = logging(make, validate=True, interval=50)
    runner.train()
    out = capsys.readouterr().out
    assert re.search(
        r"^\d\d:\d\d:\d\d  train  epoch 2/2  iter 10/10  loss \d\.\d+  lr 0.1  \d+\.\d ms  "
        r"(waits for data \d+%  )?\d+ samples/s  eta 0:00:00$",
        out,
        re.MULTILINE,
    )
    assert re.search(r"^\S+  val    epoch 1/2  iter 5/10  accuracy \d", out, re.MULTILINE)
    log = (runner.run_dir / "run.log").read_text()
    for line in out.splitlines():
        assert line[10:] in log


def test_the_run_is_introduced(make: Any, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("HOOKENGINE_DISABLE", "blocked")

    class Blocked(Losses, name="blocked"): ...

    runner = logging(make, plugins=[Losses(), Blocked()], name="mine", validate=True)
    assert not runner.run_dir.exists()  # a Runner that is only built leaves nothing behind
    runner.train()
    assert runner.run_dir.name == "mine"
    run = json.loads((runner.run_dir / "run.json").read_text())
    assert run["name"] == "mine"
    assert torch.__version__.startswith(run["environment"]["packages"]["torch"])
    plugins = {plugin["name"]: plugin for plugin in run["plugins"]}
    assert plugins["logging"]["options"] == {
        "interval": 2,
        "level": "INFO",
        "levels": {},
        "nonfinite": "stop",
        "renderer": "console",
    }
    assert plugins["logging"]["source"].startswith("hookengine ")
    assert run["hooks"]["after_train_iter"] == ["losses", "logging"]
    assert (run["model"], run["parameters"]) == ("Toy", 15)
    assert run["train_cfg"]["max_epochs"] == 2
    assert run["val_cfg"] == {"loss": False}
    assert run["optimizers"]["optimizer"]["type"] == "SGD"
    out = capsys.readouterr().out
    assert "run mine: files in" in out
    assert "plugins logging, losses (blocked: blocked)" in out


def test_runs_without_a_name_never_share_a_folder(make: Any) -> None:
    runners = [logging(make) for _ in range(3)]
    for runner in runners:
        runner.train()
    assert len({runner.run_dir for runner in runners}) == 3
    for runner in runners:
        assert len(lines(runner)) == 6
    again = logging(make, name=runners[0].name)
    again.train()  # a name of one's own shares the folder, and the history of each is whole
    assert len(lines(again)) == 6
    assert len((again.run_dir / "metrics_1.jsonl").read_text().splitlines()) == 6


def test_the_level_holds_for_console_and_file(make: Any, capsys: Any) -> None:
    runner = make(defaults=LOGGING, plugins=[dict(type="logging", level="WARNING")])
    runner.logger.info("quiet")
    runner.logger.warning("loud", key=3)
    out = capsys.readouterr().out
    assert "quiet" not in out
    assert "WARNING loud  key=3" in out


def test_an_error_and_what_was_left_are_written(make: Any) -> None:
    class Broken(Plugin):
        def before_train_iter(self, runner: Any) -> None:
            if runner.progress.iter == 3:
                raise LookupError("no")

    runner = logging(make, plugins=[Broken()])
    with pytest.raises(LookupError):
        runner.train()
    assert [r["iter"] for r in lines(runner)] == [2, 3]
    log = (runner.run_dir / "run.log").read_text()
    assert "ERROR run ends with LookupError: no (raised by plugin 'broken'" in log


def test_a_run_that_goes_on_writes_what_the_straight_run_writes(make: Any) -> None:
    def essence(runner: Any) -> list[dict[str, Any]]:
        timing = {
            "time",
            "data_time",
            "samples_per_second",
            "memory",
            "eta",
            "timestamp",
            "seconds",
        }
        return [{k: v for k, v in r.items() if k not in timing} for r in lines(runner)]

    straight = logging(make, validate=True, interval=3, name="straight")
    straight.train()
    states: dict[int, Any] = {}
    first = logging(make, validate=True, interval=3, name="resumed")

    @first.on("safe_point")
    def save(runner: Any) -> None:
        progress = runner.progress
        due = progress.val_due or (progress.batch == 0 and progress.iter)
        states[len(states)] = (progress.iter, due, runner.state_dict())

    import copy

    @first.on("before_save_checkpoint", trylast=True)
    def freeze(checkpoint: Any) -> None:
        checkpoint.update(copy.deepcopy(checkpoint))

    first.train()
    first.close()
    complete = (first.run_dir / "metrics.jsonl").read_text()
    assert essence(first) == essence(straight)
    for _, _, state in states.values():
        (first.run_dir / "metrics.jsonl").write_text(complete + '{"phase": "tra')  # a kill
        second = logging(make, validate=True, interval=3, name="resumed")
        second.load_state_dict(state)
        second.train()
        second.close()
        assert essence(second) == essence(straight)


def test_a_folder_that_cannot_be_made_is_an_error_at_once(make: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    runner = logging(make, work_dir=tmp_path / "file")
    with pytest.raises(
        OSError, match=r"cannot create the folder of the run, .*Pass another work_dir"
    ):
        runner.train()
    assert runner.progress.iter == 0


def test_a_failing_disk_costs_nothing(make: Any, capsys: Any) -> None:
    runner = logging(make)
    path = runner.run_dir / "metrics.jsonl"
    runner.on("before_train")(lambda: path.mkdir())  # cannot be opened as a file

    @runner.on("after_train_epoch", tryfirst=True)
    def mend(runner: Any) -> None:
        if path.is_dir():
            path.rmdir()

    runner.train()
    assert [r["iter"] for r in lines(runner)] == [2, 4, 5, 7, 9, 10]
    assert capsys.readouterr().out.count("WARNING cannot write") == 1


FULL_DISK = """
import resource, signal, sys, torch
from torch import nn
from hookengine import Runner
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
model = nn.Linear(1, 1)
runner = Runner(model, sys.argv[1], [(torch.ones(1, 1), torch.ones(1, 1))] * 6,
                loss=nn.MSELoss(), optim_wrapper=torch.optim.SGD(model.parameters(), lr=0.1),
                train_cfg=dict(max_epochs=1), plugins=[dict(type="logging", interval=1)])
def room(size): resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
@runner.on("before_train_iter")
def fill(runner):
    if runner.progress.iter == 2: room(400)  # in the middle of a line
    if runner.progress.iter == 4: room(resource.RLIM_INFINITY)
runner.train()
"""


def test_a_disk_that_fills_up_in_the_middle_of_a_line_leaves_whole_lines(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*/metrics.jsonl")
    written = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["iter"] for record in written] == [1, 2, 3, 4, 5, 6]
    assert "cannot write" in done.stdout


def test_a_disk_that_fails_to_the_end_is_said_so_at_the_end(make: Any, capsys: Any) -> None:
    runner = logging(make)
    runner.on("before_train")(lambda runner: (runner.run_dir / "metrics.jsonl").mkdir())
    runner.train()
    runner.close()
    assert "ERROR 6 records could not be written" in capsys.readouterr().out


def test_a_full_disk_behind_the_console_does_not_end_training(tmp_path: Path) -> None:
    script = FULL_DISK.partition("def room")[0] + "runner.train()"
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path)],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    (path,) = tmp_path.glob("*/metrics.jsonl")
    assert len(path.read_text().splitlines()) == 6
    assert "can no longer print to the console, see run.log" in done.stderr


def test_values_of_every_kind_are_taken(make: Any, capsys: Any) -> None:
    runner = logging(make, train_cfg=dict(max_iters=2))
    values = {
        "nan": float("nan"),
        "inf": torch.tensor(float("inf")),
        "huge": 10**400,
        "numpy": np.float32(0.5),
        "array": np.array([0.1, 0.2]),
        "one": torch.ones(1),
        "epoch": 99.5,
        "lr": 7.0,
    }
    runner.on("after_train_iter")(lambda runner: runner.log(values))
    runner.train()
    (record,) = lines(runner)
    assert (record["nan"], record["inf"]) == ("nan", "inf")
    assert (record["numpy"], record["one"], record["lr"]) == (0.5, 1.0, 7.0)
    assert (record["epoch"], record["value/epoch"]) == (1, 99.5)
    assert record["huge"] == "inf"
    assert sum(record["media"]["array"]["histogram"]["counts"]) == 2
    with pytest.raises(ValueError, match="phase must be"):
        runner.log(values, phase="eval")  # type: ignore[arg-type]


def test_what_a_stop_had_written_is_not_written_twice_after_a_resume(make: Any) -> None:
    first = logging(make, interval=5, name="run")
    states = []

    @first.on("after_train_iter")
    def stop(runner: Any) -> None:
        if runner.progress.iter == 3:
            runner.stop()

    @first.on("safe_point")
    def save(runner: Any) -> None:
        states.append(runner.state_dict())

    first.train()
    first.close()
    assert [r["iter"] for r in lines(first)] == [3]
    second = logging(make, interval=5, name="run")
    second.load_state_dict(states[2])
    second.train()
    assert [r["iter"] for r in lines(second)] == [5, 10]


def test_after_it_was_removed_nothing_is_opened_again(make: Any) -> None:
    runner = logging(make, interval=1)
    runner.on("after_train_iter")(
        lambda runner: "logging" in runner.plugins and runner.plugins.remove("logging")
    )
    runner.train()
    assert runner.progress.iter == 10


def test_the_logger_is_given_back(make: Any, capsys: Any, caplog: Any) -> None:
    runner = logging(make)
    runner.close()
    runner.logger.warning("after")
    assert "after" not in capsys.readouterr().out
    assert "after" in caplog.text


def test_several_optimizers_have_a_rate_each(make: Any) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 3)

        def train_step(self, data: Any, optim_wrapper: Any) -> None:
            for one in optim_wrapper.values():
                one.update_params(self.a(data[0]).sum())

    model = Two()
    sgd = torch.optim.SGD
    runner = logging(
        make,
        model=model,
        optim_wrapper=dict(x=sgd([model.a.weight], lr=0.1), y=sgd([model.a.bias], lr=0.2)),
    )
    runner.train()
    assert (lines(runner)[0]["x/lr"], lines(runner)[0]["y/lr"]) == (0.1, 0.2)
    assert "loss" not in lines(runner)[0]


def spoilt(toy: Any, at: dict[int, dict[str, float]]) -> Any:
    """A toy with two terms of a loss, which some iterations replace."""

    class Spoilt(toy):  # type: ignore[misc]
        seen = 0

        def train_step(self, data: Any, optim_wrapper: Any) -> Any:
            self.seen += 1
            outputs = super().train_step(data, optim_wrapper)
            terms = {"loss": outputs["loss"], "loss_box": torch.tensor(0.25), "size": torch.inf}
            changed = at.get(self.seen, {}).items()
            return {**terms, **{name: torch.tensor(value) for name, value in changed}}

    return Spoilt()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_ends_the_run_at_the_interval(
    make: Any, toy: Any, value: float
) -> None:
    model = spoilt(toy, {7: {"loss": value}, 8: {"loss": value, "loss_box": value}})
    runner = logging(make, model=model, interval=5, train_cfg=dict(max_epochs=4))
    with pytest.raises(FloatingPointError) as error:
        runner.train()
    assert runner.progress.iter == 10
    assert str(error.value).startswith(
        f"the loss is not finite in iteration 7, epoch 2: loss {value} (loss_box 0.25). "
    )
    assert "nonfinite='warn'" in str(error.value)
    assert "plugin 'logging'" in error.value.__notes__[0]
    assert [record["iter"] for record in lines(runner)] == [5, 10], "the interval is written"
    assert "the loss is not finite in iteration 7" in (runner.run_dir / "run.log").read_text()


def test_the_epoch_of_a_loss_is_told_where_an_interval_spans_two(make: Any, toy: Any) -> None:
    model = spoilt(toy, {4: {"loss_box": float("nan")}})
    runner = logging(make, model=model, interval=7, train_cfg=dict(max_iters=20))
    with pytest.raises(FloatingPointError, match=r"iteration 4, epoch 1: loss_box nan \(loss "):
        runner.train()
    assert runner.progress.iter == 7


def test_a_state_with_spoilt_weights_is_not_handed_out(make: Any, toy: Any) -> None:
    states = []

    class Saves(Plugin):
        def safe_point(self, runner: Any) -> None:
            states.append((runner.progress.iter, runner.state_dict()))

    model = spoilt(toy, {3: {"loss": float("nan")}})
    runner = logging(make, model=model, interval=50, plugins=[Saves()])
    with pytest.raises(FloatingPointError, match="iteration 3, epoch 1"):
        runner.train()
    assert [iteration for iteration, _ in states] == [1, 2]


def test_a_term_that_comes_now_and_then_is_looked_at_too(make: Any, toy: Any) -> None:
    model = spoilt(toy, {3: {"loss_g": 1.0}, 4: {"loss_g": float("nan")}})
    runner = logging(make, model=model, interval=5)
    with pytest.raises(FloatingPointError, match="iteration 4, epoch 1: loss_g nan"):
        runner.train()


def test_a_run_that_was_rolled_back_is_looked_at_again(make: Any, toy: Any) -> None:
    model = spoilt(toy, {3: {"loss": float("nan")}, 9: {"loss": float("nan")}})
    runner = logging(make, model=model, interval=2)
    state = runner.state_dict()
    for _ in range(2):
        with pytest.raises(FloatingPointError, match="iteration"):
            runner.train()
        runner.load_state_dict(state)


def test_who_chooses_to_goes_on_after_one_warning(make: Any, toy: Any) -> None:
    model = spoilt(toy, {3: {"loss": float("nan")}, 8: {"loss": float("nan")}})
    options = dict(type="logging", interval=2, nonfinite="warn")
    runner = make(model=model, defaults=LOGGING, plugins=[options])
    runner.train()
    assert runner.progress.iter == 10
    text = (runner.run_dir / "run.log").read_text()
    assert text.count("the loss is not finite in iteration 3") == 1
    assert "iteration 8" not in text
    runner.state_dict()


class Used(Plugin):
    """Keeps the learning rate of each iteration's step."""

    rate = 0.1

    def before_train(self) -> None:
        self.rates: list[float] = []

    def after_train_iter(self) -> None:
        self.rates.append(self.rate)

    def before_optim_step(self, optim_wrapper: Any) -> None:
        (self.rate,) = optim_wrapper.get_lr()


class Unsized:
    """Batches without a length."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __iter__(self) -> Any:
        return iter(torch.utils.data.DataLoader(self.data(), batch_size=4))


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(train_dataloader=Unsized),
        dict(train_cfg=dict(max_iters=7)),
        dict(train_cfg=dict(max_iters=7, val_interval=3), validate=True),
        dict(stop=3),
        dict(plugins=[dict(type="accumulate", steps=2)]),
    ],
)
@pytest.mark.parametrize("by_epoch", [True, False])
def test_a_record_tells_the_learning_rate_that_was_used(
    make: Any, data: Any, options: dict[str, Any], by_epoch: bool
) -> None:
    options = dict(options)
    used, stop = Used(), options.pop("stop", None)
    config = dict(type="ExponentialLR", gamma=0.5)
    schedule = dict(type="schedule", scheduler=config, by_epoch=by_epoch)
    if "train_dataloader" in options:
        options["train_dataloader"] = Unsized(data)
    plugins = [schedule, used, *options.pop("plugins", [])]
    runner = logging(make, interval=4, plugins=plugins, **options)
    runner.on("after_train_iter")(
        lambda runner: runner.stop("enough") if runner.progress.iter == stop else None
    )
    runner.train()
    records = lines(runner, "train")
    assert records
    for record in records:
        assert record["lr"] == used.rates[record["iter"] - 1], record["iter"]


def test_the_losses_come_first_and_steps_where_they_are_not_iterations(make: Any) -> None:
    plugins = [dict(type="clip", max_norm=1), dict(type="accumulate", steps=2)]
    runner = logging(make, interval=1, plugins=plugins)
    runner.train()
    keys = [[k for k in record if k in ("loss", "grad_norm", "lr")] for record in lines(runner)]
    assert keys[1] == keys[3] == ["loss", "grad_norm", "lr"]
    assert "iter 4/10  step 2  loss" in (runner.run_dir / "run.log").read_text()


def test_what_is_no_number_is_not_kept_and_no_loss(make: Any, toy: Any) -> None:
    import weakref

    images: list[Any] = []

    class Shows(toy):  # type: ignore[misc]
        def train_step(self, data: Any, optim_wrapper: Any) -> Any:
            outputs = super().train_step(data, optim_wrapper)
            image = torch.zeros(4, 4)
            images.append(weakref.ref(image))
            broken = torch.tensor(float("nan") if len(images) == 7 else 1.0)
            return {**outputs, "loss_map": image, "loss_kind": "focal", "loss_b": broken}

    alive = []
    runner = logging(make, model=Shows(), interval=50)
    runner.on("after_train_iter")(lambda: alive.append(sum(i() is not None for i in images)))
    with pytest.raises(FloatingPointError, match="iteration 7, epoch 2: loss_b nan"):
        runner.train()
    assert max(alive) <= 2


def test_who_replaces_the_same_value_is_named_in_order(make: Any) -> None:
    class Auxiliary(Plugin):
        def after_forward(self, losses: Any) -> Any:
            return {**losses, "loss_aux": losses["loss"] * 0}

    class Halved(Plugin):
        def after_forward(self, losses: Any) -> Any:
            if not losses:
                return None
            return {name: value / 2 for name, value in losses.items()}

    class Looks(Plugin):
        def after_forward(self, losses: Any) -> Any:
            if losses:
                return
            return None

    runner = logging(make, plugins=[Halved(), Looks(), Auxiliary()])
    assert runner.plugins.replacements() == {"after_forward": ["halved", "auxiliary"]}
    runner.train()
    text = (runner.run_dir / "run.log").read_text()
    assert "after_forward: halved, then auxiliary replace the losses" in text
    assert "loss_aux" in lines(runner)[0]


# -- JSON lines ---------------------------------------------------------------------------------


def strict(text: str) -> list[dict[str, Any]]:
    """The lines, as any parser of JSON reads them."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


class Speaking(Plugin):
    """Says something in its hook, in a helper, and by a warning."""

    def before_train(self, runner: Any) -> None:
        runner.logger.info("in a hook", many=[1.0, float("nan")], one=float("inf"), odd={(1, 2): 3})
        self.helper(runner)
        warnings.warn("through Python", stacklevel=1)
        standard.getLogger("torch.nn").warning("through %s", "torch")

    def helper(self, runner: Any) -> None:
        runner.logger.warning("in a helper")


class Talking(Sink):
    """Says something on its own thread."""

    def write(self, runner: Any, record: Record) -> None:
        if record.iter == 10:
            runner.logger.info("on a thread", thread=threading.current_thread().name)


def test_every_line_is_json_with_its_context(make: Any, capsys: Any) -> None:
    plugins = [dict(type="logging", renderer="json", interval=5), Speaking(), Talking()]
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        json_lines_of(make(plugins=plugins, validate=True, name="mine"), capsys)


def json_lines_of(runner: Any, capsys: Any) -> None:
    @runner.on("after_train_iter")
    def function(runner: Any) -> None:
        if runner.progress.iter == 7:
            runner.logger.info("in a function")
            runner.log({"nan": float("nan"), "event": 3.0, "epoch": 0.5, "phase": 1.0, "level": 2})

    runner.logger.info("before the run")
    runner.train()
    runner.logger.error("by the user")
    runner.close()
    printed = strict(capsys.readouterr().out)
    filed = strict((runner.run_dir / "run.log").read_text())
    for line in [*printed, *filed]:
        assert {"run", "epoch", "iteration", "level", "timestamp", "event"} <= line.keys()
        assert line["run"] == "mine"
        assert isinstance(line["epoch"], int)
        assert isinstance(line["event"], str)
        assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", line["timestamp"])
    by_event = {line["event"]: line for line in filed}
    plugins = {event: line.get("plugin") for event, line in by_event.items()}
    assert plugins["in a hook"] == plugins["in a helper"] == "speaking"
    assert plugins["UserWarning: through Python"] == "speaking"
    assert plugins["torch.nn: through torch"] == "speaking"
    assert plugins["in a function"] == "after_train_iter:function"
    assert plugins["on a thread"] == "talking"
    assert by_event["on a thread"]["thread"] == "sink talking"
    assert plugins["before the run"] is plugins["by the user"] is None
    hook = by_event["in a hook"]
    assert (hook["many"], hook["one"], hook["odd"]) == ("[1.0, nan]", "inf", "{(1, 2): 3}")
    where = {event: (line["epoch"], line["iteration"]) for event, line in by_event.items()}
    assert where["before the run"] == where["in a hook"] == (0, 0)
    assert where["in a function"] == (2, 7)
    (record,) = (r for r in filed if r.get("phase") == "train" and r["iteration"] == 10)
    assert (record["plugin"], record["level"], record["step"]) == ("logging", "info", 10)
    assert (record["nan"], record["epoch"], record["value/epoch"]) == ("nan", 2, 0.5)
    assert (record["value/event"], record["value/phase"], record["value/level"]) == (3.0, 1.0, 2.0)
    assert [line for line in filed if not line["event"].startswith("torch.nn")] == printed


def test_an_exception_is_one_json_line(make: Any, capsys: Any) -> None:
    runner = make(plugins=[dict(type="logging", renderer="json")])
    try:
        raise LookupError("two\nlines")
    except LookupError:
        runner.logger.exception("it failed")
    (line,) = strict(capsys.readouterr().out)
    assert (line["event"], line["level"]) == ("it failed", "error")
    assert "LookupError: two\nlines" in line["exception"]


@pytest.mark.parametrize("renderer", ["console", "json"])
def test_a_text_that_the_console_cannot_encode_is_escaped(
    make: Any, capsys: Any, renderer: str
) -> None:
    runner = make(plugins=[dict(type="logging", renderer=renderer)])
    runner.logger.info("file \udcff.png", name="\ud800")
    runner.train()
    runner.logger.info("and on")
    runner.close()
    out = capsys.readouterr().out
    assert "file \\udcff.png" in out
    assert "and on" in out
    assert "file \\udcff.png" in (runner.run_dir / "run.log").read_text()


# -- levels -------------------------------------------------------------------------------------


class Loud(Plugin):
    """Speaks at every level."""

    def before_train(self, runner: Any) -> None:
        for level in ("debug", "info", "warning", "error"):
            getattr(runner.logger, level)(f"loud {level}")


class Other(Plugin):
    """So does this one."""

    def before_train(self, runner: Any) -> None:
        for level in ("debug", "info", "warning", "error"):
            getattr(runner.logger, level)(f"other {level}")


@pytest.mark.parametrize(
    ("own", "heard"),
    [
        ("DEBUG", ["debug", "info", "warning", "error"]),
        ("WARNING", ["warning", "error"]),
        ("ERROR", ["error"]),
    ],
)
def test_a_plugin_may_have_a_level_of_its_own(
    make: Any, capsys: Any, own: str, heard: list[str]
) -> None:
    runner = make(plugins=[dict(type="logging", levels={"loud": own}), Loud(), Other()])
    runner.train()
    for text in (capsys.readouterr().out, (runner.run_dir / "run.log").read_text()):
        assert re.findall(r"loud (\w+)", text) == heard
        assert re.findall(r"other (\w+)", text) == ["info", "warning", "error"]


def test_a_level_for_no_plugin_is_an_error_with_a_hint(make: Any, capsys: Any) -> None:
    before = warnings.showwarning
    match = r"'chekpoint', which is not a plugin\. Did you mean.*check"
    with pytest.raises(ValueError, match=match) as error:
        make(plugins=[dict(type="logging", levels={"chekpoint": "DEBUG"})])
    assert len(error.value.__notes__) == 1, "closing the Runner adds no error of its own"
    assert warnings.showwarning == before
    with pytest.raises(TypeError, match=r"levels\.clip='loud'"):
        make(plugins=[dict(type="logging", levels={"clip": "loud"})])
    make(plugins=[dict(type="logging", levels={"checkpoint": "DEBUG"})])  # one that is not on
    assert warnings.showwarning != before  # this one listens
    assert capsys.readouterr().out == ""


# -- warnings -----------------------------------------------------------------------------------


def warn_once(runner: Any, text: str) -> None:
    runner.on("before_train")(lambda: warnings.warn(text, stacklevel=1))


WARNS = (
    FULL_DISK.partition("def room")[0]
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


def test_warnings_are_lines_of_the_log_once_and_the_console_is_not_doubled(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WARNS, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
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


def test_who_records_warnings_gets_them_all_the_same(make: Any, capsys: Any) -> None:
    def train() -> list[Any]:
        runners = [logging(make), logging(make)]
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
    assert log.count("recorded") == 1  # the second time Python gave them to the recorder alone
    assert capsys.readouterr().out.count("recorded") == 1


def hooked() -> list[Any]:
    """What listens to warnings."""
    torchs = [
        logger
        for name, logger in standard.root.manager.loggerDict.items()
        if name.partition(".")[0] == "torch" and isinstance(logger, standard.Logger)
    ]
    handlers = [handler for logger in torchs for handler in logger.handlers]
    return [warnings.showwarning, handlers, [handler.filters[:] for handler in handlers]]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0)])
def test_everything_is_as_it_was_when_all_are_closed_in_any_order(
    make: Any, order: tuple[int, ...]
) -> None:
    before = hooked()
    runners = [logging(make) for _ in range(3)]
    assert hooked() != before
    for number in order:
        assert hooked() != before
        runners[number].close()
        runners[number].close()
    assert hooked() == before


def test_of_several_runners_the_one_that_runs_gets_the_warnings(make: Any, capsys: Any) -> None:
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        first, second = (logging(make, name=name) for name in ("first", "second"))
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


def test_a_listener_of_somebody_else_is_left_in_place(make: Any) -> None:
    seen: list[str] = []
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        runner = logging(make)
        own = warnings.showwarning

        def mine(message: Any, *rest: Any) -> None:
            seen.append(str(message))
            own(message, *rest)

        warnings.showwarning = mine
        warn_once(runner, "heard")
        runner.train()
        runner.close()
        assert warnings.showwarning is mine
    assert seen == ["heard"]
    assert "heard" in (runner.run_dir / "run.log").read_text()


# -- run.json -----------------------------------------------------------------------------------


def run_json(runner: Any) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads((runner.run_dir / "run.json").read_text())
    return fields


def test_run_json_tells_how_the_run_ended(make: Any) -> None:
    seen = []
    runner = logging(make)
    runner.on("after_train_iter")(lambda runner: seen.append(run_json(runner)))
    runner.train()
    assert {fields["status"] for fields in seen} == {"running"}
    assert "ended" not in seen[0]
    fields = run_json(runner)
    assert fields["status"] == "finished"
    assert fields["ended"] >= fields["started"]

    @runner.on("after_train_iter")
    def stop(runner: Any) -> None:
        runner.stop("it's enough")

    runner.train(max_epochs=3)
    assert run_json(runner)["status"] == "stopped: it's enough"

    @runner.on("after_train_iter")
    def stop(runner: Any) -> None:  # noqa: F811  (it replaces the other one)
        assert run_json(runner)["status"] == "running"
        raise LookupError("no \ud800")

    with pytest.raises(LookupError):
        runner.train(max_epochs=4)
    assert run_json(runner)["status"] == "failed: LookupError: no \ud800"
    assert run_json(runner)["started"] == fields["started"]


def test_an_evaluation_tells_how_long_it_took(make: Any) -> None:
    runner = logging(make, validate=True, test=True)
    runner.train()
    runner.val()
    runner.test()
    records = lines(runner, "val") + lines(runner, "test")
    assert len(records) == 4
    assert all(record["seconds"] > 0 for record in records)
    runner.on("after_val_epoch")(lambda runner: runner.log({"seconds": -1.0}, phase="val"))
    runner.val()
    assert lines(runner, "val")[-1]["seconds"] == -1.0  # who measures it is believed


# -- values and images --------------------------------------------------------------------------


def test_images_that_cannot_be_saved_are_said_once(make: Any, capsys: Any) -> None:
    runner = logging(make, name="run")
    runner.run_dir.mkdir(parents=True)
    (runner.run_dir / "media").write_text("in the way")
    kept: list[Any] = []
    runner.on("write")(lambda record: kept.append(dict(record.media)))
    values = {"image": torch.zeros(2, 2), "other": torch.zeros(2, 2), "text": "x"}
    runner.on("after_train_iter")(lambda runner: runner.log(values))
    runner.train()
    assert runner.progress.iter == 10
    assert capsys.readouterr().out.count("WARNING cannot write") == 1
    assert all(record["media"] == {"text": {"text": "x"}} for record in lines(runner))
    assert all({*media} == {"image", "other", "text"} for media in kept)  # the sinks have them


def test_an_image_is_overwritten_by_the_repetition_of_its_iteration(make: Any) -> None:
    runner = logging(make, train_cfg=dict(max_iters=2))
    names = ["a/b", "a_b", "é" * 100, "e" * 100, "../../up", "."]
    values = {name: torch.full((1, 2), i / 255) for i, name in enumerate(names)}
    runner.on("after_train_iter")(lambda runner: runner.log(values))
    runner.train()
    (record,) = lines(runner)
    paths = [record["media"][name]["image"] for name in names]
    assert len(set(paths)) == len(names)
    for path in paths:
        assert (runner.run_dir / path).resolve().parent == runner.run_dir / "media"


def test_names_and_values_of_every_kind(make: Any, capsys: Any) -> None:
    runner = logging(make, train_cfg=dict(max_iters=4))
    values: dict[Any, Any] = {
        "a\nb\x00c\x1b[31m": 1.0,
        "\ud800": 2.0,
        "": 3.0,
        7: 4.0,
        ("x", 1): 5.0,
        "é\u2028": 6.0,
        "huge": -(10**400),
        "whole": torch.tensor(2**24 + 1),
        "true": torch.tensor(True),
        "one": np.ones(1),
        "half": torch.tensor(0.5, dtype=torch.bfloat16),
        "none": None,
        "list": [1, 2],
        "complex": torch.tensor(1 + 2j),
        "sparse": torch.eye(3).to_sparse(),
        "wrong": torch.zeros(5, 5, 5),
        "no values": torch.zeros(0),
        "of\nlines": object(),
        "text": "\ud800 \x1b",
    }
    runner.on("after_train_iter")(lambda runner: runner.log(values))
    runner.train()
    for record in lines(runner):
        assert record["a_b_c_[31m"] == 1.0
        assert (record["_"], record["7"], record["('x', 1)"]) in [(2.0, 4.0, 5.0), (3.0, 4.0, 5.0)]
        assert record["é_"] == 6.0
        assert (record["huge"], record["whole"], record["true"]) == ("-inf", 2**24 + 1, 1.0)
        assert (record["one"], record["half"]) == (1.0, 0.5)
        assert record["media"] == {"text": {"text": "\ud800 \x1b"}}
    out = capsys.readouterr().out
    refused = ("none", "list", "complex", "sparse", "wrong", "no values", "of\nlines")
    for name in refused:
        assert out.count(f"WARNING {name!r} (") == 1, name
    assert out.count("is left out of the records") == len(refused)
    assert "\x1b" not in out
    assert "\x00" not in out


# -- several ranks ------------------------------------------------------------------------------


class Rank1Sink(Sink):
    """Says that it was opened."""

    def __post_init__(self) -> None:
        self.opened = False

    def open(self, runner: Any) -> None:
        self.opened = True

    def write(self, record: Record) -> None: ...


def speak_on_ranks(folder: Path) -> bool:
    rank = os.environ["RANK"]
    with (folder / f"out_{rank}").open("w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    data = TensorDataset(torch.randn(8, 4), torch.arange(8) % 3)
    sink = Rank1Sink()
    runner = Runner(
        nn.Linear(4, 3),
        folder / "work_dir",
        train_dataloader=DataLoader(data, batch_size=2),
        train_cfg=dict(max_epochs=1),
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.1)),
        loss=nn.functional.cross_entropy,
        plugins=["no:progress_bar", sink],
        device="cpu",
        name="run",
    )

    @runner.on("before_train")
    def speak(runner: Any) -> None:
        runner.logger.info(f"info of rank {rank}")
        runner.logger.warning(f"warning of rank {rank}")
        runner.logger.error(f"error of rank {rank}")
        warnings.warn(f"Python of rank {rank}", stacklevel=1)
        standard.getLogger("torch.something").warning(f"torch of rank {rank}")
        standard.getLogger("torch.something").error(f"torch fails on rank {rank}")

    runner.train()
    runner.close()
    sys.stdout.flush()
    return sink.opened


def test_of_several_ranks_the_first_speaks_and_the_others_tell_errors(tmp_path: Path) -> None:
    assert on_ranks(2, speak_on_ranks, tmp_path) == [True, False]
    first, second = ((tmp_path / f"out_{rank}").read_text() for rank in range(2))
    assert "error of rank 1" in second
    for quiet in ("info of", "warning of", "Python of", "torch of", "iter 2/2"):
        assert quiet not in second, quiet
        assert quiet in first or quiet == "torch of"
    log = (tmp_path / "work_dir" / "run" / "run.log").read_text()
    for text in ("info of", "warning of", "error of", "Python of", "torch of", "torch fails on"):
        assert log.count(f"{text} rank 0") == 1, text
        assert "rank 1" not in log
    assert log.count("iter 2/2") == 1


def test_who_wraps_what_shows_warnings_meanwhile_is_called_once(
    make: Any, monkeypatch: Any, capsys: Any
) -> None:
    import warnings

    first = logging(make)
    monkeypatch.setattr(warnings, "_showwarnmsg_impl", lambda message: None)
    inner = warnings.showwarning
    seen = []

    def wrapper(*arguments: Any, **options: Any) -> None:
        seen.append(str(arguments[0]))
        inner(*arguments, **options)

    monkeypatch.setattr(warnings, "showwarning", wrapper)
    first.close()
    second = logging(make)
    warnings.showwarning(UserWarning("hello"), UserWarning, "a.py", 1, sys.stderr)
    second.close()
    assert seen == ["hello"]


def test_what_is_logged_after_a_validation_is_part_of_its_record(make: Any) -> None:
    runner = logging(make, validate=True)
    runner.on("after_val")(lambda runner: runner.log({"wrong": runner.progress.iter}, phase="val"))
    runner.train()
    assert [(r["iter"], r["wrong"]) for r in lines(runner, "val")] == [(5, 5.0), (10, 10.0)]


def test_what_joins_no_record_is_named_at_the_end(make: Any, capsys: Any) -> None:
    runner = logging(make, validate=True)
    runner.on("after_val")(lambda runner: runner.log({"late": 1.0, "note": "x"}))
    runner.train()
    runner.close()
    out = capsys.readouterr().out
    assert "logged after the last train record, and so not recorded: late, note" in out


def test_the_traceback_is_in_the_runs_log(make: Any, capsys: Any) -> None:
    runner = logging(make)

    @runner.on("after_train_iter")
    def fail(runner: Any) -> None:
        if runner.progress.iter == 4:
            raise ZeroDivisionError("boom")

    with pytest.raises(ZeroDivisionError):
        runner.train()
    log = (runner.run_dir / "run.log").read_text()
    assert log.index("iter 4/10") < log.index("ERROR run ends with ZeroDivisionError: boom")
    assert 'raise ZeroDivisionError("boom")' in log
    assert "Traceback" not in capsys.readouterr().out

"""W&B's real client writes, offline and to a server on loopback; what it wrote is read back."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import select
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hookengine import Image, Runner, Sink, Table
from tests import forks
from tests.fixtures import MakeRunner
from tests.hookengine import leaks
from tests.plugins.hookengine_wandb import wandb_file
from tests.plugins.hookengine_wandb.server import Server

pytestmark = pytest.mark.process

ROOT = Path(__file__).parents[3]
DEFAULTS = ("seed", "logging", "checkpoint")


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))  # no .netrc
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")


def offline(**options: Any) -> dict[str, Any]:
    return dict(type="wandb", mode="offline", **options)


def files(run_dir: Path) -> list[Path]:
    """The files of W&B, one for each time that the run was started."""
    return sorted(run_dir.glob("wandb/*run-*/run-*.wandb"), key=lambda file: file.stat().st_mtime)


def one_file(run_dir: Path) -> Path:
    (file,) = files(run_dir)
    return file


def local(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def where(records: list[dict[str, Any]]) -> list[tuple[str, int]]:
    return [(record["phase"], record["iter"]) for record in records]


def rows_where(rows: list[dict[str, Any]]) -> list[tuple[str, int]]:
    """The phase and the iteration of each row."""
    phases = [next(p for p in ("train", "val", "test") if f"{p}/iter" in row) for row in rows]
    return [(phase, row["iter"]) for phase, row in zip(phases, rows, strict=True)]


def test_each_record_is_a_row_with_the_same_values(make: MakeRunner) -> None:
    runner = make(
        defaults=DEFAULTS,
        validate=True,
        plugins=[dict(type="logging", interval=2), dict(type="clip", max_norm=1.0), offline()],
    )
    runner.train()
    runner.close()
    rows = wandb_file.history(one_file(runner.run_dir))
    records = local(runner.run_dir)
    assert rows_where(rows) == where(records)
    assert [row["_step"] for row in rows] == list(range(len(rows)))
    for row, record in zip(rows, records, strict=True):
        phase = record.pop("phase")
        assert row["_timestamp"] == record.pop("timestamp")
        counters = {name: record.pop(name) for name in ("epoch", "iter", "step")}
        assert counters.items() <= row.items()
        assert {f"{phase}/{name}": value for name, value in record.items()}.items() <= row.items()
    assert {"train/loss", "train/lr", "train/grad_norm"} <= rows[0].keys()


def test_a_run_is_described_and_its_axes_are_told(make: MakeRunner) -> None:
    runner = make(
        defaults=DEFAULTS,
        validate=True,
        name="digits",
        plugins=[
            offline(
                project="p",
                entity="e",
                group="g",
                job_type="j",
                tags=["a", "b"],
                notes="n",
                config=dict(mine=3),
            )
        ],
    )
    runner.train()
    runner.close()
    records = [*wandb_file.read(one_file(runner.run_dir))]
    (run,) = (record.run for record in records if record.HasField("run"))
    assert (run.project, run.entity, run.display_name, run.run_group) == ("p", "e", "digits", "g")
    assert (run.job_type, [*run.tags], run.notes) == ("j", ["a", "b"], "n")
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["mine"] == 3
    assert config["optimizers"]["optimizer"]["lr"] == 0.1
    assert config["train_cfg"]["max_epochs"] == 2
    assert "torch" in config["environment"]["packages"]
    assert "wandb" in [plugin["name"] for plugin in config["plugins"]]
    metrics = [record.metric for record in records if record.HasField("metric")]
    axes = {metric.glob_name: metric.step_metric for metric in metrics if metric.glob_name}
    assert axes == {"train/*": "iter", "val/*": "epoch", "test/*": "epoch"}


def test_the_evaluations_of_a_run_by_iterations_are_drawn_over_iterations(make: MakeRunner) -> None:
    runner = make(
        defaults=DEFAULTS, train_cfg=dict(max_iters=3), validate=True, plugins=[offline()]
    )
    runner.train()
    runner.close()
    records = wandb_file.read(one_file(runner.run_dir))
    axes = {r.metric.glob_name: r.metric.step_metric for r in records if r.HasField("metric")}
    assert axes["val/*"] == "iter"


class Hand:
    """Hands one thing of each kind over."""

    def after_val(self, runner: Any) -> None:
        runner.log(
            {
                "image": torch.linspace(0, 1, 12).reshape(3, 4),
                "captioned": Image(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), caption="black"),
                "values": torch.tensor([0.0, 1.0, 1.0]),
                "table": Table(["name", "score"], [["cat", 0.5], ["dog", None]]),
                "text": "hello",
                "nan": math.nan,
                "inf": -math.inf,
                "huge": 10**400,
                "a\nb@1 é/x": 1.0,
                "wrong": torch.zeros(2, 7, 3, 3),
            }
        )


def test_what_hooks_hand_over_arrives(make: MakeRunner, capsys: pytest.CaptureFixture[str]) -> None:
    runner = make(defaults=DEFAULTS, validate=True, plugins=[Hand(), offline()])
    runner.train()
    runner.close()
    file = one_file(runner.run_dir)
    row = next(row for row in wandb_file.history(file) if "train/text" in row)
    assert row["train/text"] == "hello"
    assert (row["train/nan"] != row["train/nan"], row["train/inf"]) == (True, -math.inf)
    assert row["train/huge"] == math.inf
    assert row["train/a_b@1 é/x"] == 1.0
    assert sum(row["train/values/values"]) == 3
    assert len(row["train/values/bins"]) == 65
    assert row["train/captioned/caption"] == "black"
    assert (row["train/captioned/width"], row["train/captioned/height"]) == (10, 4)
    image = file.parent / "files" / row["train/image/path"]
    assert image.read_bytes().startswith(b"\x89PNG")
    table = file.parent / "files" / row["train/table/path"]
    assert json.loads(table.read_text())["data"] == [["cat", 0.5], ["dog", None]]
    assert not any("wrong" in name for name in row)
    out = capsys.readouterr().out
    assert out.count("'wrong' (Tensor of shape [2, 7, 3, 3]) is left out of the records") == 1
    assert "sink 'wandb'" not in out


def test_histograms_of_gradients_and_parameters(make: MakeRunner) -> None:
    watch = dict(type="watch", what="all", every=5, bins=8)
    runner = make(defaults=DEFAULTS, plugins=[watch, offline()])
    runner.train()
    runner.close()
    rows = wandb_file.history(one_file(runner.run_dir))
    for name in ("gradients", "parameters"):
        assert [sum(row[f"train/{name}/net.weight/values"]) for row in rows] == [12, 12]


def test_the_summary_tells_the_best_and_how_it_ended(make: MakeRunner) -> None:
    runner = make(defaults=DEFAULTS, validate=True, plugins=[offline()])
    runner.train()
    runner.close()
    file = one_file(runner.run_dir)
    accuracies = [(r["accuracy"], r["epoch"]) for r in local(runner.run_dir) if "accuracy" in r]
    best, epoch = max(accuracies, key=lambda pair: pair[0])
    summary = wandb_file.summary(file)
    assert summary["best/val/accuracy"] == best
    assert summary["best/val/accuracy/epoch"] == epoch
    (exit_,) = (r.exit for r in wandb_file.read(file) if r.HasField("exit"))
    assert exit_.exit_code == 0
    kept = file.parent / "files"
    assert json.loads((kept / "run.json").read_text())["name"] == runner.name
    assert (kept / "run.log").exists()


@pytest.mark.parametrize(
    ("error", "code"), [(ValueError("no"), 1), (KeyboardInterrupt(), 130), (SystemExit(75), 75)]
)
def test_an_error_is_recorded(make: MakeRunner, error: BaseException, code: int) -> None:
    runner = make(defaults=DEFAULTS, plugins=[offline()])

    @runner.on("after_train_iter")
    def fail(runner: Any) -> None:
        if runner.progress.iter == 7:
            raise error

    with pytest.raises(type(error)):
        runner.train()
    runner.close()
    file = one_file(runner.run_dir)
    assert wandb_file.summary(file)["exception"] == f"{type(error).__name__}: {error}"
    (exit_,) = (r.exit for r in wandb_file.read(file) if r.HasField("exit"))
    assert exit_.exit_code == code


@pytest.mark.parametrize(("which", "number"), [("all", 4), ("best", 2), (None, 0)])
def test_checkpoints_become_artifacts_on_request(make: MakeRunner, which: Any, number: int) -> None:
    runner = make(
        defaults=DEFAULTS,
        validate=True,
        plugins=[dict(type="checkpoint", keep_best="accuracy"), offline(checkpoints=which)],
    )
    runner.train()
    runner.close()
    records = wandb_file.read(one_file(runner.run_dir))
    artifacts = [record.artifact for record in records if record.HasField("artifact")]
    assert len(artifacts) == number
    assert not [*(runner.run_dir / "wandb").glob("upload-*")]
    for artifact in artifacts:
        assert artifact.type == "model"
        names = {entry.path for entry in artifact.manifest.contents}
        assert names == {"state.pth", "manifest.json"}
        assert "latest" in artifact.aliases
    best = [artifact for artifact in artifacts if "best" in artifact.aliases]
    assert len(best) == (2 if which else 0)


def test_without_a_key_the_run_is_offline_and_the_log_says_how_to_upload(
    make: MakeRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    runner = make(defaults=DEFAULTS, plugins=["wandb"])
    runner.train()
    runner.close()
    out = capsys.readouterr().out
    assert "wandb: the run is offline, since there is no API key" in out
    folder = one_file(runner.run_dir).parent
    assert f"wandb: to upload the run: wandb sync {folder}" in out
    assert rows_where(wandb_file.history(one_file(runner.run_dir))) == where(local(runner.run_dir))


def test_disabled_leaves_nothing(make: MakeRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    runner = make(defaults=DEFAULTS, plugins=["wandb"])
    runner.train()
    runner.close()
    assert files(runner.run_dir) == []


def test_weights_are_the_same_with_and_without(make: MakeRunner) -> None:
    plain = make(defaults=DEFAULTS, validate=True)
    plain.train()
    logged = make(
        defaults=DEFAULTS,
        validate=True,
        plugins=[offline(), dict(type="watch", what="all", every=1), Hand()],
    )
    logged.train()
    assert torch.equal(plain.bare_model.net.weight, logged.bare_model.net.weight)


def test_a_run_that_the_script_has_begun_is_used_and_left_open(
    make: MakeRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = """
import wandb, sys
from tests.conftest import *
run = wandb.init(project="p", mode="offline", dir=sys.argv[1])
torch.manual_seed(0)
runner = Runner(Toy(), work_dir=sys.argv[1], train_dataloader=DataLoader(toy_data(), batch_size=4),
    train_cfg=dict(max_epochs=2), optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.1)),
    plugins=["wandb"])
runner.train()
runner.close()
assert wandb.run is run
run.log({"mine": 1})
run.finish()
"""
    done = forks.run(program, str(tmp_path))
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    rows = wandb_file.history(file)
    assert [row.get("train/iter") for row in rows] == [5, 10, None]
    assert rows[-1]["mine"] == 1


# -- killed and resumed -------------------------------------------------------------------------

PROGRAM = """
import os, sys
from tests.conftest import *

kill = int(sys.argv[2])
options = dict(mode=sys.argv[3]) if sys.argv[3] else {}
torch.set_num_threads(1)
runner = Runner(
    Toy, work_dir=sys.argv[1], name="run", resume="auto",
    train_dataloader=DataLoader(toy_data(), batch_size=4, shuffle=True),
    train_cfg=dict(max_epochs=8), optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.1)),
    val_dataloader=DataLoader(toy_data(10, seed=1), batch_size=4), val_evaluator=ToyAccuracy(),
    plugins=[
        dict(type="seed", seed=0), dict(type="logging", interval=2),
        dict(type="checkpoint", every="7 iterations"), dict(type="wandb", **options),
        "tensorboard",
    ],
)

@runner.on("after_train_iter")
def die(runner):
    wandb = runner.plugins["wandb"]
    if sys.argv[4] and wandb._session is None:
        wandb.after_run(runner)  # W&B's run has begun, once there is a record
    if runner.progress.iter == kill:
        if sys.argv[4] == "written":  # all that there is so far is in the sinks
            for name in ("wandb", "tensorboard"):
                runner.plugins[name].after_run(runner)
        if sys.argv[4]:
            print(wandb._session._process.pid, flush=True)
        os.kill(os.getpid(), 9)

runner.train()
runner.close()
"""


def run(folder: Path, kill: int = 0, mode: str = "offline", state: str = "") -> str:
    """Train in a process of its own, which is killed after that iteration."""
    done = forks.run(PROGRAM, str(folder), str(kill), mode, state)
    assert done.returncode == (-signal.SIGKILL if kill else 0), done.stderr
    return done.stdout


def run_and_kill(folder: Path, kill: int, state: str) -> None:
    """Train, kill, and wait for the process that speaks with W&B: it ends the run by itself."""
    process = int(run(folder, kill=kill, state=state).splitlines()[-1])
    with contextlib.suppress(ProcessLookupError):  # it has ended already
        descriptor = os.pidfd_open(process)
        select.select([descriptor], [], [])
        os.close(descriptor)
    for file in folder.glob("run/wandb/*run-*/run-*.wandb"):
        log = (folder / "run" / "wandb" / "process.log").read_text()
        assert any(record.HasField("exit") for record in wandb_file.read(file)), log


def values(rows: list[dict[str, Any]]) -> list[Any]:
    """What training and evaluations gave, without times."""
    names = ("iter", "epoch", "step", "train/loss", "train/lr", "val/accuracy")
    return [[row.get(name) for name in names] for row in rows]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was left alone."""
    folder = tmp_path_factory.mktemp("straight")
    run(folder)
    return folder / "run"


@pytest.fixture(scope="module")
def killed_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work_dir of a run that was killed when all that there was so far was in the sinks."""
    folder: Path = tmp_path_factory.mktemp("killed")
    run_and_kill(folder, 17, "written")
    return folder


@pytest.fixture
def killed(killed_once: Path, tmp_path: Path) -> Path:
    """A copy of it, to go on in."""
    return shutil.copytree(killed_once, tmp_path / "work_dir", symlinks=True)


@pytest.mark.parametrize("state", ["written", "waiting"])
def test_a_run_that_was_killed_twice_has_one_history_without_gap_or_repetition(
    tmp_path: Path, straight: Path, state: str
) -> None:
    run_and_kill(tmp_path, 17, state)
    run_and_kill(tmp_path, 29, state)
    out = run(tmp_path)
    segments = files(tmp_path / "run")
    assert len({file.name for file in segments}) == 1  # one run of W&B
    rows = [row for file in segments for row in wandb_file.history(file)]
    assert [row["_step"] for row in rows] == list(range(len(rows)))
    assert rows_where(rows) == where(local(tmp_path / "run"))
    assert values(rows) == values(wandb_file.history(one_file(straight)))
    assert f"wandb sync {shlex.join(str(file.parent) for file in segments)}" in out


def test_what_the_file_had_lost_is_written_again(killed: Path, straight: Path) -> None:
    file = one_file(killed / "run")
    whole = wandb_file.history(file)
    file.write_bytes(file.read_bytes()[: len(file.read_bytes()) // 2])  # the machine went down
    kept = wandb_file.history(file) if file.stat().st_size else []
    assert len(kept) < len(whole)
    run(killed)
    rows = [row for each in files(killed / "run") for row in wandb_file.history(each)]
    assert [row["_step"] for row in rows] == list(range(len(rows)))
    assert values(rows) == values(wandb_file.history(one_file(straight)))


def test_a_file_that_was_never_begun_does_not_stand_in_the_way(killed: Path) -> None:
    file = one_file(killed / "run")
    file.write_bytes(b"")
    out = run(killed)
    assert str(file.parent) not in out.partition("wandb sync")[2]  # which would stop at it
    (whole,) = files(killed / "run")
    assert rows_where(wandb_file.history(whole)) == where(local(killed / "run"))


def test_a_run_that_begins_anew_in_the_folder_is_another_one(tmp_path: Path) -> None:
    run(tmp_path, kill=3)  # before its first checkpoint
    run(tmp_path)
    names = {file.name for file in files(tmp_path / "run")}
    last = files(tmp_path / "run")[-1]
    assert rows_where(wandb_file.history(last)) == where(local(tmp_path / "run"))
    assert len(names) == len(files(tmp_path / "run"))


# -- a run that goes back -----------------------------------------------------------------------


def current(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of the W&B run that the folder names."""
    name = json.loads((run_dir / "wandb" / "run.json").read_text())["id"]
    segments = [file for file in files(run_dir) if file.name == f"run-{name}.wandb"]
    rows = [row for file in segments for row in wandb_file.history(file)]
    assert [row["_step"] for row in rows] == list(range(len(rows)))
    return rows


def holds_the_history(run_dir: Path) -> bool:
    """Whether the current W&B run has the records of ``metrics.jsonl``, and no others."""
    rows, records = current(run_dir), local(run_dir)
    assert rows_where(rows) == where(records)
    for row, record in zip(rows, records, strict=True):
        for name in ("loss", "lr", "accuracy"):
            assert row.get(f"{record['phase']}/{name}") == record.get(name)
    return True


def attempt(
    make: MakeRunner,
    state: Any = None,
    *,
    lr: float = 0.1,
    upto: int = 0,
    on: bool = True,
    interval: int = 1,
    mode: str = "offline",
    **limits: int,
) -> dict[int, Any]:
    """Train from a state, up to an iteration; return the state after each iteration."""
    wandb = [dict(type="wandb", mode=mode)] * on
    plugins = [dict(type="logging", interval=interval), *wandb]
    runner = make(name="run", plugins=plugins, validate=True)
    if state is not None:
        runner.load_state_dict(copy.deepcopy(state))
    runner.optim_wrapper.optimizer.param_groups[0]["lr"] = lr
    states: dict[int, Any] = {}

    @runner.on("safe_point")
    def keep(runner: Any) -> None:
        states.setdefault(runner.progress.iter, copy.deepcopy(runner.state_dict()))

    @runner.on("after_train_iter")
    def stop(runner: Any) -> None:
        if runner.progress.iter == upto:
            runner.stop()

    runner.train(**limits)
    runner.close()
    return states


def test_a_run_that_goes_back_continues_as_another_one_that_has_everything(
    make: MakeRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    first = attempt(make)
    folder = make(name="run").run_dir
    before = one_file(folder)
    content = before.read_bytes()
    attempt(make, first[3], lr=0.4)
    assert holds_the_history(folder)
    assert before.read_bytes() == content
    old, new = (json.loads(line) for line in _ids(folder, before))
    assert f"wandb: the W&B run {old} holds records after iteration 3" in capsys.readouterr().out
    last = files(folder)[-1]
    (described,) = (record.run for record in wandb_file.read(last) if record.HasField("run"))
    assert described.run_id == new
    assert f"Continues the W&B run {old} from iteration 3" in described.notes
    assert wandb_file.summary(last)["best/val/accuracy"] == max(
        record["accuracy"] for record in local(folder) if "accuracy" in record
    )
    attempt(make, first[5], lr=0.3, interval=2)  # and again, from a point before that
    assert holds_the_history(folder)


def _ids(run_dir: Path, old: Path) -> list[str]:
    now = json.loads((run_dir / "wandb" / "run.json").read_text())["id"]
    return [json.dumps(name) for name in (old.stem.removeprefix("run-"), now)]


def test_a_run_that_stops_within_an_interval_continues_as_the_same_one(make: MakeRunner) -> None:
    states = attempt(make, interval=4, upto=2)
    attempt(make, states[2], interval=4, upto=7)
    folder = make(name="run").run_dir
    assert len({file.name for file in files(folder)}) == 1
    assert [iteration for _, iteration in rows_where(current(folder))] == [2, 4, 5, 5, 7]


def test_a_run_that_goes_back_and_ends_earlier_is_shorter(make: MakeRunner) -> None:
    attempt(make, attempt(make)[3], max_epochs=1)
    assert holds_the_history(make(name="run").run_dir)


def test_what_happened_without_the_plugin_is_in_the_run(make: MakeRunner) -> None:
    first = attempt(make, upto=8)
    without = attempt(make, first[3], lr=0.4, on=False, upto=8)
    attempt(make, without[7], lr=0.4)
    assert holds_the_history(make(name="run").run_dir)


def test_one_runner_may_go_back(make: MakeRunner) -> None:
    runner = make(plugins=[dict(type="logging", interval=1), offline()], validate=True)
    states: dict[int, Any] = {}

    @runner.on("safe_point")
    def keep(runner: Any) -> None:
        states.setdefault(runner.progress.iter, copy.deepcopy(runner.state_dict()))

    runner.train()
    runner.load_state_dict(states[6])
    runner.train()  # repeats it
    assert len({file.name for file in files(runner.run_dir)}) == 1
    runner.load_state_dict(states[3])
    runner.optim_wrapper.optimizer.param_groups[0]["lr"] = 0.4
    runner.train()
    runner.close()
    assert holds_the_history(runner.run_dir)


def test_a_run_that_goes_back_is_replayed(make: MakeRunner) -> None:
    from hookengine_logging.replay import replay
    from hookengine_wandb import Wandb

    attempt(make, attempt(make)[3], lr=0.4, on=False)
    folder = make(name="run").run_dir
    assert replay(folder, Wandb(mode="offline")) == 0
    assert holds_the_history(folder)
    assert replay(folder, Wandb(mode="offline")) == 0  # there is nothing to add
    assert holds_the_history(folder)


# -- with a server ------------------------------------------------------------------------------


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with Server() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
        yield server


def test_online_a_killed_run_goes_on_without_gap_or_repetition(
    tmp_path: Path, server: Server, straight: Path
) -> None:
    run(tmp_path, kill=17, mode="", state="written")
    run(tmp_path, mode="")
    (there,) = server.runs.values()
    assert rows_where(there.history) == where(local(tmp_path / "run"))
    assert values(there.history) == values(wandb_file.history(one_file(straight)))
    assert [row["_step"] for row in there.history] == list(range(len(there.history)))
    assert there.exit_code == 0
    assert there.name == "run"
    assert {"run.json", "run.log"} <= there.files.keys()


def test_online_a_run_that_goes_back_continues_as_another_one(
    make: MakeRunner, server: Server
) -> None:
    attempt(make, attempt(make, mode="online")[3], lr=0.4, mode="online")
    folder = make(name="run").run_dir
    old, new = server.runs.values()
    records = local(folder)
    assert rows_where(new.history) == where(records)
    rows = zip(new.history, records, strict=True)
    assert all(row.get("train/loss") == record.get("loss") for row, record in rows)
    assert len(old.history) == 12
    assert new.config["continues"]["value"] == {"run": old.id, "iter": 3}


def test_wandb_sync_of_the_segments_gives_one_history(
    killed: Path, server: Server, straight: Path
) -> None:
    out = run(killed)
    command = shlex.split(next(line for line in out.splitlines() if "wandb sync" in line))
    folders = command[command.index("sync") + 1 :]
    assert len(folders) == 2
    wandb = Path(sys.executable).with_name("wandb")
    subprocess.run([wandb, "sync", *folders], check=True, capture_output=True, cwd=killed)
    (there,) = server.runs.values()
    assert [row["_step"] for row in there.history] == list(range(len(there.history)))
    assert values(there.history) == values(wandb_file.history(one_file(straight)))


def test_a_run_that_was_offline_at_first_is_whole_when_it_goes_on_online(
    killed: Path, server: Server, straight: Path
) -> None:
    run(killed, mode="online")
    (there,) = server.runs.values()
    assert values(there.history) == values(wandb_file.history(one_file(straight)))


def test_a_server_that_cannot_be_reached_costs_nothing(
    tmp_path: Path, make: MakeRunner, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    server.broken.set()
    runner = make(defaults=DEFAULTS, plugins=[dict(type="wandb", init_timeout=1)])
    runner.train()
    runner.close()
    out = capsys.readouterr().out
    assert "wandb: the run is offline, since starting it online failed: " in out
    assert "wandb: to upload the run: wandb sync" in out
    assert rows_where(wandb_file.history(one_file(runner.run_dir))) == where(local(runner.run_dir))


def test_a_server_that_breaks_in_the_middle_ends_with_the_run(
    make: MakeRunner, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    runner = make(defaults=DEFAULTS, plugins=[dict(type="wandb", finish_timeout=1)])

    @runner.on("after_train_iter")
    def break_(runner: Any) -> None:
        if runner.progress.iter == 7:
            Sink.after_run(runner.plugins["wandb"], runner)  # the run there has begun
            server.broken.set()

    runner.train()
    runner.close()
    assert runner.progress.iter == 10
    out = capsys.readouterr().out
    assert "wandb: not everything was uploaded within 1 s" in out
    command = next(line for line in out.splitlines() if "hookengine_logging.replay" in line)
    server.broken.clear()
    arguments = shlex.split(command.partition("python ")[2])
    subprocess.run([sys.executable, *arguments], check=True, cwd=ROOT)
    (there,) = server.runs.values()
    assert rows_where(there.history) == where(local(runner.run_dir))


def test_the_process_that_speaks_with_wandb_may_die(
    make: MakeRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    runner = make(defaults=DEFAULTS, plugins=[dict(type="logging", interval=1), offline()])

    @runner.on("after_train_iter")
    def murder(runner: Any) -> None:
        if runner.progress.iter == 5:
            sink = runner.plugins["wandb"]
            Sink.after_run(sink, runner)  # what came before is written
            sink._session._process.kill()
            sink._session._process.wait()

    runner.train()
    runner.close()
    out = capsys.readouterr().out
    assert out.count("sink 'wandb' failed in write; training continues") == 1
    assert "sink 'wandb' lost records" in out
    assert len(local(runner.run_dir)) == 10


def test_a_sweep_leaves_no_process_behind(tmp_path: Path) -> None:
    """Runners as a script in a loop uses them, which nothing closes."""

    def train_and_test(runner: Runner) -> None:
        runner.train()
        runner.test()  # right after: still the same process

    def sweep(name: str) -> None:
        options: dict[str, Any] = dict(defaults=(*DEFAULTS, "preprocess"), name=name)
        plugins = [offline(), "tensorboard", "report"]
        assert leaks.abandon(tmp_path, train_and_test, plugins=plugins, **options)

    leaks.collect()
    sweep("first")
    leaks.collect()
    before = leaks.held()
    sweep("second")
    sweep("third")
    leaks.collect()
    assert leaks.held() == before
    assert "wandb answers" not in before["threads"]
    for name in ("first", "second", "third"):
        file = one_file(tmp_path / name)
        assert rows_where(wandb_file.history(file)) == where(local(tmp_path / name))
        (end,) = (r.exit for r in wandb_file.read(file) if r.HasField("exit"))
        assert end.exit_code == 0


def test_an_idle_runner_has_no_process_and_continues_the_same_run(make: MakeRunner) -> None:
    before = leaks.held()
    runner = make(
        defaults=DEFAULTS, validate=True, test=True, plugins=[offline(idle_timeout=0)], name="run"
    )
    runner.train()
    for thread in threading.enumerate():
        if thread.name == "wandb answers":
            thread.join()  # it ends with the process
    assert leaks.held()["processes"] == before["processes"]
    assert leaks.held()["threads"] == before["threads"]
    runner.test()
    runner.close()
    first, second = files(runner.run_dir)
    assert first.name == second.name  # of the same W&B run, which `wandb sync` joins
    written = [*wandb_file.history(first), *wandb_file.history(second)]
    assert rows_where(written) == where(local(runner.run_dir))
    assert [row["_step"] for row in written] == [*range(len(written))]
    ends = [r.exit.exit_code for file in (first, second) for r in wandb_file.read(file)
            if r.HasField("exit")]  # fmt: skip
    assert ends == [0, 0]


def test_a_process_that_dies_while_it_is_idle_leaves_no_pipe(
    make: MakeRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    before = leaks.held()
    runner = make(defaults=DEFAULTS, test=True, plugins=[offline()])
    runner.train()
    process = runner.plugins["wandb"]._session._process
    process.kill()
    process.wait()
    runner.test()
    runner.close()
    assert "sink 'wandb' failed in write; training continues" in capsys.readouterr().out
    assert leaks.held()["files"] == before["files"]
    assert leaks.held()["threads"] == before["threads"]

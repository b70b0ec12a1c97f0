"""Plugins as outsiders write them after reading the README and docs/: short, and right."""

from __future__ import annotations

import csv
import inspect
from fnmatch import fnmatch
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, get_total_norm
from torch.utils.data import DataLoader

from hookengine import (
    BaseModel,
    OptimWrapper,
    Plugin,
    Record,
    Runner,
    Sink,
    Table,
    dist,
    hookimpl,
    read_records,
)
from tests.fixtures import ToyAccuracy, toy_data
from tests.ranks import on_ranks

# -- the plugins ----------------------------------------------------------------------------------


class SAM(Plugin, name="sam"):
    """Step with the gradient at the worst weights nearby (arXiv:2010.01412).

    With ``adaptive``, "nearby" is relative to the size of each weight (arXiv:2102.11600).
    """

    before = ("clip",)  # which clips the gradient of the second pass

    rho: float = Field(default=0.05, gt=0, description="distance to the worst weights")
    adaptive: bool = Field(default=False, description="whether distance is relative")

    def before_train(self) -> None:
        """Forget the batches of a window that an error has left open."""
        self._window: list[Any] = []

    @hookimpl(trylast=True)  # the batch as train_step gets it, after mixup
    def before_train_iter(self, data_batch: Any) -> None:
        """Keep the micro-batches of the next step."""
        self._window.append(data_batch)

    @torch.no_grad()
    def before_optim_step(self, runner: Runner, optim_wrapper: OptimWrapper) -> None:
        """Compute the gradients again, at the worst weights nearby."""
        window, self._window = self._window, []
        ascent = {p: p.grad for p in optim_wrapper.parameters() if p.grad is not None}
        weights = {p: p.clone() for p in ascent}
        if self.adaptive:
            ascent = {p: gradient * p.abs() for p, gradient in ascent.items()}
        scale = self.rho / (get_total_norm(ascent.values()) + 1e-12)
        for p, direction in ascent.items():
            p.add_(direction * p.abs() * scale if self.adaptive else direction * scale)
        try:
            runner.repeat(*window)
        finally:
            for p, weight in weights.items():
                p.copy_(weight)


class Freeze(Plugin, name="freeze"):
    """Freeze the parameters whose names match ``patterns`` until epoch ``until`` begins."""

    after = ("init",)  # which initializes the parameters first

    patterns: tuple[str, ...] = Field(description="shell patterns, such as 'backbone.*'")
    until: int = Field(gt=0, description="epochs for which they stay frozen")

    def initialize_model(self, model: nn.Module) -> None:
        """Find the names of the parameters that are trained at all."""
        self._names: set[str] = set()
        for pattern in self.patterns:
            found = [n for n, p in model.named_parameters() if fnmatch(n, pattern)]
            if not found:
                raise ValueError(f"freeze: no parameter matches {pattern!r}")
            self._names.update(n for n in found if model.get_parameter(n).requires_grad)

    def before_train_epoch(self, runner: Runner) -> None:
        """Freeze or thaw the parameters; a resumed run begins its epoch here, too."""
        for name, parameter in runner.bare_model.named_parameters():
            if name in self._names:
                parameter.requires_grad_(runner.progress.epoch >= self.until)


class ConfusionMatrix(Plugin, name="confusion_matrix"):
    """Log, for each evaluated model, how often each class was taken for each other one."""

    before = ("logging",)  # which writes the record of the validation

    classes: tuple[str, ...] = Field(description="the names of the classes, in order")

    def before_val_epoch(self) -> None:
        """Start to count."""
        self._counts: dict[str, Tensor] = {}

    def after_val_iter(self, outputs: Any, prefix: str) -> None:
        """Count the pairs of label and prediction in a batch."""
        scores, labels = outputs
        size = len(self.classes)
        pairs = torch.bincount(labels * size + scores.argmax(1), minlength=size**2)
        self._counts[prefix] = self._counts.get(prefix, 0) + pairs.view(size, size)

    def after_val_epoch(self, runner: Runner) -> None:
        """Log one table per evaluated model."""
        for prefix, counts in self._counts.items():
            counts = dist.sum_over_ranks(counts)
            columns = ["label", *self.classes]
            rows = [[c, *row] for c, row in zip(self.classes, counts.tolist(), strict=True)]
            name = f"{prefix}/confusion" if prefix else "confusion"
            runner.log({name: Table(columns, rows)}, phase="val")


class CSV(Sink, name="csv"):
    """Write chosen values to ``metrics.csv`` in the run's folder, one row per record."""

    after = ("logging",)

    columns: tuple[str, ...] = Field(default=("loss",), description="names of the values")

    def open(self, runner: Runner) -> None:
        """Find what the file holds; drop a row that a kill has cut off."""
        path = runner.run_dir / "metrics.csv"
        header = ["phase", "epoch", "iter", "step", *self.columns]
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        whole = [line for line in lines if line.endswith("\n")] if self.continues else []
        for row in csv.DictReader(whole):
            self.held[row["phase"]] = int(row["iter"])
        path.write_text("".join(whole))
        self._file = path.open("a", newline="")
        self._writer = csv.writer(self._file, lineterminator="\n")
        if not whole:
            self._writer.writerow(header)

    def write(self, record: Record) -> None:
        """Write one row, to the disk."""
        values = [record.scalars.get(name, "") for name in self.columns]
        self._writer.writerow([record.phase, record.epoch, record.iter, record.step, *values])
        self._file.flush()

    def close(self, runner: Runner) -> None:
        """Close the file."""
        self._file.close()


@pytest.mark.parametrize("plugin", [SAM, Freeze, ConfusionMatrix, CSV])
def test_each_fits_on_a_page_and_is_placed_by_one_declaration(plugin: type[Plugin]) -> None:
    source = inspect.getsource(plugin)
    assert len(source.splitlines()) <= 70
    assert source.count("\n    after = ") + source.count("\n    before = ") == 1
    assert len([*plugin.after, *plugin.before]) == 1


# -- SAM ------------------------------------------------------------------------------------------


class Net(BaseModel):
    """A small classifier without anything random."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.dtype = dtype
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)

    def forward(self, inputs: Tensor, labels: Tensor, mode: str = "tensor") -> Any:
        scores = self.net(inputs.to(self.dtype))
        if mode == "loss":
            return {"loss": F.cross_entropy(scores, labels)}
        return (scores, labels) if mode == "predict" else scores


def train(folder: Path, plugins: list[Any], model: Any = None, **options: Any) -> Runner:
    """Train without any plugin but these; the Runner is closed."""
    options.setdefault("train_dataloader", DataLoader(toy_data(22), batch_size=4))
    options.setdefault("train_cfg", dict(max_epochs=3))
    options.setdefault("optim_wrapper", dict(optimizer=SGD))
    options.setdefault("defaults", ("preprocess",))
    with Runner(model or Net(), folder, plugins=plugins, device="cpu", **options) as runner:
        runner.train()
    return runner


SGD = dict(type="SGD", lr=0.2, momentum=0.9)


def sam_by_hand(
    batches: Any, rho: float = 0.5, adaptive: bool = False, norm: float = 0.0, **options: Any
) -> Net:
    """SAM in plain torch: ``e = rho T^2 g / |T g|``, where T is 1 or, if adaptive, ``|w|``."""
    dtype = options.pop("dtype", torch.float64)
    model = Net(dtype)
    parameters = [*model.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.2, momentum=0.9)
    for inputs, labels in batches:

        def gradients(inputs: Any = inputs, labels: Any = labels) -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.float32):
                loss = model(inputs, labels, mode="loss")["loss"]
            loss.backward()

        gradients()
        with torch.no_grad():
            before = [p.clone() for p in parameters]
            sizes = [p.abs() if adaptive else torch.ones_like(p) for p in parameters]
            grads = [p.grad for p in parameters if p.grad is not None]
            scaled = [size * grad for size, grad in zip(sizes, grads, strict=True)]
            length = torch.stack([each.square().sum() for each in scaled]).sum().sqrt()
            for p, size, each in zip(parameters, sizes, scaled, strict=True):
                p.add_(rho / (length + 1e-12) * size * each)
        optimizer.zero_grad()
        gradients()
        with torch.no_grad():
            for p, value in zip(parameters, before, strict=True):
                p.copy_(value)
        if norm:
            clip_grad_norm_(parameters, norm)
        optimizer.step()
        optimizer.zero_grad()
    return model


def batches_of(sizes: int, epochs: int = 3, samples: int = 22) -> list[Any]:
    loader = DataLoader(toy_data(samples), batch_size=sizes)
    return [batch for _ in range(epochs) for batch in loader]


def assert_close(runner: Runner, expected: nn.Module, tolerance: float = 1e-12) -> None:
    actual: Any = runner.bare_model
    for mine, theirs in zip(actual.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("norm", [0.0, 0.1])
def test_sam_is_the_loop_by_hand(tmp_path: Path, adaptive: bool, norm: float) -> None:
    clip = [dict(type="clip", max_norm=norm)] if norm else []
    runner = train(tmp_path, [*clip, SAM(rho=0.5, adaptive=adaptive)])
    assert runner.progress.step == 18
    assert_close(runner, sam_by_hand(batches_of(4), adaptive=adaptive, norm=norm))
    plain = train(tmp_path, clip)
    with pytest.raises(AssertionError):
        assert_close(plain, sam_by_hand(batches_of(4), adaptive=adaptive, norm=norm), 1e-3)


def test_sam_with_accumulated_micro_batches_is_sam_with_the_big_batch(tmp_path: Path) -> None:
    """Of 22 samples in micro-batches of 4, the windows have 12 and 10; the last one is unequal."""
    runner = train(tmp_path, [dict(type="accumulate", steps=3), SAM(rho=0.5)])
    assert runner.progress.step == 6
    assert_close(runner, sam_by_hand(batches_of(12)))


def test_sam_in_bfloat16_is_the_loop_by_hand_under_autocast(tmp_path: Path) -> None:
    runner = train(tmp_path, ["amp", SAM(rho=0.5)], Net(torch.float32))
    assert_close(runner, sam_by_hand(batches_of(4), dtype=torch.float32), 1e-6)


def test_sam_in_float16_skips_steps_and_restores_the_weights(tmp_path: Path) -> None:
    amp = dict(type="amp", dtype="float16", init_scale=2.0**24, growth_interval=4)
    runner = train(tmp_path, [amp, SAM(rho=0.5), "logging"], Net(torch.float32))
    assert 0 < runner.progress.step < 18
    assert all(bool(p.isfinite().all()) for p in runner.model.parameters())


def train_on_a_rank(folder: Path, batch_size: int) -> dict[str, Any]:
    """SAM over accumulated micro-batches, the confusion matrices and the rows, with averages."""
    plugins = [
        dict(type="accumulate", steps=2),
        SAM(rho=0.5),
        dict(type="ema", evaluate="both"),
        ConfusionMatrix(classes=("cat", "dog", "owl")),
        CSV(columns=("accuracy",)),
    ]
    runner = train(
        folder,
        plugins,
        defaults=("distributed", "preprocess", "logging"),
        train_dataloader=DataLoader(toy_data(24), batch_size=batch_size),
        val_dataloader=DataLoader(toy_data(50, seed=1), batch_size=8),
        val_evaluator=ToyAccuracy(),
        name="run",
    )
    return {"weights": [p.detach() for p in runner.model.parameters()]}


@pytest.mark.ranks
def test_on_two_ranks_all_of_it_is_as_in_one_process(tmp_path: Path) -> None:
    one = train_on_a_rank(tmp_path / "one", 4)
    ranks = on_ranks(2, train_on_a_rank, tmp_path / "ranks", 2)
    for rank in ranks:
        for mine, theirs in zip(rank["weights"], one["weights"], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-13)
    files = [tmp_path / folder / "run" / "metrics.csv" for folder in ("ranks", "one")]
    rows, expected = (list(csv.DictReader(file.read_text().splitlines())) for file in files)
    assert rows == expected
    media = [[*read_records(file.parent)][-1].media for file in files]
    assert media[0].keys() == media[1].keys() == {"confusion", "ema/confusion"}
    for name, table in media[0].items():
        other = media[1][name]
        assert isinstance(table, Table)
        assert isinstance(other, Table)
        assert table.rows == other.rows


# -- Freeze ---------------------------------------------------------------------------------------


def test_frozen_parameters_stay_and_are_trained_afterwards(tmp_path: Path) -> None:
    weights: list[Any] = []
    freeze = Freeze(patterns=("net.0.*",), until=2)
    options: dict[str, Any] = dict(
        optim_wrapper=dict(optimizer=dict(SGD, weight_decay=0.1)), train_cfg=dict(max_epochs=4)
    )
    train(tmp_path, [freeze, Notes(weights), dict(type="clip", max_norm=0.5)], **options)
    moved = [not torch.equal(a, b) for (a, _), (b, _) in pairwise(weights)]
    others = [not torch.equal(a, b) for (_, a), (_, b) in pairwise(weights)]
    assert moved == [False, True, True]
    assert others == [True, True, True]
    (initial, *_) = Net().parameters()
    assert torch.equal(weights[0][0], initial)
    with pytest.raises(ValueError, match=r"no parameter matches 'nte\.\*'"):
        train(tmp_path, [Freeze(patterns=("nte.*",), until=1)])


class Notes(Plugin, name="notes"):
    """Keeps the weights of both layers after each epoch."""

    def __init__(self, weights: list[Any]) -> None:
        self.weights = weights

    def after_train_epoch(self, runner: Any) -> None:
        net = runner.bare_model.net
        self.weights.append((net[0].weight.clone(), net[2].weight.clone()))


class Begins(Plugin, name="begins"):
    """Notes the iteration at which a run resumes."""

    def __init__(self, iterations: list[int]) -> None:
        self.iterations = iterations

    def before_train(self, runner: Any) -> None:
        self.iterations.append(runner.progress.iter)


@pytest.mark.parametrize("killed_at", [4, 6, 9, 12, 15])
def test_a_frozen_run_that_is_killed_and_resumed_ends_with_the_same_weights(
    tmp_path: Path, killed_at: int
) -> None:
    """Six iterations per epoch; frozen for two epochs; saved every three iterations."""

    def run(folder: Path, *more: Any) -> Runner:
        return train(
            folder,
            [
                Freeze(patterns=("net.0.*",), until=2),
                dict(type="checkpoint", every="3 iterations"),
                "no:progress_bar",
                dict(type="seed", seed=0),
                *more,
            ],
            defaults=("seed", "preprocess", "logging", "checkpoint", "progress_bar"),
            train_dataloader=DataLoader(toy_data(22), batch_size=4, shuffle=True),
            name="run",
            resume="auto",
        )

    class Killed(Plugin):
        def after_train_iter(self, runner: Any) -> None:
            if runner.progress.iter == killed_at:
                raise KeyboardInterrupt

    straight = run(tmp_path / "straight")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", Killed())
    begins: list[int] = []
    resumed = run(tmp_path / "killed", Begins(begins))
    assert begins == [(killed_at - 1) // 3 * 3]
    assert resumed.progress.step == straight.progress.step == 18
    assert_close(resumed, straight.model, 0.0)


# -- ConfusionMatrix ------------------------------------------------------------------------------


def test_each_evaluated_model_has_its_confusion_matrix(tmp_path: Path) -> None:
    classes = ("cat", "dog", "owl")
    val = toy_data(50, seed=1)
    runner = train(
        tmp_path,
        [
            "logging",
            dict(type="ema", momentum=0.02, evaluate="both"),
            ConfusionMatrix(classes=classes),
        ],
        val_dataloader=DataLoader(val, batch_size=8),
        val_evaluator=ToyAccuracy(),
        name="run",
    )
    records = [r for r in read_records(tmp_path / "run") if r.phase == "val"]
    assert [sorted(record.media) for record in records] == [["confusion", "ema/confusion"]] * 3
    inputs, labels = val.tensors
    ema: Any = runner.plugins["ema"]
    models: dict[str, Any] = {"": runner.bare_model, "ema/": ema.averaged.module}
    tables = []
    for prefix, model in models.items():
        predicted = model(inputs, labels).argmax(1)
        table: Any = records[-1].media[f"{prefix}confusion"]
        assert list(table.columns) == ["label", *classes]
        for index, (name, *row) in enumerate(table.rows):
            assert name == classes[index]
            assert row == [int(((labels == index) & (predicted == j)).sum()) for j in range(3)]
        right = sum(row[1 + index] for index, row in enumerate(table.rows))
        assert records[-1].scalars[f"{prefix}accuracy"] == pytest.approx(right / 50)
        tables.append([list(row) for row in table.rows])
    assert tables[0] != tables[1]


# -- CSV ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [0, 3])
def test_rows_are_without_gaps_and_repeats_after_a_resume(tmp_path: Path, cut: int) -> None:
    """The last row is cut off, as by a kill in the middle of a write."""

    class Breaks(Plugin):
        def after_train_iter(self, runner: Any) -> None:
            if runner.progress.iter == 15:
                raise LookupError

    def run(*more: Any) -> Runner:
        return train(
            tmp_path,
            [
                CSV(columns=("loss", "accuracy")),
                dict(type="logging", interval=2),
                dict(type="checkpoint", every="4 iterations"),
                *more,
            ],
            defaults=("seed", "preprocess", "logging", "checkpoint"),
            val_dataloader=DataLoader(toy_data(10, seed=1), batch_size=4),
            val_evaluator=ToyAccuracy(),
            name="run",
            resume="auto",
        )

    with pytest.raises(LookupError):
        run(Breaks())
    file = tmp_path / "run" / "metrics.csv"
    if cut:
        file.write_text(file.read_text()[:-cut])
    run()
    rows = [*csv.DictReader(file.read_text().splitlines())]
    records = [*read_records(tmp_path / "run")]
    assert [(r["phase"], int(r["iter"])) for r in rows] == [(r.phase, r.iter) for r in records]
    assert [r.iter for r in records if r.phase == "val"] == [6, 12, 18]
    assert len(records) == 9 + 3
    for row, record in zip(rows, records, strict=True):
        for name in ("loss", "accuracy"):
            value = record.scalars.get(name)
            assert row[name] == ("" if value is None else str(value))


def test_a_run_that_starts_over_in_the_same_folder_has_its_rows_only(tmp_path: Path) -> None:
    for epochs in (2, 1):
        train(
            tmp_path,
            [CSV(), dict(type="logging", interval=3)],
            train_cfg=dict(max_epochs=epochs),
            name="run",
        )
    lines = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    assert lines[0] == "phase,epoch,iter,step,loss"
    assert [line.split(",")[:3] for line in lines[1:]] == [["train", "1", "3"], ["train", "1", "6"]]

"""Each rank evaluates its share, and the metrics are those of one process, to the last bit."""

from __future__ import annotations

import os
import warnings
from collections import UserDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset
from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC

from hookengine import BaseMetric, BaseModel, BatchSizeError, Runner, dist, read_records
from tests.ranks import on_ranks

pytestmark = pytest.mark.ranks


class Normed(BaseModel):
    """With batch norm, whose buffers differ on ranks that see other samples."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, inputs: Tensor, labels: Tensor, mode: str = "tensor") -> Any:
        scores = self.net(inputs)
        if mode == "loss":
            return {"loss": F.cross_entropy(scores, labels), "norm": scores.square().mean()}
        return (scores, labels) if mode == "predict" else scores


class Sum(BaseMetric):
    """A sum of floats per batch, which tells batches and their order apart."""

    def process(self, data_batch: Any, data_samples: Any) -> None:
        self.results.append(data_samples[0].float().sum().item())

    def compute_metrics(self, results: list[Any]) -> dict[str, Any]:
        total = 0.0
        for value in results:
            total = 1.1 * total + value
        return {"sum": total, "batches": len(results)}


class Labels(BaseMetric):
    """One result per sample, in order."""

    def process(self, data_batch: Any, data_samples: Any) -> None:
        self.results.extend(data_samples[1].tolist())

    def compute_metrics(self, results: list[Any]) -> dict[str, Any]:
        return {"labels": results}


class Curve(MulticlassAUROC):
    """A metric of torchmetrics that keeps all scores, in a list."""

    def __init__(self) -> None:
        super().__init__(3, thresholds=None, validate_args=False)


def evaluate(
    folder: Path, count: int, strategy: str = "ddp", seeded: bool = True, **options: Any
) -> Any:
    """Validate over ``count`` samples, shuffled, in batches of 4."""
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "No (positive|negative) samples")  # among so few
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(
        torch.randn(count, 7, generator=generator), torch.randint(3, (count,), generator=generator)
    )
    torch.manual_seed(0)
    runner = Runner(
        Normed(),
        folder,
        val_dataloader=DataLoader(data, batch_size=4, shuffle=True),
        val_cfg=dict(loss=True),
        val_evaluator=[Sum(), Labels(), MulticlassAccuracy(3, average="micro"), Curve()],
        plugins=[
            dict(type="distributed", strategy=strategy, **options),
            dict(type="seed", seed=1) if seeded else "no:seed",
            dict(type="logging", level="ERROR"),
            "no:progress_bar",
        ],
        device="cpu",
    )

    @runner.on("before_val_iter")
    def change(data_batch: Any) -> Any:
        return data_batch[0][:, :6], data_batch[1]

    with runner:
        if not seeded:
            torch.manual_seed(dist.get_rank())  # nobody has made them alike
        return runner.val()


def evaluate_all(folder: Path) -> list[Any]:
    return [evaluate(folder, *case) for case in CASES]


CASES: list[tuple[Any, ...]] = [(24,), (21,), (10,), (3,), (1,), (21, "fsdp"), (3, "fsdp")]


@pytest.mark.parametrize("world", [2, 4])
def test_metrics_are_those_of_one_process(tmp_path: Path, world: int) -> None:
    expected = [evaluate(tmp_path, count) for count, *_ in CASES]
    for metrics in on_ranks(world, evaluate_all, tmp_path):
        for case, found, wanted in zip(CASES, metrics, expected, strict=True):
            if "fsdp" not in case:
                assert found == wanted, case
            else:
                assert found["labels"] == wanted["labels"]
                assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
                assert found["MulticlassAccuracy"] == wanted["MulticlassAccuracy"]


def evaluate_unseeded(folder: Path) -> Any:
    return evaluate(folder, 21, "ddp", False)


def test_without_a_seed_the_ranks_still_draw_one_order(tmp_path: Path) -> None:
    expected = evaluate(tmp_path, 21)
    for metrics in on_ranks(2, evaluate_unseeded, tmp_path):
        assert sorted(metrics["labels"]) == sorted(expected["labels"])
        assert metrics["loss"] == pytest.approx(expected["loss"])


class OwnShare(IterableDataset[Any]):
    """Gives each rank half of 20 samples, and the length of that."""

    def __len__(self) -> int:
        return 10

    def __iter__(self) -> Iterator[Any]:
        start = 10 * dist.get_rank()
        return ((torch.full((6,), float(i)), i) for i in range(start, start + 10))


def evaluate_unshared(folder: Path) -> list[Any]:
    everything = evaluate(folder, 21, "ddp", True, share_data=False)
    runner = Runner(
        Normed(),
        folder,
        val_dataloader=DataLoader(OwnShare(), batch_size=4),
        val_evaluator=Labels(),
        plugins=["no:progress_bar", dict(type="logging", level="ERROR")],
        device="cpu",
    )
    with runner:
        return [everything, runner.val()["labels"]]


def test_where_the_plugin_shares_nothing_no_result_is_cut_off(tmp_path: Path) -> None:
    expected = evaluate(tmp_path, 21)
    for everything, own in on_ranks(2, evaluate_unshared, tmp_path):
        assert everything["labels"] == 2 * expected["labels"]  # each rank was to evaluate all
        assert everything["loss"] == expected["loss"]
        assert everything["MulticlassAccuracy"] == expected["MulticlassAccuracy"]
        assert own == [*range(20)]


def buffers(runner: Runner) -> list[float]:
    return runner.bare_model.net[1].running_mean.tolist()


def train_with_own_buffers(folder: Path) -> dict[str, Any]:
    """Train without broadcasts of buffers; what they are before, in and after a validation."""
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(
        torch.randn(16, 6, generator=generator), torch.randint(3, (16,), generator=generator)
    )
    torch.manual_seed(0)
    runner = Runner(
        Normed(),
        folder,
        train_dataloader=DataLoader(data, batch_size=4),
        train_cfg=dict(max_epochs=1),
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.1)),
        val_dataloader=DataLoader(data, batch_size=4),
        val_evaluator=Sum(),
        plugins=[
            dict(type="distributed", options=dict(broadcast_buffers=False)),
            dict(type="logging", level="ERROR"),
            "no:progress_bar",
        ],
        name="run",
        device="cpu",
    )
    seen: dict[str, Any] = {}

    @runner.on("before_val")
    def before(runner: Runner) -> None:
        seen["before"] = buffers(runner)

    @runner.on("before_metrics")
    def within(runner: Runner) -> None:
        seen["in"] = buffers(runner)

    with runner:
        runner.train()
        seen["after"] = buffers(runner)
    return seen


def test_the_buffers_of_rank_0_are_evaluated_and_each_keeps_its_own(tmp_path: Path) -> None:
    first, second = on_ranks(2, train_with_own_buffers, tmp_path)
    assert first["before"] == first["in"] == first["after"] == second["in"]
    assert second["before"] == second["after"] != second["in"]
    (saved,) = (tmp_path / "run" / "checkpoints").glob("epoch_*")
    state = torch.load(saved / "state.pth", weights_only=True)
    kept = state["ranks"][1]["plugins"]["distributed"]["buffers"]["net.1.running_mean"]
    assert state["state_dict"]["net.1.running_mean"].tolist() == first["after"]
    assert kept.tolist() == second["after"]


# -- the samples of all ranks ---------------------------------------------------------------------


class Level(BaseModel):
    """Its loss is the mean of the inputs, finite without any; above 1 it has a second loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 1)

    def forward(self, x: Any, y: Tensor, mode: str = "tensor") -> Any:
        x = x["x"] if isinstance(x, Mapping) else x
        losses = {"loss": x.mean().nan_to_num(0.0) + 0 * self.net(x).sum()}
        if x.numel() and x.flatten()[0] > 1:
            losses["aux"] = 10 * x.mean()
        return losses if mode == "loss" else [float(value) for value in y]


class Values(BaseMetric):
    """All results in a list."""

    def process(self, data_batch: Any, data_samples: Any) -> None:
        self.results.extend(data_samples)

    def compute_metrics(self, results: list[Any]) -> dict[str, Any]:
        return {"values": results}


class Counted(list[Any]):
    """Batches whose samples it counts: twice those of the targets."""

    def count_samples(self, batch: Any) -> int:
        return 2 * len(batch[1])


def batch(value: float, size: int) -> Any:
    x = torch.full((size, 3), float(value))
    return UserDict(y=x, x=x), x[:, 0]


def time_first(value: float, size: int) -> Any:
    return torch.full((12, size, 3), value), torch.full((size,), value)


def numbers(dealt: bool = False) -> Any:
    """Ten numbers, in batches whose tensors do not tell their size."""
    data = TensorDataset(torch.arange(10.0))
    ranks, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    return DataLoader(
        data,
        batch_size=4,
        sampler=DistributedSampler(data, ranks, rank, shuffle=False) if dealt else None,
        collate_fn=lambda items: (
            torch.zeros(12, len(items), 3),
            torch.stack([x for (x,) in items]),
        ),
    )


def of_batches(folder: Path, batches: Any, name: str, **options: Any) -> Any:
    distributed = dict(type="distributed", share_data=options.pop("share_data", True))
    return Runner(
        Level(),
        folder,
        plugins=[distributed, dict(type="logging", interval=5), "no:progress_bar", "no:checkpoint"],
        device="cpu",
        name=name,
        **{f"{'train' if 'train_cfg' in options else 'val'}_dataloader": batches},
        **options,
    )


SHARED = [(1.0, 8), (5.0, 0), (2.0, 2), (3.0, 4), (1.0, 3)]
SGD = dict(type="SGD", lr=0.1)


def count_on_ranks(folder: Path) -> list[Any]:
    """Train on unequal batches, validate over partial losses, and over batches of unknown size."""
    first = os.environ.get("RANK", "0") == "0"
    own = [batch(1, 8), batch(1, 2)] if first else [batch(3, 4), batch(3, 0)]
    with of_batches(
        folder, own, "train", train_cfg=dict(max_epochs=1), optim_wrapper=dict(optimizer=SGD)
    ) as runner:
        runner.train()
    unknown = [time_first(*each) for each in SHARED]
    loss, values = dict(val_cfg=dict(loss=True)), dict(val_evaluator=Values())
    found: list[Any] = []
    for name, batches, options in (
        ("partial", [batch(*each) for each in SHARED], loss),
        ("counted", Counted(unknown), loss),
        ("list", unknown, values),
        ("shared", numbers(), values),
        ("dealt", numbers(dealt=True), values),
        ("unknown", unknown, loss),
        ("unshared", numbers(), {**values, "share_data": False}),
    ):
        try:
            with of_batches(folder, batches, name, **options) as runner:
                found.append(runner.val())
        except BatchSizeError as error:
            found.append(str(error))
    return found


def test_losses_are_averaged_over_the_samples_of_all_ranks(tmp_path: Path) -> None:
    one = count_on_ranks(tmp_path / "one")
    partial, counted, listed, shared, dealt, unknown, unshared = one
    assert partial["loss"] == pytest.approx((8 * 1 + 2 * 2 + 4 * 3 + 3 * 1) / 17)
    assert partial["aux"] == pytest.approx((2 * 20 + 4 * 30) / 6)
    assert counted == partial
    assert listed == {"values": [1.0] * 8 + [2.0] * 2 + [3.0] * 4 + [1.0] * 3}
    assert shared == dealt == unshared == {"values": [*range(10)]}
    assert "count_samples" in unknown
    for found in on_ranks(2, count_on_ranks, tmp_path / "two"):
        assert found[:5] == one[:5]
        assert "the losses cannot be averaged over the samples" in found[5]
        assert "results of the ranks cannot be put in the order of the dataset" in found[6]
    (record,) = read_records(tmp_path / "two" / "train")
    assert record.scalars["loss"] == pytest.approx((10 * 1 + 4 * 3) / 14)
    assert record.scalars["aux"] == pytest.approx(30)
    samples = record.scalars["samples_per_second"] * record.scalars["time"] * 2
    assert samples == pytest.approx(14)

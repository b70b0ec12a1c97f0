"""Metrics: process, gather, compute; several of them; torchmetrics."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torchmetrics
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from hookengine import (
    BaseMetric,
    BaseModel,
    BatchSizeError,
    Evaluator,
    greater_is_better,
    metric_value,
)
from tests.fixtures import MakeData, MakeRunner


class Mean(BaseMetric):
    """The mean of what is processed."""

    def process(self, data_batch: Any, data_samples: Any) -> None:
        self.results.extend(data_samples)

    def compute_metrics(self, results: list[Any]) -> dict[str, Any]:
        return {"mean": sum(results) / len(results)}


def test_a_metric_is_computed_from_all_batches_and_starts_anew() -> None:
    metric = Mean()
    metric.process(None, [1.0, 2.0])
    metric.process(None, [6.0])
    assert metric.evaluate(3) == {"mean": 3.0}
    metric.process(None, [5.0])
    assert metric.evaluate(1) == {"mean": 5.0}


def test_compute_metrics_may_read_the_results_from_the_metric_itself() -> None:
    """As the metric of MMEngine's segmentation example does."""

    class Reads(Mean):
        def compute_metrics(self, results: list[Any]) -> dict[str, Any]:
            return {"mean": sum(self.results) / len(self.results)}

    class Fails(Mean):
        def compute_metrics(self, results: list[Any]) -> dict[str, Any]:
            raise LookupError(len(self.results))

    metric = Reads()
    for values, mean in (([1.0, 3.0], 2.0), ([5.0], 5.0)):
        metric.process(None, values)
        assert metric.evaluate(len(values)) == {"mean": mean}
        assert metric.results == []
    failing = Fails()
    failing.process(None, [1.0, 3.0])
    with pytest.raises(LookupError, match="2"):
        failing.evaluate(2)
    assert failing.results == []


def test_a_prefix_is_given_or_the_classes() -> None:
    class Prefixed(Mean):
        default_prefix = "all"

    for metric, name in ((Mean(), "mean"), (Mean(prefix="a"), "a/mean"), (Prefixed(), "all/mean")):
        metric.process(None, [1.0])
        assert metric.evaluate(1) == {name: 1.0}


@pytest.mark.parametrize(
    "value", [torch.tensor(0.5), torch.tensor([0.5]), np.float64(0.5), np.array(0.5), 0.5]
)
def test_scalars_become_python_numbers(value: Any) -> None:
    class One(Mean):
        def compute_metrics(self, results: list[Any]) -> dict[str, Any]:
            return {"value": value, "table": [1, 2], "name": "x", "many": torch.ones(2)}

    metric = One()
    metric.process(None, [1.0])
    metrics = metric.evaluate(1)
    assert type(metrics["value"]) is float
    assert metrics["table"] == [1, 2]
    assert metrics["many"].shape == (2,)


def test_results_are_on_the_cpu_and_without_a_graph() -> None:
    class Keep(Mean):
        def compute_metrics(self, results: list[Any]) -> dict[str, Any]:
            self.kept = results
            return {}

    from collections import namedtuple

    pair = namedtuple("pair", "score label")
    metric = Keep()
    score = torch.ones(2, requires_grad=True) * 2
    metric.results = [{"a": [score]}, (score, "x"), pair(score, 1)]
    metric.evaluate(3)
    first, second, third = metric.kept
    for kept in (first["a"][0], second[0], third.score):
        assert isinstance(kept, Tensor)
        assert not kept.requires_grad
    assert type(third) is pair


def test_empty_results_are_said_so() -> None:
    class Lazy(Mean):
        def compute_metrics(self, results: list[Any]) -> dict[str, Any]:
            return {"mean": 0.0}

    with pytest.warns(UserWarning, match=r"Lazy.results is empty. Append to self.results"):
        Lazy().evaluate(1)


def test_compute_metrics_must_return_a_dict() -> None:
    class Wrong(Mean):
        def compute_metrics(self, results: list[Any]) -> Any:
            return 3.0

    metric = Wrong()
    metric.process(None, [1.0])
    with pytest.raises(TypeError, match=r"Wrong.compute_metrics must return a dict"):
        metric.evaluate(1)


def test_an_evaluator_is_built_from_what_users_have() -> None:
    kinds = [Mean(), dict(type=Mean, prefix="b"), torchmetrics.MeanSquaredError()]
    evaluator = Evaluator(kinds)
    evaluator.process(data_samples=(torch.tensor([1.0]), torch.tensor([3.0])), data_batch=None)
    assert evaluator.evaluate(2) == {"mean": 2.0, "b/mean": 2.0, "MeanSquaredError": 4.0}
    assert len(Evaluator(Mean()).metrics) == 1


@pytest.mark.parametrize(
    ("metrics", "error", "message"),
    [
        ([], ValueError, "at least one metric"),
        (Mean, TypeError, r"Pass an instance, Mean\(\)"),
        (dict(type="Accuracy"), TypeError, "takes the class itself"),
        (3, TypeError, "got int"),
    ],
)
def test_what_is_no_metric_is_answered(metrics: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        Evaluator(metrics)


def test_two_metrics_of_one_name_are_refused() -> None:
    evaluator = Evaluator([Mean(), Mean()])
    evaluator.process(data_samples=[1.0])
    with pytest.raises(ValueError, match=r"two metrics report 'mean'. .*Mean\(prefix='other'\)"):
        evaluator.evaluate(1)


def test_offline_evaluation_goes_in_chunks() -> None:
    seen = []

    class Watch(Mean):
        def process(self, data_batch: Any, data_samples: Any) -> None:
            seen.append((data_batch, data_samples))
            super().process(data_batch, data_samples)

    evaluator = Evaluator(Watch())
    metrics = evaluator.offline_evaluate([1.0, 2.0, 6.0], data=["a", "b", "c"], chunk_size=2)
    assert metrics == {"mean": 3.0}
    assert seen == [(["a", "b"], [1.0, 2.0]), (["c"], [6.0])]
    assert evaluator.offline_evaluate([4.0]) == {"mean": 4.0}
    with pytest.raises(ValueError, match="1 predictions for 2 samples"):
        evaluator.offline_evaluate([1.0], data=["a", "b"])


def test_torchmetrics_count_what_a_metric_of_ones_own_counts(
    make: MakeRunner, data: MakeData
) -> None:
    ours = make(validate=True).val()
    metric = torchmetrics.classification.MulticlassAccuracy(3, average="micro")
    loader = DataLoader(data(10, seed=1), batch_size=4)
    runner = make(val_dataloader=loader, val_evaluator=metric)
    assert runner.val()["MulticlassAccuracy"] == pytest.approx(ours["accuracy"])
    assert runner.val()["MulticlassAccuracy"] == pytest.approx(ours["accuracy"])  # was reset
    both = torchmetrics.MetricCollection({"top1": metric})
    assert set(make(val_dataloader=loader, val_evaluator=both).val()) == {"top1"}


def test_a_torchmetric_takes_a_dict_as_keywords() -> None:
    evaluator = Evaluator(torchmetrics.MeanSquaredError())
    evaluator.process(data_samples=dict(preds=torch.ones(1), target=torch.zeros(1)))
    assert evaluator.evaluate(1) == {"MeanSquaredError": 1.0}


def test_the_dataset_tells_its_metainfo(make: MakeRunner, data: MakeData) -> None:
    dataset: Any = data(10, seed=1)
    dataset.metainfo = {"classes": ["a", "b", "c"]}
    metric = Mean()
    make(val_dataloader=DataLoader(dataset, batch_size=4), val_evaluator=metric)
    assert metric.dataset_meta == {"classes": ["a", "b", "c"]}


def test_which_way_a_metric_is_better_is_known_by_its_name() -> None:
    greater = "accuracy acc top1 val/top_5 coco/bbox_mAP mAP AUROC mIoU dice F1 PSNR precision"
    greater += " MulticlassAccuracy aAcc AP50 MulticlassF1Score BinaryF1Score MulticlassAUROC"
    less = "loss val/loss rmse mae error_rate perplexity FID wer"
    neither = "distance gap accuracy_loss confidence answer apple indices l2_norm accuracy_std"
    neither += " val/accuracy_drop dice_distance f_divergence recall_latency time_to_top"
    for names, expected in ((greater, True), (less, False), (neither, None)):
        for name in names.split():
            assert greater_is_better(name) is expected, name


def test_a_metric_is_taken_by_name_as_a_number() -> None:
    metrics = {"accuracy": torch.tensor(0.5), "table": [1, 2]}
    assert metric_value(metrics, "accuracy") == 0.5
    with pytest.raises(KeyError, match=r"unknown metric 'acuracy'\. Did you mean 'accuracy'"):
        metric_value(metrics, "acuracy")
    with pytest.raises(KeyError, match=r"val_cfg=dict\(loss=True\)"):
        metric_value(metrics, "loss")
    with pytest.raises(TypeError, match=r"'table' is not a number: \[1, 2\]"):
        metric_value(metrics, "table")


def test_validation_loss_is_summed_exactly_in_half_precision(make: MakeRunner) -> None:
    class Half(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            return inputs.half()

    batches = [(torch.full((2000, 1), 0.5), torch.zeros(2000, 1))] * 100
    runner = make(
        model=Half(),
        loss=lambda output, target: output.float().mean().half() + 0 * target.sum(),
        train_dataloader=None,
        train_cfg=None,
        optim_wrapper=None,
        val_dataloader=batches,
        val_cfg=dict(loss=True),
    )
    assert runner.val()["loss"] == 0.5


class Unsized(TensorDataset):
    """A dataset that does not know its length."""

    def __len__(self) -> int:
        raise NotImplementedError


def test_losses_alone_need_no_length_of_the_dataset(make: MakeRunner, data: MakeData) -> None:
    loader = DataLoader(Unsized(*data(8).tensors), batch_sampler=[[0, 1, 2], [3]])
    runner = make(val_dataloader=loader, val_cfg=dict(loss=True))
    assert set(runner.val()) == {"loss"}


# -- the samples that a loss is averaged over -----------------------------------------------------


class Level(BaseModel):
    """Its loss is the mean of all values in a batch, which may be of any nesting."""

    def forward(self, *args: Any, mode: str = "tensor", **kwargs: Any) -> Any:
        return {"loss": _first(args or kwargs).float().mean()} if mode == "loss" else [0]


def _first(value: Any) -> Tensor:
    while not isinstance(value, Tensor):
        if isinstance(value, dict):
            value = value["x"] if "x" in value else next(iter(value.values()))
        else:
            value = value[0]
    return value


def levels(wrap: Any, sizes: tuple[int, ...] = (8, 2)) -> list[Any]:
    """Batches of these sizes, with the values 1, 2, ... in them."""
    return [wrap(torch.full((size, 3), index + 1.0)) for index, size in enumerate(sizes)]


def evaluation(make: MakeRunner, batches: Any, **options: Any) -> Any:
    """A Runner that only evaluates, and reports the loss."""
    options = {"model": Level(), "val_cfg": dict(loss=True), **options}
    bare: dict[str, Any] = dict(train_dataloader=None, train_cfg=None, optim_wrapper=None)
    return make(val_dataloader=batches, **bare, **options)


NESTINGS: dict[str, Any] = {
    "a tensor": lambda x: (x, x[:, 0]),
    "two inputs": lambda x: ({"a": x, "b": x}, x[:, 0]),
    "a list of two": lambda x: ([x, x], x[:, 0]),
    "nested": lambda x: ({"a": {"b": x, "c": (x, x)}}, x[:, 0]),
    "a scalar first": lambda x: {"temperature": torch.tensor(0.5), "names": ["a", "b"], "x": x},
    "texts": lambda x: {"x": x, "text": ["a"] * len(x)},
}


@pytest.mark.parametrize("nesting", NESTINGS)
def test_a_validation_loss_is_a_mean_over_samples(make: MakeRunner, nesting: str) -> None:
    runner = evaluation(make, levels(NESTINGS[nesting]))
    assert runner.val()["loss"] == pytest.approx((8 * 1 + 2 * 2) / 10)


def time_first(x: Tensor) -> Any:
    """Inputs of shape (T, B, ...), targets of shape (B,)."""
    return x.expand(12, *x.shape), x[:, 0]


def test_a_loss_over_batches_of_unknown_size_is_an_error(make: MakeRunner) -> None:
    runner = evaluation(make, levels(time_first))
    with pytest.raises(BatchSizeError, match=r"batch\[0\]: \(12, 8, 3\).*count_samples"):
        runner.val()
    assert evaluation(make, levels(time_first, (8,))).val()["loss"] == 1  # no weight is needed


def test_the_model_or_the_dataloader_tells_the_number_of_samples(make: MakeRunner) -> None:
    class Counts(Level):
        def count_samples(self, batch: Any) -> int:
            return int(batch[1].shape[0])

    class Loader(list[Any]):
        def count_samples(self, batch: Any) -> int:
            return {8: 1, 2: 4}[batch[1].shape[0]]

    batches = levels(time_first)
    assert evaluation(make, batches, model=Counts()).val()["loss"] == pytest.approx(1.2)
    assert evaluation(make, Loader(batches), model=Counts()).val()["loss"] == pytest.approx(1.8)


def test_metrics_of_batches_of_unknown_size_need_no_number_of_samples(make: MakeRunner) -> None:
    class Values(Mean):
        def process(self, data_batch: Any, data_samples: Any) -> None:
            self.results.append(data_batch[1].mean().item())

    class Own(Values):
        def evaluate(self, size: int, consecutive: bool = False) -> dict[str, Any]:
            return {"size": size}

    options: dict[str, Any] = dict(val_cfg=None, val_evaluator=Values())
    assert evaluation(make, levels(time_first), **options).val() == {"mean": 1.5}
    options["val_evaluator"] = Own()
    with pytest.raises(BatchSizeError, match=r"evaluate\(size\) of a metric needs .*count_samples"):
        evaluation(make, levels(time_first), **options).val()
    dataset = TensorDataset(torch.ones(5, 3))
    loader = DataLoader(dataset, batch_size=2, collate_fn=lambda x: time_first(torch.ones(2, 3)))
    assert evaluation(make, loader, **options).val() == {"size": 5}


class Partial(BaseModel):
    """Has a second loss in batches whose first value is 2, and a third in batches of that size."""

    def forward(self, x: Tensor, y: Tensor, mode: str = "tensor") -> Any:
        if mode != "loss":
            return [0]
        losses = {"loss": x.mean()}
        if x.numel() and x[0, 0] == 2:
            losses["aux"] = 10 * x.mean()
        return losses if len(x) else {**losses, "nothing": x.sum()}


def pair(x: Tensor) -> Any:
    return x, x[:, 0]


def test_batches_without_samples_do_not_count(make: MakeRunner) -> None:
    runner = evaluation(make, levels(pair, (8, 0, 2)))
    assert runner.val()["loss"] == pytest.approx((8 * 1 + 2 * 3) / 10)
    with pytest.warns(UserWarning, match="'nothing' has no value: only batches without samples"):
        metrics = evaluation(make, levels(pair, (8, 0, 2)), model=Partial()).val()
    assert metrics == {"loss": pytest.approx(1.4)}


def test_a_nan_of_a_batch_with_samples_is_not_hidden(make: MakeRunner) -> None:
    broken = [(torch.full((2, 3), torch.nan), torch.zeros(2))]
    assert np.isnan(evaluation(make, [*levels(pair), *broken]).val()["loss"])
    infinite = [(torch.full((2, 3), sign * torch.inf), torch.zeros(2)) for sign in (1, -1)]
    assert np.isnan(evaluation(make, infinite).val()["loss"])


def test_an_evaluation_without_a_sample_is_an_error(make: MakeRunner) -> None:
    with pytest.raises(ValueError, match="none of the 2 batches has a sample"):
        evaluation(make, levels(pair, (0, 0))).val()


def test_a_loss_of_some_batches_is_a_mean_over_their_samples(make: MakeRunner) -> None:
    metrics = evaluation(make, levels(pair, (8, 2, 5)), model=Partial()).val()
    assert metrics["loss"] == pytest.approx((8 * 1 + 2 * 2 + 5 * 3) / 15)
    assert metrics["aux"] == pytest.approx(20)


def test_an_evaluate_that_takes_only_the_size_is_called_with_it(
    make: MakeRunner, data: MakeData
) -> None:
    class Own(Mean):
        def evaluate(self, size: int) -> dict[str, Any]:  # type: ignore[override]
            return {"size": size}

    assert make(val_dataloader=DataLoader(data(10), batch_size=4), val_evaluator=Own()).val() == {
        "size": 10
    }

"""Metrics: process batches, gather the results over ranks, and compute the values."""

from __future__ import annotations

import math
import re
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from hookengine import dist
from hookengine.batches import BatchSizeError, SampleCounter
from hookengine.events.plugin import snake_case
from hookengine.registry import unknown

_GREATER = re.compile(
    r"[am]?acc|accuracy|top\d+|auc|auroc|auprc|precision|recall|f\d|fscore|m?dice|m?iou|m?ap|r2|"
    r"psnr|ssim|bleu|rouge"
)
_LESS = re.compile(r"loss|error|err|perplexity|ppl|r?mse|mae|mape|nll|b?ce|fid|kid|wer|cer|lpips")
_NEITHER = re.compile(r"std|var|gap|drop|difference|distance|divergence|time|latency|size|count")


def greater_is_better(metric: str) -> bool | None:
    """Return whether a higher value of a metric is better, or None if its name does not tell."""
    words = set()
    for part in re.split(r"[^A-Za-z0-9]+", re.sub(r"(?i)top_(\d)", r"top\1", metric)):
        words |= {part.lower(), *snake_case(part).split("_")}
    words |= {word.rstrip("0123456789") for word in words}
    greater, less = any(map(_GREATER.fullmatch, words)), any(map(_LESS.fullmatch, words))
    return None if greater == less or any(map(_NEITHER.fullmatch, words)) else greater


def metric_value(metrics: Mapping[str, Any], name: str) -> float:
    """Return the metric ``name`` as a Python number.

    Raises:
        KeyError: No metric has this name. The message lists all names and suggests the nearest.
        TypeError: The metric is not a number.
    """
    if name not in metrics:
        hint = ". val_cfg=dict(loss=True) adds the validation losses" if "loss" in name else ""
        raise KeyError(unknown("metric", name, metrics) + hint)
    try:
        return float(_plain(metrics[name]))
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"the metric {name!r} is not a number: {metrics[name]!r}") from None


def metric_numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics that are numbers, as Python numbers by name."""
    found = {}
    for name, value in metrics.items():
        with suppress(TypeError):
            if not isinstance(value, (str, bytes)):
                found[name] = metric_value(metrics, name)
    return found


class BaseMetric(ABC):
    """Base class of metrics: ``process`` each batch, then ``compute_metrics`` from the results.

    Args:
        prefix: Added before the names of the metrics, as ``prefix/name``. Default: the
            ``default_prefix`` of the class, or no prefix.

    Attributes:
        results: What ``process`` has appended since the last ``evaluate``. The results of all ranks
            are gathered on the CPU, and ``compute_metrics`` receives them on rank 0.
        dataset_meta: ``metainfo`` of the dataset, or None if it has none.
    """

    default_prefix: str | None = None

    def __init__(self, prefix: str | None = None) -> None:
        self.results: list[Any] = []
        self.prefix = prefix or self.default_prefix
        self.dataset_meta: Mapping[str, Any] | None = None

    @abstractmethod
    def process(self, data_batch: Any, data_samples: Any) -> None:
        """Append the contribution of one batch to ``self.results``.

        Args:
            data_batch: The batch that the dataloader yielded.
            data_samples: What the model returned for it in ``mode="predict"``.
        """

    @abstractmethod
    def compute_metrics(self, results: list[Any]) -> dict[str, Any]:
        """Return the metrics by name, computed from the results of all batches of all ranks."""

    def evaluate(self, size: int, consecutive: bool = False) -> dict[str, Any]:
        """Gather the results, compute the metrics, and reset.

        Args:
            size: Length of the dataset. Results of samples that a sampler added as padding are
                dropped.
            consecutive: How the samples were shared between ranks. See ``dist.collect_results``.

        Returns:
            The metrics, with prefix, on all ranks. Scalars are Python numbers.
        """
        results = dist.collect_results(_to_cpu(self.results), size, consecutive)
        if results is not None and not results:
            warnings.warn(
                f"{type(self).__name__}.results is empty. Append to self.results in process()",
                stacklevel=2,
            )
        metrics, failure = self._try(results) if results is not None else ({}, None)
        self.results = []  # only now: compute_metrics may read those of this rank
        metrics, message = dist.broadcast_object((metrics, failure and repr(failure)))
        if failure is not None:
            raise failure
        if message is not None:
            raise RuntimeError(f"{type(self).__name__}.compute_metrics failed on rank 0: {message}")
        return _named(metrics, self.prefix)

    def _try(self, results: list[Any]) -> tuple[dict[str, Any], Exception | None]:
        """Return the metrics, or the error that the other ranks must receive instead."""
        name = f"{type(self).__name__}.compute_metrics"
        try:
            metrics = self.compute_metrics(results)
        except Exception as error:
            if not results:
                error.add_note(f"{name} got no results. Does process() append to self.results?")
            return {}, error
        if not isinstance(metrics, Mapping):
            message = f"{name} must return a dict of metrics by name, got {metrics!r}"
            return {}, TypeError(message)
        return dict(metrics), None

    def reset(self) -> None:
        """Drop the results so far, for example after an interrupted evaluation."""
        self.results = []


class TorchMetric(BaseMetric):
    """Adapter of a ``torchmetrics.Metric`` or collection, which gathers over ranks by itself.

    Its ``update`` receives what the model returned: a tuple or list as ``update(*outputs)``, a dict
    as ``update(**outputs)``, anything else as ``update(outputs)``.
    """

    def __init__(self, metric: Any, prefix: str | None = None) -> None:
        super().__init__(prefix)
        self.metric = metric
        self.name = type(metric).__name__
        parts = metric.values() if hasattr(metric, "values") else ()
        for part in (metric, *parts):
            if getattr(part, "dist_sync_fn", self) is None:
                part.dist_sync_fn = _gather_state

    def process(self, data_batch: Any, data_samples: Any) -> None:
        """Update the metric on the device of the model's outputs."""
        named = dict(data_samples) if isinstance(data_samples, Mapping) else {}
        several = isinstance(data_samples, (list, tuple))
        listed = list(data_samples) if several else [] if named else [data_samples]
        for value in (*listed, *named.values()):
            if isinstance(value, Tensor):
                self.metric.to(value.device)
                break
        self.metric.update(*listed, **named)

    def compute_metrics(self, results: list[Any]) -> dict[str, Any]:
        """Return the value by the metric's name, or the values of a collection by their names."""
        with warnings.catch_warnings():
            if dist.get_world_size() > 1:  # a rank may have had no batch while others had some
                warnings.filterwarnings("ignore", "The ``compute`` method of metric")
            value = self.metric.compute()
        return value if isinstance(value, dict) else {self.name: value}

    def evaluate(self, size: int, consecutive: bool = False) -> dict[str, Any]:
        """Compute the metric and reset it. The arguments are ignored."""
        metrics = self.compute_metrics([])
        self.metric.reset()
        return _named(metrics, self.prefix)

    def reset(self) -> None:
        """Reset the metric."""
        self.metric.reset()


def _gather_state(state: Tensor, group: Any = None) -> list[Tensor]:
    """Return a torchmetrics state of all ranks, without the ranks that had no batch."""
    states = dist.all_gather_objects(state.detach().cpu())
    there = [value for value in states if value.numel()] or states[:1]
    return [value.to(state.device) for value in there]


class Evaluator:
    """One or several metrics over the same predictions.

    Args:
        metrics: A ``BaseMetric``, a ``torchmetrics.Metric``, ``dict(type=class, ...)``, a list of
            these, or a dict of these by name. The name in the dict becomes the name of a
            torchmetrics metric, and the prefix of any other metric.

    Attributes:
        metrics: The metrics.
        silent: Those that have been evaluated, and have reported nothing so far.
    """

    def __init__(self, metrics: Any) -> None:
        if isinstance(metrics, Mapping) and "type" not in metrics:
            several = [_build(metric, name) for name, metric in metrics.items()]
        else:
            listed = metrics if isinstance(metrics, (list, tuple)) else [metrics]
            several = [_build(metric) for metric in listed]
        if not several:
            raise ValueError("an evaluator needs at least one metric, got none")
        self.metrics: list[BaseMetric] = several
        self.silent: list[BaseMetric] = []
        self._heard: set[int] = set()

    def __repr__(self) -> str:
        return f"Evaluator({[type(metric).__name__ for metric in self.metrics]})"

    def set_dataset_meta(self, meta: Mapping[str, Any] | None) -> None:
        """Set ``dataset_meta``, the ``metainfo`` of the dataset, on all metrics."""
        for metric in self.metrics:
            metric.dataset_meta = meta

    def process(self, data_samples: Any, data_batch: Any = None) -> None:
        """Pass the predictions for one batch to all metrics."""
        for metric in self.metrics:
            metric.process(data_batch, data_samples)

    def evaluate(self, size: int, consecutive: bool = False) -> dict[str, Any]:
        """Compute all metrics and return them by name.

        Args:
            size: Length of the dataset.
            consecutive: How the samples were shared between ranks. See ``dist.collect_results``.

        Raises:
            ValueError: Two metrics report the same name.
        """
        metrics: dict[str, Any] = {}
        shared = {"consecutive": True} if consecutive else {}  # an override may lack this parameter
        for number, metric in enumerate(self.metrics):
            reported = metric.evaluate(size, **shared)
            self._heard |= {number} if reported else set()
            for name, value in reported.items():
                if name in metrics:
                    raise ValueError(
                        f"two metrics report {name!r}. Give one of them a prefix, as in "
                        f"{type(metric).__name__}(prefix='other')"
                    )
                metrics[name] = value
        self.silent = [m for number, m in enumerate(self.metrics) if number not in self._heard]
        return metrics

    def reset(self) -> None:
        """Reset all metrics."""
        for metric in self.metrics:
            metric.reset()

    def offline_evaluate(
        self, data_samples: Sequence[Any], data: Sequence[Any] | None = None, chunk_size: int = 1
    ) -> dict[str, Any]:
        """Evaluate stored predictions without a model.

        Args:
            data_samples: The predictions, one per sample.
            data: The samples of the dataset, in the same number.
            chunk_size: Number of samples that ``process`` receives at a time, as a list.

        Raises:
            ValueError: The numbers of predictions and samples differ.
        """
        if data is not None and len(data) != len(data_samples):
            raise ValueError(
                f"got {len(data_samples)} predictions for {len(data)} samples. Pass one prediction "
                "per sample"
            )
        inputs = None if data is None else _chunks(iter(data), chunk_size)
        for chunk in _chunks(iter(data_samples), chunk_size):
            self.process(chunk, None if inputs is None else next(inputs))
        return self.evaluate(len(data_samples))


@dataclass
class _Share:
    """What one rank has seen in an evaluation.

    Attributes:
        losses: By name, each batch's loss and its number of samples.
        batches: The number of batches.
        samples: The number of samples; None if it cannot be determined.
        problem: Why it cannot be determined.
    """

    losses: dict[str, list[tuple[float, int]]]
    batches: int
    samples: int | None
    problem: str


class EvaluationPass:
    """One pass over an evaluation dataloader: its samples, its losses, its metrics.

    Args:
        evaluator: The metrics, or None if only the losses are wanted.
        dataloader: Where the batches come from.
        model: The bare model. It or the dataloader may count the samples in a batch.
    """

    def __init__(self, evaluator: Evaluator | None, dataloader: Any, model: Any) -> None:
        self.evaluator = evaluator
        self._dataloader = dataloader
        self._count = SampleCounter(dataloader, model)
        self._losses: list[Mapping[str, Tensor]] = []
        self._sizes: list[int | None] = []
        self._problem = ""

    def add(self, data_batch: Any, outputs: Any, losses: Mapping[str, Tensor]) -> None:
        """Add one batch.

        Args:
            data_batch: The batch.
            outputs: What the model returned for it in ``mode="predict"``.
            losses: Scalar tensors by name, means over the batch; they stay on their device.

        Raises:
            BatchSizeError: The losses are to be averaged over batches of unknown sizes.
        """
        try:
            size = self._count(data_batch)
        except BatchSizeError as error:
            size, self._problem = None, self._problem or str(error)
        self._losses.append(losses)
        self._sizes.append(size)
        if self._problem and losses and len(self._sizes) > 1 and dist.get_world_size() == 1:
            raise BatchSizeError(_NO_MEAN.format(self._problem))
        if self.evaluator is not None:
            self.evaluator.process(data_samples=outputs, data_batch=data_batch)

    def summarize(self, dataset_size: int | None, consecutive: bool) -> dict[str, Any] | None:
        """Return the losses and metrics over the batches of all ranks, or None if there were none.

        A loss is averaged over the samples of those batches for which the model returned it.
        Batches without samples do not count.

        Args:
            dataset_size: The number of samples in the dataset, or None if it is unknown.
            consecutive: How the samples were shared. See ``dist.collect_results``.

        Raises:
            BatchSizeError: The result depends on the sizes of batches, which are unknown.
            ValueError: No batch has a sample, or a metric and a loss have the same name.
        """
        shares = dist.all_gather_objects(self._share())
        batches = sum(share.batches for share in shares)
        if batches == 0:
            return None
        problem = next((share.problem for share in shares if share.problem), "")
        counts = [share.samples for share in shares if share.samples is not None]
        if not problem and sum(counts) == 0:
            raise ValueError(
                f"nothing was evaluated: none of the {batches} batches has a sample. Check the "
                "dataset, its filters and the collate function"
            )
        if problem and batches > 1 and any(share.losses for share in shares):
            raise BatchSizeError(_NO_MEAN.format(problem))
        metrics = _mean_over_samples([share.losses for share in shares])
        if self.evaluator is not None:
            arguments = self._arguments(self.evaluator, dataset_size, consecutive, counts, problem)
            for name, value in self.evaluator.evaluate(*arguments).items():
                if name in metrics:
                    raise ValueError(
                        f"a metric and a loss are both called {name!r}. Give the metric a prefix"
                    )
                metrics[name] = value
        return metrics

    def _arguments(
        self,
        evaluator: Evaluator,
        dataset_size: int | None,
        consecutive: bool,
        counts: list[int],
        problem: str,
    ) -> tuple[int, bool]:
        """Return the arguments of ``evaluate``, which depend on the numbers of samples."""
        methods: set[Any] = {type(metric).evaluate for metric in evaluator.metrics}
        if type(evaluator).evaluate is not Evaluator.evaluate:
            methods.add(type(evaluator).evaluate)
        if dataset_size is None:
            if problem and not methods <= {BaseMetric.evaluate, TorchMetric.evaluate}:
                raise BatchSizeError(_NO_SIZE.format(problem))
            return sys.maxsize if problem else sum(counts), consecutive
        if consecutive or dist.get_world_size() == 1:
            return dataset_size, consecutive
        if problem and not (methods == {TorchMetric.evaluate} or _is_dealt(self._dataloader)):
            raise BatchSizeError(_NO_ORDER.format(problem))
        # A rank that saw the whole dataset did not get a share of it.
        return dataset_size, not problem and any(count >= dataset_size for count in counts)

    def _share(self) -> _Share:
        """Return what this rank has seen; synchronizes the device once."""
        known = [size for size in self._sizes if size is not None]
        samples = None if self._problem else sum(known)
        share = _Share({}, len(self._sizes), samples, self._problem)
        values = [value for batch in self._losses for value in batch.values()]
        if not values:
            return share
        dtype = torch.float32 if values[0].device.type == "mps" else torch.float64
        read = iter(torch.stack([value.to(dtype) for value in values]).tolist())
        for batch, size in zip(self._losses, self._sizes, strict=True):
            for name in batch:
                # A batch of unknown size is the only one, or an error follows.
                share.losses.setdefault(name, []).append((next(read), 1 if size is None else size))
        return share


_NO_MEAN = "the losses cannot be averaged over the samples of all batches. {}"
_NO_ORDER = "the results of the ranks cannot be put in the order of the dataset. {}"
_NO_SIZE = "evaluate(size) of a metric needs the number of all samples. {}"


def _is_dealt(dataloader: Any) -> bool:
    """Return whether a sampler gives each rank its share, as ``DistributedSampler`` does."""
    samplers = [getattr(dataloader, name, None) for name in ("sampler", "batch_sampler")]
    samplers += [getattr(sampler, "sampler", None) for sampler in samplers]
    return any(hasattr(sampler, "num_replicas") for sampler in samplers)


def _mean_over_samples(shares: list[dict[str, list[tuple[float, int]]]]) -> dict[str, float]:
    """Average each loss over the samples of its batches; the split into shares has no effect."""
    means = {}
    for name in dict.fromkeys(name for share in shares for name in share):
        losses = [loss for share in shares for loss in share.get(name, ()) if loss[1]]
        if losses:
            weighted = [value * size for value, size in losses]
            try:
                total = math.fsum(weighted)
            except (OverflowError, ValueError):  # too large, or infinities of both signs
                total = sum(weighted)
            means[name] = total / sum(size for _, size in losses)
        else:
            warnings.warn(
                f"{name!r} has no value: only batches without samples returned it", stacklevel=2
            )
    return means


def _chunks(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while chunk := list(islice(items, size)):
        yield chunk


def _build(metric: Any, name: str | None = None) -> BaseMetric:
    if isinstance(metric, Mapping):
        options = dict(metric)
        kind = options.pop("type", None)
        if not callable(kind):
            raise TypeError(
                f"dict(type=...) of a metric takes the class itself, got type={kind!r}. Import the "
                "class and pass it, as in dict(type=Accuracy)"
            )
        metric = kind(**options)
    if isinstance(metric, BaseMetric):
        metric.prefix = name or metric.prefix
        return metric
    if isinstance(metric, type):
        raise TypeError(
            f"the metric {metric.__name__} is a class. Pass an instance, {metric.__name__}(), or "
            f"dict(type={metric.__name__})"
        )
    if all(hasattr(metric, method) for method in ("update", "compute", "reset")):
        adapted = TorchMetric(metric)
        adapted.name = name or adapted.name
        return adapted
    raise TypeError(
        "a metric must be a hookengine.BaseMetric or a torchmetrics.Metric, got "
        f"{type(metric).__name__}"
    )


def _named(metrics: Mapping[str, Any], prefix: str | None) -> dict[str, Any]:
    return {f"{prefix}/{k}" if prefix else k: _plain(v) for k, v in metrics.items()}


def _plain(value: Any) -> Any:
    """Return a tensor or array of one element as a Python number, and anything else unchanged."""
    size = value.numel() if isinstance(value, Tensor) else getattr(value, "size", None)
    return value.item() if size == 1 and hasattr(value, "item") else value


def _to_cpu(data: Any) -> Any:
    """Return ``data`` with its tensors on the CPU. The results of a metric are small."""
    if isinstance(data, Tensor):
        return data.detach().cpu()
    if isinstance(data, list):
        return [_to_cpu(item) for item in data]
    if isinstance(data, tuple):
        items = [_to_cpu(item) for item in data]
        return type(data)(*items) if hasattr(data, "_fields") else tuple(items)
    if isinstance(data, dict):
        return {key: _to_cpu(value) for key, value in data.items()}
    return data

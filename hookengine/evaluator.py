"""Metrics: process batches, gather the results over ranks, and compute the values."""

from __future__ import annotations

import math
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from hookengine import dist
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
        for metric in self.metrics:
            for name, value in metric.evaluate(size, **shared).items():
                if name in metrics:
                    raise ValueError(
                        f"two metrics report {name!r}. Give one of them a prefix, as in "
                        f"{type(metric).__name__}(prefix='other')"
                    )
                metrics[name] = value
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


class EvaluationPass:
    """One pass over an evaluation dataloader: its samples, its losses, its metrics.

    Args:
        evaluator: The metrics, or None if only the losses are wanted.
    """

    def __init__(self, evaluator: Evaluator | None) -> None:
        self.evaluator = evaluator
        self._losses: list[Mapping[str, Tensor]] = []
        self._sizes: list[int] = []

    def add(self, data_batch: Any, outputs: Any, losses: Mapping[str, Tensor], size: int) -> None:
        """Add one batch.

        Args:
            data_batch: The batch.
            outputs: What the model returned for it in ``mode="predict"``.
            losses: Scalar tensors by name, means over the batch; they stay on their device.
            size: The number of samples in the batch.
        """
        self._losses.append(losses)
        self._sizes.append(size)
        if self.evaluator is not None:
            self.evaluator.process(data_samples=outputs, data_batch=data_batch)

    def summarize(self, dataset_size: int | None, consecutive: bool) -> dict[str, Any] | None:
        """Return the losses and metrics over the batches of all ranks, or None if there were none.

        Args:
            dataset_size: The number of samples in the dataset, or None if it is unknown.
            consecutive: How the samples were shared. See ``dist.collect_results``.

        Raises:
            ValueError: A metric and a loss have the same name.
        """
        shares = dist.all_gather_objects((self._weighted_losses(), sum(self._sizes)))
        size = sum(count for _, count in shares)
        if size == 0:
            return None
        metrics = _mean_over_samples([values for values, _ in shares], size)
        if self.evaluator is not None:
            total = size if dataset_size is None else dataset_size
            # A rank that saw the whole dataset did not get a share of it.
            own = dataset_size is not None and any(count >= dataset_size for _, count in shares)
            for name, value in self.evaluator.evaluate(total, own or consecutive).items():
                if name in metrics:
                    raise ValueError(
                        f"a metric and a loss are both called {name!r}. Give the metric a prefix"
                    )
                metrics[name] = value
        return metrics

    def _weighted_losses(self) -> dict[str, list[float]]:
        """Return each batch's losses by name, times its samples; synchronizes the device once."""
        names = [name for batch in self._losses for name in batch]
        if not names:
            return {}
        values = [value for batch in self._losses for value in batch.values()]
        dtype = torch.float32 if values[0].device.type == "mps" else torch.float64
        read = torch.stack([value.to(dtype) for value in values]).tolist()
        counts = [n for batch, n in zip(self._losses, self._sizes, strict=True) for _ in batch]
        weighted: dict[str, list[float]] = {}
        for name, value, count in zip(names, read, counts, strict=True):
            weighted.setdefault(name, []).append(value * count)
        return weighted


def _mean_over_samples(shares: list[dict[str, list[float]]], size: int) -> dict[str, float]:
    """Average the losses over the samples of all ranks; the split into shares has no effect."""
    names = dict.fromkeys(name for share in shares for name in share)
    return {
        name: math.fsum(value for share in shares for value in share.get(name, ())) / size
        for name in names
    }


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

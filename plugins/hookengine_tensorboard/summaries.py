"""Convert records and hyperparameters to TensorBoard's summaries."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Any

import PIL.Image
from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary, SummaryMetadata
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo
from torch.utils.tensorboard import summary as torch_summary

from hookengine import Histogram, Image, Record, Table

_hparams: Any = torch_summary.hparams  # torch has no types for these
_text: Any = torch_summary.text

START = "_hparams_/session_start_info"
"""The tag of the hyperparameters."""


def summary_of(record: Record) -> Summary:
    """Convert a record to a summary with tags ``PHASE/NAME``."""
    summary = Summary()
    for name, value in record.scalars.items():
        summary.value.add(tag=f"{record.phase}/{name}", simple_value=value)
    for name, medium in record.media.items():
        summary.value.append(_medium(f"{record.phase}/{name}", medium))
    return summary


def _medium(tag: str, medium: Image | Histogram | Table | str) -> Any:
    if isinstance(medium, Image):
        with PIL.Image.open(io.BytesIO(medium.png)) as picture:
            width, height = picture.size
            channels = len(picture.getbands())
        image = Summary.Image(
            height=height, width=width, colorspace=channels, encoded_image_string=medium.png
        )
        return Summary.Value(tag=tag, image=image)
    if isinstance(medium, Histogram):
        return Summary.Value(tag=tag, histo=_histogram(medium))
    text = medium if isinstance(medium, str) else _markdown(medium)
    value = _text(tag, text.encode(errors="backslashreplace").decode()).value[0]
    value.tag = tag  # without torch's "/text_summary"
    return value


def _histogram(histogram: Histogram) -> HistogramProto:
    """Convert a histogram; its sums are computed from the centers of the bins."""
    counts, edges = histogram.counts, histogram.edges
    middles = [(low + high) / 2 for low, high in pairwise(edges)]
    pairs = [*zip(counts, middles, strict=True)]
    return HistogramProto(
        min=edges[0],
        max=edges[-1],
        num=sum(counts),
        sum=sum(count * middle for count, middle in pairs),
        sum_squares=sum(count * middle**2 for count, middle in pairs),
        bucket_limit=edges[1:],
        bucket=counts,
    )


def _markdown(table: Table) -> str:
    rows: list[Any] = [table.columns, ["---"] * len(table.columns), *table.rows]
    return "\n".join("| " + " | ".join(_escaped(cell) for cell in row) + " |" for row in rows)


def _escaped(cell: Any) -> str:
    return str(cell).replace("|", "\\|").replace("\n", " ")


def hyperparameters(
    description: Mapping[str, Any], metrics: Iterable[str]
) -> tuple[Summary, Summary]:
    """Return the summaries that TensorBoard's HParams page compares.

    Args:
        description: The description of a run, from ``runner.describe()``.
        metrics: The tags of the metrics that judge the run.
    """
    experiment, start, _ = _hparams(dict(_flat(description)), dict.fromkeys(metrics, 0.0))
    return experiment, start


def _flat(description: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield model, optimizers, limits and options of plugins as numbers and texts by name."""
    yield "model", description["model"]
    yield "parameters", description["parameters"]
    yield "world_size", description.get("world_size", description.get("ranks"))
    groups: dict[str, Any] = {
        **description["optimizers"],
        "train": description.get("train_cfg", {}),
    }
    groups |= {plugin["name"]: plugin["options"] for plugin in description["plugins"]}
    for group, options in groups.items():
        for name, value in options.items():
            plain = isinstance(value, (int, float, str))
            yield f"{group}/{name}", value if plain or value is None else json.dumps(value)


def session_end(failed: bool) -> Summary:
    """Return the summary that ends a session, for the HParams page."""
    status = "STATUS_FAILURE" if failed else "STATUS_SUCCESS"
    end = HParamsPluginData(session_end_info=SessionEndInfo(status=status), version=0)
    plugin = SummaryMetadata.PluginData(plugin_name="hparams", content=end.SerializeToString())
    value = Summary.Value(
        tag="_hparams_/session_end_info", metadata=SummaryMetadata(plugin_data=plugin)
    )
    return Summary(value=[value])

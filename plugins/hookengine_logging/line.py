"""The console line of a record."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from hookengine import Record


def line(record: Record, progress: Any) -> str:
    """Format a record for people to read.

    Args:
        record: The record.
        progress: The Runner's progress, which has the limits of the run.
    """
    where = [f"{record.phase:<5}"]
    if progress.max_epochs is not None:
        where.append(f"epoch {record.epoch}/{progress.max_epochs}")
    total = f"/{progress.max_iters}" if progress.max_iters is not None else ""
    where.append(f"iter {record.iter}{total}")
    if record.step != record.iter:
        where.append(f"step {record.step}")
    values = []
    for name, value in record.scalars.items():
        if name == "eta":
            values.append(f"eta {timedelta(seconds=round(value))}")
        elif name == "samples_per_second":
            values.append(f"{value:.0f} samples/s")
        elif name == "seconds":
            values += [f"{value:.1f} s"] if value >= 1 else []
        elif name == "time":
            values.append(f"{1000 * value:.1f} ms")
        elif name == "data_time":
            share = value / record.scalars["time"] if record.scalars.get("time") else 0
            values += [f"waits for data {share:.0%}"] if share >= 0.2 else []
        elif name != "memory":
            values.append(f"{name} {value:.4g}")
    return "  ".join(where + values)

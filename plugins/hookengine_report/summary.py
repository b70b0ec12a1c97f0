"""The key numbers of a run, and the differences between runs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from hookengine import greater_is_better
from hookengine_report.runs import Curve, Run
from hookengine_report.text import NOTHING

OWN = ("time", "data_time", "samples_per_second", "memory", "eta")
"""What ``logging`` itself adds to a training record, besides the learning rates."""


@dataclass(frozen=True)
class Best:
    """The best value of a metric, or its last one if the name does not tell the direction.

    Attributes:
        name: The name of the metric.
        value: The value; NaN if none was finite.
        iteration: The iteration after which it was measured.
        greater: Whether a greater value is better; None if that is unknown.
    """

    name: str
    value: float
    iteration: float
    greater: bool | None

    @property
    def word(self) -> str:
        """``best`` or ``last``."""
        return "last" if self.greater is None else "best"


def best_values(run: Run, phase: str = "val") -> list[Best]:
    """Return the best value of each metric of a phase, those with a known direction first."""
    curves = run.phase(phase).items()
    found = [best_of(name, curve) for name, curve in curves if name != "seconds"]
    return sorted(found, key=lambda b: (b.greater is None, "loss" in b.name.lower()))


def best_of(name: str, curve: Curve) -> Best:
    """Return the best value of one metric, the first of equal ones."""
    greater = greater_is_better(name)
    pairs = zip(curve.iterations, curve.values, strict=True)
    finite = [(iteration, value) for iteration, value in pairs if math.isfinite(value)]
    if not finite:
        return Best(name, math.nan, math.nan, greater)
    iteration, value = finite[-1]
    if greater is not None:
        pick = max if greater else min
        iteration, value = pick(finite, key=lambda pair: pair[1])
    return Best(name, value, iteration, greater)


def last_finite(curve: Curve | None) -> float:
    """Return the last finite value, or NaN if there is none."""
    values = reversed(curve.values) if curve is not None else ()
    return next((value for value in values if math.isfinite(value)), math.nan)


def throughput(run: Run) -> float:
    """Return the median of the samples per second, or NaN without any."""
    curve = run.curves.get(("train", "samples_per_second"), Curve())
    finite = [value for value in curve.values if math.isfinite(value)]
    return median(finite) if finite else math.nan


def peak_memory(run: Run) -> float:
    """Return the peak memory in MB, or NaN if it is unknown."""
    curve = run.curves.get(("train", "memory"), Curve())
    return max((value for value in curve.values if math.isfinite(value)), default=math.nan)


def loss_name(run: Run) -> str | None:
    """Return the name of the main training loss: ``loss``, else the first name with ``loss``."""
    names = [name for name in run.phase("train") if "loss" in name.lower()]
    return "loss" if "loss" in names else next(iter(names), None)


def seconds_by_phase(run: Run) -> dict[str, float]:
    """Return where the time went: training, waiting for data, validation, test, and the rest.

    The rest (startup, checkpoints, everything in between) is known only if ``run.json`` has the
    total time and all records are from that process.
    """
    per_iteration = run.curves.get(("train", "time"), Curve())
    training = _summed(per_iteration, run)
    waiting = min(_summed(run.curves.get(("train", "data_time"), Curve()), run), training)
    seconds = {"training": training - waiting, "waiting for data": waiting}
    for phase, word in (("val", "validation"), ("test", "test")):
        curve = run.curves.get((phase, "seconds"), Curve())
        seconds[word] = math.fsum(value for value in curve.values if 0 <= value < 1e12)
    rest = run.time("ended") - run.time("started") - math.fsum(seconds.values())
    if rest > 0 and run.first >= run.time("started"):
        seconds["other"] = rest
    return {name: value for name, value in seconds.items() if value > 0}


def total_seconds(run: Run) -> float:
    """Return how long the run took, as far as its records tell, or NaN if they do not."""
    known = math.fsum(seconds_by_phase(run).values())
    whole = run.time("ended") - run.time("started")
    return max(known, whole) if math.isfinite(whole) else known or math.nan


def _summed(curve: Curve, run: Run) -> float:
    """Return the sum of seconds per iteration times the iterations since the previous record."""
    total, before = 0.0, 0.0
    for iteration, value in zip(curve.iterations, curve.values, strict=True):
        count = iteration - before
        if count > 0 and math.isfinite(value):
            seconds = value * count
            if before == 0 and run.first >= run.time("started"):
                # Loaded weights bring an iteration count that this history does not cover.
                seconds = min(seconds, run.first - run.time("started"))
            total += seconds
        before = iteration
    return total


# -- options ------------------------------------------------------------------------------------


def configuration(run: Run) -> dict[str, Any]:
    """Return what a user chose, by dotted name: model, loops, optimizers, options of plugins."""
    plugins = {
        str(plugin.get("name")): {"": "on", **_as_mapping(plugin.get("options"))}
        for plugin in plugins_of(run)
    }
    optimizers = {name: initial(options) for name, options in run.section("optimizers").items()}
    loops = {f"{p}_cfg": run.section(f"{p}_cfg") for p in ("train", "val", "test")}
    kept = ("model", "parameters", "world_size")
    facts = {name: run.info[name] for name in kept if name in run.info}
    groups: dict[str, Any] = {**facts, **loops, "optimizers": optimizers, "plugins": plugins}
    return dict(_leaves("", groups))


def differences(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Return the options in which runs differ, by dotted name: one text per run."""
    told = [configuration(run) for run in runs]
    everywhere = set.intersection(*({str(p.get("name")) for p in plugins_of(run)} for run in runs))
    told = [_with_plugins_as_one(run, one, everywhere) for run, one in zip(runs, told, strict=True)]
    names = dict.fromkeys(name for one in told for name in one)
    rows = {name: [plain(one[name]) if name in one else NOTHING for one in told] for name in names}
    return {name: row for name, row in rows.items() if len(set(row)) > 1}


def _with_plugins_as_one(run: Run, told: dict[str, Any], everywhere: set[str]) -> dict[str, Any]:
    """Merge a plugin that some runs do not have into one row with all its set options."""
    rows = dict(told)
    for plugin in plugins_of(run):
        if (name := str(plugin.get("name"))) not in everywhere:
            own = f"plugins.{name}"
            rows = {n: value for n, value in rows.items() if n != own and f"{own}." not in n}
            options = {n: v for n, v in _as_mapping(plugin.get("options")).items() if not unset(v)}
            rows[own] = ", ".join(f"{n} {plain(v)}" for n, v in options.items()) or "on"
    return rows


def unset(value: Any) -> bool:
    """Return whether the value of an option means that nothing was chosen."""
    return value is None or value is False or value in ("", [], {})


def plugins_of(run: Run) -> list[dict[str, Any]]:
    """Return name, source and options of each plugin, as in ``run.json``."""
    plugins = run.info.get("plugins")
    return [p for p in plugins if isinstance(p, dict)] if isinstance(plugins, list) else []


def initial(given: Any) -> dict[str, Any]:
    """Return an optimizer's options with its given learning rate, not the first of a warm-up."""
    options: dict[str, Any] = {**_as_mapping(given)}
    if "initial_lr" in options:
        options["lr"] = options.pop("initial_lr")
    return options


def plain(value: Any) -> str:
    """Return a value of ``run.json`` as text on one line."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, (int, float)):
        return f"{value:.6g}" if isinstance(value, float) else str(value)
    if isinstance(value, list) and all(isinstance(v, (str, int, float)) for v in value):
        return ", ".join(map(plain, value)) or "none"
    return json.dumps(value, ensure_ascii=False) if value else "none"


def _as_mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _leaves(prefix: str, value: Any) -> list[tuple[str, Any]]:
    if not isinstance(value, dict) or not value:
        return [] if isinstance(value, dict) else [(prefix, value)]
    return [
        leaf
        for name, child in value.items()
        for leaf in _leaves(f"{prefix}.{name}".strip("."), child)
    ]

"""The key numbers of a run, and in what runs differ."""

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
"""What ``logging`` itself adds to a training record, beside the learning rates."""


@dataclass(frozen=True)
class Best:
    """The best value of a metric, or its last one where the name does not tell the direction.

    Attributes:
        name: Of the metric.
        value: NaN where no value was finite.
        iteration: After which it was measured.
        greater: Whether more is better; None where that is not known.
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
    """The best value of each metric of a phase, those with a known direction first."""
    curves = run.phase(phase).items()
    found = [best_of(name, curve) for name, curve in curves if name != "seconds"]
    return sorted(found, key=lambda b: (b.greater is None, "loss" in b.name.lower()))


def best_of(name: str, curve: Curve) -> Best:
    """The best value of one metric; of equal ones the first."""
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
    """The last finite value; NaN where there is none."""
    values = reversed(curve.values) if curve is not None else ()
    return next((value for value in values if math.isfinite(value)), math.nan)


def throughput(run: Run) -> float:
    """The median of the samples per second; NaN without any."""
    curve = run.curves.get(("train", "samples_per_second"), Curve())
    finite = [value for value in curve.values if math.isfinite(value)]
    return median(finite) if finite else math.nan


def peak_memory(run: Run) -> float:
    """In MB; NaN where it is not known."""
    curve = run.curves.get(("train", "memory"), Curve())
    return max((value for value in curve.values if math.isfinite(value)), default=math.nan)


def loss_name(run: Run) -> str | None:
    """The loss that stands for the training: ``loss``, else the first that is called so."""
    names = [name for name in run.phase("train") if "loss" in name.lower()]
    return "loss" if "loss" in names else next(iter(names), None)


def seconds_by_phase(run: Run) -> dict[str, float]:
    """Where the time went: training, waiting for data, validation, test, and what is left.

    The rest (start, checkpoints, what lies between) is known only where ``run.json`` tells the
    whole time and the records are all of that process.
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
    """How long the run took, as far as its records tell; NaN where they do not."""
    known = math.fsum(seconds_by_phase(run).values())
    whole = run.time("ended") - run.time("started")
    return max(known, whole) if math.isfinite(whole) else known or math.nan


def _summed(curve: Curve, run: Run) -> float:
    """Seconds per iteration times the iterations since the record before."""
    total, before = 0.0, 0.0
    for iteration, value in zip(curve.iterations, curve.values, strict=True):
        count = iteration - before
        if count > 0 and math.isfinite(value):
            seconds = value * count
            if before == 0 and run.first >= run.time("started"):
                # Weights that were loaded bring a count that this history knows nothing of.
                seconds = min(seconds, run.first - run.time("started"))
            total += seconds
        before = iteration
    return total


# -- options ------------------------------------------------------------------------------------


def configuration(run: Run) -> dict[str, Any]:
    """What a user chose, by dotted name: model, loops, optimizers, options of the plugins."""
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
    """The options in which runs differ, by dotted name: one text per run."""
    told = [configuration(run) for run in runs]
    everywhere = set.intersection(*({str(p.get("name")) for p in plugins_of(run)} for run in runs))
    told = [_with_plugins_as_one(run, one, everywhere) for run, one in zip(runs, told, strict=True)]
    names = dict.fromkeys(name for one in told for name in one)
    rows = {name: [plain(one[name]) if name in one else NOTHING for one in told] for name in names}
    return {name: row for name, row in rows.items() if len(set(row)) > 1}


def _with_plugins_as_one(run: Run, told: dict[str, Any], everywhere: set[str]) -> dict[str, Any]:
    """A plugin that some runs do not have is one row: all that is set in it."""
    rows = dict(told)
    for plugin in plugins_of(run):
        if (name := str(plugin.get("name"))) not in everywhere:
            own = f"plugins.{name}"
            rows = {n: value for n, value in rows.items() if n != own and f"{own}." not in n}
            options = {n: v for n, v in _as_mapping(plugin.get("options")).items() if not unset(v)}
            rows[own] = ", ".join(f"{n} {plain(v)}" for n, v in options.items()) or "on"
    return rows


def unset(value: Any) -> bool:
    """Whether an option says no more than that nothing was chosen."""
    return value is None or value is False or value in ("", [], {})


def plugins_of(run: Run) -> list[dict[str, Any]]:
    """Name, source and options of each plugin, as ``run.json`` has them."""
    plugins = run.info.get("plugins")
    return [p for p in plugins if isinstance(p, dict)] if isinstance(plugins, list) else []


def initial(given: Any) -> dict[str, Any]:
    """An optimizer's options with the learning rate that it was given, not a warm-up's first."""
    options: dict[str, Any] = {**_as_mapping(given)}
    if "initial_lr" in options:
        options["lr"] = options.pop("initial_lr")
    return options


def plain(value: Any) -> str:
    """A value of ``run.json`` as a text on one line."""
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

"""Which charts there are, and which lines they contain; other modules draw them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from hookengine import greater_is_better
from hookengine_report.runs import Curve, Run
from hookengine_report.scale import Scale, Trace, iteration_scale, trace, value_scale
from hookengine_report.summary import OWN, best_of, last_finite
from hookengine_report.text import number

MOST_CHARTS = 32
MOST_LINES = 8
_POINTS = 24_000  # in all lines of a page together
_WORDS = {"train": "training", "val": "validation", "test": "test"}

Kind = Literal["loss", "metric", "rate", "speed", "other"]


@dataclass
class Line:
    """One curve of one run.

    Attributes:
        label: For the legend.
        note: Its last or best value, as text.
        phase: train, val or test. Training is drawn thin, the others with dots.
        colour: The number of the color.
        trace: The points to draw.
    """

    label: str
    note: str
    phase: str
    colour: int
    trace: Trace


@dataclass
class Chart:
    """Lines over the same iterations.

    Attributes:
        title: The title above it.
        kind: What it shows.
        lines: The lines, those of training first.
        x: The iterations.
        y: The values.
    """

    title: str
    kind: Kind
    lines: list[Line]
    x: Scale
    y: Scale


@dataclass
class _Group:
    """The curves that belong in one chart."""

    title: str
    kind: Kind
    curves: list[tuple[int, str, str, Curve]] = field(default_factory=list)


def charts_of(runs: Sequence[Run]) -> tuple[list[Chart], list[str]]:
    """Choose the charts of one run, or of several in the same plots.

    Returns:
        The charts, losses first; and the names of the curves that do not fit.
    """
    groups = _groups(runs)
    kinds: tuple[Kind, ...] = ("loss", "metric", "rate", "other", "speed")
    ordered = sorted(groups.values(), key=lambda group: kinds.index(group.kind))
    most = MOST_LINES if len(runs) == 1 else 6 * MOST_LINES
    split = [part for group in ordered for part in _parts(group, most)]
    shown, left = split[:MOST_CHARTS], split[MOST_CHARTS:]
    number_of_lines = sum(len(group.curves) for group in shown)
    limit = min(max(_POINTS // max(number_of_lines, 1), 60), 900)
    x = iteration_scale(max(run.iterations for run in runs), epoch_ends(runs))
    charts = [_chart(group, runs, x, limit) for group in shown]
    return charts, [name for group in left for _, _, name, _ in group.curves]


def epoch_ends(runs: Sequence[Run]) -> list[int]:
    """Return the last iteration of each whole epoch, if the runs agree on these, else none."""
    first, *others = sorted(runs, key=lambda run: -run.iterations)
    ends = _whole_epochs(first)
    if not first.by_epoch or any(
        not run.by_epoch or (own := _whole_epochs(run)) != ends[: len(own)] for run in others
    ):
        return []
    return ends


def _whole_epochs(run: Run) -> list[int]:
    ends = [run.epoch_ends[epoch] for epoch in sorted(run.epoch_ends)]
    if sorted(run.epoch_ends) != list(range(1, len(ends) + 1)):
        return []  # records of some epochs are missing
    if len(ends) > 1 and ends[-1] - ends[-2] < ends[0]:
        ends.pop()  # the run ended within it
    return ends


def _groups(runs: Sequence[Run]) -> dict[str, _Group]:
    groups: dict[str, _Group] = {}
    bare = {name for run in runs for _, name in run.curves if "/" not in name}
    for index, run in enumerate(runs):
        for (phase, name), curve in run.curves.items():
            place = _place(phase, name, bare, together=len(runs) == 1)
            if place is not None:
                kind, key, title = place
                group = groups.setdefault(key, _Group(title, kind))
                if phase != "train" and group.kind == "other":
                    group.kind = "metric"
                group.curves.append((index, phase, name, curve))
    return groups


def _place(
    phase: str, name: str, bare: Iterable[str], together: bool
) -> tuple[Kind, str, str] | None:
    """Return kind, key and title of the chart that a scalar belongs in, or None."""
    if phase == "train" and name in OWN:
        titles = {"samples_per_second": "Samples per second", "memory": "Peak memory, MB"}
        return ("speed", f"own {name}", titles[name]) if name in titles else None
    if phase != "train" and name == "seconds":
        return None
    prefix, _, last = name.rpartition("/")
    if phase == "train" and last == "lr":
        title = "Learning rate" if together or not prefix else name
        return "rate", "own lr" if together else name, title
    if "loss" in name.lower():
        if not together:
            return "loss", name, name
        whole = last == "loss"
        title = "Loss" if whole else "Terms of the loss" if "loss" in bare else "Losses"
        return "loss", f"own {title}", title
    kind: Kind = "other" if phase == "train" else "metric"
    if not prefix or not together:
        return kind, name, name
    # raw/accuracy belongs to accuracy, f1/macro and f1/micro to f1.
    known = greater_is_better(last) is not None and greater_is_better(prefix) is None
    key = last if last in bare or known else name.partition("/")[0]
    return kind, key, key


def _parts(group: _Group, size: int) -> list[_Group]:
    """Split a group into charts of at most ``size`` lines."""
    if len(group.curves) <= size:
        return [group]
    parts = [group.curves[i : i + size] for i in range(0, len(group.curves), size)]
    return [
        _Group(f"{group.title} ({n} of {len(parts)})", group.kind, part)
        for n, part in enumerate(parts, start=1)
    ]


def _chart(group: _Group, runs: Sequence[Run], x: Scale, limit: int) -> Chart:
    names = {name for _, _, name, _ in group.curves}
    phases = {phase for _, phase, _, _ in group.curves}
    lines = []
    for place, (index, phase, name, curve) in enumerate(group.curves):
        run = runs[index]
        if len(runs) > 1:
            label, colour = run.name, index
            label += f", {_WORDS.get(phase, phase)}" if len(phases) > 1 else ""
        elif len(names) == 1:
            label, colour = _WORDS.get(phase, phase), list(_WORDS).index(phase)
        else:
            label = f"{name}, {_WORDS.get(phase, phase)}" if len(phases) > 1 else name
            colour = place
        drawn = trace(list(zip(curve.iterations, curve.values, strict=True)), limit)
        note = _note(run, phase, name, curve)
        note += f", {drawn.missing:,} not finite" * bool(drawn.missing)
        lines.append(Line(label, note, phase, colour, drawn))
    lines.sort(key=lambda line: list(_WORDS).index(line.phase))
    zero = [0.0] if group.kind in ("speed", "rate") else []
    values = (value for line in lines for value in line.trace.values)
    y = value_scale([*zero, *values], may_be_log=group.kind in ("loss", "other"))
    return Chart(group.title, group.kind, lines, x, y)


def _note(run: Run, phase: str, name: str, curve: Curve) -> str:
    best = best_of(name, curve)
    last = number(last_finite(curve))
    if phase == "train" or best.greater is None or math.isnan(best.value):
        return f"last {last}"
    where = f"epoch {run.epoch_of(best.iteration)}"
    where = where if run.by_epoch else f"iteration {best.iteration:.0f}"
    return f"best {number(best.value)} ({where})"

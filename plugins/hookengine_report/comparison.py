"""The page's sections about several runs: results, differing options and times side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence

from hookengine_report.markup import Markup, element, joined
from hookengine_report.runs import Run
from hookengine_report.sections import panel, state, table
from hookengine_report.summary import (
    Best,
    best_values,
    differences,
    last_finite,
    loss_name,
    peak_memory,
    seconds_by_phase,
    throughput,
    total_seconds,
)
from hookengine_report.svg import COLOURS
from hookengine_report.text import duration, memory, number

PHASES = ("training", "waiting for data", "validation", "test", "other")
_MOST_METRICS = 12
_MOST_ROWS = 200


def header(runs: Sequence[Run]) -> Markup:
    """Show the number of runs, and their models."""
    models = dict.fromkeys(str(run.info["model"]) for run in runs if "model" in run.info)
    facts = [element("span", element("b", model)) for model in models]
    title = element("h1", f"{len(runs)} runs compared")
    return element("header", title, element("div", facts, class_="facts"))


def results(runs: Sequence[Run]) -> Markup:
    """Show the key numbers of each run, with the best value of each metric emphasized."""
    found = [{best.name: best for best in best_values(run)} for run in runs]
    metrics = [*dict.fromkeys(name for one in found for name in one)][:_MOST_METRICS]
    tops = {name: _top([one[name] for one in found if name in one]) for name in metrics}
    rows = []
    for index, (run, own) in enumerate(zip(runs, found, strict=True)):
        name = loss_name(run)
        cells = [element("th", _key(index), run.name), element("td", state(run))]
        for metric in metrics:
            best = own.get(metric)
            value = math.nan if best is None else best.value
            kind = "number best" if value == tops[metric] else "number"
            cells.append(element("td", number(value), class_=kind))
        loss = last_finite(run.curves["train", name]) if name is not None else math.nan
        told = (number(loss), number(throughput(run)), duration(total_seconds(run)))
        cells += [element("td", text, class_="number") for text in told]
        cells.append(element("td", memory(peak_memory(run)), class_="number"))
        rows.append(element("tr", cells))
    words = {best.name: best.word for one in found for best in one.values()}
    columns = [
        "run",
        "status",
        *(f"{words[name]} {name}" for name in metrics),
        "training loss",
        "samples/s",
        "time",
        "memory",
    ]
    drawn = table(columns, rows, numbers=range(2, len(columns)))
    return element("section", element("h2", "Results"), panel(drawn))


def _top(values: list[Best]) -> float:
    """Return the best of several runs, or NaN if the name does not tell the direction."""
    finite = [best.value for best in values if math.isfinite(best.value)]
    if not finite or values[0].greater is None:
        return math.nan
    return max(finite) if values[0].greater else min(finite)


def options(runs: Sequence[Run]) -> Markup:
    """Show a row for each option that is not the same in all runs."""
    found = differences(runs)
    heading = element("h2", "Differing options")
    if not found:
        return element("section", heading, element("p", "None.", class_="hint"))
    rows = [
        element(
            "tr",
            element("th", element("code", name)),
            [_value(value) for value in values],
        )
        for name, values in [*found.items()][:_MOST_ROWS]
    ]
    names = [joined(_key(index), run.name) for index, run in enumerate(runs)]
    return element("section", heading, panel(table(["option", *names], rows)))


def _value(text: str) -> Markup:
    shown = text if len(text) <= 200 else text[:200] + "…"
    return element("td", shown, class_="long" if len(text) > 40 else None)


def phases(runs: Sequence[Run]) -> Markup:
    """Show where the time went, as a bar for each run, all to the same scale."""
    found = [seconds_by_phase(run) for run in runs]
    longest = max((math.fsum(one.values()) for one in found), default=0.0)
    if not longest:
        return Markup("")
    if len(runs) == 1:
        (seconds,) = found
        shares = [
            element(
                "li",
                element("i", class_=f"p{PHASES.index(name)}"),
                f"{name} ",
                element("span", f"{duration(s)}, {s / longest:.0%}", class_="hint"),
            )
            for name, s in seconds.items()
        ]
        drawn = panel(_bar(seconds, longest), element("ul", shares, class_="shares"))
    else:
        rows = [
            part
            for run, seconds in zip(runs, found, strict=True)
            if seconds
            for part in (
                element("span", run.name),
                _bar(seconds, longest),
                element("span", duration(math.fsum(seconds.values())), class_="hint"),
            )
        ]
        used = [name for name in PHASES if any(name in one for one in found)]
        keys = [element("li", element("i", class_=f"p{PHASES.index(name)}"), name) for name in used]
        bars = element("div", rows, class_="bars-of")
        drawn = panel(bars, element("ul", keys, class_="shares"))
    return element("section", element("h2", "Time"), drawn)


def _bar(seconds: dict[str, float], longest: float) -> Markup:
    parts = [
        element("i", class_=f"p{PHASES.index(name)}", style=f"width:{100 * s / longest:.3f}%")
        for name, s in seconds.items()
    ]
    told = ", ".join(f"{name} {duration(s)}" for name, s in seconds.items())
    return element("div", parts, class_="bar", role="img", aria_label=told)


def folders(runs: Sequence[Run]) -> Markup:
    """Show the folders of the runs."""
    rows = [
        element("tr", element("th", run.name), element("td", str(run.folder.resolve())))
        for run in runs
    ]
    return element("section", element("h2", "Folders"), panel(table(("run", "folder"), rows)))


def _key(index: int) -> Markup:
    return element("i", class_=f"key s{index % COLOURS}" + " dashed" * (index >= COLOURS))

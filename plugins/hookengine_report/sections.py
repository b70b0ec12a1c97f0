"""The page's sections about one run, other than its curves."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from hookengine import EVENTS, RunFolder
from hookengine_report.markup import Markup, element, joined
from hookengine_report.runs import Run
from hookengine_report.summary import (
    Best,
    best_values,
    initial,
    last_finite,
    loss_name,
    peak_memory,
    plain,
    plugins_of,
    throughput,
    total_seconds,
    unset,
)
from hookengine_report.text import NOTHING, counted, duration, memory, moment, number

_MOST_TILES = 5  # of metrics


def header(run: Run) -> Markup:
    """Show name, model, status, start and number of epochs and iterations."""
    facts = [state(run)]
    if model := run.info.get("model"):
        facts.append(element("span", element("b", str(model))))
    if isinstance(count := run.info.get("parameters"), int):
        facts.append(element("span", element("b", f"{count:,}"), " parameters"))
    if run.iterations:
        for count, noun in ((max(run.epoch_ends), "epoch"), (run.iterations, "iteration")):
            figure, _, word = counted(count, noun).partition(" ")
            facts.append(element("span", element("b", figure), f" {word}"))
    started = run.time("started")
    if math.isfinite(began := min(run.first, started) if run.first < started else started):
        facts.append(element("span", moment(began)))
    heading = [element("h1", run.name), element("div", facts, class_="facts")]
    return element("header", heading, _banner(run))


def state(run: Run) -> Markup:
    """Show the status as one word in its color."""
    word = run.status.partition(":")[0]
    kind = {"finished": "good", "failed": "bad"}.get(word, "wait")
    return element("span", word, class_=f"state {kind}")


def _banner(run: Run) -> Markup:
    word, _, reason = run.status.partition(": ")
    if reason:
        told = [element("b", word.capitalize()), f": {reason}"]
        return element("p", *told, class_="banner" + " bad" * (word == "failed"))
    if word == "running" and math.isfinite(run.latest):
        return element(
            "p", f"It was running when this was drawn; last record {moment(run.latest)}.",
            class_="banner",
        )  # fmt: skip
    return Markup("")


def tiles(run: Run) -> Markup:
    """Show the key numbers."""
    told: list[tuple[str, str, str]] = []
    for best in best_values(run)[:_MOST_TILES]:
        told.append((label(run, best), number(best.value), where(run, best)))
    for name, curve in run.phase("test").items():
        if name != "seconds" and len(told) < _MOST_TILES + 3:
            told.append((f"test {name}", number(last_finite(curve)), "last test"))
    if (loss := loss_name(run)) is not None:
        curve = run.curves["train", loss]
        told.append((f"training {loss}", number(last_finite(curve)), "last record"))
    if math.isfinite(rate := throughput(run)):
        told.append(("samples per second", number(rate), "median"))
    if math.isfinite(seconds := total_seconds(run)):
        told.append(("time in records", duration(seconds), ""))
    if math.isfinite(peak := peak_memory(run)):
        told.append(("peak memory", memory(peak), ""))
    drawn = [
        element(
            "div",
            element("dt", name),
            element("dd", value),
            *([element("dd", note)] if note else []),
            class_="tile",
        )
        for name, value, note in told
    ]
    return element("dl", drawn, class_="tiles") if drawn else Markup("")


def label(run: Run, best: Best) -> str:
    """Name a best value; ``val`` tells it from a training value of the same name."""
    val = "val " * (best.name in run.phase("train"))
    return f"{best.word} {val}{best.name}"


def where(run: Run, best: Best) -> str:
    """Return the epoch or iteration of a value."""
    if math.isnan(best.value):
        return "never finite"
    if run.by_epoch:
        return f"validation, epoch {run.epoch_of(best.iteration)}"
    return f"validation, iteration {best.iteration:,.0f}"


def checkpoints(run: Run) -> Markup:
    """Show the best and the newest checkpoint."""
    rows = []
    for name, manifest in run.checkpoints.items():
        progress = _mapping(manifest.get("progress"))
        iteration, epoch = progress.get("iter"), progress.get("epoch")
        rows.append(
            element(
                "tr",
                element("th", name),
                element("td", element("code", _folder(run, name))),
                element("td", _count(epoch), class_="number"),
                element("td", _count(iteration), class_="number"),
                element("td", _measured(run, name, manifest), class_="long"),
                element("td", str(manifest.get("saved_at", NOTHING))[:16].replace("T", " ")),
            )
        )
    if not rows:
        return Markup("")
    columns = ("", "folder", "epochs", "iterations", "validation there", "saved (UTC)")
    return _section("Checkpoints", panel(table(columns, rows, numbers=(2, 3))))


def _folder(run: Run, name: str) -> str:
    folder = RunFolder(run.folder).checkpoints
    return f"{folder.name}/{(folder / name).resolve().name}"


def _measured(run: Run, name: str, manifest: Mapping[str, Any]) -> str:
    """Return what was measured with its weights: the metric that chose it, or all metrics."""
    iteration = _mapping(manifest.get("progress")).get("iter")
    there = {}
    for metric, curve in run.phase("val").items():
        pairs = zip(curve.iterations, curve.values, strict=True)
        values = [value for at, value in pairs if at == iteration]
        if values and metric != "seconds":
            there[metric] = values[-1]
    chosen = _mapping(manifest.get("best")).get("metric")
    if name == "best" and isinstance(chosen, str) and chosen in there:
        return f"{chosen} {number(there[chosen])}"
    return ", ".join(f"{n} {number(v)}" for n, v in [*there.items()][:6]) or NOTHING


def setup(run: Run) -> Markup:
    """Show the chosen options of loops and optimizers."""
    rows = []
    for phase in ("train", "val", "test"):
        if config := run.section(f"{phase}_cfg"):
            rows.append((f"{phase}_cfg", "", config))
    for name, values in run.section("optimizers").items():
        own = initial(values)
        told = "optimizer" if name == "optimizer" else f"optimizer {name}"
        rows.append((told, str(own.pop("type", "")), own))
    if not rows:
        return Markup("")
    drawn = [
        element("tr", element("th", name), element("td", kind), element("td", options(values)))
        for name, kind, values in rows
    ]
    return _section("Setup", panel(table(("", "type", "options"), drawn), stack=True))


def plugins(run: Run) -> Markup:
    """Show each plugin with its source and options."""
    rows = [
        element(
            "tr",
            element("th", str(plugin.get("name", ""))),
            element("td", element("span", str(plugin.get("source", "")), class_="hint")),
            element("td", options(_mapping(plugin.get("options")))),
        )
        for plugin in plugins_of(run)
    ]
    if not rows:
        return Markup("")
    return _section("Plugins", panel(table(("name", "source", "options"), rows), stack=True))


def options(values: Mapping[str, Any]) -> Markup:
    """Show names and values side by side, unset ones last and paler."""
    chips = []
    for name, value in sorted(values.items(), key=lambda pair: unset(pair[1])):
        text = plain(value)
        text = text if len(text) <= 300 else text[:300] + "…"
        kind = "option unset" if unset(value) else "option"
        chips.append(element("span", element("span", str(name)), f" {text}", class_=kind))
    return element("div", chips, class_="options")


def hooks(run: Run) -> Markup:
    """Show the plugins called at each event, in order."""
    called = run.section("hooks")
    by_subject: dict[str, list[str]] = {}
    for event in [*(e for e in EVENTS if e in called), *(e for e in called if e not in EVENTS)]:
        subject = EVENTS[event].subject if event in EVENTS else "others"
        by_subject.setdefault(subject, []).append(event)
    panels = []
    for subject, events in by_subject.items():
        rows = []
        for event in events:
            places = called[event] if isinstance(called[event], list) else [called[event]]
            rows.append(element("div", element("dt", event), element("dd", _chain(places))))
        panels.append(element("div", element("h3", subject), element("dl", rows), class_="panel"))
    if not panels:
        return Markup("")
    return _section("Hook order", element("div", panels, class_="hooks"))


def _chain(places: Iterable[Any]) -> Markup:
    """Show plugins in order; the reason for a place appears when the pointer is over it."""
    parts: list[str] = []
    for place in places:
        place = place if isinstance(place, dict) else {"plugin": place}  # of an earlier version
        about = "; ".join(str(place[key]) for key in ("reason", "rhythm") if key in place)
        name = element("b", str(place.get("plugin")), title=about or None)
        parts += [" → "] * bool(parts) + [name]
    return joined(*parts)


def environment(run: Run) -> Markup:
    """Show the environment of the run, and its command."""
    found = run.section("environment")
    if not found:
        return Markup("")
    packages = found.get("packages")
    packages = packages if isinstance(packages, dict) else {}
    command = found.get("command")
    rows: list[tuple[str, str]] = [
        (name, plain(found[name]))
        for name in ("python", "platform", "devices", "cuda", "cpus", "threads")
        if name in found
    ]
    if (ranks := run.info.get("world_size")) is not None:
        rows.append(("ranks", plain(ranks)))
    if isinstance(command, list):
        rows.append(("command", " ".join(map(str, command))))
    rows.append(("folder", str(run.folder.resolve())))
    blocks = [
        element("div", _pairs(rows), class_="panel"),
        element("div", _pairs((n, plain(v)) for n, v in packages.items()), class_="panel"),
    ]
    return _section("Environment", element("div", blocks, class_="two"))


def _pairs(rows: Iterable[tuple[str, str]]) -> Markup:
    drawn = [element("tr", element("th", name), element("td", value)) for name, value in rows]
    return element("table", element("tbody", drawn))


def table(columns: Iterable[str], rows: Iterable[str], numbers: Iterable[int] = ()) -> Markup:
    """Build a table that scrolls horizontally if it is too wide.

    Args:
        columns: The names of the columns.
        rows: The ``tr`` elements.
        numbers: The columns whose name is aligned to the right.
    """
    numbers = set(numbers)
    heads = [
        element("th", name, class_="number" if place in numbers else None)
        for place, name in enumerate(columns)
    ]
    content = [element("thead", element("tr", heads)), element("tbody", rows)]
    return element("div", element("table", content, class_="wide"), class_="scroll", tabindex="0")


def panel(*children: str, stack: bool = False) -> Markup:
    """Build a card around something.

    Args:
        children: The content of the card.
        stack: Whether to stack the cells of a table on a narrow page.
    """
    return element("div", *children, class_="panel" + " stack" * stack)


def _section(heading: str, *children: str) -> Markup:
    return element("section", element("h2", heading), *children)


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else NOTHING


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}

"""The picture: a run, or several, at a glance, for a README or a message.

It uses neither pyplot nor ``rcParams``, since it is drawn on a thread while training may draw its
own figures.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import matplotlib
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, get_font
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.text import Text

from hookengine_report.charts import Chart, Kind, Line, charts_of, epoch_ends
from hookengine_report.comparison import PHASES
from hookengine_report.runs import Run
from hookengine_report.scale import Scale
from hookengine_report.sections import label
from hookengine_report.summary import (
    best_values,
    last_finite,
    loss_name,
    peak_memory,
    seconds_by_phase,
    throughput,
    total_seconds,
)
from hookengine_report.text import (
    NOTHING,
    counted,
    duration,
    iteration_texts,
    memory,
    moment,
    number,
    tick_texts,
)

_SIZE = (16.0, 9.0)  # inches, of 100 dots
_INK, _SOFT, _RULE, _GRID, _PAGE = "#1d2024", "#5c636d", "#d9d6cf", "#ebe9e4", "#ffffff"
_COLOURS = (
    "#2563b8",
    "#c8500b",
    "#0f7b6c",
    "#8040bf",
    "#b81d5b",
    "#8f6400",
    "#52606d",
    "#4b7a0d",
)
_PHASE_COLOURS = dict(zip(PHASES, (_COLOURS[i] for i in (0, 3, 1, 2, 6)), strict=True))
_STATES = {"finished": "#1f7a3f", "failed": "#b3261e"}


def picture(runs: Sequence[Run]) -> bytes:
    """Draw a PNG of 1600 x 900 pixels."""
    try:
        return _draw(runs)
    finally:  # the cache holds the open files of the fonts, once for each thread
        vars(font_manager)["_get_font"].cache_clear()


def _draw(runs: Sequence[Run]) -> bytes:
    figure = Figure(figsize=_SIZE, dpi=100, facecolor=_PAGE, edgecolor=_PAGE)
    canvas = FigureCanvasAgg(figure)
    if len(runs) == 1:
        _heading(figure, runs[0])
        _key_numbers(figure, runs[0])
    else:
        _compared(figure, runs)
    _panels(figure, runs)
    buffer = io.BytesIO()
    canvas.print_png(buffer)  # type: ignore[no-untyped-call]
    return buffer.getvalue()


# -- texts --------------------------------------------------------------------------------------


@cache
def _font(bold: bool) -> Path:
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name


def _properties(size: float, bold: bool = False) -> FontProperties:
    return FontProperties(fname=str(_font(bold)), size=size)


def _drawable(text: str, most: int = 200) -> str:
    """Return text on one line, with a box for what the font lacks, to avoid warnings."""
    font = get_font(str(_font(False)))
    shown = "".join(c if c.isprintable() and font.get_char_index(ord(c)) else "□" for c in text)
    return shown if len(shown) <= most else shown[: most - 1] + "…"


def _plain(text: Text, size: float, colour: str = _INK, bold: bool = False) -> Text:
    """Draw text verbatim: a dollar sign in a name does not start a formula."""
    text.set_parse_math(False)
    text.set_usetex(False)
    text.set_antialiased(True)
    text.set_fontproperties(_properties(size, bold))
    text.set_color(colour)
    return text


def _write(
    figure: Figure, x: float, y: float, text: str, size: float, colour: str = _INK, **how: Any
) -> Text:
    bold = how.pop("bold", False)
    told = Text(x, y, _drawable(text, how.pop("most", 200)), transform=figure.transFigure, **how)
    figure.add_artist(_plain(told, size, colour, bold))
    return told


# -- the head -----------------------------------------------------------------------------------


def _heading(figure: Figure, run: Run) -> None:
    _write(figure, 0.035, 0.925, run.name, 24, bold=True, most=60)
    facts = []
    if model := run.info.get("model"):
        facts.append(str(model))
    if isinstance(count := run.info.get("parameters"), int):
        facts.append(f"{count:,} parameters")
    if run.iterations:
        facts.append(counted(max(run.epoch_ends), "epoch"))
        facts.append(counted(run.iterations, "iteration"))
    if math.isfinite(run.time("started")):
        facts.append(moment(run.time("started")))
    _write(figure, 0.035, 0.89, "  ·  ".join(facts), 12.5, _SOFT, most=110)
    word = run.status.partition(":")[0]
    colour = _STATES.get(word, "#8a5a00")
    shown = run.status if len(run.status) <= 70 else run.status[:69] + "…"
    _write(figure, 0.965, 0.93, f"● {shown}", 12.5, colour, ha="right", bold=True)


def _key_numbers(figure: Figure, run: Run) -> None:
    told = []
    for best in best_values(run)[:3]:
        place = f", epoch {run.epoch_of(best.iteration)}" if run.by_epoch else ""
        told.append((number(best.value), f"{label(run, best)}{place}"))
    if (loss := loss_name(run)) is not None:
        told.append((number(last_finite(run.curves["train", loss])), f"training {loss}, last"))
    told.append((number(throughput(run)), "samples per second"))
    told.append((duration(total_seconds(run)), "time in records"))
    told.append((memory(peak_memory(run)), "peak memory"))
    shown = [(value, name) for value, name in told if value != NOTHING]
    width = 0.93 / max(len(shown), 4)
    for index, (value, name) in enumerate(shown):
        _write(figure, 0.035 + index * width, 0.815, value, 21, bold=True, most=16)
        _write(figure, 0.035 + index * width, 0.785, name, 11, _SOFT, most=int(186 * width))
    figure.add_artist(_stroke([0.035, 0.965], [0.755, 0.755], _RULE, 1))


def _compared(figure: Figure, runs: Sequence[Run]) -> None:
    models = dict.fromkeys(str(run.info["model"]) for run in runs if "model" in run.info)
    _write(figure, 0.035, 0.925, f"{len(runs)} runs compared", 24, bold=True)
    _write(figure, 0.035, 0.89, ", ".join(models), 12.5, _SOFT, most=110)
    columns = min(max(len(runs), 3), 4)
    rows = 3
    most = columns * rows
    for index, run in enumerate(runs[:most]):
        few = len(runs) <= columns
        x, y = 0.035 + index % columns * 0.93 / columns, 0.835 - index // columns * 0.034
        told = [
            f"{best.name} {number(best.value)}"
            for best in best_values(run)[: 2 if few else 1]
            if math.isfinite(best.value)
        ]
        if index == most - 1 and len(runs) > most:
            _write(figure, x, y, f"and {len(runs) - most + 1} more", 12, _SOFT)
            break
        colour = _COLOURS[index % len(_COLOURS)]
        figure.add_artist(_stroke([x, x + 0.014], [y + 0.006] * 2, colour, 3, _style(index)))
        room = int(120 / columns)
        if few:
            told.append(duration(total_seconds(run)))
            _write(figure, x + 0.019, y, run.name, 13, bold=True, most=room - 4)
            _write(
                figure,
                x + 0.019,
                y - 0.034,
                ", ".join(told),
                11,
                _SOFT,
                most=int(150 / columns) + 6,
            )
        else:
            _write(figure, x + 0.019, y, "  ".join([run.name, *told]), 12, most=room)
    figure.add_artist(_stroke([0.035, 0.965], [0.755, 0.755], _RULE, 1))


# -- the panels ---------------------------------------------------------------------------------


def _panels(figure: Figure, runs: Sequence[Run]) -> None:
    charts = _chosen(charts_of(runs)[0])
    times = [seconds_by_phase(run) for run in runs]
    count = len(charts) + any(times)
    if not count:
        _write(figure, 0.5, 0.4, "no record was written", 15, _SOFT, ha="center")
        return
    columns = 3 if count > 4 else 2 if count > 1 else 1
    rows = math.ceil(count / columns)
    left, right, top, bottom, gap = 0.035, 0.965, 0.735, 0.03, 0.03
    width = (right - left - gap * (columns - 1)) / columns
    height = (top - bottom) / rows
    for place in range(count):
        x = left + place % columns * (width + gap)
        y = top - (place // columns + 1) * height
        box = (x + 0.035, y + 0.05, width - 0.035, height - 0.13)
        if place < len(charts):
            _draw_chart(figure, charts[place], box, epoch_ends(runs), len(runs) == 1)
        else:
            _draw_times(figure, runs, times, box)


def _chosen(charts: list[Chart]) -> list[Chart]:
    """Choose at most five charts, one of each kind before a second of any."""
    wanted: tuple[Kind, ...] = ("loss", "metric", "rate", "other", "speed", "metric", "loss")
    left = list(charts)
    chosen: list[Chart] = []
    for kind in (*wanted, "metric", "other", "metric", "other", "speed"):
        found = next((chart for chart in left if chart.kind == kind), None)
        if found is not None and len(chosen) < 5:
            left.remove(found)
            chosen.append(found)
    return sorted(chosen, key=charts.index)


def _axes(figure: Figure, box: tuple[float, float, float, float]) -> Axes:
    axes = figure.add_axes(box, facecolor="none")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.grid(False)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(_SOFT)
        spine.set_linewidth(0.8)
        spine.set_antialiased(True)
    axes.tick_params(which="both", length=0, pad=5)
    return axes


def _title(figure: Figure, box: tuple[float, float, float, float], title: str, hint: str) -> None:
    x, y, _, height = box
    name = _write(figure, x - 0.035, y + height + 0.05, title, 13, bold=True, most=44)
    if hint:
        shown = name.get_window_extent(figure.canvas.get_renderer())  # type: ignore[attr-defined]
        end = shown.x1 / (100 * _SIZE[0])
        _write(figure, end + 0.008, y + height + 0.05, hint, 10.5, _SOFT)


def _draw_chart(
    figure: Figure,
    chart: Chart,
    box: tuple[float, float, float, float],
    epochs: list[int],
    legend: bool,
) -> None:
    axes = _axes(figure, box)
    averaged = any(line.trace.band for line in chart.lines)
    hints = ["log scale"] * chart.y.log + ["mean and range"] * averaged
    _title(figure, box, chart.title, ", ".join(hints))
    for line in chart.lines:
        if line.trace.band:
            _draw_band(axes, line, chart)
        axes.add_line(_drawn(line, chart))
    for tick in chart.y.ticks:
        grid = _stroke([0, 1], [chart.y.place(tick)] * 2, _GRID, 1)
        grid.set_zorder(0)
        axes.add_line(grid)
    _label(axes.set_yticks, axes.get_yticklabels, chart.y, tick_texts(chart.y.ticks, chart.y.log))
    by_epoch = len(epochs) > 1
    texts = _epochs(chart.x, epochs) if by_epoch else iteration_texts(chart.x.ticks)
    _label(axes.set_xticks, axes.get_xticklabels, chart.x, texts)
    unit = "epoch" if by_epoch else "iteration"
    _write(figure, box[0] - 0.006, box[1] - 0.023, unit, 9.5, _SOFT, ha="right")
    if legend:
        _legend(figure, axes, chart, box)


def _draw_band(axes: Axes, line: Line, chart: Chart) -> None:
    x = [chart.x.place(at) for at, _, _ in line.trace.band]
    low, high = (
        [
            math.nan if math.isnan(limits[i]) else chart.y.place(limits[i])
            for limits in line.trace.band
        ]
        for i in (1, 2)
    )
    colour = _COLOURS[line.colour % len(_COLOURS)]
    axes.fill_between(
        x, low, high, facecolor=colour, alpha=0.24, linewidth=0, edgecolor="none", antialiased=True
    )


def _drawn(line: Line, chart: Chart) -> Line2D:
    x = [chart.x.place(at) for at, _ in line.trace.points]
    y = [math.nan if math.isnan(value) else chart.y.place(value) for _, value in line.trace.points]
    finite = sum(not math.isnan(value) for value in y)
    dots = finite == 1 or (line.phase != "train" and finite <= 40)
    width = 1.1 if line.phase == "train" else 2.2
    colour = _COLOURS[line.colour % len(_COLOURS)]
    drawn = _stroke(x, y, colour, width, _style(line.colour))
    if dots:
        drawn.set_marker("o")
        drawn.set_markersize(5.5)
    drawn.set_clip_on(False)
    return drawn


def _stroke(
    x: Sequence[float],
    y: Sequence[float],
    colour: str,
    width: float,
    style: Literal["-", "--"] = "-",
) -> Line2D:
    """Return a line with everything set that rcParams would decide otherwise."""
    return Line2D(
        x,
        y,
        color=colour,
        linewidth=width,
        linestyle=style,
        marker="None",
        markerfacecolor=colour,
        markeredgecolor=colour,
        markeredgewidth=0,
        solid_joinstyle="round",
        solid_capstyle="butt",
        antialiased=True,
    )


def _style(colour: int) -> Literal["-", "--"]:
    return "--" if colour >= len(_COLOURS) else "-"


def _epochs(scale: Scale, ends: list[int]) -> list[str]:
    """Return the epochs that end at the ticks."""
    epoch_of = {float(end): epoch for epoch, end in enumerate(ends, start=1)}
    return [f"{epoch_of.get(tick, 0)}" for tick in scale.ticks]


def _label(place: Any, labels: Any, scale: Scale, texts: list[str]) -> None:
    place([scale.place(tick) for tick in scale.ticks], labels=texts)
    for text in labels():
        _plain(text, 10.5, _SOFT)


def _legend(
    figure: Figure, axes: Axes, chart: Chart, box: tuple[float, float, float, float]
) -> None:
    shown = chart.lines[:3] if len(chart.lines) > 3 else chart.lines
    handles = [_stroke([], [], _COLOURS[line.colour % len(_COLOURS)], 2.5) for line in shown]
    room = 46 // len(shown)
    alone = len(shown) == 1 and shown[0].phase == "train"
    notes = [line.note.partition(" (")[0] if len(shown) > 1 else line.note for line in shown]
    whole = [
        note if alone else f"{line.label}  {note}" for line, note in zip(shown, notes, strict=True)
    ]
    fits = sum(map(len, whole)) <= 52
    labels = [
        _drawable(told if fits else line.label, 60 if fits else room)
        for told, line in zip(whole, shown, strict=True)
    ]
    legend = axes.legend(
        handles,
        labels,
        loc="lower left",
        bbox_to_anchor=(box[0] - 0.035, box[1] + box[3] + 0.012),
        bbox_transform=figure.transFigure,
        ncols=len(shown),
        frameon=False,
        numpoints=1,
        handleheight=0.7,
        labelspacing=0.5,
        borderpad=0,
        borderaxespad=0,
        handlelength=1.3,
        handletextpad=0.5,
        columnspacing=1.6,
        prop=_properties(10.5),
    )
    for handle in legend.get_lines():
        handle.set_antialiased(True)
    for text in legend.get_texts():
        _plain(text, 10.5, _SOFT)


def _draw_times(
    figure: Figure,
    runs: Sequence[Run],
    times: list[dict[str, float]],
    box: tuple[float, float, float, float],
) -> None:
    _title(figure, box, "Time", "")
    x, y, width, height = box
    axes = _axes(figure, (x - 0.035, y, width + 0.035, height))
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines["bottom"].set_visible(False)
    if len(runs) == 1:
        (seconds,) = times
        rows = [(name, {name: value}) for name, value in seconds.items()]
    else:
        rows = [(run.name, own) for run, own in zip(runs, times, strict=True) if own][:8]
    longest = max(math.fsum(own.values()) for _, own in rows)
    whole = math.fsum(math.fsum(own.values()) for _, own in rows)
    for index, (name, own) in enumerate(rows):
        at = 1 - (index + 0.6) / max(len(rows), 4)
        start = 0.0
        for phase, value in own.items():
            length = 0.62 * value / longest
            bar = Rectangle((start, at - 0.0425), length, 0.085, facecolor=_PHASE_COLOURS[phase])
            bar.set_edgecolor("none")
            bar.set_antialiased(True)
            axes.add_patch(bar)
            start += length
        told = duration(math.fsum(own.values()))
        if len(runs) == 1:
            told += f"   {math.fsum(own.values()) / whole:.0%}"
        for left, text, across, colour in (
            (0.0, name, 0.075, _INK),
            (start + 0.02, told, -0.03, _SOFT),
        ):
            _plain(axes.text(left, at + across, _drawable(text, 40)), 10.5, colour)
    if len(runs) > 1:
        used = [phase for phase in PHASES if any(phase in own for own in times)]
        place = 0.0
        for phase in used:
            word = phase.removeprefix("waiting for ")
            _plain(axes.text(place, -0.1, word, va="top"), 10, _PHASE_COLOURS[phase], bold=True)
            place += 0.04 + 0.019 * len(word)

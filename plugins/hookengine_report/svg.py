"""Charts as SVG that stretches with the page, with their labels as HTML that does not.

The colors are those of the page's style sheet, so that one drawing serves both its light and its
dark scheme.
"""

from __future__ import annotations

import math

from hookengine import Histogram
from hookengine_report.charts import Chart, Line
from hookengine_report.markup import Markup, element, joined
from hookengine_report.scale import Point, Scale, value_scale
from hookengine_report.text import iteration_texts, number, tick_texts

COLOURS = 8
_WIDTH, _HEIGHT = 2000, 1000  # of the drawing, whatever size it is shown at
_MOST_DOTS = 60


def chart(drawn: Chart, epochs: list[int]) -> Markup:
    """Draw a card with title, legend, axes and lines.

    Args:
        drawn: The chart to draw.
        epochs: The last iterations of the epochs, which get a row of labels below the axis.
    """
    alone = len(drawn.lines) == 1 and drawn.lines[0].phase == "train"
    title = [element("h3", drawn.title)]
    if drawn.y.log:
        title.append(element("span", "log scale", class_="hint"))
    together = max(line.trace.together for line in drawn.lines)
    if together > 1:
        told = f"mean and range of each {together:,} records"
        title.append(element("span", told, class_="hint"))
    lines = [_line(line, drawn) for line in drawn.lines]
    drawing = _svg(drawn.title, _grid(drawn.x, drawn.y), lines)
    plot = element("div", drawing, class_="plot", data_end=f"{drawn.x.high:.17g}")
    body = joined(_value_labels(drawn.y), plot, _iteration_labels(drawn.x, epochs))
    return element(
        "figure",
        element("figcaption", *title),
        element("ul", [_legend(line, alone) for line in drawn.lines], class_="legend"),
        element("div", body, class_="chart"),
        class_="card",
    )


def histogram(counted: Histogram, name: str) -> Markup:
    """Draw the bars of a histogram."""
    counts, edges = counted.counts, counted.edges
    y = value_scale([0.0, *counts])
    low, high = edges[0], edges[-1]
    bars = []
    if high > low and all(map(math.isfinite, [*counts, *edges])):
        for count, left, right in zip(counts, edges, edges[1:], strict=False):
            x0, x1 = ((edge - low) / (high - low) * _WIDTH for edge in (left, right))
            top = (1 - y.place(count)) * _HEIGHT
            bars.append(f"M{x0:.0f} {_HEIGHT}V{top:.0f}H{x1:.0f}V{_HEIGHT}Z")
    drawing = _svg(name, [], [element("path", d="".join(bars), class_="bars s0")])
    labels = [
        element("span", number(value), style=f"left:{place}%", class_=kind)
        for place, value, kind in (
            (0, low, "first"),
            (50, (low + high) / 2, None),
            (100, high, "end"),
        )
    ]
    plot = element("div", drawing, class_="plot low")
    return element(
        "div", _value_labels(y), plot, element("div", labels, class_="x"), class_="chart"
    )


def _svg(title: str, grid: list[Markup], lines: list[Markup]) -> Markup:
    return element(
        "svg",
        grid,
        lines,
        viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
        preserveAspectRatio="none",
        role="img",
        aria_label=title,
    )


def _grid(x: Scale, y: Scale) -> list[Markup]:
    across = "".join(f"M0 {(1 - y.place(t)) * _HEIGHT:.0f}H{_WIDTH}" for t in y.ticks)
    down = "".join(f"M{x.place(t) * _WIDTH:.0f} 0V{_HEIGHT}" for t in x.ticks)
    return [element("path", d=across + down, class_="grid")]


def _line(line: Line, drawn: Chart) -> Markup:
    """Draw a line, its range, and dots for validations; add the values for the readout."""
    points = line.trace.points
    places = [[_place(point, drawn) for point in segment] for segment in _segments(points)]
    path = "".join(
        "M" + "L".join(f"{x} {y}" for x, y in segment) + "h0" * (len(segment) == 1)
        for segment in places
    )
    kind = f"s{line.colour % COLOURS} {line.phase}" + " dashed" * (line.colour >= COLOURS)
    values = [(x, y) for x, y in points if not math.isnan(y)]
    curve = element(
        "path",
        d=path,
        class_=f"line {kind}",
        data_name=line.label,
        data_x=" ".join(f"{x:.15g}" for x, _ in values),
        data_y=" ".join(f"{y:.5g}" for _, y in values),
    )
    parts = [*_band(line, drawn), curve]
    alone = [segment[0] for segment in places if len(segment) == 1]
    all_places = [place for segment in places for place in segment]
    few = line.phase != "train" and len(all_places) <= _MOST_DOTS
    if dots := all_places if few else alone:
        drawing = "".join(f"M{x} {y}h0" for x, y in dots)
        parts.append(element("path", d=drawing, class_=f"dots {kind}"))
    return joined(*parts)


def _band(line: Line, drawn: Chart) -> list[Markup]:
    """Draw the range of the values behind each point, one area per stretch without a gap."""
    lows = _segments([(x, low) for x, low, _ in line.trace.band])
    highs = _segments([(x, high) for x, _, high in line.trace.band])
    areas = [
        "M" + "L".join("{} {}".format(*_place(p, drawn)) for p in [*low, *reversed(high)]) + "Z"
        for low, high in zip(lows, highs, strict=True)
    ]
    if not areas:
        return []
    return [element("path", d="".join(areas), class_=f"band s{line.colour % COLOURS}")]


def _place(point: Point, drawn: Chart) -> tuple[int, int]:
    x, y = point
    return round(drawn.x.place(x) * _WIDTH), round((1 - drawn.y.place(y)) * _HEIGHT)


def _segments(points: list[Point]) -> list[list[Point]]:
    """Return the stretches without a gap."""
    segments: list[list[Point]] = [[]]
    for point in points:
        if math.isnan(point[1]):
            segments.append([])
        else:
            segments[-1].append(point)
    return [segment for segment in segments if segment]


def _value_labels(scale: Scale) -> Markup:
    labels = zip(scale.ticks, tick_texts(scale.ticks, scale.log), strict=True)
    spans = [
        element("span", text, style=f"top:{100 * (1 - scale.place(tick)):.2f}%")
        for tick, text in labels
    ]
    return element("div", spans, class_="y", aria_hidden="true")


def _iteration_labels(scale: Scale, epochs: list[int]) -> Markup:
    """Draw the iterations and, below ticks at the ends of epochs, the epochs."""
    epoch_of = {float(end): epoch for epoch, end in enumerate(epochs, start=1)}
    both = len(epochs) > 1
    spans = [element("span", "iteration", class_="name")]
    if both:
        spans.append(element("span", "epoch", class_="name second"))
    texts = iteration_texts(scale.ticks)
    for place, (tick, text) in enumerate(zip(scale.ticks, texts, strict=True)):
        where = f"left:{100 * scale.place(tick):.2f}%"
        odd = " odd" * ((len(scale.ticks) - 1 - place) % 2)
        spans.append(element("span", text, style=where, class_=f"tick{odd}"))
        if both and tick in epoch_of:
            told = f"{epoch_of[tick]}"
            spans.append(element("span", told, style=where, class_=f"tick second{odd}"))
    return element("div", spans, class_="x" + " both" * both, aria_hidden="true")


def _legend(line: Line, alone: bool) -> Markup:
    """Draw a line of the legend; a single line needs no name."""
    kind = f"key s{line.colour % COLOURS} {line.phase}" + " dashed" * (line.colour >= COLOURS)
    note = [" ", element("span", line.note, class_="hint")] if line.note else []
    label = "" if alone else line.label
    return element("li", element("i", class_=kind), label, *note)

"""The last images, histograms, tables and texts of a run."""

from __future__ import annotations

import base64

from hookengine import Histogram, Image, Table
from hookengine_report.markup import Markup, element
from hookengine_report.runs import Medium, Run
from hookengine_report.svg import histogram
from hookengine_report.text import number

_MOST = 24
_MOST_BYTES = 2_000_000  # of all images together
_MOST_ROWS = 50
_MOST_LETTERS = 5000
_SMALL = 200  # pixels


def media(run: Run) -> Markup:
    """Show each with its name and the iteration in which it was logged."""
    room, drawn = _MOST_BYTES, []
    for (phase, name), (iteration, medium) in [*run.media.items()][:_MOST]:
        size = 0
        if isinstance(medium, Image):
            try:
                size = len(medium.png)
            except OSError:
                continue  # the file has been deleted
        fits = size <= room
        room -= size if fits else 0
        shown = _shown(medium, name) if fits else _too_large(size)
        hint = element("span", f"{phase}, iteration {iteration:,}", class_="hint")
        long = isinstance(medium, Table) and len(medium.columns) > 4
        drawn.append(
            element(
                "figure",
                element("figcaption", element("h3", name), hint),
                shown,
                class_="card" + " long" * long,
            )
        )
    if not drawn:
        return Markup("")
    cards = element("div", drawn, class_="media")
    return element("section", element("h2", "Images, histograms, tables, texts"), cards)


def _shown(medium: Medium, name: str) -> Markup:
    if isinstance(medium, Image):
        return _image(medium, name)
    if isinstance(medium, Histogram):
        return histogram(medium, name)
    if isinstance(medium, Table):
        return _table(medium)
    text = medium if len(medium) <= _MOST_LETTERS else medium[:_MOST_LETTERS] + " …"
    return element("pre", text)


def _image(image: Image, name: str) -> Markup:
    width = int.from_bytes(image.png[16:20], "big")  # where a PNG file stores it
    source = f"data:image/png;base64,{base64.b64encode(image.png).decode()}"
    small = "small" if width < _SMALL else None
    picture = element("img", src=source, alt=image.caption or name, class_=small)
    if image.caption is None:
        return picture
    return element("div", picture, element("p", image.caption, class_="hint"))


def _too_large(size: int) -> Markup:
    told = f"an image of {size / 1e6:.1f} MB is too large for this page; it is in the run's folder"
    return element("p", told, class_="hint")


def _table(table: Table) -> Markup:
    heads = element("tr", [element("th", column) for column in table.columns])
    rows = [element("tr", [_cell(cell) for cell in row]) for row in table.rows[:_MOST_ROWS]]
    content = element("table", element("thead", heads), element("tbody", rows))
    more = len(table.rows) - _MOST_ROWS
    told = [element("p", f"and {more:,} more rows", class_="hint")] if more > 0 else []
    return element("div", content, *told, class_="scroll", tabindex="0")


def _cell(cell: object) -> Markup:
    if isinstance(cell, (int, float)) and not isinstance(cell, bool):
        return element("td", number(cell))
    return element("td", "" if cell is None else str(cell)[:500])

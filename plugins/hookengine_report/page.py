"""The page: one self-contained HTML file, without references to anything outside."""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Sequence
from importlib.resources import files

from hookengine_report import comparison, sections
from hookengine_report.charts import Chart, charts_of, epoch_ends
from hookengine_report.markup import Markup, element, joined
from hookengine_report.media import media
from hookengine_report.runs import Run
from hookengine_report.svg import chart
from hookengine_report.text import moment

_MOST_EPOCHS = 2000  # whose ends are passed to the readout


def page(runs: Sequence[Run]) -> str:
    """Return the HTML of one run, or of several in the same plots."""
    charts, left_out = charts_of(runs)
    if len(runs) == 1:
        (run,) = runs
        title = run.name
        before = [sections.header(run), sections.tiles(run)]
        after = [
            sections.checkpoints(run),
            media(run),
            sections.setup(run),
            sections.plugins(run),
            sections.hooks(run),
            sections.environment(run),
        ]
    else:
        title = f"{len(runs)} runs compared"
        before = [comparison.header(runs), comparison.results(runs), comparison.options(runs)]
        after = [comparison.folders(runs)]
    body = [*before, _curves(charts, epoch_ends(runs)), _left_out(left_out)]
    body += [comparison.phases(runs), *after, _footer()]
    return _document(title, joined(*body), epoch_ends(runs))


def _document(title: str, body: Markup, epochs: list[int]) -> str:
    style, script = _resource("style.css"), _resource("readout.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("style", style),
    )
    ends = " ".join(map(str, epochs)) if len(epochs) <= _MOST_EPOCHS else ""
    main = element("main", body, data_epochs=ends)
    html = element("html", head, element("body", main, element("script", script)), lang="en")
    return f"<!doctype html>\n{html}\n"


def _resource(name: str) -> Markup:
    return Markup((files(__package__) / name).read_text(encoding="utf-8"))


def _curves(charts: list[Chart], epochs: list[int]) -> Markup:
    if charts:
        drawn = element("div", [chart(one, epochs) for one in charts], class_="charts")
    else:
        drawn = element("p", "No record was written.", class_="hint")
    return element("section", element("h2", "Curves"), drawn)


def _left_out(names: list[str]) -> Markup:
    if not names:
        return Markup("")
    told = dict.fromkeys(names)
    some = ", ".join([*told][:40]) + " …" * (len(told) > 40)
    return element("p", f"{len(told)} more scalars without a chart: {some}", class_="hint")


def _footer() -> Markup:
    return element("footer", f"Drawn by hookengine's report, {moment(time.time())}.")

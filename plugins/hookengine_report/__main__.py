"""``python -m hookengine_report RUN...``: draw a run, or compare several."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from hookengine_report.runs import find_runs
from hookengine_report.write import write_report


def main(
    runs: Annotated[
        list[Path], typer.Argument(help="folders of runs; for a work_dir, its newest run is drawn")
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="a folder, or a file that ends with .html or .png [default: the folder of the "
            "run; the current folder for several runs]"
        ),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="draw all runs of a work_dir")] = False,
) -> None:
    """Draw one run, or several in the same plots, as an HTML page and a PNG."""
    try:
        found = [folder for path in runs for folder in find_runs(path, every)]
        distinct = [*{folder.resolve(): folder for folder in found}.values()]
        if out is None:
            out = distinct[0] if len(distinct) == 1 else Path()
        written = write_report(distinct, out)
    except OSError as error:
        named = error.filename is not None and error.strerror is not None
        sys.exit(f"{error.filename}: {error.strerror}" if named else str(error))
    for path in written:
        print(path)


if __name__ == "__main__":
    typer.run(main)

"""The two files of a report, each written atomically."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from hookengine_report.page import page
from hookengine_report.picture import picture
from hookengine_report.runs import distinguished, read_run

NAME = "report"


def write_report(folders: Sequence[str | Path], out: str | Path) -> list[Path]:
    """Draw one run, or several in the same plots.

    Args:
        folders: The folders of the runs.
        out: A folder, which is created if needed; or a file ``NAME.html`` or ``NAME.png``, and the
            other file is written beside it.

    Returns:
        The paths of the page and the picture.

    Raises:
        ValueError: ``folders`` is empty.
        FileNotFoundError: A folder holds no run.
        OSError: The files cannot be written.
    """
    if not folders:
        raise ValueError("folders is empty. Pass the folder of at least one run")
    runs = distinguished([read_run(folder) for folder in folders])
    html, png = _paths(Path(out).expanduser())
    html.parent.mkdir(parents=True, exist_ok=True)
    _replace(html, page(runs).encode("utf-8", "replace"))
    _replace(png, picture(runs))
    return [html, png]


def _paths(out: Path) -> tuple[Path, Path]:
    if out.suffix in (".html", ".png") and not out.is_dir():
        return out.with_suffix(".html"), out.with_suffix(".png")
    return out / f"{NAME}.html", out / f"{NAME}.png"


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise

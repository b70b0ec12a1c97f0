"""What the pages under docs/ show is what happens."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"

RUN_BLOCKS = """
import json, sys
blocks = json.load(sys.stdin)
for number, block in enumerate(blocks):
    try:
        exec(compile(block, f"block {number}", "exec"), globals())
    except Exception as error:
        print(f"{type(error).__name__}: {error}")
    print("=== next ===", flush=True)
"""


def blocks_of(page: Path) -> list[tuple[str, str]]:
    """Each Python block, with the text block that follows it, if one does."""
    pattern = r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?"
    return re.findall(pattern, page.read_text(), re.DOTALL)


@pytest.mark.parametrize("name", ["weight-initialization.md"])
def test_each_block_prints_what_the_page_shows(name: str, tmp_path: Path) -> None:
    import json

    blocks = blocks_of(DOCS / name)
    assert blocks
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", RUN_BLOCKS],
        input=json.dumps([code for code, _ in blocks]),
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    printed = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \[\w+ *\] ", "", done.stdout)
    outputs = printed.split("=== next ===\n")
    for (code, expected), actual in zip(blocks, outputs, strict=False):
        assert actual == expected, code

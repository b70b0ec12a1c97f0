"""What the pages under docs/ show is what happens."""

from __future__ import annotations

import re
from itertools import combinations
from pathlib import Path

import pytest

from tests import forks

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


@pytest.mark.process
@pytest.mark.parametrize(
    "name",
    [
        "weight-initialization.md",
        "optimization.md",
        "averaged-weights.md",
        "checkpoints.md",
        "logging.md",
        "plugins.md",
    ],
)
def test_each_block_prints_what_the_page_shows(name: str, tmp_path: Path) -> None:
    import json

    blocks = blocks_of(DOCS / name)
    assert blocks
    codes = json.dumps([code for code, _ in blocks])
    done = forks.run(RUN_BLOCKS, stdin=codes, strict=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    printed = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \[\w+ *\] ", "", done.stdout)
    outputs = printed.split("=== next ===\n")
    for (code, expected), actual in zip(blocks, outputs, strict=False):
        assert actual == expected, code


def test_the_table_of_pairs_is_whole_and_names_tests_that_are_there() -> None:
    """The pairs of the page are those that are tested, and each test that it names exists."""
    source = (DOCS.parent / "tests" / "end_to_end" / "test_optimization.py").read_text()
    features = re.findall(r'"(\w+)"', re.search(r"FEATURES = \((.*?)\)", source, re.DOTALL)[1])
    rows = re.findall(
        r"^\| `(\w+)`, `(\w+)` \| .+ \| (.+) \|$", page("optimization.md"), re.MULTILINE
    )
    assert [(a, b) for a, b, _ in rows] == [*combinations(features, 2)]
    tests = all_tests()
    for a, b, named in rows:
        first, *more = re.findall(r"`(.+?)`", named)
        assert first == f"test_pair[{a}-{b}]"
        assert {*more} <= tests
    for name in re.findall(r"`(test_\w+)`", page("optimization.md")):
        assert name in tests


def test_each_cell_about_checkpoints_names_a_test_that_is_there() -> None:
    text = page("checkpoints.md")
    rows = [
        line for line in text[text.index("## What is tested") :].splitlines() if line[:1] == "|"
    ]
    cells = [row for row in rows if "`test_" in row]
    assert len(cells) == len(rows) - 4  # the heads of two tables
    named = re.findall(r"`(test_\w+)(?:\[\d\])?`", text)
    assert len(named) > 20
    assert {*named} <= all_tests()


def all_tests() -> set[str]:
    return {
        name
        for path in (DOCS.parent / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
    }


def page(name: str) -> str:
    return (DOCS / name).read_text()

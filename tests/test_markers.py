"""``tests/conftest.py`` fails a test that starts a process or compiles without its marker."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytest_plugins = ["pytester"]

TESTS = """
import multiprocessing, os, subprocess, sys
import pytest
from tests.ranks import on_ranks

def rank(folder):
    return {}

def test_quiet():
    pass

def test_a_process():
    subprocess.run([sys.executable, "-c", ""], check=True)

@pytest.mark.process
def test_a_marked_process():
    subprocess.run([sys.executable, "-c", ""], check=True)

def test_a_fork():
    if os.fork() == 0:
        os._exit(0)
    os.wait()

@pytest.mark.process
def test_ranks_as_a_process(tmp_path):
    on_ranks(1, rank, tmp_path)

def test_compiling():
    import torch
    torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1))
"""


@pytest.mark.process
def test_a_test_without_its_marker_fails(pytester: pytest.Pytester) -> None:
    pytester.makeconftest((ROOT / "tests" / "conftest.py").read_text())
    pytester.makeini(
        f"[pytest]\npythonpath = {ROOT}\naddopts = --import-mode=importlib --strict-markers -p "
        "no:cacheprovider\nmarkers =\n  gpu: a\n  process: b\n  ranks: c\n"
    )
    pytester.makepyfile(test_sample=TESTS)
    result = pytester.runpytest_subprocess("-W", "ignore", "--show-capture=no")
    result.assert_outcomes(passed=2, failed=4)
    printed = result.stdout.str()
    for marker, what in [
        ("process", "subprocess.Popen"),
        ("process", "os.fork"),
        ("ranks", "hookengine.tests.ranks"),
        ("process", "torch.compile"),
    ]:
        # Python 3.13 names the system's call before it.
        text = rf"the marker '{marker}' it must not use (os\.posix_spawn, )?{re.escape(what)}"
        assert re.search(text, printed), what

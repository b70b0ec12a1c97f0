"""The house: the size of the kernel, the paths that users import, the table in CONTRIBUTING.md."""

from __future__ import annotations

import ast
import importlib
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
KERNEL = ("hookengine/events/**/*.py", "hookengine/loop/**/*.py", "hookengine/runner.py")
LIMIT = 2200
NOT_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


def code_lines(source: str) -> int:
    """Count the lines that hold code: no docstrings, no comments, no blank lines."""
    texts = {
        line
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    lines = {
        line
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type not in NOT_CODE
        for line in range(token.start[0], token.end[0] + 1)
    }
    return len(lines - texts)


def test_code_lines_are_counted_without_texts() -> None:
    assert code_lines('"""One.\n\nTwo."""\n\nx = 1  # three\n# four\ny = (\n    2\n)\n') == 4


def test_the_kernel_is_small() -> None:
    files = [path for pattern in KERNEL for path in sorted(ROOT.glob(pattern))]
    assert len(files) > 15
    sizes = {str(path.relative_to(ROOT)): code_lines(path.read_text()) for path in files}
    assert sum(sizes.values()) <= LIMIT, sizes


def _python_texts() -> Iterator[tuple[str, str]]:
    """The examples, and the Python blocks of the README and the docs."""
    for path in sorted((ROOT / "examples").glob("**/*.py")):
        yield path.name, path.read_text()
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for block in re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL):
            yield path.name, block


def _imported_names() -> list[str]:
    found: set[str] = set()
    for _, text in _python_texts():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hookengine"):
                found |= {f"{node.module}:{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Import):
                names = [a.name for a in node.names if a.name.startswith("hookengine")]
                found |= {f"{name}:" for name in names}
    seed = {
        "hookengine.dist:get_rank",
        "hookengine.evaluator:BaseMetric",
        "hookengine.evaluator:Evaluator",
        "hookengine.model:BaseModel",
        "hookengine.optim:OptimWrapper",
        "hookengine.optim:OptimWrapperDict",
        "hookengine.registry:MODELS",
        "hookengine.registry:Registry",
        "hookengine.registry:WEIGHT_INITIALIZERS",
        "hookengine.runner:Runner",
    }
    return sorted(found | seed)


@pytest.mark.parametrize("name", _imported_names())
def test_what_the_pages_import_is_there(name: str) -> None:
    module, _, attribute = name.partition(":")
    imported = importlib.import_module(module)
    assert not attribute or getattr(imported, attribute) is not None


def test_the_table_of_the_house_is_complete() -> None:
    listed = re.findall(r"^\| `(hookengine/[\w/.]+\.pyi?)` \|", CONTRIBUTING, re.MULTILINE)
    there = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "hookengine").glob("**/*.py*")
        if path.suffix in (".py", ".pyi")
        and (path.name != "__init__.py" or path.stat().st_size > 200)
    }
    assert len(listed) == len(set(listed))
    assert set(listed) == there


THIN = {"__init__.py", "__main__.py"}
RE_EXPORTS = {"hookengine/optim.py"}


def test_the_tests_of_each_file_are_found_by_its_name() -> None:
    for path in sorted((ROOT / "hookengine").glob("**/*.py")):
        place = path.relative_to(ROOT)
        if path.name not in THIN and str(place) not in RE_EXPORTS:
            assert (ROOT / "tests" / place.parent / f"test_{path.name}").exists(), place
    for path in sorted((ROOT / "plugins").glob("*/__init__.py")):
        name = path.parent.name
        folder = ROOT / "tests/plugins" / name
        file = ROOT / "tests/plugins" / f"test_{name.removeprefix('hookengine_')}.py"
        assert folder.is_dir() or file.exists(), name


def test_the_files_of_the_plugins_are_listed() -> None:
    rows = dict(re.findall(r"^\| `(hookengine_\w+)` \| (.*) \|$", CONTRIBUTING, re.MULTILINE))
    for package in sorted((ROOT / "plugins").iterdir()):
        files = {path.name for path in package.glob("*.py")} - {"__init__.py"}
        listed = set(re.findall(r"`(\w+\.py)`", rows.get(package.name, "")))
        assert listed == files, package.name


RUN_FILES = {"metrics.jsonl", "run.json", "run.log", "manifest.json"}
RUN_FOLDERS = {"checkpoints", "media"}
"""Also words of other kinds: these count only where a path is built."""
SPELLED = {
    "plugins/hookengine_wandb/session.py:run.json": "the id of the W&B run, in W&B's own folder",
}


def names_in_paths(source: str) -> set[str]:
    """Find the names of the files of a run that a source spells in a path."""
    tree = ast.parse(source)
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    parts: list[ast.expr] = []  # of a path, for certain
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
            parts += (node.left, node.right)
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func).rpartition(".")[2]
            if called in {"Path", "join", "joinpath", "with_name"}:
                parts += node.args
    texts = {
        node: node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs
    }
    found = set()
    for node, text in texts.items():
        names = set(text.split("/")) if " " not in text else set()
        certain = "/" in text or node in parts
        found |= names & (RUN_FILES | RUN_FOLDERS if certain else RUN_FILES)
    return found


def test_names_in_paths_are_found() -> None:
    assert names_in_paths('"""run.json"""\nx = "no run.json, no media/ folder", "media"') == set()
    assert names_in_paths('x = folder / "media" / "a.png"') == {"media"}
    assert names_in_paths('x = f"checkpoints/{name}", os.path.join(y, "media")') == {
        "checkpoints",
        "media",
    }
    assert names_in_paths('for name in ("run.log", "run.json"): pass') == {"run.log", "run.json"}


def test_only_run_folder_spells_the_names_of_the_files_of_a_run() -> None:
    spelled = {
        f"{path.relative_to(ROOT)}:{name}"
        for folder in ("hookengine", "plugins")
        for path in (ROOT / folder).glob("**/*.py")
        for name in names_in_paths(path.read_text())
        if path.name != "run_folder.py"
    }
    assert spelled == set(SPELLED), "use hookengine.RunFolder"

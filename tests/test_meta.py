"""What holds for every module, and for the packaging."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import hookengine

ROOT = Path(__file__).parents[1]
MODULES = sorted(
    ".".join(path.relative_to(base).with_suffix("").parts).removesuffix(".__init__")
    for base, pattern in ((ROOT, "hookengine/**/*.py"), (ROOT / "plugins", "**/*.py"))
    for path in base.glob(pattern)
)


IMPORT_EACH = """
import os, sys, warnings
import torch
warnings.simplefilter("error")
# What takes long and many of the modules need, once for all the forked processes.
import torch.distributed.checkpoint, torch.distributed.fsdp, matplotlib.figure
import pydantic, structlog
import hookengine  # the first thing that the import of any of these modules does
failed = []
for module in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        try:
            __import__(module)
        except BaseException as error:
            print(f"{module}: {type(error).__name__}: {error}", flush=True)
            os._exit(1)
        os._exit(0)
    failed += [module] * (os.waitpid(child, 0)[1] != 0)
sys.exit(bool(failed))
"""


@pytest.mark.process
def test_each_module_is_imported_alone_without_a_warning() -> None:
    command = [
        sys.executable,
        "-c",
        IMPORT_EACH,
        *MODULES,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.process
def test_the_kernel_is_imported_under_w_error() -> None:
    subprocess.run([sys.executable, "-W", "error", "-c", "import hookengine"], check=True)


def test_every_package_is_typed_and_has_its_entry_points() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = {
        value.partition(":")[0].partition(".")[0]
        for group in project["entry-points"].values()
        for value in group.values()
    }
    packages = {path.parent.name for path in (ROOT / "plugins").glob("*/__init__.py")}
    assert named - {"torch", "hookengine"} == packages  # their own entry points
    for package in (*(ROOT / "plugins" / name for name in packages), ROOT / "hookengine"):
        assert (package / "py.typed").exists()


def test_the_kernel_imports_no_plugin() -> None:
    for path in (ROOT / "hookengine").glob("**/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.startswith("hookengine_") for name in names), path


def test_plugins_import_only_the_kernels_public_names() -> None:
    for path in (ROOT / "plugins").glob("**/*.py"):
        package = path.relative_to(ROOT / "plugins").parts[0]
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert not any(alias.name.startswith("hookengine") for alias in node.names), path
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hookengine"):
                if node.module == "hookengine":
                    assert {alias.name for alias in node.names} <= set(hookengine.__all__), path
                else:
                    assert (node.module or "").partition(".")[0] == package, path


OF_THE_RUNNER = {"runner", "progress", "train_loop", "val_loop", "test_loop", "loop"}
ASSIGNED: dict[str, str] = {}
"""``"plugins/FILE.py:target"``, and the reason why no method of the Runner does that."""


def assigned_to_the_runner(source: str) -> set[str]:
    """Find the attributes of the Runner, its progress and its loops that a source assigns."""

    aliases = {
        target.id
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Assign) and ast.unparse(node.value).split(".")[-1] == "runner"
        for target in node.targets
        if isinstance(target, ast.Name)
    }

    def belongs(owner: ast.expr) -> bool:
        parts = [part.removeprefix("_") for part in ast.unparse(owner).split(".")]
        if any(part.startswith("optim_wrapper") for part in parts):
            return False  # its attributes are there to be set
        return parts[-1] in OF_THE_RUNNER or parts[0] in aliases or "runner" in parts[:-1]

    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load):
            found |= {ast.unparse(node)} if belongs(node.value) else set()
        elif isinstance(node, ast.Call) and node.args and belongs(node.args[0]):
            called = ast.unparse(node.func).rpartition(".")[2].strip("_")
            found |= {ast.unparse(node)} if called in {"setattr", "delattr", "vars"} else set()
        elif isinstance(node, ast.Attribute) and node.attr == "__dict__" and belongs(node.value):
            found.add(ast.unparse(node))
    return found


def test_assignments_to_the_runner_are_found() -> None:
    for source in (
        "runner.model = model",
        "self._runner.name += 'x'",
        "runner.progress.iter: int = 0",
        "self._progress.stopped = 'why'",
        "for runner.val_loop.metrics in (): pass",
        "del runner.model",
        "setattr(runner, name, value)",
        "object.__setattr__(runner.progress, name, value)",
        "vars(runner)['model'] = model",
        "runner.__dict__.update(model=model)",
    ):
        assert assigned_to_the_runner(source), source
    for source in ("r = runner; r.device = 3", "runner.train_loop.cfg.max_epochs = 3"):
        assert assigned_to_the_runner(source), source
    for source in (
        "self.runner = runner",
        "self._progress = runner.progress",
        "optim_wrapper.window_length = 2",
        "runner.optim_wrappers[name].window_length = 2",
        "runner.requests['stop'] = reason",
        "iteration = runner.progress.iter",
    ):
        assert not assigned_to_the_runner(source), source


def test_plugins_annotate_the_runner() -> None:
    """So that mypy checks what they do with it."""
    untyped = []
    for path in (ROOT / "plugins").glob("**/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            arguments = node.args if isinstance(node, ast.FunctionDef | ast.Lambda) else None
            for argument in arguments.args + arguments.kwonlyargs if arguments else ():
                kind = ast.unparse(argument.annotation) if argument.annotation else "none"
                if argument.arg == "runner" and not re.fullmatch(
                    r"(Runner|RunInfo)( \| None)?", kind
                ):
                    untyped.append(f"{path.relative_to(ROOT)}:{argument.lineno} {kind}")
    assert not untyped


def test_plugins_change_the_runner_only_through_its_methods() -> None:
    assigned = {
        f"{path.relative_to(ROOT)}:{target}"
        for path in (ROOT / "plugins").glob("**/*.py")
        for target in assigned_to_the_runner(path.read_text())
    }
    assert assigned == set(ASSIGNED)


@pytest.mark.process
def test_no_file_names_a_registry_host_or_a_path_of_a_machine() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no git checkout")
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if path.suffix in {".png", ""} or path == Path(__file__) or not path.exists():
            continue
        text = path.read_text()
        for word in ("pypi.org", "pythonhosted", "/root/", "/work/"):
            assert word not in text, f"{name} contains {word}"

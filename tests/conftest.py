"""What the tests share: the fixtures, whose types are in tests/fixtures.py."""

from __future__ import annotations

import os
import platform
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy.testing  # noqa: F401 - numpy 1 starts a process as this is imported
import pytest
import torch
from torch.utils.data import DataLoader

from hookengine import MODEL_WRAPPERS, MODELS, PLUGINS, WEIGHT_INITIALIZERS, Runner
from hookengine.registry import ANSWERS
from tests import forks
from tests.fixtures import Install, MakeData, MakeRunner, Toy, ToyAccuracy, ToyRunner, toy_data


@pytest.fixture(autouse=True)
def quiet_and_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOOKENGINE_DISABLE", raising=False)
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture
def toy() -> type[Toy]:
    return Toy


@pytest.fixture
def accuracy() -> type[ToyAccuracy]:
    return ToyAccuracy


@pytest.fixture
def data() -> MakeData:
    return toy_data


@pytest.fixture
def make(tmp_path: Path) -> Iterator[MakeRunner]:
    """Build Runners over the toy: bare, two epochs of five batches, unless told otherwise."""
    runners: list[Runner] = []

    def build(validate: bool = False, test: bool = False, **options: Any) -> ToyRunner:
        torch.manual_seed(0)
        model = options.pop("model", None)
        model = Toy() if model is None else model
        options.setdefault("defaults", ())
        options.setdefault("train_dataloader", DataLoader(toy_data(), batch_size=4))
        options.setdefault("train_cfg", dict(max_epochs=2))
        options.setdefault("optim_wrapper", dict(optimizer=dict(type="SGD", lr=0.1)))
        options.setdefault("work_dir", tmp_path / "work_dir")
        for phase in ["val"] * validate + ["test"] * test:
            loader = DataLoader(toy_data(10, seed=1), batch_size=4)
            options.setdefault(f"{phase}_dataloader", loader)
            options.setdefault(f"{phase}_evaluator", ToyAccuracy())
        runner = ToyRunner(model, **options)
        runners.append(runner)
        return runner

    yield build
    for runner in runners:
        runner.close()


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Put distributions into a temporary folder on the path, as pip would."""
    modules = []

    def put(
        source: str | None,
        points: str = "greeter = greeter_package:Greeter",
        requires: tuple[str, ...] = (),
        name: str = "greeter-dist",
        group: str = "hookengine.plugins",
        module: str = "greeter_package",
    ) -> Path:
        folder = tmp_path / name
        info = folder / f"{name.replace('-', '_')}-1.5.dist-info"
        info.mkdir(parents=True)
        lines = [f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.5\n"]
        lines += [f"Requires-Dist: {line}\n" for line in requires]
        (info / "METADATA").write_text("".join(lines))
        (info / "entry_points.txt").write_text(f"[{group}]\n{points}\n")
        if source is not None:
            (folder / f"{module}.py").write_text(textwrap.dedent(source))
        monkeypatch.syspath_prepend(str(folder))
        monkeypatch.delitem(sys.modules, module, raising=False)
        modules.append(module)
        return folder

    yield put
    for module in modules:
        sys.modules.pop(module, None)
    monkeypatch.undo()
    for registry in (PLUGINS, MODELS, MODEL_WRAPPERS, WEIGHT_INITIALIZERS, ANSWERS):
        registry.entry_points()


# -- which tests start processes, and where they run --------------------------------------------

platform.platform()  # asks `uname`, once in a process
os.environ["OMP_NUM_THREADS"] = "1"  # of processes that are started: they would starve each other


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each worker of pytest-xdist whole files, and one of them all files with ranks.

    Two pairs of ranks at a time would starve each other on two cores. The tests of a file share
    what takes long. (The groups of pytest-xdist 3.8, by marker, do nothing under pytest 9.2.)
    """
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "ranks" if "tests.ranks" in (config.rootpath / file).read_text() else file

    config.option.loadscopereorder = False
    return Scheduling(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what needs an accelerator; on a worker of pytest-xdist let the longest come first."""
    for item in items:
        if "gpu" in item.keywords and not torch.accelerator.is_available():
            item.add_marker(pytest.mark.skip(reason="no accelerator here"))
        if "ranks" in item.keywords:
            item.add_marker(pytest.mark.process)
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: 2 - ("process" in item.keywords) - ("ranks" in item.keywords))


STARTS_A_PROCESS = {
    *("subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.system"),
    *(forks.PROCESS, forks.RANKS),
}
started: set[str] = set()


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if event in STARTS_A_PROCESS:
        started.add(event)


sys.addaudithook(_note)


def graphs_compiled() -> int:
    """Count the frames that torch's compiler has compiled in this process."""
    dynamo: Any = sys.modules.get("torch._dynamo.utils")
    return 0 if dynamo is None else int(dynamo.counters["frames"]["total"])


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> Any:
    """Forget what other tests have started."""
    started.clear()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Any:
    """Fail a test that starts a process, or compiles, and has no marker that says so."""
    before = graphs_compiled()
    result = yield
    seen = {*started, *["torch.compile"] * (graphs_compiled() > before)}
    needed = "ranks" if forks.RANKS in seen else "process"
    if seen and needed not in item.keywords:
        pytest.fail(f"without the marker {needed!r} it must not use {', '.join(sorted(seen))}")
    return result

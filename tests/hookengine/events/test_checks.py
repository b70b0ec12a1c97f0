"""Tests of ``hookengine/events/checks.py``."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import hookengine
from hookengine import Plugin, Runner
from hookengine.events.checks import check_methods
from tests.fixtures import MakeRunner


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("after_train_itr(self)", "Did you mean 'after_train_iter'"),
        ("on_error(self)", "unknown event 'on_error'"),
        ("after_train_iter(self, output)", "Did you mean 'outputs'"),
        ("after_train_iter(self, ouputs=None)", "Did you mean 'outputs'"),
        ("after_train_iter(self, *args)", "without * or **"),
        ("after_train_iter(self, **kwargs)", "without * or **"),
    ],
)
def test_misspelled_events_and_arguments_are_refused(method: str, message: str) -> None:
    namespace: dict[str, object] = {}
    exec(f"class Misspelt:\n    def {method}: pass", namespace)
    plugin = namespace["Misspelt"]()  # type: ignore[operator]
    with pytest.raises(TypeError) as caught:
        check_methods("misspelled", plugin, "a module")
    assert message in str(caught.value)
    assert "'misspelled'" in str(caught.value)


def test_properties_options_and_private_methods_are_no_events() -> None:
    class Careful(Plugin):
        resume: str = "auto"
        on_error: str = "warn"

        def _before_anything(self) -> None: ...

        def after_run(self) -> None: ...

        @property
        def after_all(self) -> None:
            raise AssertionError("evaluated")

    check_methods("careful", Careful(), "a module")


def test_a_default_may_bind_a_value(make: MakeRunner) -> None:
    runner, seen = make(), list[int]()
    for number in (1, 2):

        def hook(runner: Runner, number: int = number) -> None:
            seen.append(number)

        hook.__name__ = f"hook_{number}"
        runner.on("before_run")(hook)
    runner.train()
    assert seen == [1, 2]


OLD = '''
    @event.per("iter").deprecated("use after_train_iter; gone in 0.4")
    def after_iteration(self, runner: Runner, loss: Any) -> None:
        """An event that a later version replaces."""

    @event.deprecated(metrics="use runner.val_loop.metrics; gone in 0.4")
    def after_train(self, runner: Runner, metrics: Any) -> None:
'''

SCRIPT = """
import torch, warnings
from torch import nn
from hookengine import Plugin, Runner, hookimpl

class Old(Plugin):
    @hookimpl(every=2)
    def after_iteration(self, runner, loss):
        print("after_iteration", loss)

    def after_train(self, runner, metrics):
        print("after_train", metrics)

class New(Plugin):
    def after_train(self, runner):
        print("new")

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    model = nn.Linear(2, 1)
    runner = Runner(model, "work_dir", [(torch.ones(3, 2), torch.ones(3, 1))],
                    train_cfg=dict(max_epochs=1), loss=nn.MSELoss(), defaults=(),
                    optim_wrapper=torch.optim.SGD(model.parameters()), plugins=[Old(), New()])
    runner.on("before_train")(lambda: None)  # the plugins are put in order again
    runner.train()
for warning in caught:
    print(f"{warning.category.__name__}: {warning.message}")
runner.hooks.after_iteration(runner, 0.5)
runner.progress.iter = 2
runner.hooks.after_iteration(runner, 0.25)
runner.hooks.after_train(runner, {"accuracy": 1.0})
"""


@pytest.mark.process
def test_what_a_later_version_deprecates_still_works_and_warns_once(tmp_path: Path) -> None:
    """A copy of hookengine, in which one event is old and another one has an old argument."""
    shutil.copytree(Path(hookengine.__file__).parent, tmp_path / "hookengine")
    contract = tmp_path / "hookengine" / "events" / "hookspecs.py"
    now = "    @event\n    def after_train(self, runner: Runner) -> None:\n"
    source = contract.read_text()
    assert now in source
    contract.write_text(source.replace(now, OLD.lstrip("\n")))
    loops = tmp_path / "hookengine" / "loop" / "loops.py"
    call = "hooks.after_train(runner)"
    assert call in loops.read_text()
    loops.write_text(loops.read_text().replace(call, "hooks.after_train(runner, {})"))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=tmp_path,  # where Python looks first
        capture_output=True,
        text=True,
    )
    old = "plugin 'old' (__main__):"
    assert done.stdout.splitlines() == [
        "after_train {}",
        "new",
        f"FutureWarning: {old} the event 'after_iteration' is deprecated: use after_train_iter; "
        "gone in 0.4",
        f"FutureWarning: {old} the argument 'metrics' of the event 'after_train' is deprecated: "
        "use runner.val_loop.metrics; gone in 0.4",
        "after_iteration 0.25",
        "after_train {'accuracy': 1.0}",
        "new",
    ], done.stderr

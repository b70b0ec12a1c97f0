"""The contract: every event is documented, and fires at its place."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hookengine import Sink
from hookengine.cli import events_page
from hookengine.events import hookspecs
from hookengine.events.hookspecs import EVENTS, SUBJECTS
from tests.fixtures import MakeRunner

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("event", EVENTS.values(), ids=lambda event: event.name)
def test_an_event_is_documented_as_it_is_signed(event: Any) -> None:
    assert event.doc.partition("\n\n")[0].endswith((".", ";"))
    page = (ROOT / "docs" / "events.md").read_text()
    start = page.index(f"### `{event}`\n\n*{event.kind}*")
    about, doc = page[start:].split("\n\n", 2)[1:]
    assert doc.startswith(f"{event.doc}\n")
    assert ("`every` counts" in about) == (event.kind.counter is not None)
    drawn = event.name.replace("_test", "_val")  # testing is drawn as validation
    assert re.search(rf"\b{drawn}\b", inspect.getdoc(hookspecs) or ""), "not in the drawing"
    for mentioned in re.findall(r"``(\w+)``", event.doc):
        if mentioned in {"runner", "outputs", "role", "error", "batch_idx", "optim_wrapper"}:
            assert mentioned in event.arguments


def test_the_page_of_events_is_up_to_date() -> None:
    assert (ROOT / "docs" / "events.md").read_text() == events_page(), "run make docs"


def test_a_transform_names_one_of_its_arguments_and_no_event_has_more_than_five() -> None:
    for event in EVENTS.values():
        assert len(event.arguments) <= 5
        assert event.arguments[0] == "runner"
        assert (event.kind.name == "transform") == (event.kind.argument is not None)
        if event.kind.argument is not None:
            assert event.kind.argument in event.arguments


def test_every_event_is_found_once() -> None:
    names = [name for subject in SUBJECTS for name in vars(subject) if name in EVENTS]
    assert sorted(names) == sorted(EVENTS)


def recorder(log: list[str]) -> object:
    """A plugin that answers every event with nothing, and notes that it was asked."""
    source = "\n".join(
        f"def {event.name}(self, {', '.join(event.arguments)}): _log.append('{event.name}')"
        for event in EVENTS.values()
    )
    namespace: dict[str, Any] = {"_log": log}
    exec(source, namespace)
    methods = {name: namespace[name] for name in EVENTS}
    return type("Recorder", (), methods)()


BUILD = "configure initialize_model convert_model wrap_model"


ITERATION = (
    "before_train_iter should_step forward_context after_forward scale_loss backward "
    "finish_gradients before_optim_step optim_step after_optim_step after_train_iter "
    "agree safe_point"
)


VAL_ITERATION = "before_val_iter forward_context after_val_iter"


def test_events_fire_in_the_documented_order_over_a_whole_run(make: MakeRunner) -> None:
    log: list[str] = []
    runner = make(plugins=[recorder(log)], validate=True, test=True, train_cfg=dict(max_epochs=1))
    loaders = "setup_dataloader setup_dataloader setup_dataloader setup_optimizer resume"
    assert log == f"{BUILD} {loaders}".split()

    log.clear()
    runner.train()
    iterations = " ".join([ITERATION] * 5)
    validation = (
        f"before_val before_val_epoch evaluated_models {' '.join([VAL_ITERATION] * 3)} "
        "before_metrics after_val_epoch after_val agree safe_point"
    )
    assert (
        log
        == (
            f"before_run before_train before_train_epoch {iterations} after_train_epoch "
            f"agree safe_point {validation} after_train after_run"
        ).split()
    )

    log.clear()
    runner.test()
    iteration = VAL_ITERATION.replace("val", "test")
    assert (
        log
        == (
            f"before_run before_test before_test_epoch evaluated_models "
            f"{' '.join([iteration] * 3)} before_metrics after_test_epoch after_test after_run"
        ).split()
    )

    log.clear()
    runner.log({"value": 1.0})
    state = runner.state_dict()
    runner.load_state_dict(state)
    runner.close()
    runner.close()
    state_events = ["before_save_checkpoint", "before_load_checkpoint", "after_load_checkpoint"]
    assert log == ["log", *state_events, "unconfigure"]


def test_every_event_fires_somewhere(make: MakeRunner) -> None:
    log: list[str] = []

    class Failing(nn.Module):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            raise ValueError("no")

    runner = make(plugins=[recorder(log)], validate=True, test=True, defaults=("logging",))
    batch = torch.ones(2, 4), torch.zeros(2, dtype=torch.long)
    runner.on("before_optim_step", once=True)(lambda: runner.repeat(batch))
    runner.train()
    runner.test()
    runner.log({"value": 1.0})
    runner.load_state_dict(runner.state_dict())
    runner.close()
    runner = make(
        plugins=[recorder(log)],
        model=Failing(),
        loss=nn.MSELoss(),
        optim_wrapper=None,
        train_cfg=None,
        train_dataloader=None,
        validate=True,
    )
    with pytest.raises(ValueError, match="no"):
        runner.val()

    class Nowhere(Sink):
        def write(self, record: Any) -> None: ...

    plugins = [recorder(log), Nowhere()]
    runner = make(plugins=plugins, validate=True, defaults=("logging", "checkpoint"))
    runner.load_state_dict(runner.state_dict())
    runner.train()
    runner.close()
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    make(plugins=[recorder(log), "swa"], model=model, loss=nn.CrossEntropyLoss()).train()
    assert set(log) == set(EVENTS)

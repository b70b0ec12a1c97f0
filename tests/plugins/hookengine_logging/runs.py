"""Build Runners with the plugin, and read the records that they have written."""

from __future__ import annotations

import json
from typing import Any

from tests.fixtures import MakeRunner

LOGGING = ("logging",)

SCRIPT = """
import resource, signal, sys, torch
from torch import nn
from hookengine import Runner
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
model = nn.Linear(1, 1)
runner = Runner(model, sys.argv[1], [(torch.ones(1, 1), torch.ones(1, 1))] * 6,
                loss=nn.MSELoss(), optim_wrapper=torch.optim.SGD(model.parameters(), lr=0.1),
                train_cfg=dict(max_epochs=1), plugins=[dict(type="logging", interval=1)])
"""
"""A script that builds a Runner over six iterations, in the folder given as its argument."""


def logging_runner(make: MakeRunner, **options: Any) -> Any:
    """Build a Runner with the plugin, which writes a record every 2 iterations by default."""
    interval = options.pop("interval", 2)
    plugins = [dict(type="logging", interval=interval), *options.pop("plugins", [])]
    return make(defaults=LOGGING, plugins=plugins, **options)


def written(runner: Any, phase: str | None = None) -> list[dict[str, Any]]:
    """Read the records of a run, or of one phase."""
    text = (runner.run_dir / "metrics.jsonl").read_text()
    records = [json.loads(line) for line in text.splitlines()]
    return [r for r in records if phase in (None, r["phase"])]

"""SIGKILL at random moments, inside saves too: resumed, a run ends where it would have ended.

``tests/soak/killing.py`` is the same for hours.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from tests import forks

SOAK = Path(__file__).parents[1] / "soak" / "killing.py"


@pytest.mark.process
def test_killed_at_36_random_moments() -> None:
    done = forks.run_file(SOAK, "--kills", "36", "--workers", "2")
    assert done.returncode == 0, done.stderr
    killed = {name: int(n) for n, name in (x.split(maxsplit=1) for x in done.stdout.splitlines())}
    ended = killed.pop("runs that came to their end")
    assert ended > 0
    assert sum(killed.values()) >= 36
    wanted = {
        *("before_train_iter", "after_forward", "before_val", "after_val_epoch"),
        *("after_train_epoch", "before_save_checkpoint", "os.mkdir", "os.rename", "os.remove"),
    }
    assert wanted <= killed.keys()  # in mid-window, before and in a validation, inside of a save


def test_the_comparison_sees_a_difference() -> None:
    """The soak can fail."""
    import torch

    spec = importlib.util.spec_from_file_location("killing", SOAK)
    assert spec is not None
    assert spec.loader is not None
    killing: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(killing)
    one = {"a": [torch.zeros(2)], "b": {"c": 1}}
    assert killing.differences(one, {"a": [torch.zeros(2)], "b": {"c": 1}}) == []
    assert killing.differences(one, {"a": [torch.tensor([0, 1e-45])], "b": {"c": 1}}) == ["/a/0"]
    assert killing.differences(one, {"a": [torch.zeros(2)], "b": {"c": 2}}) == ["/b/c: 1 != 2"]
    assert killing.differences([1, 2], [1]) == [": 2 and 1 items"]

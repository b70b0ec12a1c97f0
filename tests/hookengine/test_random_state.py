"""Random states are taken, kept through torch.save, and put back."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from hookengine import get_random_state, preserved_random_state, set_random_state


def draw() -> tuple[float, float, float]:
    return random.gauss(0, 1), float(np.random.randn()), torch.randn(1).item()


def test_a_state_that_was_saved_safely_gives_the_same_numbers(tmp_path: Path) -> None:
    draw()  # an odd number of Gaussians: the second of a pair is part of the state
    torch.save(get_random_state(), tmp_path / "state.pt")
    expected = [draw() for _ in range(3)]
    set_random_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert [draw() for _ in range(3)] == expected


def test_what_is_drawn_inside_is_not_missed_outside() -> None:
    state = get_random_state()
    expected = draw()
    set_random_state(state)
    with preserved_random_state():
        draw()
    assert draw() == expected
    set_random_state(state)
    with pytest.raises(LookupError), preserved_random_state():
        draw()
        raise LookupError
    assert draw() == expected


@pytest.mark.gpu
def test_the_devices_states_are_part_of_it() -> None:
    torch.rand(1, device="cuda")
    state = get_random_state()
    expected = torch.rand(3, device="cuda")
    set_random_state(state)
    assert torch.equal(torch.rand(3, device="cuda"), expected)

"""What is told of where a run runs."""

from __future__ import annotations

import pytest

from hookengine.setup.environment import without_secrets


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        ("train.py --lr 0.1 key", "train.py --lr 0.1 key"),
        ("train.py --api-key abc --lr 0.1", "train.py --api-key *** --lr 0.1"),
        ("train.py --token=abc password=x", "train.py --token=*** password=***"),
        ("train.py --secret --lr=1", "train.py --secret --lr=1"),
        ("train.py --tokens=5 --monkey=no", "train.py --tokens=5 --monkey=***"),
    ],
)
def test_what_is_named_after_a_secret_is_not_shown(command: str, shown: str) -> None:
    assert without_secrets(command.split()) == shown.split()

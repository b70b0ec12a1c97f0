"""Tests of ``hookengine/model/stub.py``."""

from __future__ import annotations

from pathlib import Path

import pytest

import hookengine.model
from hookengine import (
    MODELS,
)
from hookengine.model.stub import stub


def test_type_checkers_see_the_names_that_plugins_offer() -> None:
    path = Path(hookengine.model.__file__).with_suffix(".pyi")
    assert path.read_text() == stub(), "run `make docs`"
    offered = set(MODELS.own_entry_points())
    assert offered <= set(hookengine.model.__all__) <= set(dir(hookengine.model))


def test_an_unknown_name_of_the_module_is_answered() -> None:
    with pytest.raises(ImportError, match="BaseDataPreprocesor"):
        from hookengine.model import BaseDataPreprocesor  # type: ignore[attr-defined]  # noqa: F401
    with pytest.raises(AttributeError, match="Did you mean 'BaseDataPreprocessor'"):
        hookengine.model.BaseDataPreprocesor  # type: ignore[attr-defined]  # noqa: B018
    assert not hasattr(hookengine.model, "__wrapped__")

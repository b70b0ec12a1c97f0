"""Tests of ``hookengine/model/loaded.py``."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from tests.hookengine.model.blocks import Block, loaded


def test_a_module_knows_which_tensors_were_loaded_into_it() -> None:
    whole = nn.Sequential(Block(), Block())
    assert loaded(whole[0]) == set()
    state = {name: value for name, value in whole.state_dict().items() if name != "1.fc.bias"}
    whole.load_state_dict(state, strict=False)
    assert loaded(whole[0]) == {"fc.weight", "fc.bias"}
    assert loaded(whole[1]) == {"fc.weight"}
    for twin in (copy.deepcopy(whole), pickle.loads(pickle.dumps(whole)), whole.double()):
        assert loaded(twin[1]) == {"fc.weight"}


def test_what_is_replaced_or_renamed_in_loading_counts_and_what_does_not_fit_does_not() -> None:
    block = Block()
    block.load_state_dict(Block().state_dict(), assign=True)
    assert loaded(block) == {"fc.weight", "fc.bias"}

    def rename(module: Any, state: Any, prefix: str, *_: Any) -> None:
        state[prefix + "weight"] = state.pop(prefix + "old")

    block = Block()
    block.fc.register_load_state_dict_pre_hook(rename)
    block.load_state_dict({"fc.old": torch.ones(2, 2)}, strict=False)
    assert loaded(block) == {"fc.weight"}

    block = Block(inner=Block())
    with pytest.raises(RuntimeError, match="size mismatch"):
        block.load_state_dict({"inner.fc.bias": torch.ones(7), "inner.fc.weight": torch.ones(2, 2)})
    assert loaded(block) == set()  # what a BaseModule within knows, it knows itself
    assert loaded(block.inner) == {"fc.weight"}


def test_shared_modules_on_the_meta_device_are_known_as_loaded_by_assignment() -> None:
    for _ in range(20):  # a freed parameter's id may be taken by the next one
        with torch.device("meta"):
            block = Block()
            block.twin = block.fc
        block.load_state_dict(
            {
                f"{n}.{p}": torch.ones(2, 2)[0 if p == "bias" else slice(None)]
                for n in ("fc", "twin")
                for p in ("weight", "bias")
            },
            assign=True,
        )
        assert loaded(block) == {"fc.weight", "fc.bias"}


def test_what_takes_the_place_of_a_loaded_tensor_is_not_loaded() -> None:
    block = Block()
    block.load_state_dict(Block().state_dict())
    block.fc = nn.Linear(2, 2)
    assert loaded(block) == set()


def test_inference_tensors_load_as_in_any_module() -> None:
    with torch.inference_mode():
        block = Block()
        block.load_state_dict(Block().state_dict())

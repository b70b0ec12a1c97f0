"""Tests of ``hookengine/model/loaded.py``."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from hookengine import loaded_tensors, remember_loaded
from hookengine.model import load_weights
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


# -- modules that are no BaseModule -------------------------------------------------------------


def known(module: nn.Module) -> set[str]:
    """Names of the tensors in any module that are known as loaded."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return {name for name, tensor in tensors if any(tensor is t for t in loaded_tensors(module))}


def test_what_is_loaded_into_any_module_is_known() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    assert known(net) == set()
    state = {name: value for name, value in net.state_dict().items() if name != "0.bias"}
    assert net.load_state_dict(state, strict=False).missing_keys == ["0.bias"]
    expected = {*state}
    assert known(net) == expected
    block = Block(net=net)
    assert known(block) == {f"net.{name}" for name in expected}
    assert loaded(block) == set()
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), net.double()):
        assert known(twin) == expected
    assert b"hookengine" not in pickle.dumps(net)
    net[0] = nn.Linear(2, 2)
    assert known(net) == {name for name in expected if name.startswith("1")}
    block.is_init = False
    assert known(net) == set()


def test_what_was_loaded_before_an_error_is_known_unless_it_is_undone() -> None:
    net = nn.Linear(2, 2)
    bad = {"weight": torch.ones(2, 2), "bias": torch.ones(3)}
    with pytest.raises(RuntimeError, match="size mismatch"):
        net.load_state_dict(bad)
    assert known(net) == {"weight"}
    net = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="nothing was loaded"):
        load_weights(net, bad)
    assert known(net) == set()
    restore = remember_loaded(net)
    net.load_state_dict(nn.Linear(2, 2).state_dict())
    assert known(net) == {"weight", "bias"}
    restore()
    assert known(net) == set()


def test_assigned_shared_and_lazy_tensors_of_any_module() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net[1].weight = net[0].weight
    net.load_state_dict({"0.weight": torch.ones(2, 2)}, strict=False, assign=True)
    assert known(net[0]) == {"weight"}
    lazy = nn.LazyLinear(2)
    lazy.load_state_dict(nn.Linear(3, 2).state_dict())
    assert known(lazy) == {"weight", "bias"}


@pytest.mark.filterwarnings("ignore:`torch.jit.* is deprecated")
def test_a_scripted_module_is_loaded_as_ever() -> None:
    net: Any = torch.jit.script(nn.Linear(2, 2))
    net.load_state_dict({"weight": torch.ones(2, 2), "bias": torch.ones(2)})
    assert net.weight.tolist() == [[1, 1], [1, 1]]


def test_the_method_is_still_torchs_to_look_at() -> None:
    import inspect

    assert [*inspect.signature(nn.Module.load_state_dict).parameters][:3] == [
        "self",
        "state_dict",
        "strict",
    ]
    assert nn.Module.load_state_dict.__module__ == "torch.nn.modules.module"

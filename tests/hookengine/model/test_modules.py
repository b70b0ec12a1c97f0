"""Tests of ``hookengine/model/modules.py``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hookengine import (
    MODELS,
    BaseModule,
    ModuleDict,
    ModuleList,
    Registry,
    Sequential,
)
from tests.hookengine.model.blocks import Block, loaded


def test_init_weights_asks_the_plugin_or_says_that_there_is_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Module(BaseModule): ...

    module = Module(init_cfg=dict(type="Constant", val=1))
    assert module.init_cfg == dict(type="Constant", val=1)
    assert not module.is_init
    called: list[Any] = []
    monkeypatch.setitem(MODELS._registered, "init_weights", called.append)
    module.init_weights()
    assert called == [module]
    monkeypatch.setattr(Registry, "__contains__", lambda self, name: False)
    with pytest.raises(RuntimeError, match=r"no installed plugin.*torch.nn.init"):
        module.init_weights()


def test_a_module_to_be_initialised_anew_forgets_at_every_depth() -> None:
    block = Block(inner=nn.Sequential(Block()))
    block.load_state_dict(block.state_dict())
    block.is_init = block.inner[0].is_init = True
    block.is_init = False
    assert not block.inner[0].is_init
    assert loaded(block) == loaded(block.inner[0]) == set()


def test_init_cfg_is_a_copy_and_shows_in_the_repr() -> None:
    class Module(BaseModule): ...

    cfg: dict[str, Any] = dict(type="Constant", val=[1])
    module = Module(cfg)
    cfg["val"].append(2)
    assert module.init_cfg == dict(type="Constant", val=[1])
    assert "init_cfg={'type': 'Constant', 'val': [1]}" in repr(module)
    assert "init_cfg" not in repr(Module())


def test_containers_have_an_init_cfg() -> None:
    cfg = dict(type="Constant", val=1)
    layers = [nn.Linear(2, 3), nn.Linear(3, 1)]
    sequential = Sequential(*layers, init_cfg=cfg)
    assert sequential(torch.ones(1, 2)).shape == (1, 1)
    listed = ModuleList(layers, init_cfg=cfg)
    named = ModuleDict({"a": layers[0]}, init_cfg=cfg)
    assert (len(sequential), len(listed), list(named)) == (2, 2, ["a"])
    for container in (sequential, listed, named):
        assert isinstance(container, BaseModule)
        assert container.init_cfg == cfg
    assert set(sequential.state_dict()) == set(nn.Sequential(*layers).state_dict())

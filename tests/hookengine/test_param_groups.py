"""The options of parameter groups, and groups that are added during training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hookengine import OptimWrapper
from hookengine.param_groups import options_of_groups


def test_options_are_copied_without_the_parameters() -> None:
    lr = torch.tensor(0.1)
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=lr, momentum=0.9)
    (options,) = options_of_groups(optimizer.param_groups)
    assert "params" not in options
    assert options["momentum"] == 0.9
    lr.fill_(1.0)
    assert options["lr"].item() == pytest.approx(0.1)


def test_an_added_group_starts_without_the_gradients_of_earlier_iterations() -> None:
    """It was not frozen, so its gradient is the sum over all of them."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    wrapper = OptimWrapper(torch.optim.SGD(model[1].parameters(), lr=0.1))
    batch = torch.ones(3, 2)
    for _ in range(3):
        wrapper.update_params(model(batch).square().mean())
    first: Any = model[0].weight
    wrapper.optimizer.add_param_group(dict(params=[*model[0].parameters()], lr=0.5))
    (expected,) = torch.autograd.grad(model(batch).square().mean(), first)
    before = first.detach().clone()
    assert first.grad is not None
    assert not torch.allclose(first.grad, expected)
    wrapper.update_params(model(batch).square().mean())
    assert torch.allclose(before - first, 0.5 * expected)
    assert [given["lr"] for given in wrapper.given] == [0.1, 0.5]


def test_gradients_that_the_script_computed_first_are_kept() -> None:
    layer: Any = nn.Linear(2, 2)
    layer(torch.ones(1, 2)).sum().backward()
    wrapper = OptimWrapper(torch.optim.SGD(layer.parameters(), lr=0.1))
    wrapper.backward(layer(torch.ones(1, 2)).sum())
    assert torch.equal(layer.bias.grad, torch.full((2,), 2.0))


def test_removed_groups_are_forgotten() -> None:
    layer = nn.Linear(2, 2)
    groups = [dict(params=[layer.weight], lr=0.1), dict(params=[layer.bias], lr=0.2)]
    wrapper = OptimWrapper(torch.optim.SGD(groups))
    del wrapper.param_groups[0]
    wrapper.update_params(layer(torch.ones(1, 2)).sum())
    assert [given["lr"] for given in wrapper.given] == [0.2]

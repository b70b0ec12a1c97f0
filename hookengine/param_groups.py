"""The options of an optimizer's parameter groups, and groups that are added during training."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hookengine.loop.optim import OptimWrapper


def options_of_groups(groups: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a copy of the options of parameter groups, without their parameters."""
    options = ({n: v for n, v in group.items() if n != "params"} for group in groups)
    return [copy.deepcopy(one) for one in options]


def take_in_groups(optim_wrapper: OptimWrapper) -> None:
    """Take in parameter groups that were added since the last backward pass.

    Their options are added to ``optim_wrapper.given``, and their gradients are discarded: a
    parameter that was not frozen before has the sum over all earlier iterations, which no
    optimizer has reset.
    """
    groups, given = optim_wrapper.param_groups, optim_wrapper.given
    if len(groups) < len(given):  # which ones were removed is unknown
        given.clear()
    added = groups[len(given) :]
    if given:
        for group in added:
            for parameter in group["params"]:
                parameter.grad = None
    given += options_of_groups(added)

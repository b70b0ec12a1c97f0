"""Model utilities of MMEngine's list: wrappers told apart, losses merged, graphs searched.

``stack_batch``, the fourth of them, is in ``hookengine_preprocess``, which uses it.
"""

from __future__ import annotations

from typing import Any

import structlog
from torch import Tensor, fx, nn

from hookengine import MODEL_WRAPPERS, Registry

__all__ = ["detect_anomalous_params", "is_model_wrapper", "merge_dict"]


def is_model_wrapper(model: nn.Module, registry: Registry = MODEL_WRAPPERS) -> bool:
    """Whether a module is a wrapper around a model, which it holds as ``module``.

    Those are the classes in ``MODEL_WRAPPERS`` and their subclasses: ``DataParallel``,
    ``DistributedDataParallel``, and what is registered, by
    ``@MODEL_WRAPPERS.register_module()`` or in the entry-point group
    ``hookengine.model_wrappers``.

    Args:
        model: Any module.
        registry: Where to look.
    """
    return isinstance(model, tuple(registry.objects()))


def merge_dict(*args: dict[str, Any]) -> dict[str, Any]:
    """Merge dicts into a new one; of a key that several have, the last one's value counts.

    Under ``torch.fx.symbolic_trace`` a dict that is not known yet, a submodule's output, is merged
    when the traced module runs.

    Raises:
        TypeError: an argument that is no dict.
    """
    for item in args:
        if isinstance(item, fx.Proxy):
            merged: dict[str, Any] = item.tracer.create_proxy("call_function", merge_dict, args, {})
            return merged
    if wrong := [type(item).__name__ for item in args if not isinstance(item, dict)]:
        raise TypeError(f"merge_dict merges dicts, got {', '.join(wrong)}")
    return {key: value for item in args for key, value in item.items()}


def detect_anomalous_params(loss: Tensor, model: nn.Module) -> list[str]:
    """Find the trainable parameters that took no part in a loss, and log an error that names them.

    They are those that ``loss.backward()`` reaches by no path through the autograd graph; they get
    no gradient, and DistributedDataParallel waits for it. What ``torch.utils.checkpoint`` with
    ``use_reentrant=True`` hides from the graph is reported too.

    Args:
        loss: Before its ``backward()``.
        model: Its parameters are looked for.

    Returns:
        Their names, in the order of the model.

    Raises:
        TypeError: the loss is no tensor.
    """
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"detect_anomalous_params takes the loss, one tensor, got {type(loss).__name__}; of "
            "losses by name take their sum"
        )
    reached: set[int] = set()
    visited: set[Any] = set()
    waiting: list[Any] = [loss.grad_fn]
    if loss.is_leaf:
        reached.add(id(loss))
    while waiting:  # by hand, since graphs are deeper than Python's recursion
        node = waiting.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        if (variable := getattr(node, "variable", None)) is not None:
            reached.add(id(variable))
        waiting.extend(parent for parent, _ in node.next_functions)
    named = {n: p for n, p in model.named_parameters() if p.requires_grad and id(p) not in reached}
    if named:
        listed = ", ".join(f"{name} {list(p.shape)}" for name, p in named.items())
        structlog.get_logger("hookengine").error(
            f"{len(named)} parameters took no part in the loss: {listed}"
        )
    return list(named)

"""MMEngine's model utilities: recognize wrappers, merge losses, search the autograd graph.

The fourth one, ``stack_batch``, is in ``hookengine_preprocess``, which uses it.
"""

from __future__ import annotations

from typing import Any

import structlog
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

from hookengine import MODEL_WRAPPERS, Registry

__all__ = ["detect_anomalous_params", "is_model_wrapper", "merge_dict"]


def is_model_wrapper(model: nn.Module, registry: Registry = MODEL_WRAPPERS) -> bool:
    """Return whether a module is a wrapper around a model, which it holds as ``module``.

    Wrappers are the classes in ``MODEL_WRAPPERS`` and their subclasses: ``DataParallel``,
    ``DistributedDataParallel``, and classes registered with ``@MODEL_WRAPPERS.register_module()``
    or in the entry-point group ``hookengine.model_wrappers``.

    Args:
        model: Any module.
        registry: The registry of wrapper classes.
    """
    return isinstance(model, tuple(registry.objects()))


def merge_dict(*args: dict[str, Any]) -> dict[str, Any]:
    """Merge dicts into a new one; if several have a key, the last value is used.

    Under ``torch.fx.symbolic_trace``, a dict that is not known yet, such as the output of a
    submodule, is merged when the traced module runs.

    Raises:
        TypeError: An argument is not a dict.
    """
    for item in args:
        if isinstance(item, fx.Proxy):
            merged: dict[str, Any] = item.tracer.create_proxy("call_function", merge_dict, args, {})
            return merged
    if wrong := [type(item).__name__ for item in args if not isinstance(item, dict)]:
        raise TypeError(f"merge_dict expects dicts, got {', '.join(wrong)}")
    return {key: value for item in args for key, value in item.items()}


def detect_anomalous_params(loss: Tensor, model: nn.Module) -> list[str]:
    """Find the trainable parameters that took no part in a loss, and log an error that names them.

    No path through the autograd graph leads from ``loss.backward()`` to these parameters. They get
    no gradient, but DistributedDataParallel waits for one. Parameters that
    ``torch.utils.checkpoint`` with ``use_reentrant=True`` hides from the graph are reported, too.

    Args:
        loss: The loss, before its ``backward()``.
        model: The model whose parameters are checked.

    Returns:
        The names of these parameters, in the order of the model.

    Raises:
        TypeError: The loss is not a tensor.
    """
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"detect_anomalous_params expects the loss, one tensor, got {type(loss).__name__}. "
            "Pass the sum of several losses"
        )
    reached: set[int] = set()
    visited: set[Any] = set()
    waiting: list[Any] = [loss.grad_fn]
    if loss.is_leaf:
        reached.add(id(loss))
    while waiting:  # a loop, because graphs are deeper than Python can recurse
        node = waiting.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        if (variable := getattr(node, "variable", None)) is not None:
            reached.add(id(variable))
        waiting.extend(parent for parent, _ in node.next_functions)
    named = {n: p for n, p in model.named_parameters() if p.requires_grad and id(p) not in reached}
    if named:
        listed = ", ".join(f"{name} {_shape(p)}" for name, p in named.items())
        structlog.get_logger("hookengine").error(
            f"{len(named)} parameters took no part in the loss: {listed}"
        )
    return list(named)


def _shape(parameter: Tensor) -> str:
    return "of unknown shape" if is_lazy(parameter) else str(list(parameter.shape))

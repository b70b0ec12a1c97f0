"""DistributedDataParallel with the steps of a model, around the model or around each child."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Self

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hookengine import MODELS, OptimWrapper, OptimWrapperDict
from hookengine_distributed.exchange import Exchange, find_tensors
from hookengine_distributed.steps import ModelSteps

_IGNORED = "_ddp_params_and_buffers_to_ignore"
_ARGUMENTS = inspect.signature(DistributedDataParallel.__init__).parameters


class MMDistributedDataParallel(ModelSteps, DistributedDataParallel):
    """DistributedDataParallel with the model's ``train_step``, ``val_step`` and ``test_step``.

    It runs the model's own ``train_step``. If that calls the model as ``self(...)``, the call goes
    through ``DistributedDataParallel.forward``, so that the backward pass averages the gradients
    over the ranks. In an iteration without an optimizer step (``optim_wrapper.will_step``), the
    gradients are not exchanged. If several optimizers train parts of the model, use
    ``MMSeparateDistributedDataParallel``. Without a Runner, as in torch, each backward pass needs
    its own forward pass.

    Args:
        module: The model, on its device.
        detect_anomalous_params: Whether to log, in each iteration, an error that names the
            parameters that did not contribute to the losses. Use it for debugging only, because it
            walks through the whole graph.
        **kwargs: Further arguments of ``DistributedDataParallel``.

    Attributes:
        exchange: Tracks which gradients were exchanged.
        held: The parameters whose gradients are exchanged: those that required gradients when the
            wrapper was created.
    """

    def __init__(
        self, module: nn.Module, detect_anomalous_params: bool = False, **kwargs: Any
    ) -> None:
        if "broadcast_buffers" in kwargs and "forward_sync_buffers" in _ARGUMENTS:
            kwargs["forward_sync_buffers"] = kwargs.pop("broadcast_buffers")  # torch's newer name
        empty = [name for name, buffer in module.named_buffers() if not buffer.numel()]
        ignored = [*getattr(module, _IGNORED, ()), *empty]  # saves a broadcast per iteration
        setattr(module, _IGNORED, ignored)
        super().__init__(module=module, **kwargs)
        self.detect_anomalous_params = detect_anomalous_params
        self.exchange = Exchange()
        self.route = _Route(self)
        self.held = {parameter for parameter in module.parameters() if parameter.requires_grad}
        self._has_begun = False

    def _within_backward(self, gradient: Any) -> None:
        self.exchange.within_backward(id(self))

    def train_step(self, data: Any, optim_wrapper: OptimWrapper | OptimWrapperDict) -> Any:
        """Run the model's ``train_step``.

        Raises:
            RuntimeError: ``train_step`` never called the model with gradients enabled.
        """
        self.exchange.begin(optim_wrapper)
        with self.route:
            outputs = self.module.train_step(data, optim_wrapper)
        self.exchange.check(type(self.module).__name__)
        return outputs

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """Run the model; the backward pass exchanges gradients if this iteration steps."""
        if not torch.is_grad_enabled():
            return super().forward(*inputs, **kwargs)  # type: ignore[no-untyped-call]
        own = vars(self)  # faster than the attribute access of nn.Module
        wanted = own["require_backward_grad_sync"]  # False within no_sync()
        exchanges = self.exchange.decide(id(self), wanted)
        if self.static_graph and not self._has_begun:
            exchanges = self._has_begun = True  # torch records the graph in the first pass
        own["require_backward_grad_sync"] = exchanges
        try:
            outputs = super().forward(*inputs, **kwargs)  # type: ignore[no-untyped-call]
        finally:
            own["require_backward_grad_sync"] = wanted
        for tensor in find_tensors(outputs):
            tensor.register_hook(self._within_backward)  # type: ignore[no-untyped-call]
        if self.detect_anomalous_params and (found := find_tensors(outputs, losses=True)):
            total = torch.stack([tensor.sum().float() for tensor in found]).sum()
            MODELS.own("detect_anomalous_params")(total, self.module)
        return outputs


class _Route:
    """A context in which calls of a module go through its wrapper.

    ``nn.Module.__call__`` looks up its implementation in the instance. If it is replaced there, the
    module's hooks run only once, in the call that the wrapper makes.
    """

    def __init__(self, wrapper: MMDistributedDataParallel) -> None:
        self._wrapper = wrapper
        self._compiled: Any = None
        self._depth = 0  # Runner.repeat enters again

    def __enter__(self) -> None:
        self._depth += 1
        if self._depth == 1:
            own = vars(self._wrapper.module)
            self._compiled = own.get("_compiled_call_impl")
            self._set(own)

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._unset(vars(self._wrapper.module))

    def _set(self, own: dict[str, Any]) -> None:
        own["_call_impl"] = self._call
        if self._compiled is not None:
            own["_compiled_call_impl"] = self._call

    def _unset(self, own: dict[str, Any]) -> None:
        own.pop("_call_impl", None)
        if self._compiled is not None:
            own["_compiled_call_impl"] = self._compiled

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        wrapper = self._wrapper
        own = vars(wrapper.module)
        self._unset(own)
        try:
            # Without gradients, nothing is exchanged, and no rank has to wait for another.
            target = wrapper if torch.is_grad_enabled() else wrapper.module
            return target(*args, **kwargs)
        finally:
            self._set(own)


class MMSeparateDistributedDataParallel(ModelSteps, nn.Module):
    """Wrap each child of a model in its own DistributedDataParallel, as GANs need it.

    A step that trains the discriminator computes no gradients for the generator, and a single
    DistributedDataParallel around both would wait for them. Children without parameters and frozen
    children are not wrapped. The children keep their places and names; within ``train_step``, their
    calls go through their wrappers.

    Args:
        module: The model, on its device, with its own ``train_step`` that calls its children.
        broadcast_buffers: See ``DistributedDataParallel``.
        find_unused_parameters: See ``DistributedDataParallel``.
        **kwargs: Further arguments of ``MMDistributedDataParallel``.

    Attributes:
        wrappers: The wrappers of the children, by name.
        exchange: Tracks which gradients were exchanged.
        held: The parameters whose gradients are exchanged.
    """

    def __init__(
        self,
        module: nn.Module,
        broadcast_buffers: bool = False,
        find_unused_parameters: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.module: Any = module
        self.exchange = Exchange()
        self.wrappers: dict[str, MMDistributedDataParallel] = {}
        own = [n for n, p in module.named_parameters(recurse=False) if p.requires_grad]
        if own:
            raise ValueError(
                f"{type(module).__name__} has parameters outside its children "
                f"({', '.join(own)}), which no wrapper would hold. Move them into a child"
            )
        for name, child in module.named_children():
            if any(parameter.requires_grad for parameter in child.parameters()):
                wrapper = MMDistributedDataParallel(
                    child,
                    broadcast_buffers=broadcast_buffers,
                    find_unused_parameters=find_unused_parameters,
                    **kwargs,
                )
                wrapper.exchange = self.exchange
                self.wrappers[name] = wrapper
        self.held = {p for wrapper in self.wrappers.values() for p in wrapper.held}
        if not self.wrappers:
            raise ValueError(f"no child of {type(module).__name__} has parameters to train")

    def train_step(self, data: Any, optim_wrapper: OptimWrapper | OptimWrapperDict) -> Any:
        """Run the model's ``train_step``.

        Raises:
            RuntimeError: ``train_step`` called none of the children with gradients enabled.
        """
        self.exchange.begin(optim_wrapper)
        with ExitStack() as stack:
            for wrapper in self.wrappers.values():
                stack.enter_context(wrapper.route)
            outputs = self.module.train_step(data, optim_wrapper)
        self.exchange.check(type(self.module).__name__, f"self.{next(iter(self.wrappers))}(...)")
        return outputs

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model."""
        return self.module(*args, **kwargs)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Disable the exchange of gradients in all children within the block."""
        with ExitStack() as stack:
            for wrapper in self.wrappers.values():
                stack.enter_context(wrapper.no_sync())
            yield

    def train(self, mode: bool = True) -> Self:
        """Set the mode of the model and of its children's wrappers."""
        super().train(mode)
        for wrapper in self.wrappers.values():
            wrapper.train(mode)  # type: ignore[no-untyped-call]
        return self

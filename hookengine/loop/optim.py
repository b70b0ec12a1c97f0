"""Optimizer wrappers: loss -> backward -> step, as events."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from hookengine.events.answers import explain_arguments
from hookengine.events.blame import answering
from hookengine.events.dispatch import SILENT
from hookengine.events.hookspecs import HookSpecs
from hookengine.events.registry import unknown

_NO_CONTEXT: AbstractContextManager[None] = nullcontext()


def combine(
    contexts: tuple[AbstractContextManager[Any], ...], runner: Any = None
) -> AbstractContextManager[Any]:
    """One context manager that enters ``contexts`` in order; at no cost where there are none.

    Raises:
        TypeError: one of them is none; the message names the plugins of ``runner`` that answer.
    """
    if not contexts:
        return _NO_CONTEXT
    for context in contexts:
        if not hasattr(context, "__enter__"):
            raise TypeError(
                f"{answering(runner, 'forward_context')} must return a context manager, such as "
                f"torch.autocast(...), or None; got {context!r}"
            )
    if len(contexts) == 1:
        return contexts[0]
    return _Combined(contexts)


class _Combined(ExitStack):
    def __init__(self, contexts: tuple[AbstractContextManager[Any], ...]) -> None:
        super().__init__()
        self._contexts = contexts

    def __enter__(self) -> _Combined:
        super().__enter__()
        try:
            for context in self._contexts:
                self.enter_context(context)
        except BaseException as error:
            if not self.__exit__(type(error), error, error.__traceback__):
                raise
        return self


class OptimWrapper:
    """One optimizer, and the events around it. Usable without a Runner: the events are silent.

    ::

        with optim_wrapper.optim_context(model):
            loss = model(batch)
        optim_wrapper.update_params(loss)

    Args:
        optimizer: The optimizer.
        name: What it is called where there are several.

    Attributes:
        hooks: The events; those of the Runner that took the wrapper.
        will_step: Whether the present iteration ends with a step; known before the forward pass.
            Who exchanges gradients between ranks only where it does, exchanges them in
            ``finish_gradients`` where a window is closed in another way.
        window_length: Iterations per step, as planned by the plugin that answers ``should_step``.
        window_open: Whether gradients are held that no step has used yet.
        steps: Steps really taken.
    """

    def __init__(self, optimizer: Optimizer, name: str = "optimizer", **moved: Any) -> None:
        if moved:
            raise TypeError(explain_arguments("OptimWrapper", moved))
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
        self.optimizer = optimizer
        self.name = name
        self.hooks: HookSpecs = SILENT
        self.will_step = True
        self.window_length = 1
        self.window_open = False
        self.steps = 0
        self._asked = False

    def optim_context(self, model: nn.Module) -> AbstractContextManager[Any]:
        """The context of a forward pass: asks ``should_step``, enters ``forward_context``."""
        hooks = self.hooks
        self.will_step = hooks.should_step(hooks.runner, self)
        self._asked = True
        contexts = hooks.forward_context(hooks.runner, model, self, "train")
        return combine(contexts, hooks.runner) if contexts else _NO_CONTEXT

    def update_params(self, loss: Tensor) -> None:
        """Backpropagate ``loss`` and, where this iteration steps, step and zero the gradients.

        Args:
            loss: Scalar tensor that requires a gradient.

        Raises:
            TypeError: it is no tensor. ValueError: it is no scalar, or has no gradient.
        """
        if not self._asked:
            hooks = self.hooks
            self.will_step = hooks.should_step(hooks.runner, self)
        self.backward(loss)
        self._asked = False
        if self.will_step:
            self.step()

    def backward(self, loss: Tensor) -> None:
        """Backpropagate ``loss`` without a step, for a ``train_step`` that steps by itself.

        Raises:
            TypeError: it is no tensor. ValueError: it is no scalar, or has no gradient.
        """
        if not isinstance(loss, Tensor) or loss.dim() or not loss.requires_grad:
            raise _bad_loss(loss)
        hooks = self.hooks
        given, loss = loss, hooks.scale_loss(hooks.runner, self, loss)
        if loss is not given and not isinstance(loss, Tensor):
            who = answering(hooks.runner, "scale_loss")
            raise TypeError(f"{who} must return a tensor or None, got {loss!r}")
        if not hooks.backward(hooks.runner, self, loss):
            loss.backward()  # type: ignore[no-untyped-call]
        self.window_open = True

    def step(self) -> None:
        """Step with the gradients that are there and zero them; also closes a short window."""
        self._asked = False
        hooks = self.hooks
        hooks.finish_gradients(hooks.runner, self)
        hooks.before_optim_step(hooks.runner, self)
        stepped = hooks.optim_step(hooks.runner, self)
        if stepped is None:
            self.optimizer.step()
            stepped = True
        self.optimizer.zero_grad()
        self.window_open = False
        if stepped:
            self.steps += 1
            hooks.after_optim_step(hooks.runner, self)

    def zero_grad(self) -> None:
        """Drop the gradients, and with them an open window."""
        self.optimizer.zero_grad()
        self.window_open = False

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's parameter groups."""
        return self.optimizer.param_groups

    def by_name(self, name: str | None = None) -> dict[str, OptimWrapper]:
        """Itself by its name, as ``OptimWrapperDict`` gives several.

        Args:
            name: Only the one of this name.

        Raises:
            KeyError: there is none.
        """
        return _by_name({self.name: self}, name)

    def parameters(self) -> Iterator[nn.Parameter]:
        """All parameters of the optimizer."""
        for group in self.optimizer.param_groups:
            yield from group["params"]

    def get_lr(self) -> list[float]:
        """The learning rate of each parameter group."""
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the optimizer's state."""
        self.optimizer.load_state_dict(state)

    def __repr__(self) -> str:
        return f"OptimWrapper(name={self.name!r}, steps={self.steps}, optimizer={self.optimizer!r})"


def _by_name(wrappers: Mapping[str, OptimWrapper], name: str | None) -> dict[str, OptimWrapper]:
    if name is None:
        return dict(wrappers)
    if name not in wrappers:
        raise KeyError(unknown("optimizer", name, wrappers))
    return {name: wrappers[name]}


def _bad_loss(loss: Any) -> Exception:
    if not isinstance(loss, Tensor):
        return TypeError(f"the loss must be a tensor, got {loss!r}")
    if loss.dim():
        return ValueError(
            f"the loss must be a scalar, got shape {tuple(loss.shape)}: reduce it with .mean() or "
            ".sum()"
        )
    return ValueError(
        "the loss does not require a gradient: it was detached, computed under no_grad, or every "
        "parameter behind it is frozen"
    )


class OptimWrapperDict(Mapping[str, OptimWrapper]):
    """Several optimizer wrappers by name, for a model whose ``train_step`` uses each of them."""

    def __init__(self, **optim_wrappers: OptimWrapper) -> None:
        if not optim_wrappers:
            raise ValueError("OptimWrapperDict needs at least one OptimWrapper by name")
        for name, wrapper in optim_wrappers.items():
            if not isinstance(wrapper, OptimWrapper):
                raise TypeError(f"expected an OptimWrapper for {name!r}, got {wrapper!r}")
            wrapper.name = name
        self.optim_wrappers = optim_wrappers

    def __getitem__(self, name: str) -> OptimWrapper:
        return _by_name(self.optim_wrappers, name)[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.optim_wrappers)

    def __len__(self) -> int:
        return len(self.optim_wrappers)

    def by_name(self, name: str | None = None) -> dict[str, OptimWrapper]:
        """All of them by name; or only the one of this name, a KeyError where there is none."""
        return _by_name(self.optim_wrappers, name)

    @property
    def window_open(self) -> bool:
        """Whether any of them holds gradients that no step has used yet."""
        return any(wrapper.window_open for wrapper in self.optim_wrappers.values())

    def update_params(self, loss: Tensor) -> None:
        """Refused: only the model knows which of them a loss belongs to."""
        raise TypeError(self._choose("update_params(loss)"))

    def optim_context(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Refused, as ``update_params`` is."""
        raise TypeError(self._choose("optim_context(model)"))

    def _choose(self, call: str) -> str:
        first = next(iter(self.optim_wrappers))
        return f"there are several optimizers: choose one, as in optim_wrapper[{first!r}].{call}"

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for wrapper in self.optim_wrappers.values():
            wrapper.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """The state of each by name."""
        return {name: wrapper.state_dict() for name, wrapper in self.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the state of each.

        Raises:
            ValueError: the names differ.
        """
        if state.keys() != self.optim_wrappers.keys():
            raise ValueError(
                f"the checkpoint has the optimizers {sorted(state)}, the Runner {sorted(self)}"
            )
        for name, wrapper in self.items():
            wrapper.load_state_dict(state[name])

    def __repr__(self) -> str:
        return f"OptimWrapperDict({self.optim_wrappers!r})"

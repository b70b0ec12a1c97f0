"""Optimizer wrappers: run loss -> backward -> step and emit an event at each stage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hookengine.answers import explained_arguments
from hookengine.events.dispatch import SILENT
from hookengine.events.hookspecs import HookSpecs
from hookengine.param_groups import options_of_groups, take_in_groups
from hookengine.registry import unknown

if TYPE_CHECKING:
    from hookengine.runner import Runner

_NO_CONTEXT: AbstractContextManager[None] = nullcontext()


def combine(contexts: tuple[AbstractContextManager[Any], ...]) -> AbstractContextManager[Any]:
    """Return one context manager that enters ``contexts`` in order.

    With no contexts, it returns a shared null context, which costs nothing.
    """
    if not contexts:
        return _NO_CONTEXT
    return contexts[0] if len(contexts) == 1 else _Combined(contexts)


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
    """Wrap an optimizer and emit the events around its steps.

    You can use a wrapper without a Runner; its events then call no plugin::

        with optim_wrapper.optim_context(model):
            loss = model(batch)
        optim_wrapper.update_params(loss)

    Args:
        optimizer: The optimizer.
        name: The name that identifies the wrapper when a run has several optimizers.

    Attributes:
        hooks: The events that the wrapper emits. A Runner that receives the wrapper sets them.
        given: The options of each parameter group, such as ``lr``, as the script gave them. When a
            run is resumed, they are compared with those in the checkpoint.
        will_step: Whether the current iteration ends with a step; known before the forward pass.
            A direct call of ``step`` may close a window in any other iteration: a plugin that
            synchronizes gradients only when ``will_step`` is True must then do so in
            ``finish_gradients``. During ``Runner.repeat``, only the last pass has it, and only for
            the optimizer whose step is repeated.
        window_length: Iterations per step, set by the plugin that implements ``should_step``.
        window_open: Whether there are gradients that no step has used yet.
        steps: Steps taken; skipped steps do not count.
        stepping: Whether a step is in progress: its gradients are complete, and the optimizer has
            not used them yet. See ``Runner.repeat``.
    """

    @explained_arguments("OptimWrapper")
    def __init__(self, optimizer: Optimizer, name: str = "optimizer") -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
        self.optimizer = optimizer
        self.name = name
        self.hooks: HookSpecs = SILENT
        self.given = options_of_groups(optimizer.param_groups)
        self.will_step = True
        self.window_length = 1
        self.window_open = False
        self.steps = 0
        self.stepping = False
        self._asked = False
        self._repeating: bool | None = None  # in Runner.repeat: whether this optimizer's step is it
        self._passed = False  # whether the repeated pass has reached its step

    def optim_context(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Return the context for a forward pass of ``model`` in training.

        Emits ``should_step`` to set ``will_step``, and ``forward_context`` to collect the contexts
        to enter.
        """
        hooks = self.hooks
        if self._repeating is None:
            self.will_step = hooks.should_step(hooks.runner, self)
            self._asked = True
        contexts = hooks.forward_context(hooks.runner, model, self, "train")
        return combine(contexts) if contexts else _NO_CONTEXT

    def update_params(self, loss: Tensor) -> None:
        """Backpropagate ``loss``; if this iteration steps, step and zero the gradients.

        Args:
            loss: A scalar tensor that requires a gradient.

        Raises:
            TypeError: If ``loss`` is not a tensor.
            ValueError: If ``loss`` is not a scalar or does not require a gradient.
            RuntimeError: If a step is in progress; see ``Runner.repeat``.
        """
        if self._repeating is None:
            if not self._asked:
                hooks = self.hooks
                self.will_step = hooks.should_step(hooks.runner, self)
            self._asked = False
        self.backward(loss)
        if self.will_step:
            self.step()

    def backward(self, loss: Tensor) -> None:
        """Backpropagate ``loss`` without a step, for a ``train_step`` that calls ``step`` itself.

        Raises:
            TypeError: If ``loss`` is not a tensor.
            ValueError: If ``loss`` is not a scalar or does not require a gradient.
            RuntimeError: If a step is in progress; see ``Runner.repeat``.
        """
        if self._repeating is False:
            return
        if self.stepping and self._repeating is None:
            raise _within_a_step(self.name)
        if self._passed:
            raise RuntimeError(
                f"train_step uses the optimizer {self.name!r} again after its step, so "
                "runner.repeat() cannot tell which losses belong to the step. Take one step per "
                "train_step with it"
            )
        if not isinstance(loss, Tensor) or loss.dim() or not loss.requires_grad:
            raise _bad_loss(loss)
        if len(self.given) != len(self.optimizer.param_groups):
            take_in_groups(self)
        hooks = self.hooks
        loss = hooks.scale_loss(hooks.runner, self, loss)
        if not hooks.backward(hooks.runner, self, loss):
            loss.backward()  # type: ignore[no-untyped-call]
        self.window_open = True

    def step(self) -> None:
        """Take a step with the current gradients, then zero them.

        Call it directly to close a window of accumulated gradients early.

        Raises:
            RuntimeError: If this step is already in progress; see ``Runner.repeat``.
        """
        if self._repeating is not None:
            self._passed = True
            return
        if self.stepping:
            raise _within_a_step(self.name)
        self._asked = False
        hooks = self.hooks
        hooks.finish_gradients(hooks.runner, self)
        self.stepping = True
        try:
            hooks.before_optim_step(hooks.runner, self)
            if not self.stepping:
                raise RuntimeError(
                    f"the gradients of the optimizer {self.name!r} are gone, because "
                    "runner.repeat() raised an error that a plugin has caught. Let the error pass"
                )
        finally:
            self.stepping = False
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
        """Discard the gradients, including those of an open window."""
        if self._repeating is None or (self._repeating and not self._passed):
            self.optimizer.zero_grad()
            self.window_open = False

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The parameter groups of the optimizer."""
        return self.optimizer.param_groups

    def by_name(self, name: str | None = None) -> dict[str, OptimWrapper]:
        """Return a dict that maps the name of this wrapper to the wrapper itself.

        This matches ``OptimWrapperDict.by_name``, so that callers need not distinguish the two.

        Args:
            name: If given, the wrapper must have this name.

        Raises:
            KeyError: If ``name`` is given and the wrapper has another name.
        """
        return _by_name({self.name: self}, name)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield all the parameters of the optimizer."""
        for group in self.optimizer.param_groups:
            yield from group["params"]

    def get_lr(self) -> list[float]:
        """Return the learning rate of each parameter group."""
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the optimizer."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load an optimizer state saved by ``state_dict``."""
        self.optimizer.load_state_dict(state)

    def __repr__(self) -> str:
        return f"OptimWrapper(name={self.name!r}, steps={self.steps}, optimizer={self.optimizer!r})"


def repeat(
    runner: Runner, wrappers: Mapping[str, OptimWrapper], data_batches: Sequence[Any]
) -> list[Any]:
    """Compute the gradients of the step in progress again; see ``Runner.repeat``."""
    stepping = [wrapper for wrapper in wrappers.values() if wrapper.stepping]
    if len(stepping) != 1 or stepping[0]._repeating is not None:
        raise RuntimeError(
            "runner.repeat() computes the gradients of one optimizer step again. Call it in "
            "before_optim_step, and neither within another step nor within a repeated pass"
        )
    if not data_batches:
        raise ValueError("runner.repeat() needs the batch of this step, or all its micro-batches")
    if len(data_batches) > 1 and not runner.plugins.hook.should_step.get_hookimpls():
        raise ValueError(
            f"runner.repeat() got {len(data_batches)} batches, but no plugin accumulates, "
            "so this step has a single one. Pass that batch"
        )
    (current,) = stepping
    outputs, will_step = [], {wrapper: wrapper.will_step for wrapper in wrappers.values()}
    current.zero_grad()
    try:
        for wrapper in will_step:
            wrapper._repeating, wrapper.will_step = wrapper is current, False
        for left, data_batch in enumerate(data_batches, 1 - len(data_batches)):
            current.will_step = left == 0  # ranks exchange gradients in the last pass
            current._passed = False
            runner.hooks.before_repeat(runner, current, data_batch)
            with torch.enable_grad():  # the plugin may edit the weights under no_grad
                outputs.append(runner.model.train_step(data_batch, runner.optim_wrapper))
        if not current.window_open:
            raise RuntimeError(
                "train_step did not backpropagate a loss for the optimizer whose step is repeated, "
                f"{current.name!r}"
            )
    except BaseException:
        current.stepping = False
        raise
    finally:
        for wrapper, value in will_step.items():
            wrapper.will_step, wrapper._repeating, wrapper._passed = value, None, False
    current.stepping = False  # a plugin that repeats the pass once more would never end
    runner.hooks.finish_gradients(runner, current)
    current.stepping = True
    return outputs


def _by_name(wrappers: Mapping[str, OptimWrapper], name: str | None) -> dict[str, OptimWrapper]:
    if name is None:
        return dict(wrappers)
    if name not in wrappers:
        raise KeyError(unknown("optimizer", name, wrappers))
    return {name: wrappers[name]}


def _within_a_step(name: str) -> RuntimeError:
    return RuntimeError(
        f"the optimizer {name!r} is in the middle of a step, whose gradients are complete. To "
        "compute them again, call runner.repeat(data_batch) in before_optim_step"
    )


def _bad_loss(loss: Any) -> Exception:
    if not isinstance(loss, Tensor):
        return TypeError(f"the loss must be a tensor, got {loss!r}")
    if loss.dim():
        return ValueError(
            f"the loss must be a scalar, got shape {tuple(loss.shape)}. Reduce it with .mean() or "
            ".sum()"
        )
    return ValueError(
        "the loss does not require a gradient: it was detached or computed under torch.no_grad(), "
        "or every parameter it depends on is frozen"
    )


class OptimWrapperDict(Mapping[str, OptimWrapper]):
    """Map names to optimizer wrappers, for a model whose ``train_step`` uses several of them."""

    def __init__(self, **optim_wrappers: OptimWrapper) -> None:
        if not optim_wrappers:
            raise ValueError("OptimWrapperDict needs at least one OptimWrapper, as in name=wrapper")
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
        """Return the wrappers by name.

        Args:
            name: If given, return only the wrapper with this name.

        Raises:
            KeyError: If no wrapper has this name.
        """
        return _by_name(self.optim_wrappers, name)

    @property
    def window_open(self) -> bool:
        """Whether any wrapper has gradients that no step has used yet."""
        return any(wrapper.window_open for wrapper in self.optim_wrappers.values())

    def update_params(self, loss: Tensor) -> None:
        """Raise a TypeError, because only the model knows which optimizer a loss belongs to."""
        raise TypeError(self._choose("update_params(loss)"))

    def optim_context(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Raise a TypeError, because only the model knows which optimizer the pass is for."""
        raise TypeError(self._choose("optim_context(model)"))

    def _choose(self, call: str) -> str:
        first = next(iter(self.optim_wrappers))
        return f"{call} needs one optimizer. Choose one, as in optim_wrapper[{first!r}].{call}"

    def zero_grad(self) -> None:
        """Discard the gradients of all the wrappers."""
        for wrapper in self.optim_wrappers.values():
            wrapper.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of each optimizer by name."""
        return {name: wrapper.state_dict() for name, wrapper in self.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the state of each optimizer.

        Raises:
            ValueError: If ``state`` and this dict have different names.
        """
        if state.keys() != self.optim_wrappers.keys():
            raise ValueError(
                f"the checkpoint has optimizers {sorted(state)}, but the Runner has {sorted(self)}"
            )
        for name, wrapper in self.items():
            wrapper.load_state_dict(state[name])

    def __repr__(self) -> str:
        return f"OptimWrapperDict({self.optim_wrappers!r})"

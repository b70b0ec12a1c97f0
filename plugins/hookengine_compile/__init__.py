"""``torch.compile`` for the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn

from hookengine import BaseModel, Plugin, Runner

__all__ = ["Compile"]


class Compile(Plugin, name="compile"):
    """Compile the model's forward pass with ``torch.compile``, in place.

    Parameter names, checkpoints and copies are the same as without compilation. If the compiler
    does not work on this machine (no C++ compiler, no Triton), a warning is logged once and the run
    continues without it.
    """

    mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = (
        Field(default="default", description="the mode of torch.compile")
    )
    backend: str | Callable[..., Any] = Field(
        default="inductor", description="the backend; see torch.compiler.list_backends()"
    )
    fullgraph: bool = Field(
        default=False, description="raise an error instead of breaking the graph"
    )
    dynamic: bool | None = Field(
        default=None, description="whether shapes may change; None detects it"
    )
    options: dict[str, Any] | None = Field(
        default=None, description="options of the backend, instead of a mode"
    )
    modules: Sequence[str] = Field(
        default=(), description="names of parts of the model to compile, instead of the whole"
    )

    def __post_init__(self) -> None:
        """Raise a TypeError for options that torch.compile rejects."""
        if self.options and self.mode != "default":
            raise TypeError("compile takes a mode or options of the backend, not both")
        if isinstance(self.backend, str):
            known = torch.compiler.list_backends(exclude_tags=())
            if self.backend not in known:
                raise TypeError(
                    f"compile: unknown backend {self.backend!r}; known: {', '.join(sorted(known))}"
                )
        if self.options:
            try:
                torch.compile(_something_small, **self._arguments())
            except (RuntimeError, TypeError, AttributeError) as error:
                raise TypeError(
                    f"compile: torch rejects options={self.options!r}: {error}"
                ) from error

    def configure(self) -> None:
        """Forget whether the compiler works."""
        self._works: bool | None = None

    def wrap_model(self, runner: Runner, model: nn.Module) -> None:
        """Compile the model, or parts of it, in place."""
        parts = [_part(model, name) for name in self.modules] or [model]
        if self._works is None:
            self._works = self._try(runner)
        if not self._works:
            return
        own_step = isinstance(model, BaseModel) and type(model).train_step != BaseModel.train_step
        if own_step and not self.modules:
            runner.logger.warning(
                f"compile: {type(model).__name__} overrides train_step, so only what it calls as "
                "self(...) is compiled. To compile parts that it calls directly, pass "
                "modules=('generator', ...)"
            )
        for part in parts:
            _compile(part, self._arguments())
        runner.logger.info("compile: the first iterations compile the model, so they take longer")

    def _arguments(self) -> dict[str, Any]:
        arguments: dict[str, Any] = {
            "backend": self.backend,
            "fullgraph": self.fullgraph,
            "dynamic": self.dynamic,
        }
        if self.options:
            return {**arguments, "options": self.options}
        return {**arguments, "mode": self.mode} if self.mode != "default" else arguments

    def _try(self, runner: Runner) -> bool:
        """Compile a small function, forward and backward; return whether the compiler works."""
        try:
            function = torch.compile(_something_small, **self._arguments())
            sample = torch.ones(2, device=runner.device, requires_grad=True)
            function(sample).backward()  # type: ignore[no-untyped-call]
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            reason = " ".join(str(error).strip().splitlines()[:2])  # torch names the error first
            runner.logger.warning(
                f"compile: the model is not compiled, because torch.compile with backend "
                f"{self.backend!r} does not work here ({type(error).__name__}: {reason}); the run "
                "continues without it. Install a C++ compiler (on GPUs also Triton), or disable "
                "compile"
            )
            return False
        return True


def _something_small(x: torch.Tensor) -> torch.Tensor:
    return (x * 2).sum()


def _compile(part: nn.Module, arguments: dict[str, Any]) -> None:
    """Compile a module in place.

    Before torch 2.14, ``Module.compile`` compiles nothing in a module whose ``forward`` is torch's
    own, such as ``nn.Sequential``: the compiler skips torch's functions until it meets another one.
    """
    if not type(part).forward.__module__.startswith("torch."):
        part.compile(**arguments)
        return

    def call(*inputs: Any, **options: Any) -> Any:
        return part._call_impl(*inputs, **options)  # type: ignore[no-untyped-call]

    part._compiled_call_impl = torch.compile(call, **arguments)


def _part(model: nn.Module, name: str) -> nn.Module:
    """Return the part of the model with that name, also if the model is wrapped."""
    inner: Any = model
    while isinstance(inner, nn.Module):
        try:
            return inner.get_submodule(name)
        except AttributeError:
            model, inner = inner, getattr(inner, "module", None)
    known = ", ".join(child for child, _ in model.named_children())
    raise KeyError(f"compile: the model has no part {name!r}; it has {known}")

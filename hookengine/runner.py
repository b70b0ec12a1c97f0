"""The Runner: puts the parts together and owns their state."""

from __future__ import annotations

import atexit
import inspect
import logging
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

import structlog
import torch
from torch import nn

from hookengine import migration
from hookengine.build import (
    all_or_none,
    build_dataloader,
    build_evaluator,
    build_model,
    build_optim_wrapper,
    check_model,
    check_optimizers,
    default_device,
    eval_cfg,
    point_at_model,
)
from hookengine.config import EvalCfg, TrainCfg, parse
from hookengine.hookspecs import HookSpecs, Phase
from hookengine.loops import EvalLoop, TrainLoop
from hookengine.manager import FunctionPlugin, PluginLike, PluginManager
from hookengine.model import BaseModel, SupervisedModel
from hookengine.optim import OptimWrapper, OptimWrapperDict
from hookengine.plugins import DEFAULT_PLUGINS
from hookengine.progress import Progress

F = TypeVar("F", bound=Callable[..., Any])
EvalPhase = Literal["val", "test"]


class Runner:
    """Trains, validates and tests a model; every feature is a plugin that answers its events.

    Everything is built here, in the constructor, so that a mistake shows before the first
    iteration. Training needs ``train_dataloader``, ``train_cfg`` and ``optim_wrapper``;
    validation and testing a dataloader and an evaluator.

    Args:
        model: A ``BaseModel``; a plain ``nn.Module`` together with ``loss``; ``dict(type=NAME,
            ...)``; or a function that returns one of these.
        work_dir: Folder of the runs; this one's files go to ``run_dir`` within it.
        train_dataloader: Anything iterable, with a length or together with ``max_iters``; or
            ``dict(dataset=..., batch_size=...)``, the arguments of torch's DataLoader.
        val_dataloader: Likewise, for validation.
        test_dataloader: Likewise, for testing.
        train_cfg: ``dict(max_epochs=..., val_interval=1)`` or ``dict(max_iters=...)``; see
            ``TrainCfg``.
        val_cfg: ``dict(loss=True)`` also reports the losses; see ``EvalCfg``.
        test_cfg: Likewise.
        optim_wrapper: An optimizer; ``dict(optimizer=dict(type="SGD", lr=0.1))``; or a dict of
            these by name.
        val_evaluator: A metric, or a list of them; see ``Evaluator``.
        test_evaluator: Likewise.
        loss: For a plain module: ``loss(output, target)``. A batch is then (inputs, target).
        plugins: Names, ``dict(type=NAME, **options)``, instances, ``"no:NAME"``.
        defaults: The plugins that are on without being named; ``()`` for the bare kernel.
        device: By default the accelerator that torch finds, else the CPU.
        name: Name of the run and of its folder; by default the time.

    Attributes:
        hooks: All events as functions.
        plugins: The plugin manager.
        progress: The counters.
        model: The model as it is trained: wrapped, on its device.
        bare_model: The module before any wrapping, whose names all state uses.
        optim_wrapper: The optimizer wrapper (or ``OptimWrapperDict``), or None.
        requests: What this rank asks for at the next safe point: ``{"stop": reason}``.
        agreed: During ``safe_point``, the requests that all ranks agreed on.
        logger: A structlog logger.
    """

    optim_wrapper: OptimWrapper | OptimWrapperDict

    def __init__(
        self,
        model: nn.Module | Mapping[str, Any] | Callable[[], nn.Module],
        work_dir: str | Path = "work_dir",
        train_dataloader: Iterable[Any] | Mapping[str, Any] | None = None,
        val_dataloader: Iterable[Any] | Mapping[str, Any] | None = None,
        test_dataloader: Iterable[Any] | Mapping[str, Any] | None = None,
        train_cfg: Mapping[str, Any] | TrainCfg | None = None,
        val_cfg: Mapping[str, Any] | EvalCfg | None = None,
        test_cfg: Mapping[str, Any] | EvalCfg | None = None,
        optim_wrapper: Any = None,
        val_evaluator: Any = None,
        test_evaluator: Any = None,
        *,
        loss: Callable[..., Any] | None = None,
        plugins: Iterable[PluginLike] = (),
        defaults: Sequence[str] = DEFAULT_PLUGINS,
        device: str | torch.device | None = None,
        name: str | None = None,
        **moved: Any,
    ) -> None:
        if moved:
            known = set(inspect.signature(Runner).parameters) - {"moved"}
            raise TypeError(migration.explain("Runner", moved, known))
        self._has_optimizer = optim_wrapper is not None
        train = {
            "train_dataloader": train_dataloader,
            "train_cfg": train_cfg,
            "optim_wrapper": optim_wrapper,
        }
        all_or_none(train, "training")
        self.train_cfg = None if train_cfg is None else parse(TrainCfg, train_cfg, "train_cfg")
        self.val_cfg = eval_cfg("val", val_cfg, val_dataloader, val_evaluator)
        self.test_cfg = eval_cfg("test", test_cfg, test_dataloader, test_evaluator)

        self.work_dir = Path(work_dir)
        self.name = name or time.strftime("%Y%m%d_%H%M%S")
        self.run_dir = self.work_dir / self.name
        self.device = torch.device(device) if device is not None else default_device()
        self.progress = Progress()
        self.requests: dict[str, str] = {}
        self.agreed: Mapping[str, str] = {}
        self.logger = _make_logger()
        self.closed = False

        self.plugins = PluginManager(plugins, defaults)
        self.hooks: HookSpecs = self.plugins.hooks
        self.hooks.runner = self
        _open_runners.add(self)
        with self._errors_blamed(close=True):
            self.plugins.configure()
            self._build_model(model, loss)
            self._build_optimizers(optim_wrapper)
            self.train_loop = self._build_train_loop(train_dataloader)
            self.val_loop = self._build_eval_loop("val", val_dataloader, val_evaluator)
            self.test_loop = self._build_eval_loop("test", test_dataloader, test_evaluator)
            self.hooks.resume(self)

    # -- construction ---------------------------------------------------------------------------

    def _build_model(self, model: Any, loss: Callable[..., Any] | None) -> None:
        model = build_model(model)
        configured = {"train": self.train_cfg, "val": self.val_cfg, "test": self.test_cfg}
        check_model(model, loss, [phase for phase, cfg in configured.items() if cfg is not None])
        self._names = {id(p): n for n, p in model.named_parameters()}
        self.hooks.initialize_model(self, model)
        self.bare_model: nn.Module = self.hooks.convert_model(self, model)
        trained = self.bare_model if loss is None else SupervisedModel(self.bare_model, loss)
        if isinstance(trained, BaseModel):
            trained._hooks = self.hooks
        self.model: Any = self.wrap(trained.to(self.device), "train")

    def wrap(self, model: nn.Module, role: Literal["train", "average"]) -> nn.Module:
        """``model`` as the plugins wrap it (DDP, FSDP, compile)."""
        return self.hooks.wrap_model(self, model, role)

    def _build_optimizers(self, cfg: Any) -> None:
        if not self._has_optimizer:
            return
        self.optim_wrapper = build_optim_wrapper(cfg, self.bare_model)
        check_optimizers(self.optim_wrapper, self.model)
        wrappers = self.optim_wrapper.by_name()
        for wrapper in wrappers.values():
            point_at_model(wrapper, self.bare_model, self._names)
            wrapper.hooks = self.hooks
        self.progress.count_steps_of(wrappers)
        for wrapper in wrappers.values():
            self.hooks.setup_optimizer(self, wrapper)

    def _build_train_loop(self, dataloader: Any) -> TrainLoop | None:
        if self.train_cfg is None:
            return None
        loader = self._dataloader(dataloader, "train")
        return TrainLoop(self, loader, self.train_cfg)

    def _build_eval_loop(self, phase: EvalPhase, dataloader: Any, metrics: Any) -> EvalLoop | None:
        cfg = self.val_cfg if phase == "val" else self.test_cfg
        if cfg is None:
            return None
        loader = self._dataloader(dataloader, phase)
        if cfg.loss and not hasattr(self.model, "loss_step"):
            raise TypeError(
                f"{phase}_cfg=dict(loss=True) needs a model with loss_step(data), as BaseModel is"
            )
        evaluator = None if metrics is None else build_evaluator(metrics)
        return EvalLoop(self, phase, loader, evaluator, cfg)

    def _dataloader(self, dataloader: Any, phase: Phase) -> Iterable[Any]:
        loader = build_dataloader(dataloader, f"{phase}_dataloader")
        return self.hooks.setup_dataloader(self, loader, phase)

    # -- what users call ------------------------------------------------------------------------

    def train(self, max_epochs: int | None = None, max_iters: int | None = None) -> dict[str, Any]:
        """Train up to the limit of ``train_cfg``, or up to another one; again to go on.

        Returns:
            The metrics of the last validation.
        """
        self._check_open()
        if self.train_loop is None or self.train_cfg is None:
            raise ValueError(
                "this Runner cannot train: it needs train_dataloader, train_cfg and optim_wrapper"
            )
        if max_epochs is not None or max_iters is not None:
            limits = {"by_epoch": max_epochs is not None, "max_epochs": max_epochs}
            limits["max_iters"] = max_iters
            if limits["by_epoch"] != self.train_cfg.by_epoch:
                limits["val_interval"] = None
            cfg = {**self.train_cfg.model_dump(), **limits}
            self.train_cfg = parse(TrainCfg, cfg, "train()")
            self.train_loop.set_limits(self.train_cfg)
        if self.train_loop.done:
            limit, unit = self.train_cfg.limit, self.train_cfg.unit
            self.logger.warning(
                f"training has reached its limit of {limit} {unit} already; to go on, call "
                f"train(max_{unit}={2 * limit})"
            )
        else:
            with self._running():
                self.train_loop.run()
        return {} if self.val_loop is None else self.val_loop.metrics

    def val(self) -> dict[str, Any]:
        """Validate, and return the metrics."""
        return self._evaluate(self.val_loop, "val")

    def test(self) -> dict[str, Any]:
        """Test, and return the metrics."""
        return self._evaluate(self.test_loop, "test")

    def _evaluate(self, loop: EvalLoop | None, phase: EvalPhase) -> dict[str, Any]:
        self._check_open()
        if loop is None:
            raise ValueError(
                f"this Runner has no {phase}() to do: pass {phase}_dataloader and "
                f"{phase}_evaluator (or {phase}_cfg=dict(loss=True))"
            )
        with self._running():
            return loop.run()

    def _check_open(self) -> None:
        if self.closed:
            raise RuntimeError("this Runner is closed: make another one")

    def stop(self, reason: str = "runner.stop()") -> None:
        """Ask for the end of training at the next safe point."""
        self.requests["stop"] = reason

    def log(self, values: Mapping[str, Any], phase: Phase = "train") -> None:
        """Hand values to the log, by name; tensors stay on the device until it is their turn."""
        self.hooks.log(self, phase, values)

    def on(self, event: str, *, tryfirst: bool = False, trylast: bool = False) -> Callable[[F], F]:
        """Make a plugin of one function: ``@runner.on("after_train_iter")``.

        A function of the same name replaces the one before it.
        """

        def register(function: F) -> F:
            self.plugins.add(FunctionPlugin(event, function, tryfirst, trylast), replace=True)
            return function

        return register

    def close(self) -> None:
        """Let the plugins give back what they took; the Runner cannot be used afterwards."""
        if self.closed:
            return
        self.closed = True
        _open_runners.discard(self)
        if getattr(self, "train_loop", None) is not None:
            self.train_loop.forget()  # type: ignore[union-attr]
        with self._errors_blamed():
            self.plugins.unconfigure()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # -- state ----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What all ranks share: weights, optimizers, counters, plugins; plain containers."""
        checkpoint: dict[str, Any] = {
            "state_dict": self.bare_model.state_dict(),
            "progress": self.progress.state_dict(),
            "plugins": self.plugins.state_dict(),
        }
        if self._has_optimizer:
            checkpoint["optimizer"] = self.optim_wrapper.state_dict()
        self.hooks.before_save_checkpoint(self, checkpoint)
        return checkpoint

    def load_state_dict(self, checkpoint: dict[str, Any], *, allow: Iterable[str] = ()) -> None:
        """Go on from what ``state_dict`` returned.

        Args:
            checkpoint: The state.
            allow: Names of plugins whose state may be missing on either side.
        """
        self.bare_model.load_state_dict(checkpoint["state_dict"])
        if self._has_optimizer:
            self.optim_wrapper.load_state_dict(checkpoint["optimizer"])
        self.progress.load_state_dict(checkpoint["progress"])
        self.plugins.load_state_dict(checkpoint["plugins"], allow=allow)
        if self.train_loop is not None:
            self.train_loop.forget()
        self.hooks.after_load_checkpoint(self, checkpoint)

    # -- life -----------------------------------------------------------------------------------

    @contextmanager
    def _running(self) -> Iterator[None]:
        """One call of train(), val() or test(): before_run, and on the way out after_run."""
        self.requests.clear()  # what a run that is over may have left
        with self._errors_blamed():
            try:
                with self.plugins.opened("before_run"):
                    self.hooks.before_run(self)
                    yield
            except BaseException as error:
                if self.train_loop is not None:
                    self.train_loop.forget()
                self.plugins.blame(error)
                self._also(error, self.hooks.on_exception, self, error)
                self._also(error, self.hooks.after_run, self)
                raise
            self.hooks.after_run(self)

    def _also(self, error: BaseException, call: Callable[..., None], *arguments: Any) -> None:
        """Run a closing event after ``error``; what it raises is noted and does not hide it."""
        try:
            call(*arguments)
        except Exception as other:
            self.plugins.blame(other)
            notes = "; ".join(getattr(other, "__notes__", []))
            error.add_note(f"and then {type(other).__name__}: {other} ({notes})")

    @contextmanager
    def _errors_blamed(self, close: bool = False) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self.plugins.blame(error)
            if close:
                self._also(error, self.close)
            raise


def _make_logger() -> Any:
    """A structlog logger over a standard one, which nobody else shares; plugins add handlers."""
    logger = logging.Logger("hookengine", logging.INFO)
    logger.parent = logging.getLogger("hookengine")
    return structlog.wrap_logger(
        logger,
        processors=[structlog.stdlib.filter_by_level, structlog.stdlib.render_to_log_kwargs],
        wrapper_class=structlog.stdlib.BoundLogger,
    )


_open_runners: weakref.WeakSet[Runner] = weakref.WeakSet()


@atexit.register
def _close_open_runners() -> None:
    for runner in list(_open_runners):
        try:
            runner.close()
        except Exception as error:
            runner.logger.error("closing at exit failed", error=repr(error))

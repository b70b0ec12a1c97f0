"""The Runner, which builds the parts of a run and owns their state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Unpack

import torch
from torch import nn

from hookengine.answers import answer, explained_arguments
from hookengine.events.dispatch import SILENT
from hookengine.events.hookimpl import HookArguments
from hookengine.events.hookspecs import Phase
from hookengine.events.manager import PluginManager
from hookengine.events.plugin import DEFAULT_PLUGINS, FunctionPlugin
from hookengine.events.selection import PluginLike
from hookengine.loop.life import Life
from hookengine.loop.loops import EvalLoop, TrainLoop
from hookengine.loop.optim import OptimWrapper, repeat
from hookengine.loop.progress import Progress
from hookengine.model.base_model import connect
from hookengine.model.plain_model import PlainModel, is_plain
from hookengine.records.log_context import make_logger
from hookengine.records.record import check_logged
from hookengine.records.run_folder import NamedRun
from hookengine.registry import did_you_mean
from hookengine.setup import arguments, state
from hookengine.setup.config import EvalCfg, TrainCfg
from hookengine.setup.description import describe_in_brief, describe_run
from hookengine.setup.migration import drop_neutral

F = TypeVar("F", bound=Callable[..., Any])
EvalPhase = Literal["val", "test"]


class Runner(Life, NamedRun):
    """Train, validate and test a model. Every feature is a plugin that implements events.

    The constructor builds everything, so that mistakes surface before the first iteration. Training
    needs ``train_dataloader``, ``train_cfg`` and ``optim_wrapper``. Validation and testing need a
    dataloader and an evaluator each.

    Args:
        model: A ``BaseModel``; a plain ``nn.Module``, together with ``loss`` unless it returns its
            loss; ``dict(type=NAME, ...)``; or a function that returns one of these.
        work_dir: Folder of all runs. The files of this run go to ``run_dir`` within it.
        train_dataloader: Any iterable that has a length or is used with ``max_iters``; or
            ``dict(dataset=..., batch_size=...)`` with the arguments of torch's DataLoader.
        val_dataloader: The same, for validation.
        test_dataloader: The same, for testing.
        train_cfg: ``dict(max_epochs=..., val_interval=1)`` or ``dict(max_iters=...)``. See
            ``TrainCfg``.
        val_cfg: ``dict(loss=True)`` also reports the losses. See ``EvalCfg``.
        test_cfg: The same, for testing.
        optim_wrapper: An optimizer; ``dict(optimizer=dict(type="SGD", lr=0.1))``, with
            ``paramwise=dict(...)`` for parameter groups; or a dict of these, whose keys are the
            names of the model's parts that they train.
        val_evaluator: A metric or a list of metrics. See ``Evaluator``.
        test_evaluator: The same, for testing.
        loss: The loss of a plain module, called as ``loss(output, target)`` if a batch is (inputs,
            target), and as ``loss(output, batch)`` if it is a dict. Without it, the loss is the
            item or attribute ``loss`` of what the module returns.
        plugins: Names, ``dict(type=NAME, **options)``, instances, or ``"no:NAME"``, which disables
            a default plugin.
        defaults: Plugins that are enabled without being named. Pass ``()`` for the bare kernel.
        device: The device of the model. Default: the accelerator that torch finds, or the CPU.
        name: Name of the run and of its folder. Default: the current time.
        resume: ``"auto"`` (or True) resumes from the newest checkpoint under ``work_dir``, if there
            is one. A path resumes from that checkpoint.
        load_from: Start with the weights of a checkpoint: a path, a URL, or a dict of the arguments
            of ``hookengine.model.load_weights``. With ``resume="auto"``, these weights are used
            only if there is no checkpoint to resume from. With ``resume=True``, this is the
            checkpoint to resume from.

    The attributes are there to be read. What a plugin may change has a method: ``use_device``,
    ``use_name``, ``use_logger``, ``stop``, ``repeat``.

    Attributes:
        hooks: All events as functions.
        plugins: The plugin manager.
        progress: The counters.
        model: The model that is trained: wrapped and on its device.
        bare_model: The module before any wrapping. All state uses its parameter names.
        optim_wrapper: The optimizer wrapper (or ``OptimWrapperDict``), or None.
        optimizer_names: The names of the optimizers, known before the optimizers are built.
        requests: What this rank requests for the next safe point: ``{"stop": reason}``.
        resume_from: ``"auto"``, a path, or None. A plugin resumes from it in the event ``resume``.
        load_from: The weights to start with, or None. A plugin loads them.
        logger: A structlog logger that binds run, epoch, iteration and plugin to its lines.
    """

    @explained_arguments("Runner", drop_neutral)
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
        resume: bool | str | Path | None = None,
        load_from: str | Path | Mapping[str, Any] | None = None,
    ) -> None:
        if loss is not None and not callable(loss):
            raise TypeError(f"loss must be callable, like F.cross_entropy, got {loss!r}")
        self.optimizer_names = arguments.optimizer_names(optim_wrapper)
        train = {
            "train_dataloader": train_dataloader,
            "train_cfg": train_cfg,
            "optim_wrapper": optim_wrapper,
        }
        arguments.all_or_none(train, "training")
        self.train_cfg = arguments.train_cfg(train_cfg)
        val = val_cfg, val_dataloader, val_evaluator
        self.val_cfg = arguments.eval_cfg("val", *val, self.train_cfg)
        self.test_cfg = arguments.eval_cfg("test", test_cfg, test_dataloader, test_evaluator)

        self._name_run(work_dir, name)
        self._window_told = False
        self.resume_from, self.load_from = arguments.beginning(resume, load_from)
        self.device = torch.device(device) if device is not None else arguments.default_device()
        self.progress = Progress()
        self.requests = {}
        self.logger = make_logger(self)
        self.loss = loss
        self.model: Any = None
        self.optim_wrapper: Any = None
        self.train_loop: TrainLoop | None = None
        self.val_loop: EvalLoop | None = None
        self.test_loop: EvalLoop | None = None

        self.plugins = PluginManager(plugins, defaults)
        self.hooks = self.plugins.hooks
        self.hooks.runner = self
        with self._building():
            arguments.check_beginning(self)
            self.plugins.configure()
            self._reserve_folder()
            self._build_model(model)
            self.train_loop = self._build_train_loop(train_dataloader)
            self.val_loop = self._build_eval_loop("val", val_dataloader, val_evaluator)
            self.test_loop = self._build_eval_loop("test", test_dataloader, test_evaluator)
            self._build_optimizers(optim_wrapper)
            self.hooks.resume(self)

    # -- construction ---------------------------------------------------------------------------

    def _build_model(self, model: Any) -> None:
        model = arguments.build_model(model)
        configured = {"train": self.train_cfg, "val": self.val_cfg, "test": self.test_cfg}
        phases = [phase for phase, cfg in configured.items() if cfg is not None]
        arguments.check_model(model, self.loss, phases)
        self._names = {id(p): n for n, p in model.named_parameters()}
        self.hooks.initialize_model(self, model)
        self.bare_model: nn.Module = self.hooks.convert_model(self, model)
        self.model = self.wrap(self.bare_model, "train")

    def wrap(self, model: nn.Module, role: Literal["train", "average"]) -> nn.Module:
        """Move ``model`` to the device and let the plugins wrap it (DDP, FSDP, compile).

        A plain module is first made a module with ``train_step``, ``val_step`` and ``test_step``,
        together with the Runner's loss if there is one.
        """
        if is_plain(model, self.loss):
            model = PlainModel(model, self.loss)
        if role == "train":
            connect(model, self.hooks)
        wrapped = self.hooks.wrap_model(self, model.to(self.device), role)
        return arguments.check_wrapped(self, wrapped, role)

    def _build_optimizers(self, cfg: Any) -> None:
        if not self.optimizer_names:
            return
        optim_wrapper = arguments.build_optim_wrapper(cfg, self.bare_model)
        arguments.check_optimizers(optim_wrapper, self.bare_model)
        self.optim_wrapper = optim_wrapper
        wrappers = self.optim_wrappers
        for wrapper in wrappers.values():
            arguments.point_at_model(wrapper, self.bare_model, self._names)
            wrapper.hooks = self.hooks
            wrapper.window_length = 1
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
        arguments.check_loss_step(self.model, cfg, phase)
        evaluator = None if metrics is None else arguments.build_evaluator(metrics)
        return EvalLoop(self, phase, loader, evaluator, cfg)

    def _dataloader(self, dataloader: Any, phase: Phase) -> Iterable[Any]:
        loader = arguments.build_dataloader(dataloader, f"{phase}_dataloader")
        return self.hooks.setup_dataloader(self, loader, phase)

    @property
    def optim_wrappers(self) -> dict[str, OptimWrapper]:
        """The optimizer wrappers by name; empty if the Runner does not train."""
        return {} if self.optim_wrapper is None else self.optim_wrapper.by_name()

    @property
    def dataloaders(self) -> dict[Phase, Iterable[Any]]:
        """The dataloaders by phase (``train``, ``val``, ``test``), as far as the Runner has them.

        They are those that the plugins returned from ``setup_dataloader``.
        """
        loops = {"train": self.train_loop, "val": self.val_loop, "test": self.test_loop}
        return {phase: loop.dataloader for phase, loop in loops.items() if loop is not None}  # type: ignore[misc]

    # -- what users call ------------------------------------------------------------------------

    def train(self, max_epochs: int | None = None, max_iters: int | None = None) -> dict[str, Any]:
        """Train up to the limit of ``train_cfg``. Call it again to continue.

        Args:
            max_epochs: Override the limit, in epochs, for this call.
            max_iters: Override the limit, in iterations, for this call.

        Returns:
            The metrics of the last validation.
        """
        self._check_open()
        if self.train_loop is None or self.train_cfg is None:
            raise ValueError(
                "this Runner cannot train because it needs train_dataloader, train_cfg and "
                "optim_wrapper. Pass all three to the Runner"
            )
        cfg = self.train_cfg
        if max_epochs is not None or max_iters is not None:
            limits = {"max_epochs": max_epochs, "max_iters": max_iters, "by_epoch": None}
            if (max_epochs is not None) != cfg.by_epoch:
                limits["val_interval"] = None
            cfg = arguments.parse(TrainCfg, {**cfg.model_dump(), **limits}, "train()")
        if self._depth:
            raise RuntimeError(
                "train() was called within a run that is still in progress. Call it after the run"
            )
        self.train_loop.set_limits(cfg)
        if self.train_loop.done:
            self.logger.warning(
                f"training has already reached its limit of {cfg.limit} {cfg.unit}. To continue, "
                f"call train(max_{cfg.unit}={2 * cfg.limit})"
            )
        else:
            with self._running():
                self.train_loop.run()
        return {} if self.val_loop is None else self.val_loop.metrics

    def val(self) -> dict[str, Any]:
        """Validate and return the metrics."""
        return self._evaluate(self.val_loop, "val")

    def test(self) -> dict[str, Any]:
        """Test and return the metrics."""
        return self._evaluate(self.test_loop, "test")

    def _evaluate(self, loop: EvalLoop | None, phase: EvalPhase) -> dict[str, Any]:
        self._check_open()
        if loop is None:
            raise ValueError(
                f"this Runner cannot run {phase}() because it has no {phase}_dataloader. Pass "
                f"{phase}_dataloader and {phase}_evaluator (or {phase}_cfg=dict(loss=True)) to the "
                "Runner"
            )
        with self._running():
            return loop.run()

    def stop(self, reason: str = "runner.stop()", *, now: bool = False) -> None:
        """Request that training stops at the next safe point.

        If you call it between runs, the next run stops at its first safe point.

        Args:
            reason: The reason, for the log and ``progress.stopped``.
            now: Do not ask the other ranks. They must all do the same: this is for ``before_train``
                and ``safe_point``, where training then ends without another iteration.

        Raises:
            RuntimeError: ``now`` is set, but training is not in progress.
        """
        if now and not self.plugins.is_open("before_train"):
            raise RuntimeError(
                "stop(now=True) ends training that is in progress. Call it in before_train or "
                "safe_point; elsewhere, call stop(reason)"
            )
        if now:
            self.progress.stopped = reason
        else:
            self.requests["stop"] = reason

    def repeat(self, *data_batches: Any) -> list[Any]:
        """Compute the gradients of the current step again, in ``before_optim_step``.

        The gradients so far are discarded. Each batch goes through ``train_step`` once more, with
        the current weights. The events of a pass are emitted, from ``before_repeat`` to
        ``finish_gradients``, but not those of a step. Counters do not change. Random numbers are
        drawn again, and batch norm sees the batches again.

        With several optimizers, only the losses of the one that steps are backpropagated. The
        windows, steps and learning rates of the others do not change. As in any backward pass,
        autograd adds to the gradients of every parameter that such a loss reaches, including those
        of another optimizer. ``train_step`` may use each optimizer for at most one step.

        Args:
            *data_batches: All micro-batches of the step, as ``before_train_iter`` returned them. If
                gradients are not accumulated, that is one batch. The gradients become those of
                these batches as one big batch.

        Returns:
            What ``train_step`` returned, per batch.

        Raises:
            RuntimeError: No optimizer step is in progress, or ``train_step`` backpropagated no
                loss for it, or used its optimizer for several steps.
            ValueError: There is no batch, or several although gradients are not accumulated.
        """
        return repeat(self, self.optim_wrappers, data_batches)

    def log(self, values: Mapping[str, Any], phase: Phase = "train") -> None:
        """Log values by name. Tensors stay on the device until their record is due.

        Numbers are averaged until their record is due. Of images, figures, histograms, tables and
        texts (``hookengine.Image``, ``Histogram``, ``Table``, or anything that ``media.as_medium``
        accepts), the record keeps the last one of each name, as it was when you logged it.
        """
        check_logged(values, phase)
        self.hooks.log(self, phase, values)

    def use_device(self, device: str | torch.device) -> None:
        """Choose the device of the model; call it in ``configure``.

        Raises:
            RuntimeError: The model is already built.
        """
        if self.model is not None:
            raise RuntimeError(
                f"cannot use the device {device}, because the model is already on {self.device}. "
                "Call use_device in configure"
            )
        self.device = torch.device(device)

    def use_logger(self, logger: Any) -> Any:
        """Log to ``logger``, a structlog logger, from now on, and return the previous one."""
        if not hasattr(logger, "bind"):
            raise TypeError(f"use_logger takes a structlog logger, got {logger!r}")
        previous, self.logger = self.logger, logger
        return previous

    def on(self, event: str, **options: Unpack[HookArguments]) -> Callable[[F], F]:
        """Register a function as a plugin: ``@runner.on("after_train_iter")``.

        It replaces a function that was registered under the same name.

        Args:
            event: The event that the function implements.
            **options: ``after``, ``before``, ``tryfirst``, ``trylast``, ``every`` and ``once``; see
                ``hookimpl``.
        """
        if not isinstance(event, str):
            raise TypeError(
                'runner.on takes the name of an event, as in @runner.on("before_run"), got '
                f"{event!r}"
            )

        def register(function: F) -> F:
            self.plugins.add(FunctionPlugin(event, function, options), replace=True)
            return function

        return register

    def __repr__(self) -> str:
        return describe_in_brief(self)

    if not TYPE_CHECKING:  # a type checker must report an unknown attribute

        def __getattr__(self, name: str) -> Any:
            text = answer(f"runner.{name}")
            hint = f": {text}" if text else f".{did_you_mean(name, dir(type(self)), 0.7)}"
            raise AttributeError(f"the Runner has no {name!r}{hint}")

    def _leave_run(self) -> None:
        if self.train_loop is not None:
            self.train_loop.forget()

    def _let_go(self) -> None:
        self._release_folder()
        if self.model is not None:
            connect(self.model, SILENT)
        for wrapper in self.optim_wrappers.values():
            wrapper.hooks = SILENT

    # -- state ----------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """Return a description of the run as plain values that JSON can hold.

        It covers the model and its parameters, the optimizers and their options, the configuration,
        the plugins with their options, the order in which the hooks are called, and the
        environment.
        """
        return describe_run(self)

    def state_dict(self) -> dict[str, Any]:
        """Return the state that all ranks share, in plain containers.

        The state holds weights, optimizers, counters and plugins. It does not hold gradients:
        if you call this method within a window of accumulated gradients, a run cannot be resumed
        exactly from the state, and a warning is logged. Call it in the event ``safe_point``.
        """
        if not self._window_told:
            self._window_told = state.warn_of_open_window(self)
        checkpoint = state.collect(self)
        self.hooks.before_save_checkpoint(self, checkpoint)
        return state.as_saved(checkpoint)

    def load_state_dict(self, checkpoint: dict[str, Any], *, allow: Iterable[str] = ()) -> None:
        """Load a state that ``state_dict`` returned, to resume from it.

        Args:
            checkpoint: The state.
            allow: What may differ: ``"optimizer"``, ``"dataset"``, ``"world_size"``, and names of
                plugins whose state is missing on either side.

        Raises:
            ValueError: ``checkpoint`` is not the state of a Runner, or it does not fit this one.
                The message names everything that differs, and nothing is loaded.
        """
        state.load(self, checkpoint, allow)
        if self.train_loop is not None:
            self.train_loop.forget(resumed=True)
        self.hooks.after_load_checkpoint(self, checkpoint)

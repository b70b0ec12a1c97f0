"""Every event of hookengine: the contract between the kernel and the plugins.

The left column shows the loop, the right column the events that it emits. Brackets give the kind of
an event, unless it is a plain *event*; the kinds are explained below. ::

    Runner(...)                                 configure
                                                initialize_model
                                                convert_model       [transform model]
                                                wrap_model          [transform model]
                                                setup_dataloader    [transform dataloader]
                                                setup_optimizer     once per optimizer
                                                resume
    runner.train()                              before_run
      start                                     before_train
      for epoch in range(max_epochs):           before_train_epoch
        for batch in train_dataloader:          before_train_iter   [transform data_batch]
          model.train_step(batch)
            optim_wrapper.optim_context():      should_step         [veto]
                                                forward_context     [contexts]
              losses = model(batch)             after_forward       [transform losses]
            optim_wrapper.update_params(loss)   scale_loss          [transform loss]
                                                backward            [decision]
              if will_step:                     finish_gradients
                                                before_optim_step
                (runner.repeat(batch):          before_repeat, forward_context, after_forward,
                                                scale_loss, backward, finish_gradients)
                                                optim_step          [decision]
                if taken:                       after_optim_step
          progress.iter += 1                    after_train_iter
          if no window is open:                 agree               [decision]
                                                safe_point
        progress.epoch += 1                     after_train_epoch
                                                agree, safe_point
        if progress.val_due:                    before_val
                                                before_val_epoch
          for model in                          evaluated_models    [decision]
            for batch in val_dataloader:        before_val_iter     [transform data_batch]
              model.val_step(batch)             forward_context     [contexts]
                                                after_val_iter
                                                before_metrics      once per model
                                                after_val_epoch
                                                after_val
                                                agree, safe_point
      end                                       after_train
                                                on_exception        only after an error
                                                after_run
    runner.val(), runner.test()                 before_run, before_val or before_test, ...
    runner.close()                              unconfigure

``runner.log(...)`` emits ``log``. The plugin that reduces the logged values emits ``write`` for the
sinks. ``runner.state_dict()`` emits ``before_save_checkpoint``. The plugin that has written a
checkpoint to disk emits ``after_save_checkpoint``. ``runner.load_state_dict()`` emits
``before_load_checkpoint``, and ``after_load_checkpoint``, during which each sink emits ``history``.
A plugin that passes over data by itself emits ``on_progress``.

Kinds
-----
event
    Every plugin is called. Return values are ignored.
decision
    Plugins are called in order until one returns a value other than None, which is the decision.
    If all of them return None, the kernel's default applies. Plugins that must be asked first use
    ``@hookimpl(tryfirst=True)``.
veto
    Every plugin is called. The answer is no if at least one returns False; None counts as yes.
transform
    Plugins are called in order. Each may return a replacement for the named argument, which the
    next plugin receives. Returning None leaves the argument unchanged.
contexts
    Every plugin is called and may return a context manager or None. The kernel enters all the
    context managers, in order.

A returned value of another type than the event expects is an error, which names the plugin.

An implementation declares only the arguments that it needs. The annotated return type is what the
*caller* of the event receives; an implementation may always return None.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, runtime_checkable

import pluggy
import torch
from torch import nn

if TYPE_CHECKING:
    from pathlib import Path

    from hookengine.loop.optim import OptimWrapper
    from hookengine.records.record import Record
    from hookengine.runner import Runner

PROJECT = "hookengine"
F = TypeVar("F", bound=Callable[..., Any])
Phase = Literal["train", "val", "test"]
"""What the model is doing."""
Counter = Literal["iter", "step", "epoch", "batch"]
_hookspec = pluggy.HookspecMarker(PROJECT)


@dataclass(frozen=True)
class Kind:
    """How an event treats its implementations. The dispatcher and the docs read this data."""

    name: Literal["event", "decision", "veto", "transform", "contexts"]
    argument: str | None = None
    """The argument that a transform replaces."""
    closing: bool = False
    """Every implementation is called even if one raises; all errors are reported."""
    mirrored: bool = False
    """The event undoes ``configure``: the plugin that was configured last is called first."""
    counter: Counter | None = None
    """What ``every`` counts, or None if the event has no rhythm."""
    deprecations: Mapping[str, str] = field(default_factory=dict)
    """What to use instead of a deprecated argument, by its name; of the whole event under ""."""
    answer: Any = object
    """The type of a returned value; any other one, apart from None, is an error."""
    expects: str = ""
    """The same in words, for that error."""

    def returning(self, answer: Any, expects: str) -> Kind:
        """Return this kind for an event whose implementations return an ``answer``, or None."""
        return replace(self, answer=answer, expects=expects)

    def per(self, counter: Counter) -> Kind:
        """Return this kind for an event whose rhythm ``counter`` sets."""
        return replace(self, counter=counter)

    def deprecated(self, event: str | None = None, /, **arguments: str) -> Kind:
        """Return this kind for an event that still works for one minor version, with a warning.

        Args:
            event: What to use instead and when the event is removed: ``"use X; gone in 0.4"``.
            **arguments: The same for single arguments of the event, by name.
        """
        return replace(self, deprecations=arguments if event is None else {"": event, **arguments})

    def __call__(self, function: F) -> F:
        function.hookengine_kind = self  # type: ignore[attr-defined]
        return _hookspec(function, firstresult=self.name == "decision")

    def __str__(self) -> str:
        return f"{self.name} {self.argument}" if self.argument else self.name


event = Kind("event")
decision = Kind("decision")
veto = Kind("veto").returning(bool, "True, False")
contexts = Kind("contexts").returning(
    AbstractContextManager, "a context manager, such as torch.autocast(...),"
)
closing = Kind("event", closing=True)


def transform(argument: str) -> Kind:
    """Return the kind of an event whose implementations may replace ``argument``."""
    return Kind("transform", argument=argument)


@runtime_checkable
class Indexable(Protocol):
    """What Python can iterate over by index, without ``__iter__``."""

    def __getitem__(self, index: int) -> Any:
        """Return an item, or raise an IndexError behind the last one."""


class Life(Protocol):
    """The life cycle of a Runner."""

    @event
    def configure(self, runner: Runner) -> None:
        """Set up the process before anything is built: process group, device, seeds, log files.

        ``runner`` has its options and ``run_dir``, but no model yet. You may call
        ``runner.use_device``, ``runner.use_name`` and ``runner.use_logger``.

        Set the attributes of your plugin here, since every other method relies on them:
        ``state_dict`` may be called before ``before_train``. One plugin object may serve several
        Runners in turn, and ``configure`` starts each from scratch.
        """

    @Kind("event", closing=True, mirrored=True)
    def unconfigure(self, runner: Runner) -> None:
        """Release what ``configure`` acquired. Each plugin is called once.

        The plugin that was configured last is called first.

        This happens in ``runner.close()``, at the end of ``with Runner(...)``, at interpreter exit,
        when the construction of the Runner fails, and when Python collects a Runner that nothing
        refers to: then on another thread. It also happens before the same plugin object serves
        another Runner.
        """

    @event
    def before_run(self, runner: Runner) -> None:
        """Prepare for a call of ``runner.train()``, ``val()`` or ``test()``."""

    @closing
    def after_run(self, runner: Runner) -> None:
        """Clean up after a call of ``runner.train()``, ``val()`` or ``test()``, even a failed one.

        If the call failed, ``on_exception`` comes first.
        """

    @closing
    def on_exception(self, runner: Runner, error: BaseException) -> None:
        """React to ``error``, which ends the run and is raised again afterwards.

        ``error`` may be a KeyboardInterrupt.
        """

    @event
    def on_progress(self, runner: Runner, name: str, done: int, total: int | None) -> None:
        """Show the progress of a pass over data that is neither training nor evaluation.

        The plugin that makes the pass emits this event: with ``done=0`` before it, after each
        batch, and with ``done == total`` at its end. ``total`` is None while it is unknown.
        """


class Build(Protocol):
    """The construction of a Runner. The events come in this order."""

    @event
    def initialize_model(self, runner: Runner, model: nn.Module) -> None:
        """Initialize the weights of the bare model, on the CPU, before any conversion.

        Later events may replace parameters (SyncBN, FSDP): keep their names, not the parameters.
        """

    @transform("model").returning(nn.Module, "a module")
    def convert_model(self, runner: Runner, model: nn.Module) -> nn.Module:
        """Replace layers (SyncBN) or the whole bare model before it moves to the device."""

    @transform("model").returning(nn.Module, "a module")
    def wrap_model(
        self, runner: Runner, model: nn.Module, role: Literal["train", "average"]
    ) -> nn.Module:
        """Wrap the model (DDP, FSDP, compile), which is already on its device.

        ``role`` is ``"train"``, or ``"average"`` for a copy that a plugin wraps the same way with
        ``runner.wrap``. The wrapped model needs ``train_step``, ``val_step`` and ``test_step``, and
        also ``loss_step`` for ``val_cfg=dict(loss=True)``.
        """

    @transform("dataloader").returning(Iterable | Indexable, "a dataloader")
    def setup_dataloader(
        self, runner: Runner, dataloader: Iterable[Any], phase: Phase
    ) -> Iterable[Any]:
        """Replace a dataloader, for example to change its sampler.

        To change the sampler, create a new dataloader (``hookengine.copy_dataloader``): torch does
        not allow setting it on an existing one.

        If a dataloader has a method ``seek(epoch, batch)``, the kernel calls it before each pass
        of training, and the pass must start at that batch. From any other dataloader, the kernel
        fetches and drops the batches that were already used before a resume.

        Set the attribute ``consecutive`` of a dataloader to True if each rank gets the batches that
        follow those of the previous rank. Evaluation then joins the results in that order.
        """

    @event
    def setup_optimizer(self, runner: Runner, optim_wrapper: OptimWrapper) -> None:
        """Add what belongs to one optimizer (schedulers, scalers). Emitted once per optimizer.

        By then, ``runner.progress`` holds the lengths of an epoch and of the run, if known.
        """

    @event
    def resume(self, runner: Runner) -> None:
        """Load weights or resume with ``runner.load_state_dict``. Everything is built by then."""


class Train(Protocol):
    """Training. Counters advance before each ``after_*`` event."""

    @event
    def before_train(self, runner: Runner) -> None:
        """Prepare to start or continue training."""

    @event
    def after_train(self, runner: Runner) -> None:
        """Finish training: the limit is reached, or the ranks agreed to stop.

        The last checkpoint is already saved: change weights in an earlier event.
        """

    @event.per("epoch")
    def before_train_epoch(self, runner: Runner) -> None:
        """Prepare for a pass over the training dataloader.

        If ``progress.batch > 0``, the run resumes an interrupted pass.

        The model is in training mode. What you change here, such as freezing layers, lasts for the
        epoch.
        """

    @event.per("epoch")
    def after_train_epoch(self, runner: Runner) -> None:
        """Finish a complete pass. ``progress.epoch`` is the number of finished epochs."""

    @transform("data_batch").per("iter")
    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any) -> Any:
        """Replace the batch that the dataloader yielded, before the data preprocessor gets it."""

    @event.per("iter")
    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any, outputs: Any
    ) -> None:
        """Finish an iteration. ``progress.iter`` is the number of finished iterations.

        ``outputs`` is what ``train_step`` returned. For a BaseModel it is a dict of detached scalar
        tensors on the device. Reading a value (``.item()``) synchronizes the device.
        """

    @event
    def safe_point(self, runner: Runner, agreed: Mapping[str, str]) -> None:
        """Save or handle preemption. No iteration, validation or accumulation window is open.

        This event follows all ``after_*`` events of an iteration, an epoch or a validation.
        ``agreed`` holds the requests that all ranks agreed on, such as ``{"stop": reason}``; most
        often it is empty.
        """


class Val(Protocol):
    """Validation. The kernel saves the random state before it and restores it afterwards."""

    @event
    def before_val(self, runner: Runner) -> None:
        """Prepare for a validation."""

    @event
    def after_val(self, runner: Runner) -> None:
        """Finish a validation."""

    @event
    def before_val_epoch(self, runner: Runner) -> None:
        """Prepare for the passes over the validation dataloader, one per evaluated model."""

    @event
    def after_val_epoch(self, runner: Runner, metrics: dict[str, Any]) -> None:
        """Receive the metrics of all evaluated models by name, scalars as Python numbers.

        You may add metrics of your own, which are recorded and can be monitored like the others.
        """

    @transform("data_batch").per("batch")
    def before_val_iter(self, runner: Runner, batch_idx: int, data_batch: Any, prefix: str) -> Any:
        """Replace the batch before the data preprocessor gets it."""

    @event.per("batch")
    def after_val_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any, outputs: Any, prefix: str
    ) -> None:
        """Receive what ``val_step`` returned. The evaluator has already processed it.

        ``prefix`` is the name of the evaluated model, as ``evaluated_models`` gave it: ``""`` for
        the only one, or the raw one.
        """


class Test(Protocol):
    """Testing, which works the same way as validation."""

    @event
    def before_test(self, runner: Runner) -> None:
        """Prepare for a test."""

    @event
    def after_test(self, runner: Runner) -> None:
        """Finish a test."""

    @event
    def before_test_epoch(self, runner: Runner) -> None:
        """Prepare for the passes over the test dataloader, one per evaluated model."""

    @event
    def after_test_epoch(self, runner: Runner, metrics: dict[str, Any]) -> None:
        """Receive the metrics of all evaluated models by name, scalars as Python numbers."""

    @transform("data_batch").per("batch")
    def before_test_iter(self, runner: Runner, batch_idx: int, data_batch: Any, prefix: str) -> Any:
        """Replace the batch before the data preprocessor gets it."""

    @event.per("batch")
    def after_test_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any, outputs: Any, prefix: str
    ) -> None:
        """Receive what ``test_step`` returned. The evaluator has already processed it.

        ``prefix`` is the name of the evaluated model, as in ``after_val_iter``.
        """


class Evaluation(Protocol):
    """Events that validation and testing share."""

    @decision.returning(Mapping, "a dict of modules by name")
    def evaluated_models(self, runner: Runner, phase: Phase) -> dict[str, nn.Module] | None:
        """Choose the models to evaluate (raw, averaged): return ``{prefix: module}``.

        Each model gets one pass. Its metrics are named ``prefix/name``. The kernel's default is
        ``{"": runner.model}``.
        """

    @event
    def before_metrics(self, runner: Runner, model: nn.Module, phase: Phase, prefix: str) -> None:
        """Act between the last batch of a model and the computation of its metrics.

        The model has seen all batches of this rank. After this event, the ranks gather the results
        that the metrics hold. The model is in evaluation mode, and gradients are disabled.
        ``prefix`` is its name, as ``evaluated_models`` gave it.
        """


class Step(Protocol):
    """Everything between a batch and the optimizer step."""

    @contexts
    def forward_context(
        self, runner: Runner, model: nn.Module, optim_wrapper: OptimWrapper | None, phase: Phase
    ) -> tuple[AbstractContextManager[Any], ...]:
        """Return a context manager for the forward pass (autocast), in every phase.

        ``optim_wrapper`` is None in validation and testing.
        """

    @transform("losses").returning(Mapping, "a dict of losses by name")
    def after_forward(
        self, runner: Runner, losses: Mapping[str, torch.Tensor | Sequence[torch.Tensor]]
    ) -> Mapping[str, torch.Tensor | Sequence[torch.Tensor]]:
        """Replace the dict of losses that the model returned.

        ``BaseModel.parse_losses`` emits this event.
        """

    @veto.per("iter")
    def should_step(self, runner: Runner, optim_wrapper: OptimWrapper) -> bool:
        """Decide, before the forward pass, whether this iteration ends with an optimizer step."""

    @transform("loss").returning(torch.Tensor, "a tensor").per("iter")
    def scale_loss(
        self, runner: Runner, optim_wrapper: OptimWrapper, loss: torch.Tensor
    ) -> torch.Tensor:
        """Replace the scalar loss before its backward pass."""

    @decision.returning(bool, "True, False").per("iter")
    def backward(
        self, runner: Runner, optim_wrapper: OptimWrapper, loss: torch.Tensor
    ) -> bool | None:
        """Run the backward pass and return True.

        The kernel's default is ``loss.backward()``.
        """

    @event.per("step")
    def finish_gradients(self, runner: Runner, optim_wrapper: OptimWrapper) -> None:
        """Turn the raw gradients into the gradients of the loss, which all later events see.

        Exchange gradients with other ranks, divide by the loss scale, or average over accumulated
        micro-batches. A plugin that exchanges gradients must run first (``tryfirst``, before
        ``amp``), because an infinite gradient on one rank affects all ranks.
        """

    @event
    def before_repeat(self, runner: Runner, optim_wrapper: OptimWrapper, data_batch: Any) -> None:
        """Prepare for a pass over ``data_batch`` within a step; see ``Runner.repeat``.

        ``optim_wrapper.window_open`` is False before the first pass: the gradients computed so far
        are discarded, so forget how they were weighted and scaled.
        """

    @event.per("step")
    def before_optim_step(self, runner: Runner, optim_wrapper: OptimWrapper) -> None:
        """Read or edit the gradients just before the step.

        To compute them again, for example with other weights, call ``runner.repeat(data_batch)``.
        It discards what earlier plugins have edited: call it before them (``tryfirst``).
        """

    @decision.returning(bool, "True, False").per("step")
    def optim_step(self, runner: Runner, optim_wrapper: OptimWrapper) -> bool | None:
        """Take the step and return True, or skip it and return False.

        The kernel's default is ``optim_wrapper.optimizer.step()``.
        """

    @event.per("step")
    def after_optim_step(self, runner: Runner, optim_wrapper: OptimWrapper) -> None:
        """React to a step that was taken, not skipped. ``optim_wrapper.steps`` counts it."""


class State(Protocol):
    """Checkpoints, and what all ranks agree on."""

    @event
    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Add entries to the state that ``runner.state_dict()`` is about to return.

        A hook that takes ``checkpoint`` may also be called once before training, to find out
        whether what it adds can be saved.
        """

    @event
    def after_save_checkpoint(self, runner: Runner, path: Path, best: bool) -> None:
        """Use a checkpoint that is complete on disk. Only the rank that saved it is called.

        ``path`` is the folder of the checkpoint, which may be renamed or removed when later ones
        are saved. ``best`` tells whether the checkpoint is the best one so far. If a validation
        shows that later, the event is emitted again for the same checkpoint, with ``best=True``.
        """

    @event
    def before_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Prepare for a state that ``runner.load_state_dict()`` is about to load.

        Add to the Runner what your plugin had added during training before the state was saved,
        such as a parameter group; only then is the Runner compared with the state. You may also
        change entries of ``checkpoint``. Tensors of a sharded checkpoint may not be read yet.
        """

    @event
    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Read entries of the state that ``runner.load_state_dict()`` has just loaded."""

    @decision.returning(Mapping, "a dict of requests by name")
    def agree(self, runner: Runner, requests: Mapping[str, str]) -> Mapping[str, str] | None:
        """Combine the requests of all ranks into one: ``{"stop": reason, "save": reason}``.

        The kernel emits this event at every safe point. You may return ``{}`` and answer at a later
        safe point: a request stays until the ranks agree on it. The kernel's default is the
        requests of this rank.
        """


class Records(Protocol):
    """Logged values and the records made from them."""

    @event
    def log(self, runner: Runner, phase: Phase, values: Mapping[str, Any]) -> None:
        """Receive the values passed to ``runner.log``. Tensors are still on the device."""

    @event
    def write(self, runner: Runner, record: Record) -> None:
        """Receive one record of reduced values: phase, progress, Python floats, media."""

    @decision.returning(Iterable, "an iterable of records")
    def history(self, runner: Runner) -> Iterable[Record] | None:
        """Return the records of the run so far, oldest first. They are iterated over once.

        A ``RecordHistory`` may be iterated over twice. It also tells which later records training
        is about to cut, because the run resumes before them, and which file holds all records.

        A sink emits this event to write the records that it does not hold yet:

        - after a checkpoint is loaded; the records are then those up to the point where the run
          resumes,
        - when you add the sink in the middle of a run,
        - on its own thread, when its queue has drained after it dropped records.

        It also emits it before it warns of lost records, to name the file.
        """


SUBJECTS: tuple[type, ...] = (Life, Build, Train, Val, Test, Evaluation, Step, State, Records)


class HookSpecs(Life, Build, Train, Val, Test, Evaluation, Step, State, Records, Protocol):
    """All events. ``runner.hooks`` has this type. The kernel passes arguments by position.

    The plugin manager emits ``configure`` and ``unconfigure`` itself: ``runner.hooks`` lacks them.
    """

    runner: Runner
    replaced: dict[str, str | None]
    """Per transform, the plugin that replaced the current value, or None."""


@dataclass(frozen=True)
class Event:
    """Describe one event: its name, kind, subject, signature and documentation."""

    name: str
    kind: Kind
    subject: str
    signature: inspect.Signature
    doc: str

    @property
    def arguments(self) -> tuple[str, ...]:
        """Names of the arguments, in the order in which the kernel passes them."""
        return tuple(self.signature.parameters)

    def __str__(self) -> str:
        return f"{self.name}({', '.join(self.arguments)})"


def _events() -> dict[str, Event]:
    found = {}
    for subject in SUBJECTS:
        for name, function in vars(subject).items():
            kind = getattr(function, "hookengine_kind", None)
            if kind is not None:
                full = inspect.signature(function)
                signature = full.replace(parameters=list(full.parameters.values())[1:])
                doc = inspect.getdoc(function) or ""
                found[name] = Event(name, kind, subject.__name__.lower(), signature, doc)
    return found


EVENTS: dict[str, Event] = _events()

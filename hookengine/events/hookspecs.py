"""Every event of hookengine: the contract between the kernel and the plugins.

The loop, with each event at its place. What stands in brackets is the event's kind where it is
not a plain *event*; the kinds are explained below. ::

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
                                                on_exception        where there was one
                                                after_run
    runner.val(), runner.test()                 before_run, before_val or before_test, ...
    runner.close()                              unconfigure

``runner.log(...)`` emits ``log``; a plugin that reduces values emits ``write`` for the sinks.
``runner.state_dict()`` emits ``before_save_checkpoint``, a plugin that has written it to the disk
``after_save_checkpoint``; ``runner.load_state_dict()`` emits
``after_load_checkpoint``, where each sink asks for the ``history``.

Kinds
-----
event
    Everyone is told; return values are ignored.
decision
    Asked in order; the first answer that is not None wins; the kernel's default applies when
    nobody answers. Who must be asked before the others says ``@hookimpl(tryfirst=True)``.
veto
    Everyone is asked; one False is enough. None is no objection.
transform
    Each implementation may return a replacement for the named argument, which the next one
    receives; None keeps it.
contexts
    Every answer that is not None is a context manager, and all of them are entered, in order.

An implementation declares just the arguments that it wants. Annotated return types are what the
*caller* of the event gets; an implementation may always return None.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, overload

import pluggy

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import nn

    from hookengine.loop.optim import OptimWrapper
    from hookengine.records.record import Record
    from hookengine.runner import Runner

PROJECT = "hookengine"
F = TypeVar("F", bound=Callable[..., Any])
Phase = Literal["train", "val", "test"]
_hookspec = pluggy.HookspecMarker(PROJECT)
_hookimpl = pluggy.HookimplMarker(PROJECT)


@dataclass(frozen=True)
class Kind:
    """How an event treats its implementations; data that the dispatcher and the docs read."""

    name: Literal["event", "decision", "veto", "transform", "contexts"]
    argument: str | None = None
    """The argument that a transform replaces."""
    closing: bool = False
    """Every implementation is called even if one raises; all errors are reported."""
    reverse: bool = False
    """Implementations are called in the reverse of the resolved order."""

    def __call__(self, function: F) -> F:
        function.hookengine_kind = self  # type: ignore[attr-defined]
        return _hookspec(function, firstresult=self.name == "decision")

    def __str__(self) -> str:
        return f"{self.name} {self.argument}" if self.argument else self.name


event = Kind("event")
decision = Kind("decision")
veto = Kind("veto")
contexts = Kind("contexts")
closing = Kind("event", closing=True)


def transform(argument: str) -> Kind:
    """Mark an event whose implementations may replace ``argument``."""
    return Kind("transform", argument=argument)


@overload
def hookimpl(function: F, /) -> F: ...
@overload
def hookimpl(*, tryfirst: bool = ..., trylast: bool = ...) -> Callable[[F], F]: ...
def hookimpl(
    function: F | None = None, /, *, tryfirst: bool = False, trylast: bool = False
) -> F | Callable[[F], F]:
    """Give options to an implementation of an event; without options it is not needed.

    Args:
        tryfirst: Called before the implementations of the other plugins; of several, in order.
        trylast: Called after them; of several, the one of the first plugin is the very last.

    Raises:
        ValueError: both were asked for.
    """
    if tryfirst and trylast:
        raise ValueError("an implementation is called first or last, not both: drop one of the two")
    marker = _hookimpl(tryfirst=tryfirst, trylast=trylast)
    return marker(function) if function is not None else marker


class Life(Protocol):
    """The life of a Runner."""

    @event
    def configure(self, runner: Runner) -> None:
        """Set up the process, before anything is built: process group, device, seeds, log files.

        ``runner`` has its options and ``run_dir``, but no model yet; ``runner.device`` may be set.
        """

    @Kind("event", closing=True, reverse=True)
    def unconfigure(self, runner: Runner) -> None:
        """Give back what ``configure`` took; once, in reverse order.

        Called by ``runner.close()``, at the end of ``with Runner(...)``, at interpreter exit, or
        when the construction of the Runner failed.
        """

    @event
    def before_run(self, runner: Runner) -> None:
        """Begin a call of ``runner.train()``, ``val()`` or ``test()``."""

    @closing
    def after_run(self, runner: Runner) -> None:
        """End that call, also when it failed (then ``on_exception`` came before)."""

    @closing
    def on_exception(self, runner: Runner, error: BaseException) -> None:
        """Learn that the run ends with ``error`` (KeyboardInterrupt included); it is raised on."""


class Build(Protocol):
    """The construction of a Runner, in this order."""

    @event
    def initialize_model(self, runner: Runner, model: nn.Module) -> None:
        """Initialise the weights of the bare model, on the CPU, before any conversion."""

    @transform("model")
    def convert_model(self, runner: Runner, model: nn.Module) -> nn.Module:
        """Replace layers (SyncBN) or the whole bare model, before it moves to the device."""

    @transform("model")
    def wrap_model(
        self, runner: Runner, model: nn.Module, role: Literal["train", "average"]
    ) -> nn.Module:
        """Wrap the model, which is on its device (DDP, FSDP, compile).

        ``role`` is ``"train"``, or ``"average"`` for a copy that a plugin wants wrapped the same
        way (``runner.wrap``). What comes back needs ``train_step``, ``val_step``, ``test_step``,
        and ``loss_step`` for ``val_cfg=dict(loss=True)``.
        """

    @transform("dataloader")
    def setup_dataloader(
        self, runner: Runner, dataloader: Iterable[Any], phase: Phase
    ) -> Iterable[Any]:
        """Replace a dataloader (another sampler needs a rebuilt one; torch forbids setting it).

        A dataloader with a method ``seek(epoch, batch)`` is told where each pass starts and
        yields from there; of any other the kernel fetches and drops what was consumed before a
        resume. One with a true attribute ``consecutive`` gives each rank the batches that follow
        those of the rank before: in evaluation, results are joined in that order.
        """

    @event
    def setup_optimizer(self, runner: Runner, optim_wrapper: OptimWrapper) -> None:
        """Add what belongs to one optimizer (schedulers, scalers); once per optimizer.

        The lengths of the run are known by then, as far as they can be: ``runner.progress``.
        """

    @event
    def resume(self, runner: Runner) -> None:
        """Load or resume, through ``runner.load_state_dict``; everything is built."""


class Train(Protocol):
    """Training. Counters move before an ``after_*`` event."""

    @event
    def before_train(self, runner: Runner) -> None:
        """Begin training, or go on with it."""

    @event
    def after_train(self, runner: Runner) -> None:
        """End training: the limit is reached, or a stop was agreed."""

    @event
    def before_train_epoch(self, runner: Runner) -> None:
        """Begin a pass over the training dataloader, or go on with one (``progress.batch > 0``).

        The model is in training mode; what is changed here (frozen layers) stays for the epoch.
        """

    @event
    def after_train_epoch(self, runner: Runner) -> None:
        """End a complete pass; ``progress.epoch`` is the number of finished epochs."""

    @transform("data_batch")
    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any) -> Any:
        """Replace the batch as it came from the dataloader, before the data preprocessor."""

    @event
    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any, outputs: Any
    ) -> None:
        """End an iteration; ``progress.iter`` is the number of finished iterations.

        ``outputs`` is what ``train_step`` returned: for a BaseModel a dict of detached scalar
        tensors on the device. Reading a value (``.item()``) synchronises the device.
        """

    @event
    def safe_point(self, runner: Runner) -> None:
        """Save, or be preempted: no iteration, validation or accumulation window is open.

        Comes after all ``after_*`` hooks of an iteration, an epoch, a validation.
        ``runner.agreed`` holds the requests that all ranks have agreed on.
        """


class Val(Protocol):
    """Validation, under a random state that is restored afterwards."""

    @event
    def before_val(self, runner: Runner) -> None:
        """Begin a validation."""

    @event
    def after_val(self, runner: Runner) -> None:
        """End a validation."""

    @event
    def before_val_epoch(self, runner: Runner) -> None:
        """Begin the passes over the validation dataloader, one per evaluated model."""

    @event
    def after_val_epoch(self, runner: Runner, metrics: Mapping[str, Any]) -> None:
        """Receive the metrics of all evaluated models by name, scalars as Python numbers."""

    @transform("data_batch")
    def before_val_iter(self, runner: Runner, batch_idx: int, data_batch: Any) -> Any:
        """Replace the batch, before the data preprocessor."""

    @event
    def after_val_iter(self, runner: Runner, batch_idx: int, data_batch: Any, outputs: Any) -> None:
        """Receive what ``val_step`` returned; the evaluator has processed it."""


class Test(Protocol):
    """Testing, as validation."""

    @event
    def before_test(self, runner: Runner) -> None:
        """Begin a test."""

    @event
    def after_test(self, runner: Runner) -> None:
        """End a test."""

    @event
    def before_test_epoch(self, runner: Runner) -> None:
        """Begin the passes over the test dataloader, one per evaluated model."""

    @event
    def after_test_epoch(self, runner: Runner, metrics: Mapping[str, Any]) -> None:
        """Receive the metrics of all evaluated models by name, scalars as Python numbers."""

    @transform("data_batch")
    def before_test_iter(self, runner: Runner, batch_idx: int, data_batch: Any) -> Any:
        """Replace the batch, before the data preprocessor."""

    @event
    def after_test_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any, outputs: Any
    ) -> None:
        """Receive what ``test_step`` returned; the evaluator has processed it."""


class Evaluation(Protocol):
    """What validation and testing share."""

    @decision
    def evaluated_models(self, runner: Runner, phase: Phase) -> dict[str, nn.Module] | None:
        """Name the models to evaluate, ``{prefix: module}``, one pass each (raw and averaged).

        The kernel's default is ``{"": runner.model}``. A metric is called ``prefix/name``.
        """

    @event
    def before_metrics(self, runner: Runner, model: nn.Module, phase: Phase) -> None:
        """Learn that one of the models has seen all batches of this rank.

        Next the ranks gather what the metrics hold. The model is in evaluation mode, and nothing
        records gradients.
        """


class Step(Protocol):
    """What happens between a batch and the optimizer's step."""

    @contexts
    def forward_context(
        self, runner: Runner, model: nn.Module, optim_wrapper: OptimWrapper | None, phase: Phase
    ) -> tuple[AbstractContextManager[Any], ...]:
        """Run the forward pass within a context (autocast); in every phase.

        ``optim_wrapper`` is None in validation and testing.
        """

    @transform("losses")
    def after_forward(
        self, runner: Runner, losses: dict[str, torch.Tensor | list[torch.Tensor]]
    ) -> dict[str, torch.Tensor | list[torch.Tensor]]:
        """Replace the dict of losses that the model returned, by ``BaseModel.parse_losses``."""

    @veto
    def should_step(self, runner: Runner, optim_wrapper: OptimWrapper) -> bool:
        """Say, before the forward pass, whether this iteration ends with an optimizer step."""

    @transform("loss")
    def scale_loss(
        self, runner: Runner, optim_wrapper: OptimWrapper, loss: torch.Tensor
    ) -> torch.Tensor:
        """Replace the scalar loss before its backward pass."""

    @decision
    def backward(
        self, runner: Runner, optim_wrapper: OptimWrapper, loss: torch.Tensor
    ) -> bool | None:
        """Run the backward pass and return True; the kernel's default is ``loss.backward()``."""

    @event
    def finish_gradients(self, runner: Runner, optim_wrapper: OptimWrapper) -> None:
        """Make the gradients those of the loss itself, for everybody who comes after.

        Exchange them with other ranks, divide a loss scale out, average what was accumulated. A
        plugin that exchanges them comes first of all (``tryfirst``, before ``amp``): an infinite
        gradient of one rank is a matter of all.
        """

    @event
    def before_optim_step(self, runner: Runner, optim_wrapper: OptimWrapper) -> None:
        """Read or edit the gradients, just before the step."""

    @decision
    def optim_step(self, runner: Runner, optim_wrapper: OptimWrapper) -> bool | None:
        """Take the step and return True, or skip it and return False.

        The kernel's default is ``optim_wrapper.optimizer.step()``.
        """

    @event
    def after_optim_step(self, runner: Runner, optim_wrapper: OptimWrapper) -> None:
        """Learn that a step was really taken; ``optim_wrapper.steps`` counts it."""


class State(Protocol):
    """What is saved, and on what all ranks agree."""

    @event
    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Add to the state that ``runner.state_dict()`` is about to return."""

    @event
    def after_save_checkpoint(self, runner: Runner, path: Path, best: bool) -> None:
        """A checkpoint is on the disk, whole; on the rank that saved it.

        Told again, with ``best``, where a validation has shown that it is the best one so far.

        Args:
            path: Its folder, which may be renamed or removed when later ones are saved.
            best: Whether it is the best one so far.
        """

    @event
    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Read from the state that ``runner.load_state_dict()`` has just loaded."""

    @decision
    def agree(self, runner: Runner, requests: Mapping[str, str]) -> Mapping[str, str] | None:
        """Make one of the requests of all ranks: ``{"stop": reason, "save": reason}``.

        Asked at every safe point. An answer may come some safe points later (``{}`` meanwhile);
        a request stays until it was agreed. The kernel's default is the rank's own requests.
        """


class Records(Protocol):
    """What is written down."""

    @event
    def log(self, runner: Runner, phase: Phase, values: Mapping[str, Any]) -> None:
        """Receive raw values, still tensors on the device, as ``runner.log`` hands them in."""

    @event
    def write(self, runner: Runner, record: Record) -> None:
        """Receive one reduced record: phase, progress, Python floats, media."""

    @decision
    def history(self, runner: Runner) -> Iterable[Record] | None:
        """Answer with the records that the run has so far, oldest first, to be read once.

        Asked on behalf of a sink, which is given what it does not hold of them: when a checkpoint
        was loaded (these are then the records up to where the run goes on from), when the sink is
        added in mid-run, and, on the sink's thread, when it comes back after it could not keep up.
        """


SUBJECTS: tuple[type, ...] = (Life, Build, Train, Val, Test, Evaluation, Step, State, Records)


class HookSpecs(Life, Build, Train, Val, Test, Evaluation, Step, State, Records, Protocol):
    """All events; ``runner.hooks`` has this type, and calls them with positional arguments."""

    runner: Runner


@dataclass(frozen=True)
class Event:
    """One event as data."""

    name: str
    kind: Kind
    subject: str
    signature: inspect.Signature
    doc: str

    @property
    def arguments(self) -> tuple[str, ...]:
        """The names of the arguments, in the order in which the kernel passes them."""
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

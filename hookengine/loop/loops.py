"""The training loop, which counts in epochs or iterations, and the evaluation loop."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from hookengine.evaluator import EvaluationPass, Evaluator
from hookengine.loop.data import dataset_size, is_consecutive, iterate_from, length_of
from hookengine.loop.optim import combine
from hookengine.random_state import preserved_random_state

if TYPE_CHECKING:
    from hookengine.runner import Runner
    from hookengine.setup.config import EvalCfg, TrainCfg


_NOTHING: Mapping[str, str] = MappingProxyType({})


class TrainLoop:
    """Train: pass over the dataloader until ``max_epochs`` or ``max_iters`` is reached.

    Args:
        runner: The Runner, with its model and optimizer wrapper.
        dataloader: The training batches.
        cfg: The limit, and when to validate.

    Attributes:
        resumed_at: Where a run with other batches resumed within an epoch, until a batch was
            trained: the epoch, the batch, and the samples of all ranks before that place.
    """

    resumed_at: tuple[int, int, int] | None = None

    def __init__(self, runner: Runner, dataloader: Iterable[Any], cfg: TrainCfg) -> None:
        self.runner = runner
        self.dataloader = dataloader
        self._iterator: Iterator[Any] | None = None  # kept if a run stops mid-epoch
        self._resumed = False
        self.set_limits(cfg)

    def set_limits(self, cfg: TrainCfg) -> None:
        """Use the limits of ``cfg`` from now on."""
        self.cfg = cfg
        progress = self.runner.progress
        progress.epoch_length = length = length_of(self.dataloader)
        progress.max_epochs = cfg.max_epochs
        known = None
        if length is not None and cfg.max_epochs is not None:
            # Earlier epochs may have had another length, with another number of ranks.
            left = (cfg.max_epochs - progress.epoch) * length - progress.batch
            known = progress.iter + max(left, 0)
        progress.max_iters = known if cfg.by_epoch else cfg.max_iters

    @property
    def done(self) -> bool:
        """Whether the limit is reached, no validation is due and no epoch remains to be closed."""
        progress = self.runner.progress
        count = progress.epoch if self.cfg.by_epoch else progress.iter
        left = progress.val_due or progress.batch == progress.epoch_length
        return count >= self.cfg.limit and not left

    def run(self) -> None:
        """Train, or resume training, until the limit or until all ranks agree to stop."""
        runner, hooks, progress = self.runner, self.runner.hooks, self.runner.progress
        progress.stopped = None
        if runner.optim_wrapper.window_open:
            runner.logger.warning(
                "training was interrupted between two optimizer steps: the gradients since the "
                "last step are dropped"
            )
        runner.optim_wrapper.zero_grad()  # an interrupted backward pass may have left some
        with runner.plugins.opened("before_train"):
            hooks.before_train(runner)
            if progress.val_due:
                self._validate()
            while not self.done and progress.stopped is None:
                self._run_epoch()
            hooks.after_train(runner)

    def _run_epoch(self) -> None:
        runner, hooks, progress = self.runner, self.runner.hooks, self.runner.progress
        runner.model.train()
        with runner.plugins.opened("before_train_epoch"):
            hooks.before_train_epoch(runner)
            at_limit = not self.cfg.by_epoch and progress.iter >= self.cfg.limit
            if not (at_limit or self._run_batches(self._open())):
                return
            if progress.batch == 0:
                raise ValueError(
                    f"the training dataloader yielded no batch in epoch {progress.epoch + 1}. An "
                    "iterator (a generator) can be used only once. Pass an iterable that starts "
                    "over each time, or limit the run with max_iters"
                )
            progress.epoch += 1
            progress.batch = 0
            self._iterator = None
            progress.val_due |= bool(self.cfg.by_epoch) and self._validates_at(progress.epoch)
            hooks.after_train_epoch(runner)
        if not self._at_safe_point() and progress.val_due:
            self._validate()

    def _run_batches(self, batches: Iterator[Any]) -> bool:
        """Run the iterations of an epoch; return whether the epoch is complete."""
        runner, hooks, progress = self.runner, self.runner.hooks, self.runner.progress
        train_step, optim_wrapper = runner.model.train_step, runner.optim_wrapper
        last, milestone = self._last_batch(), self._next_milestone()
        for batch_idx, data_batch in enumerate(batches, progress.batch):
            progress.is_last = batch_idx + 1 == last
            data_batch = hooks.before_train_iter(runner, batch_idx, data_batch)
            outputs = train_step(data_batch, optim_wrapper)
            progress.iter += 1
            progress.batch += 1
            if progress.iter == milestone:
                progress.val_due = self._validates_at(milestone)
            hooks.after_train_iter(runner, batch_idx, data_batch, outputs)
            if self._at_safe_point():
                return False
            if progress.iter == milestone:
                if progress.val_due:
                    self._validate()
                if progress.stopped is not None or milestone == self.cfg.limit:
                    return progress.batch == progress.epoch_length
                milestone = self._next_milestone()
        return True

    def _at_safe_point(self) -> bool:
        """Let plugins save and serve requests, unless a window is open; return whether to stop."""
        runner = self.runner
        if runner.optim_wrapper.window_open:
            return False
        agreed = runner.hooks.agree(runner, runner.requests)
        if agreed is None:
            agreed = runner.requests
        agreed = dict(agreed) if agreed else _NOTHING  # later requests wait for the next safe point
        runner.hooks.safe_point(runner, agreed)
        if agreed:
            self._serve(agreed)
        return runner.progress.stopped is not None

    def _serve(self, agreed: Mapping[str, str]) -> None:
        runner = self.runner
        for request, reason in agreed.items():
            if runner.requests.get(request) == reason:
                del runner.requests[request]
        if "stop" in agreed:
            runner.progress.stopped = agreed["stop"]
            runner.logger.info("training stops", reason=agreed["stop"])

    def _validate(self) -> None:
        if self.runner.val_loop is not None:
            self.runner.val_loop.run()
        self.runner.progress.val_due = False
        self._at_safe_point()

    def _validates_at(self, count: int) -> bool:
        return self.runner.val_loop is not None and self.cfg.validates_at(count)

    def _open(self) -> Iterator[Any]:
        """Return the remaining batches of this epoch."""
        if self._iterator is None:
            progress = self.runner.progress
            behind = progress.iter if self._resumed else 0
            start = progress.epoch, progress.batch
            # Mid-epoch, the draws at the start of the pass were made before the resume.
            resumed = self._resumed and progress.batch > 0
            with preserved_random_state() if resumed else nullcontext():
                self._iterator, dropped = iterate_from(self.dataloader, *start, behind)
            self._resumed = False
            if dropped:
                self.runner.logger.warning(
                    f"fetched and skipped the first {dropped} batches of epoch "
                    f"{progress.epoch + 1}, which the run has already trained on. They are the "
                    "same batches only if the dataloader's random state is the same"
                )
        return self._iterator

    def forget(self, resumed: bool = False) -> None:
        """Drop the iterator of an epoch that was left in the middle.

        Args:
            resumed: Whether the counters were loaded from a checkpoint. A dataloader that cannot
                start over is then still at its first batch.
        """
        self._iterator = None
        self._resumed |= resumed

    def _last_batch(self) -> int | None:
        """Return the number of the last batch of this pass, or None if it is unknown."""
        progress = self.runner.progress
        left = None if self.cfg.by_epoch else progress.batch + self.cfg.limit - progress.iter
        known = [end for end in (progress.epoch_length, left) if end is not None]
        return min(known, default=None)

    def _next_milestone(self) -> int:
        """Return the iteration of the next validation or of the end, or -1 if epochs decide."""
        if self.cfg.by_epoch:
            return -1
        interval, done = self.cfg.val_interval or 1, self.runner.progress.iter
        return min(self.cfg.limit, done + interval - done % interval)


class EvalLoop:
    """Validate or test: one pass over the dataloader per evaluated model.

    A pass runs in evaluation mode and without gradients. Afterwards, even after an error, the
    random state and the mode of each module are restored.

    Args:
        runner: The Runner, with its model.
        phase: ``val`` or ``test``.
        dataloader: The batches.
        evaluator: The metrics, or None if only the losses are wanted.
        cfg: Options.
    """

    def __init__(
        self,
        runner: Runner,
        phase: Literal["val", "test"],
        dataloader: Iterable[Any],
        evaluator: Evaluator | None,
        cfg: EvalCfg,
    ) -> None:
        self.runner = runner
        self.phase = phase
        self.dataloader = dataloader
        self.evaluator = evaluator
        self.cfg = cfg
        self.metrics: dict[str, Any] = {}
        self._running = False
        if evaluator is not None:
            dataset = getattr(dataloader, "dataset", None)
            evaluator.set_dataset_meta(getattr(dataset, "metainfo", None))

    def run(self) -> dict[str, Any]:
        """Evaluate, and return the metrics of all evaluated models by name, with their prefix."""
        if self._running:
            raise RuntimeError(f"{self.phase}() was called while {self.phase}() is running")
        self._running = True
        try:
            return self._run()
        finally:
            self._running = False

    def _run(self) -> dict[str, Any]:
        runner, hooks, plugins = self.runner, self.runner.hooks, self.runner.plugins
        before, before_epoch = f"before_{self.phase}", f"before_{self.phase}_epoch"
        with preserved_random_state(), plugins.opened(before):
            getattr(hooks, before)(runner)
            with plugins.opened(before_epoch):
                getattr(hooks, before_epoch)(runner)
                models = self._models()
                metrics: dict[str, Any] = {}
                for prefix, model in models.items():
                    for name, value in self._evaluate(model, prefix).items():
                        metrics[f"{prefix}/{name}" if prefix else name] = value
                self.metrics = metrics
                getattr(hooks, f"after_{self.phase}_epoch")(runner, metrics)
            getattr(hooks, f"after_{self.phase}")(runner)
        return metrics

    def _models(self) -> Mapping[str, nn.Module]:
        runner, method = self.runner, f"{self.phase}_step"
        models = runner.hooks.evaluated_models(runner, self.phase)
        if models is None:
            return {"": runner.model}
        if not all(hasattr(model, method) for model in models.values()):
            raise TypeError(
                f"evaluated_models must return a dict of modules with {method}(), got {models!r}. "
                "For a plain module, pass runner.wrap(module, 'average')"
            )
        return models

    def _evaluate(self, model: nn.Module, prefix: str) -> dict[str, Any]:
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        try:
            with torch.no_grad():
                return self._run_batches(model, prefix)
        finally:
            for module, training in modes:
                module.training = training
            if self.evaluator is not None:
                self.evaluator.reset()

    def _run_batches(self, model: nn.Module, prefix: str) -> dict[str, Any]:
        runner, hooks, phase = self.runner, self.runner.hooks, self.phase
        step = getattr(model, f"{phase}_step")
        evaluation = EvaluationPass(self.evaluator, self.dataloader, runner.bare_model)
        for batch_idx, data_batch in enumerate(self.dataloader):
            before, after = f"before_{phase}_iter", f"after_{phase}_iter"
            data_batch = getattr(hooks, before)(runner, batch_idx, data_batch, prefix)
            with combine(hooks.forward_context(runner, model, None, phase)):
                outputs = step(data_batch)
                losses = model.loss_step(data_batch) if self.cfg.loss else {}  # type: ignore[operator]
            evaluation.add(data_batch, outputs, losses)
            getattr(hooks, after)(runner, batch_idx, data_batch, outputs, prefix)
        hooks.before_metrics(runner, model, phase, prefix)
        size = None if self.evaluator is None else dataset_size(self.dataloader)
        metrics = evaluation.summarize(size, is_consecutive(self.dataloader))
        if metrics is None:
            raise ValueError(
                f"the {phase} dataloader yielded no batch, so nothing was evaluated. An iterator "
                "(a generator) can be used only once. Pass an iterable that starts over each time"
            )
        return metrics

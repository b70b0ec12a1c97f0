"""Checkpoints: safe, atomic, written behind the training; a run that goes on where it was cut."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from torch import nn

from hookengine import (
    MODELS,
    Plugin,
    describe_environment,
    dist,
    greater_is_better,
    hookimpl,
    metric_value,
)
from hookengine_checkpoint import files
from hookengine_checkpoint.best import Best
from hookengine_checkpoint.checks import (
    ask_to_end,
    ends,
    is_checkpoint,
    nonfinite,
    numbers,
    position,
    steps,
)
from hookengine_checkpoint.export import export_weights, weights_at
from hookengine_checkpoint.find import FOLDER, find
from hookengine_checkpoint.integrity import DamagedError
from hookengine_checkpoint.interval import Rhythm, parse
from hookengine_checkpoint.preemption import EXIT_CODE, Signals
from hookengine_checkpoint.retention import Shelf
from hookengine_checkpoint.snapshot import Snapshot, check_plain

__all__ = ["EXIT_CODE", "Checkpoint", "export_weights"]


class Checkpoint(Plugin, name="checkpoint"):
    """Save the run, and go on from what was saved.

    A checkpoint is a folder in ``checkpoints`` of the run's folder: ``state.pth``, which
    ``torch.load(weights_only=True)`` reads anywhere, and ``manifest.json``. It is saved at a
    ``safe_point`` only: at the rhythm of ``every``, at the end, when training is stopped, and on
    request (``runner.requests["save"] = "why"``). The state is copied to host memory, one copy of
    it, and written by a thread; at most one write is under way. ``latest`` and ``best`` are links.

    A save that fails is told and training goes on; where the last one fails, ``train()`` ends with
    the error.

    SIGTERM, SIGINT and SIGUSR1 end training at the next safe point, with a checkpoint and exit code
    75; a second signal ends the process at once.
    """

    every: int | str | None = Field(
        None,
        description="'2 epochs', '500 iterations', '10 minutes'; a number counts what the run "
        "counts; by default every epoch, or 1000 iterations",
    )
    keep_last: int | None = Field(1, gt=0, description="how many to keep; None keeps all")
    keep_best: str | None = Field(
        None, description="a metric; the checkpoint with its best value is kept, too"
    )
    greater_is_better: bool | None = Field(
        None, description="of that metric; by default told by its name"
    )
    asynchronous: bool = Field(True, description="write on a thread, behind the training")
    allow: list[str] = Field(
        default_factory=list,
        description="what may differ from the checkpoint that is resumed: names of plugins, "
        "'optimizer', 'dataset', 'world_size'",
    )
    signals: list[Literal["SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGHUP"]] = Field(
        ["SIGTERM", "SIGINT", "SIGUSR1"], description="that end training with a checkpoint"
    )

    def __post_init__(self) -> None:
        """Refuse a rhythm and a metric that say nothing."""
        parse(self.every, by_epoch=True)
        greater = self.greater_is_better
        if self.keep_best is not None and greater is None:
            greater = greater_is_better(self.keep_best)
            if greater is None:
                raise TypeError(
                    f"checkpoint: whether more of {self.keep_best!r} is better cannot be told from "
                    "its name: give greater_is_better=True or False"
                )
        self.allow = sorted(self.allow)  # it may have been a set
        self._best = Best(self.keep_best, bool(greater))

    @property
    def best(self) -> dict[str, Any] | None:
        """``{"metric", "value", "number"}`` of the best checkpoint, or None."""
        return self._best.known

    # -- beginning ------------------------------------------------------------------------------

    def configure(self, runner: Any) -> None:
        """Find what to go on from, so that the run gets the folder that it had."""
        self._best = Best(self.keep_best, self._best.greater)
        self._snapshot = Snapshot()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._write: Future[Any] | None = None
        self._shards: Any = None  # of a sharded model: copies them, and writes them
        self._retiring: Future[None] | None = None
        self._failed: str | None = None
        self._position: tuple[Any, ...] | None = None
        self._preempted: str | None = None
        self._signals: Signals | None = None
        self._shelf = Shelf(self.keep_last)
        self._validated: tuple[int, dict[str, float]] = (-1, {})
        self._training = False
        self._number = 0
        self._begun = False
        self._remarks: list[str] = []
        self._environment = describe_environment()
        found = find(runner, self._remarks.append) if dist.is_main_process() else None
        self._found, name, named = dist.broadcast_object((found, runner.name, runner.named))
        if named:
            runner.continue_run(name)

    @hookimpl(trylast=True)  # over what was initialised, before anybody copies or converts it
    def initialize_model(self, runner: Any, model: nn.Module) -> None:
        """Load the weights that the run is to begin with."""
        if runner.load_from is None or self._found is not None:
            return
        given = runner.load_from
        options = dict(given) if isinstance(given, Mapping) else {"checkpoint": given}
        path = options.get("checkpoint")
        if isinstance(path, (str, Path)) and is_checkpoint(Path(path)):
            options["checkpoint"] = weights_at(Path(path), self._remarks.append)
        MODELS.get("load_weights")(model, **options)
        self._remarks.append(f"begins with the weights of {path}")

    def resume(self, runner: Any) -> None:
        """Load the state to go on from.

        Raises:
            ValueError: it is of another run; all that differs is named, and how to allow it.
        """
        if self._found is None:
            return
        path = self._found.path
        state = files.read_state(self._found.state)
        if not isinstance(state, dict):
            raise DamagedError(f"{path} is no state of a Runner")
        if (path / files.METADATA).exists():
            from hookengine_checkpoint import sharded  # takes a while, and few need it

            state = sharded.load(path, state, runner)
        elif dist.is_distributed():
            from hookengine_checkpoint import sharded

            if sharded.is_sharded(runner):
                state = sharded.spread(state, runner)
        ranks = state.pop("ranks", [])
        goes_on = (
            runner.named
            and self._found.saved is not None
            and self._found.path.parent.resolve() == (runner.run_dir / FOLDER).resolve()
        )
        if goes_on and dist.is_main_process():
            self._shelf.adopt(self._found)
        try:
            runner.load_state_dict(state, allow=self.allow)
            self._load_of_rank(runner, ranks, path)
        except ValueError as error:
            error.add_note(
                f"while resuming from {path}; the names to allow go to dict(type='checkpoint', "
                "allow=[...]). To begin a run of its own, give it another name: Runner(name=...)"
            )
            raise
        if runner.val_loop is not None:
            runner.val_loop.metrics = dict(state.get("metrics", {}))
        if not dist.broadcast_object(self._shelf.holds(self._best.number)):
            self._best.known = None  # the validation that is owed finds a better one again
        self._position = position(runner.progress)
        self._remarks.append(f"goes on from {path}: {runner.progress}")

    def _load_of_rank(self, runner: Any, ranks: list[dict[str, Any]], path: Path) -> None:
        rank = dist.get_rank()
        of_rank = ranks[rank]["plugins"] if rank < len(ranks) else {}
        runner.plugins.load_rank_state_dict(of_rank)
        if not of_rank:
            self._remarks.append(
                f"{path.name} holds no random states of rank {rank}: what is random is not repeated"
            )

    def before_run(self, runner: Any) -> None:
        """Say how the run begins, now that its log is open."""
        for remark in self._remarks:
            runner.logger.info(f"checkpoint: {remark}")
        self._remarks.clear()

    @hookimpl(tryfirst=True)  # before the history of the run is cut back
    def before_train(self, runner: Any) -> None:
        """Begin to count, and to take signals; refuse states that could not be saved."""
        for aside in self._shelf.set_aside():
            runner.logger.warning(f"checkpoint: damaged, or of another future: moved to {aside}")
        check_plain(runner.plugins.state_dict(), "the state of plugins")
        check_plain(runner.plugins.rank_state_dict(), "the state of plugins")
        by_epoch = runner.progress.max_epochs is not None
        every = parse(self.every, by_epoch)
        agreed = dist.get_world_size() == 1 or "agree" in runner.plugins.calls()
        if every.unit == "minutes" and not agreed:
            raise ValueError(
                f"every={self.every!r} needs a plugin that answers the event 'agree', by which the "
                "processes save together: give it in epochs or iterations"
            )
        self._rhythm = Rhythm(every, runner.progress)
        self._preempted = None
        self._training = True
        names = self.signals if agreed else []  # the processes could not end together
        self._signals = Signals(names, lambda name: ask_to_end(runner, name))

    # -- saving ---------------------------------------------------------------------------------

    @hookimpl(trylast=True)
    def after_val_epoch(self, runner: Any, metrics: Mapping[str, Any]) -> None:
        """See whether it is the best so far, in the validations that training asks for."""
        self._validated = runner.progress.iter, numbers(metrics)
        if self.keep_best is None or not runner.progress.val_due:
            return
        self._best.known = dist.broadcast_object(self.best)  # rank 0 alone knows of a failed save
        self._best.see(metric_value(metrics, self.keep_best), steps(runner))

    @hookimpl(trylast=True)  # what others do at a safe point is part of what is saved
    def safe_point(self, runner: Any) -> None:
        """Save, where it is due."""
        if self._write is not None and self._write.done():
            self.wait(runner)
        progress, rhythm = runner.progress, self._rhythm
        if self._best.waits and self._best.expire(steps(runner)):
            runner.logger.warning(
                f"checkpoint: the best {self.keep_best} so far was validated within a window of "
                "accumulated gradients, and the weights have been trained on since: they are not "
                "kept. Let val_interval be a multiple of the window"
            )
        if rhythm.overdue and dist.is_main_process():
            runner.requests.setdefault("save", f"every {self.every}")
        if runner.agreed and runner.agreed.keys() & {"save", "stop"}:
            self._preempted = runner.agreed.get("preempt", self._preempted)
            due = True
        else:
            due = rhythm.due or ends(runner)
        if due and position(progress) != self._position:
            self.begin_save(runner)
        elif self._best.waits:
            self._take_for_best(runner)

    def save(self, runner: Any) -> None:
        """Save now; within ``safe_point`` the state can be resumed exactly.

        Raises:
            OSError: it could not be saved, when training is over; within it, that is told later.
        """
        self.begin_save(runner)
        if not self._training:
            self._finish_write(runner)
        if self._failed is not None and not self._training:
            raise OSError(self._failed)

    def begin_save(self, runner: Any) -> None:
        """Copy the state, and have it written behind what follows."""
        self._finish_write(runner)
        if self._training:
            self._rhythm.restart()
        progress = runner.progress
        state = runner.state_dict()
        ranks = dist.gather_objects({"plugins": runner.plugins.rank_state_dict()})
        self._position = position(progress)
        if dist.is_main_process() and not self._begun:
            self._begin(runner)
        self._number += 1
        if self._best.waits:
            self._best.call(self._number)
            state["plugins"] = {**state["plugins"], self.plugin_name: self.state_dict()}
        if runner.val_loop is not None:
            state["metrics"] = numbers(runner.val_loop.metrics)
        problem: Exception | None = None
        job: Callable[[], object] | None = None
        shards: Path | None = None
        try:
            state, shards = self._take_shards(runner, state)
            if ranks is not None:
                job = self._prepare(runner, {**state, "ranks": ranks}, shards)
            elif shards is not None:
                job = self._share_of(runner, shards)
        except (OSError, TypeError) as error:
            problem = error
        if shards is not None:  # all ranks write, or none
            text = dist.broadcast_object(problem and str(problem))
            problem = problem or (OSError(text) if text else None)
        if problem is not None:
            self._report(runner, problem)
        if problem is not None or job is None:
            return
        self._write = self._executor.submit(job)
        if not self.asynchronous:
            self._finish_write(runner)

    def _take_shards(
        self, runner: Any, state: dict[str, Any]
    ) -> tuple[dict[str, Any], Path | None]:
        """Copy tensors that are spread over ranks; returns the rest, and where they will be."""
        if not dist.is_distributed():
            return state, None
        from hookengine_checkpoint import sharded

        whole, tensors = sharded.split(state)
        if not tensors:
            return state, None
        folder, problem = Path(), ""
        if dist.is_main_process():
            try:
                folder = files.make_folder(runner.make_run_dir() / FOLDER / ".shards.saving")
            except OSError as error:
                problem = str(error)
        folder, problem = dist.broadcast_object((folder, problem))
        if problem:
            raise OSError(problem)
        if self._shards is None:
            self._shards = sharded.Shards()
        self._shards.take(tensors)
        return whole, folder

    def _share_of(self, runner: Any, folder: Path) -> Callable[[], list[str]]:
        """What writes the shards of this rank, and returns what in them is not finite."""
        names = [name for name, _ in runner.bare_model.named_parameters()]
        return partial(self._shards.write, folder, names)

    def _prepare(
        self, runner: Any, state: dict[str, Any], shards: Path | None
    ) -> Callable[[], files.Saved]:
        """Copy the state; returns what writes it."""
        progress = runner.progress
        folder = runner.make_run_dir() / FOLDER
        by_epoch = progress.max_epochs is not None and progress.batch == 0
        name = f"epoch_{progress.epoch}" if by_epoch else f"iter_{progress.iter}"
        path = files.free_path(folder, name)
        best = self._best.number
        check_plain(state, "the state")
        copied = self._snapshot.take(state)
        validated, metrics = self._validated
        manifest = {
            "number": self._number,
            "run": runner.name,
            "lineage": self._shelf.lineage,
            "progress": copied["progress"],
            "best": self.best,
            "metrics": metrics if validated == progress.iter else {},
            "meta": copied["meta"],
            "plugins": {n: runner.plugins.source(n) for n in runner.plugins},
            "environment": self._environment,
        }
        parameters = [name for name, _ in runner.bare_model.named_parameters()]

        share = self._share_of(runner, shards) if shards is not None else None

        def job() -> files.Saved:
            self._snapshot.wait()
            bad = nonfinite(copied["state_dict"], parameters) if share is None else share()
            manifest["finite"] = not bad
            manifest["saved_at"] = datetime.now(UTC).isoformat()
            saved = files.publish(path, copied, manifest, shards)
            if bad:
                runner.logger.warning(
                    f"checkpoint: the weights in {path.name} are not finite ({', '.join(bad)}); "
                    "the last good one is kept, and latest points to it"
                )
            self._shelf.put(saved)
            # Freeing the space of old ones takes a while: what waits for this one need not.
            self._retiring = self._executor.submit(self._retire, runner, best, name)
            return saved

        return job

    def _begin(self, runner: Any) -> None:
        """Look at what is in the folder before the first save."""
        self._begun = True
        folder = runner.run_dir / FOLDER
        files.clean(folder)
        there = files.published(folder)
        self._number = max((saved.number for saved in there), default=0)
        if there and not self._shelf.kept:
            runner.logger.warning(
                f"checkpoint: {folder} holds checkpoints of an earlier run, the newest is "
                f"{there[-1].name}; they are left alone. resume='auto' would have gone on from it"
            )

    def _retire(self, runner: Any, best: int | None, name: str | None = None) -> None:
        try:
            self._shelf.keep_only(best, name)
        except OSError as error:
            runner.logger.warning(f"checkpoint: old ones could not be removed: {error}")

    def _take_for_best(self, runner: Any) -> None:
        """Have a better validation's weights kept: those saved before it, or saved now."""
        self._finish_write(runner)
        newest = self._shelf.newest
        same = newest is not None and newest.iter == runner.progress.iter
        if (number := dist.broadcast_object(newest.number if newest and same else None)) is None:
            self.begin_save(runner)
            return
        self._best.call(number)
        self._best.settle()
        if newest is not None:
            runner.logger.info(self._best.line(newest.name))
            runner.hooks.after_save_checkpoint(runner, newest.path, True)
            self._retiring = self._executor.submit(self._retire, runner, number)

    # -- what came of it ------------------------------------------------------------------------

    def wait(self, runner: Any) -> None:
        """Wait until what was saved is on the disk; tell of an error."""
        write, self._write = self._write, None
        if write is None:
            return
        try:
            saved = write.result()
        except Exception as error:
            self._report(runner, error)
        else:
            self._failed = None
            self._best.settle()
            if not isinstance(saved, files.Saved):  # this rank's share in what rank 0 publishes
                return
            if saved.number == self._best.number:
                runner.logger.info(self._best.line(saved.name))
            runner.logger.debug(f"checkpoint: {saved.path} is saved")
            best = saved.number == self._best.number
            runner.hooks.after_save_checkpoint(runner, saved.path, best)

    @property
    def written(self) -> bool:
        """Whether nothing is being written at the moment."""
        return self._write is None or self._write.done()

    def _finish_write(self, runner: Any) -> None:
        self.wait(runner)
        if self._retiring is not None:
            self._retiring.result()

    def _report(self, runner: Any, error: Exception) -> None:
        self._failed = f"{type(error).__name__}: {error}"
        alone = dist.get_world_size() == 1  # else the ranks would act apart
        same = alone and self._position == position(runner.progress)
        self._best.take_back(steps(runner) if same else None)
        newest = self._shelf.newest
        before = f"the one before, {newest.name}, is whole" if newest else "none is yet"
        runner.logger.warning(
            f"checkpoint: it could not be saved ({self._failed}); training goes on, and {before}. "
            "Make room or mend the folder: the next save tries again"
        )

    # -- ending ---------------------------------------------------------------------------------

    def after_train(self, runner: Any) -> None:
        """See that the last one is on the disk.

        Raises:
            OSError: it cannot be.
        """
        self._finish_write(runner)
        if dist.broadcast_object(self._failed) is not None:
            self.begin_save(runner)
            self._finish_write(runner)
        self._training = False
        if self._signals is not None and self._preempted is None:
            # A signal that came too late for the ranks to agree on it ends all of them, too.
            received = dist.all_gather_objects(self._signals.received)
            self._preempted = next((name for name in received if name is not None), None)
        if (failed := dist.broadcast_object(self._failed)) is not None:
            raise OSError(
                f"training has ended and its last checkpoint could not be saved: {failed}. "
                "The weights are still in runner.bare_model; when there is room again, "
                "runner.plugins['checkpoint'].save(runner) saves it"
            )

    @hookimpl(trylast=True)
    def after_run(self, runner: Any) -> None:
        """Put the signals' handlers back; leave, where one had asked for it."""
        self._training = False
        self._finish_write(runner)
        signals, self._signals = self._signals, None
        if signals is None:
            return
        signals.restore()
        received = self._preempted or (signals.received if dist.get_world_size() == 1 else None)
        if received == "SIGINT" and hasattr(sys, "ps1"):
            raise KeyboardInterrupt  # who sits at a prompt wants to stay there
        if received is not None:
            runner.logger.warning(
                f"ended by {received} with exit code {EXIT_CODE}; resume='auto' goes on from here"
            )
            raise SystemExit(EXIT_CODE)

    def on_exception(self) -> None:
        """The run ends with its error, whatever was asked for."""
        if self._signals is not None:
            self._signals.restore()
            self._signals = None

    def unconfigure(self, runner: Any) -> None:
        """Let the thread end, with what it has to write."""
        self._finish_write(runner)
        self._executor.shutdown()

    def state_dict(self) -> dict[str, Any]:
        """The best one so far."""
        return {} if self.best is None else {"best": self.best}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it back."""
        best = state.get("best")
        if best is not None and self.keep_best in (None, best["metric"]):
            self._best.known = dict(best)

"""Saving one checkpoint: collect the state, copy it, and have it written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from hookengine import RunFolder, Runner, as_plain, describe_environment, dist, original_names
from hookengine_checkpoint import writing
from hookengine_checkpoint.background import BackgroundWriter
from hookengine_checkpoint.best import Best
from hookengine_checkpoint.checks import adding_plugins, check_state, nonfinite
from hookengine_checkpoint.files import Saved, published
from hookengine_checkpoint.retention import RunCheckpoints
from hookengine_checkpoint.snapshot import Snapshot


class Saver:
    """Collects and copies the state of a run, and hands it to the background writer.

    Args:
        writer: Writes the copy.
        checkpoints: The checkpoints of the run, to which new ones are added.
        best: The best checkpoint so far.
        plugin_name: The key under which the state of plugins holds the best checkpoint.

    Attributes:
        snapshot: The copy of the state in host memory.
    """

    def __init__(
        self, writer: BackgroundWriter, checkpoints: RunCheckpoints, best: Best, plugin_name: str
    ) -> None:
        self.snapshot = Snapshot()
        self._writer = writer
        self._checkpoints = checkpoints
        self._best = best
        self._plugin_name = plugin_name
        self._shards: Any = None  # sharded.Shards, once a state has sharded tensors
        self._number = 0
        self._has_begun = False
        self._environment = describe_environment()

    def begin(self, runner: Runner, metrics: Mapping[str, float]) -> None:
        """Copy the state and start to write it; all ranks call it together.

        The write before must be finished. An error is logged instead of raised.

        Args:
            runner: The Runner.
            metrics: The metrics of the current weights, for the manifest.
        """
        state, ranks = self._collect(runner)
        problem: Exception | None = None
        write: Callable[[], object] | None = None
        write_shards: Callable[[], list[str]] | None = None
        shards: Path | None = None
        try:
            state, shards = self._take_shards(runner, state)
            if shards is not None:
                write = write_shards = partial(self._shards.write, shards, _parameters(runner))
            if ranks is not None:
                state = {**state, "ranks": ranks}
                write = self._prepare(runner, state, metrics, shards, write_shards)
        except (OSError, TypeError) as error:
            problem = error
        if shards is not None:  # all ranks write their shards, or none does
            text = dist.broadcast_object(problem and str(problem))
            problem = problem or (OSError(text) if text else None)
        if problem is not None:
            self._writer.report(runner, problem)
        elif write is not None:
            self._writer.start(write, self._best.number, _name(runner.progress))

    def _collect(self, runner: Runner) -> tuple[dict[str, Any], list[dict[str, Any]] | None]:
        """Collect the state of the run and, on rank 0, the states of all ranks."""
        state = runner.state_dict()
        ranks = dist.gather_objects({"plugins": as_plain(runner.plugins.rank_state_dict())})
        self._writer.mark_saved(runner.progress)
        if dist.is_main_process() and not self._has_begun:
            self._prepare_folder(runner)
        self._number += 1
        if self._best.is_pending:
            self._best.assign(self._number)
            state["plugins"] = {**state["plugins"], self._plugin_name: self._best.state_dict()}
        return state, ranks

    def _prepare_folder(self, runner: Runner) -> None:
        """Clean the folder before the first save, and number on from the checkpoints there."""
        self._has_begun = True
        folder = RunFolder(runner.run_dir).checkpoints
        writing.clean(folder)
        there = published(folder)
        self._number = max((saved.number for saved in there), default=0)
        if there and not self._checkpoints.kept:
            runner.logger.warning(
                f"checkpoint: {folder} holds checkpoints of an earlier run, the newest is "
                f"{there[-1].name}; they are kept. resume='auto' would have resumed from it"
            )

    def _take_shards(
        self, runner: Runner, state: dict[str, Any]
    ) -> tuple[dict[str, Any], Path | None]:
        """Copy the sharded tensors; return the rest of the state, and the folder for the shards."""
        if not dist.is_distributed():
            return state, None
        from hookengine_checkpoint import sharded  # slow to import, and rarely needed

        rest, tensors = sharded.split(state)
        if not tensors:
            return state, None
        folder = sharded.make_shard_folder(runner)
        if self._shards is None:
            self._shards = sharded.Shards()
        self._shards.take(tensors)
        return rest, folder

    def _prepare(
        self,
        runner: Runner,
        state: dict[str, Any],
        metrics: Mapping[str, float],
        shards: Path | None,
        write_shards: Callable[[], list[str]] | None,
    ) -> Callable[[], Saved]:
        """Copy the state; return the function that writes the checkpoint.

        Args:
            runner: The Runner.
            state: What is not sharded.
            metrics: For the manifest.
            shards: The folder for the shards, or None.
            write_shards: Writes them, and returns the parameters that are not finite.
        """
        folder = RunFolder(runner.make_run_dir()).checkpoints
        path = writing.free_path(folder, _name(runner.progress))
        added_by = " or ".join(map(repr, adding_plugins(runner)))
        check_state(state, f"a plugin ({added_by})")
        copied = self.snapshot.take(state)
        manifest = {
            "number": self._number,
            "run": runner.name,
            "lineage": self._checkpoints.lineage,
            "progress": copied["progress"],
            "best": self._best.known,
            "metrics": metrics,
            "meta": copied["meta"],
            "plugins": {n: runner.plugins.source(n) for n in runner.plugins},
            "environment": self._environment,
        }
        parameters = _parameters(runner)

        def write() -> Saved:
            self.snapshot.wait()
            bad = write_shards() if write_shards else nonfinite(copied["state_dict"], parameters)
            manifest["finite"] = not bad
            manifest["saved_at"] = datetime.now(UTC).isoformat()
            saved = writing.publish(path, copied, manifest, shards)
            if bad:
                kept = any(one.manifest["finite"] for one in self._checkpoints.kept)
                others = "no checkpoint with finite weights has been saved yet"
                if kept:
                    others = (
                        "the last checkpoint with finite weights is kept, and latest points to it"
                    )
                runner.logger.warning(
                    f"checkpoint: the weights in {path.name} are not finite ({', '.join(bad)}); "
                    f"{others}"
                )
            self._checkpoints.add(saved)
            return saved

        return write


def _parameters(runner: Runner) -> list[str]:
    return [*original_names(dict(runner.bare_model.named_parameters()))]


def _name(progress: Any) -> str:
    by_epoch = progress.max_epochs is not None and progress.batch == 0
    return f"epoch_{progress.epoch}" if by_epoch else f"iter_{progress.iter}"

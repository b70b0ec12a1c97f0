"""Seeds: one number determines every random choice of a run, before and after a resume."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from typing import Any, Literal

import torch
from pydantic import Field
from torch.utils.data import DataLoader

from hookengine import (
    Phase,
    Plugin,
    Runner,
    dist,
    get_random_state,
    hookimpl,
    is_seekable,
    set_random_state,
)
from hookengine_seed.loader import SeededLoader, StatefulLoader
from hookengine_seed.sample import derive, seed_here

__all__ = ["Seed"]

_ITER = DataLoader.__iter__


class Seed(Plugin, name="seed"):
    """Make a run a function of one number, and repeat it exactly after a resume.

    - With ``seed``, Python, NumPy and torch are seeded before the model is built (if you pass the
      Runner a function or a dict; an instance is already built). Without it, their random states
      are left unchanged, and the dataloaders use ``torch.initial_seed()`` as their seed, so that a
      ``torch.manual_seed`` at the top of a script works as expected.
    - The order of samples is a pure function of (seed, epoch). A resumed pass skips the earlier
      batches without loading them.
    - In worker processes, each sample is read with its own seed (about 7 us), so that random
      augmentation depends neither on the number of workers nor on where the run was interrupted.
      Without workers, it draws from the random state of the main process, which is saved.
    - The random states of Python, NumPy, torch and its devices are saved for each rank.

    Attributes:
        value: The seed in use.
    """

    seed: int | None = Field(
        default=None,
        ge=0,
        lt=2**63,
        description="by default torch.initial_seed(), without seeding anything",
    )
    deterministic: bool | Literal["warn"] = Field(
        default=False, description="torch.use_deterministic_algorithms; 'warn' warns if none exists"
    )
    per_sample: bool | None = Field(
        default=None, description="seed each sample; by default if workers read the samples"
    )

    def configure(self, runner: Runner) -> None:
        """Choose the seed, and seed the process if you have set ``seed``."""
        own = torch.initial_seed() & (2**63 - 1) if self.seed is None else self.seed
        seeds = dist.all_gather_objects(own)
        self.value: int = seeds[0]
        self._alike = self.seed is None and len(seeds) > 1 and len(set(seeds)) == 1
        self._loaders: dict[str, SeededLoader | StatefulLoader] = {}
        self._others: dict[str, str] = {}
        self._random: dict[str, Any] | None = None
        self._told = False
        self._progress = runner.progress
        if self.seed is not None:
            rank = dist.get_rank()
            seed = self.value if rank == 0 else derive(self.value, "rank", rank)
            torch.manual_seed(seed)  # all devices
            seed_here(seed)
        self._was = _deterministic(self.deterministic) if self.deterministic else None

    def after_run(self) -> None:
        """Release persistent workers; the next run starts others, which draw the same numbers.

        If a Runner is collected with its workers, torch cannot reach them, and waits for seconds.
        """
        for loader in self._loaders.values():
            loader.close()

    def unconfigure(self) -> None:
        """Release the workers, and restore torch's settings."""
        self.after_run()
        if self._was is not None:
            mode, benchmark, workspace = self._was
            torch.set_deterministic_debug_mode(mode)
            torch.backends.cudnn.benchmark = benchmark
            if workspace is None:
                os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)

    @hookimpl(tryfirst=True)  # innermost: the wrappers of other plugins stay around it
    def setup_dataloader(self, dataloader: Iterable[Any], phase: Phase) -> Any:
        """Replace torch's dataloader with a seeded one, or a stateful one with a wrapper."""
        loader: SeededLoader | StatefulLoader
        if hasattr(dataloader, "state_dict") and hasattr(dataloader, "load_state_dict"):
            loader = StatefulLoader(dataloader)
        elif isinstance(dataloader, DataLoader) and type(dataloader).__iter__ is _ITER:
            loader = SeededLoader(dataloader, lambda: self.value, phase, self.per_sample)
        else:
            if isinstance(dataloader, DataLoader):
                self._others[phase] = f"{type(dataloader).__name__}, which has its own __iter__,"
            elif not isinstance(dataloader, (list, tuple)) and not is_seekable(dataloader):
                self._others[phase] = type(dataloader).__name__
            return None
        self._loaders[phase] = loader
        return loader

    # These run last, so that nothing draws random numbers between them and the first batch.

    @hookimpl(after="*")
    def before_train(self, runner: Runner) -> None:
        """Restore the loaded random states, and log once what a resume cannot repeat exactly."""
        if self._random is not None:
            set_random_state(self._random)
        if not self._told:
            self._told = True
            self._tell(runner)

    @hookimpl(after="*")
    def before_train_epoch(self, runner: Runner) -> None:
        """Restore the random states again in a resumed epoch.

        The other plugins are called for the start of that epoch a second time and may draw.
        """
        if self._random is not None and runner.progress.batch:
            set_random_state(self._random)
        self._random = None
        loader = self._loaders.get("train")
        if loader is not None and not is_seekable(runner.dataloaders["train"]):
            # A wrapper around the loader has no seek, so the kernel drops the earlier batches.
            loader.seek(runner.progress.epoch, 0)

    def _tell(self, runner: Runner) -> None:
        given = "" if self.seed is not None else " from torch.initial_seed(), to order the samples"
        if self._alike:
            given += (
                "; all ranks draw the same random numbers (dict(type='seed', seed=0) gives each "
                "rank different ones)"
            )
        runner.logger.info(f"seed {self.value}{given}")
        loader = self._loaders.get("train")
        remarks = [] if loader is None else list(loader.remarks())
        if name := self._others.get("train"):
            remarks.append(
                f"{name} is left unchanged: a resume within an epoch fetches and drops the earlier "
                "batches, which are the same ones only if nothing in it is random"
            )
        if loader is not None and _reads_ahead(runner.dataloaders["train"], loader):
            remarks.append(
                "a plugin prefetches batches in this process: a resume repeats random augmentation "
                "only with dict(type='seed', per_sample=True)"
            )
        for remark in remarks:
            runner.logger.info(f"seed: train_dataloader: {remark}")

    def state_dict(self) -> dict[str, Any]:
        """Return the seed."""
        return {"seed": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the seed saved by ``state_dict``.

        Raises:
            ValueError: The option ``seed`` is set to a different seed.
        """
        if self.seed is not None and self.seed != state["seed"]:
            raise ValueError(
                f"the checkpoint was trained with seed {state['seed']}, but this run has seed="
                f"{self.seed}. Leave it out to resume with the seed of the checkpoint"
            )
        self.value = state["seed"]

    def rank_state_dict(self) -> dict[str, Any]:
        """Return the random states of this rank and those of its dataloaders."""
        state: dict[str, Any] = {"random": get_random_state()}
        loaders = {
            phase: loader.rank_state_dict(phase == "train" and self._progress.batch > 0)
            for phase, loader in self._loaders.items()
        }
        if loaders := {phase: kept for phase, kept in loaders.items() if kept}:
            state["loaders"] = loaders
        return state

    def load_rank_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the dataloaders' states, and keep the random states until training starts."""
        self._random = state.get("random")
        owners = Counter(id(g) for loader in self._loaders.values() for g in loader.generators)
        shared = {key for key, count in owners.items() if count > 1}
        for phase, loader in reversed(self._loaders.items()):  # train last: its pass starts again
            loader.load_rank_state_dict(state.get("loaders", {}).get(phase, {}), shared)


def _reads_ahead(dataloader: Any, loader: SeededLoader | StatefulLoader) -> bool:
    """Return whether a wrapper around the seeded dataloader reads batches in this process."""
    in_process = getattr(loader, "num_workers", 0) == 0
    seeded = getattr(loader, "_per_sample", False)
    return dataloader is not loader and in_process and not seeded


def _deterministic(mode: bool | str) -> tuple[int, bool, str | None]:
    """Enable deterministic algorithms, and return the previous settings."""
    was = torch.get_deterministic_debug_mode()
    benchmark = torch.backends.cudnn.benchmark
    workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
    torch.use_deterministic_algorithms(True, warn_only=mode == "warn")
    torch.backends.cudnn.benchmark = False
    return was, benchmark, workspace

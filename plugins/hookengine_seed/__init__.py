"""Seeds: one number from which every random choice of a run follows, before and after a resume."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from typing import Any, Literal

import torch
from pydantic import Field
from torch.utils.data import DataLoader

from hookengine import Plugin, dist, get_random_state, hookimpl, set_random_state
from hookengine_seed.loader import SeededLoader, StatefulLoader
from hookengine_seed.sample import derive, seed_here

__all__ = ["Seed"]

_ITER = DataLoader.__iter__


class Seed(Plugin, name="seed"):
    """Make a run a function of one number, and let it go on exactly after a resume.

    - With ``seed``, Python, NumPy and torch are seeded before the model is built (by a Runner that
      is given a function or a dict; an instance is built already). Without, their random states
      stay as they are, and the seed of the dataloaders is ``torch.initial_seed()``, so that a
      ``torch.manual_seed`` at the head of a script does what one expects.
    - The order of samples is a pure function of (seed, epoch). A pass that is resumed skips the
      batches before without loading them.
    - In worker processes each sample is read with a seed of its own (about 7 us), so that random
      augmentation depends neither on the number of workers nor on where the run was cut. Without
      workers it draws from the random state of the main process, which is a part of the state.
    - The random states of Python, NumPy, torch and its devices are kept for each rank.

    Attributes:
        value: The seed in use.
    """

    seed: int | None = Field(
        default=None,
        ge=0,
        lt=2**63,
        description="by default torch.initial_seed(), and nothing is seeded",
    )
    deterministic: bool | Literal["warn"] = Field(
        default=False, description="torch.use_deterministic_algorithms; 'warn' where there is none"
    )
    per_sample: bool | None = Field(
        default=None, description="a seed for each sample; by default where workers read them"
    )

    def configure(self, runner: Any) -> None:
        """Seed, before anything is built."""
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

    def unconfigure(self) -> None:
        """Let workers go; leave the switches of torch as they were."""
        for loader in self._loaders.values():
            loader.close()
        if self._was is not None:
            mode, benchmark, workspace = self._was
            torch.set_deterministic_debug_mode(mode)
            torch.backends.cudnn.benchmark = benchmark
            if workspace is None:
                os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)

    @hookimpl(tryfirst=True)  # nearest to the dataset: what others wrap around stays around
    def setup_dataloader(self, dataloader: Iterable[Any], phase: str) -> Any:
        """Put a seeded dataloader in the place of torch's."""
        loader: SeededLoader | StatefulLoader
        if hasattr(dataloader, "state_dict") and hasattr(dataloader, "load_state_dict"):
            loader = StatefulLoader(dataloader)
        elif isinstance(dataloader, DataLoader) and type(dataloader).__iter__ is _ITER:
            loader = SeededLoader(dataloader, lambda: self.value, phase, self.per_sample)
        else:
            if isinstance(dataloader, DataLoader):
                self._others[phase] = f"{type(dataloader).__name__}, with an __iter__ of its own,"
            elif not isinstance(dataloader, (list, tuple)) and not hasattr(dataloader, "seek"):
                self._others[phase] = type(dataloader).__name__
            return None
        self._loaders[phase] = loader
        return loader

    # Last of all, so that nothing draws between this and the first batch.

    @hookimpl(trylast=True)
    def before_train(self, runner: Any) -> None:
        """Set the random states that were loaded; say once what cannot be exact."""
        if self._random is not None:
            set_random_state(self._random)
        if not self._told:
            self._told = True
            self._tell(runner)

    @hookimpl(trylast=True)
    def before_train_epoch(self, runner: Any) -> None:
        """Again where an epoch goes on, which others were told of a second time."""
        if self._random is not None and runner.progress.batch:
            set_random_state(self._random)
        self._random = None
        loader = self._loaders.get("train")
        if loader is not None and not hasattr(runner.train_loop.dataloader, "seek"):
            # Something is wrapped around it that nobody can have begin at a batch.
            loader.seek(runner.progress.epoch, 0)

    def _tell(self, runner: Any) -> None:
        given = "" if self.seed is not None else ", torch's own, for the order of samples"
        if self._alike:
            given += (
                ", and all ranks draw the same random numbers (dict(type='seed', seed=0) gives "
                "each its own)"
            )
        runner.logger.info(f"seed {self.value}{given}")
        loader = self._loaders.get("train")
        remarks = [] if loader is None else list(loader.remarks())
        if name := self._others.get("train"):
            remarks.append(
                f"{name} is left as it is: after a resume within an epoch, the batches before are "
                "fetched and dropped, and are the same ones only if nothing in it is random"
            )
        if loader is not None and _reads_ahead(runner.train_loop.dataloader, loader):
            remarks.append(
                "a plugin reads batches ahead in this process: random augmentation is repeated "
                "after a resume with dict(type='seed', per_sample=True)"
            )
        for remark in remarks:
            runner.logger.info(f"seed: train_dataloader: {remark}")

    def state_dict(self) -> dict[str, Any]:
        """The seed."""
        return {"seed": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back.

        Raises:
            ValueError: another one was asked for.
        """
        if self.seed is not None and self.seed != state["seed"]:
            raise ValueError(
                f"the checkpoint was trained with seed {state['seed']}, and this run has seed="
                f"{self.seed}: leave it out to go on with that of the checkpoint"
            )
        self.value = state["seed"]

    def rank_state_dict(self) -> dict[str, Any]:
        """The random states of this rank, and those of its dataloaders."""
        state: dict[str, Any] = {"random": get_random_state()}
        loaders = {
            phase: loader.rank_state_dict(phase == "train" and self._progress.batch > 0)
            for phase, loader in self._loaders.items()
        }
        if loaders := {phase: kept for phase, kept in loaders.items() if kept}:
            state["loaders"] = loaders
        return state

    def load_rank_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back: the random states when training begins."""
        self._random = state.get("random")
        owners = Counter(id(g) for loader in self._loaders.values() for g in loader.generators)
        shared = {key for key, count in owners.items() if count > 1}
        for phase, loader in reversed(self._loaders.items()):  # train last: it begins anew
            loader.load_rank_state_dict(state.get("loaders", {}).get(phase, {}), shared)


def _reads_ahead(dataloader: Any, loader: SeededLoader | StatefulLoader) -> bool:
    """Whether something is wrapped around the seeded dataloader that reads in this process."""
    in_process = getattr(loader, "num_workers", 0) == 0
    seeded = getattr(loader, "_per_sample", False)
    return dataloader is not loader and in_process and not seeded


def _deterministic(mode: bool | str) -> tuple[int, bool, str | None]:
    """Switch deterministic algorithms on; returns what was there before."""
    was = torch.get_deterministic_debug_mode()
    benchmark = torch.backends.cudnn.benchmark
    workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
    torch.use_deterministic_algorithms(True, warn_only=mode == "warn")
    torch.backends.cudnn.benchmark = False
    return was, benchmark, workspace

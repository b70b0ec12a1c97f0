"""Dataloaders whose passes are a pure function of (seed, epoch), from any batch on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Container, Iterable, Iterator
from itertools import chain, islice
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, IterDataPipe

from hookengine import dist, preserved_random_state
from hookengine_seed.sample import (
    SeededDataset,
    SeededIterable,
    WorkerInit,
    derive,
    nth,
    seeded,
)


class Wrapped:
    """A dataloader in place of the user's, which is asked for everything else."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __getattr__(self, name: str) -> Any:
        if name == "loader":
            raise AttributeError(name)
        return getattr(self.loader, name)  # dataset, batch_size, sampler, ...


class SeededLoader(Wrapped):
    """A torch DataLoader, unchanged but for where its random numbers come from.

    The sampler, batch sampler, generator, collate function and ``worker_init_fn`` are the user's.
    What a sampler draws from the global random state when its pass begins, it draws from a seed of
    the pass. A pass that begins at a later batch skips the indices of those before, without loading
    them.

    Args:
        loader: The user's.
        seed: Tells the run's seed; asked when a pass begins.
        phase: ``train``, ``val`` or ``test``.
        per_sample: Seed each sample; by default where workers read them.

    Attributes:
        generators: The user's own, of the dataloader and its samplers.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        seed: Callable[[], int],
        phase: str,
        per_sample: bool | None = None,
    ) -> None:
        super().__init__(loader)
        self._seed = seed
        self._phase = phase
        self._sought: tuple[int, int] | None = None
        self._iterable = isinstance(loader.dataset, IterableDataset)
        self._piped = isinstance(loader.dataset, IterDataPipe)  # which torch seeds by itself
        wanted = loader.num_workers > 0 if per_sample is None else per_sample
        self._per_sample = wanted and not self._iterable
        self._isolated = self._per_sample and loader.num_workers == 0
        # A worker that persists is given its seed once, whatever the epoch: so none of the user's.
        self._own = loader.generator is None or loader.persistent_workers
        self.generators = _generators(loader)
        self._begun = self._states()
        self._rewind: list[tuple[torch.Generator, torch.Tensor]] = []
        self._pass_seed = torch.zeros((), dtype=torch.int64)
        self._inner = self._rebuild(loader)

    def _rebuild(self, loader: DataLoader[Any]) -> DataLoader[Any]:
        # A copy, since the constructor of a subclass may take anything. It goes to the instance's
        # own dict, because torch refuses to set what a running iterator would not notice.
        inner = copy.copy(loader)
        own = vars(inner)
        own["_iterator"] = None
        if not self._iterable:
            samples = "sampler" if loader.batch_sampler is None else "batch_sampler"
            batched = samples == "batch_sampler"
            whole = batched and SeededDataset(loader.dataset).__getitems__ is not None
            self._numbered = _Numbered(own[samples], batched, self._per_sample, whole)
            own[samples] = self._numbered
        if self._per_sample:
            own["dataset"] = SeededDataset(loader.dataset)
        elif self._iterable and loader.persistent_workers and not self._piped:
            self._pass_seed.share_memory_()  # type: ignore[no-untyped-call]
            own["dataset"] = SeededIterable(loader.dataset, self._pass_seed)
        if loader.num_workers:
            own["worker_init_fn"] = WorkerInit(loader.worker_init_fn)
        return inner

    def seek(self, epoch: int, batch: int) -> None:
        """Have the next pass be that of ``epoch``, from ``batch`` on."""
        self._sought = epoch, batch

    def close(self) -> None:
        """Let workers that persist go."""
        vars(self._inner)["_iterator"] = None

    def __iter__(self) -> Iterator[Any]:
        sought, self._sought = self._sought, None
        epoch, start = sought or ("other", 0)
        seed = derive(self._seed(), self._phase, epoch)
        for part in _samplers(self.loader):
            if epoch != "other" and callable(set_epoch := getattr(part, "set_epoch", None)):
                set_epoch(epoch)
        if self._own:
            self._inner.generator = torch.Generator().manual_seed(derive(seed, "workers"))
        self._pass_seed.fill_(derive(seed, "worker", dist.get_rank()))
        rewind: list[tuple[torch.Generator, torch.Tensor]] = []
        if sought is not None:  # a pass of training, not one that a hook goes through beside it
            rewind, self._rewind = self._rewind, []
        later = [(generator, generator.get_state()) for generator, _ in rewind]
        for generator, state in rewind:
            generator.set_state(state)
        if sought is not None:
            self._begun = self._states()
        if self._iterable:
            return self._iterate(seed, start)

        def begun() -> None:
            for generator, state in later:
                generator.set_state(state)

        self._numbered.begin(seed, derive(seed, "sample", dist.get_rank()), start, begun)
        return _isolated(iter(self._inner)) if self._isolated else iter(self._inner)

    def _iterate(self, seed: int, start: int) -> Iterator[Any]:
        """Batches of an iterable dataset: those before ``start`` are fetched and dropped."""
        with seeded(seed):
            batches = iter(self._inner)
            first = list(islice(batches, start, start + 1))
        yield from first
        yield from batches

    def rank_state_dict(self, within: bool) -> dict[str, Any]:
        """The states of the user's own generators: now, and where the present pass began.

        Args:
            within: Whether a pass is open.
        """
        if not self.generators:
            return {}
        state = {"generators": self._states()}
        return {**state, "begun": self._begun} if within else state

    def load_rank_state_dict(self, state: dict[str, Any], shared: Container[int] = ()) -> None:
        """Take them back.

        Args:
            state: What ``rank_state_dict`` returned.
            shared: The ids of generators that another dataloader draws from too. They begin the
                pass as it began, and then are where they were.
        """
        now = state.get("generators", ())
        self._rewind = []
        for generator, here, begun in zip(
            self.generators, now, state.get("begun", now), strict=False
        ):
            generator.set_state(here if id(generator) in shared else begun)
            if id(generator) in shared and "begun" in state:
                self._rewind.append((generator, begun))

    def _states(self) -> list[torch.Tensor]:
        return [generator.get_state() for generator in self.generators]

    def remarks(self) -> Iterator[str]:
        """What cannot be made exact."""
        loader = self.loader
        if self._iterable:
            yield (
                f"{type(loader.dataset).__name__} is an iterable dataset: after a resume within an "
                "epoch, the batches before are fetched and dropped"
            )
            if loader.num_workers == 0:
                yield (
                    "what it draws at random after the first sample of an epoch is not repeated; "
                    "with num_workers=1 it is"
                )
        for part in _samplers(loader):
            module = type(part).__module__
            known = module.startswith("torch.") or hasattr(part, "set_epoch")
            if not known and getattr(part, "generator", None) is None:
                yield (
                    f"the order of {type(part).__name__} is repeated after a resume if it draws "
                    "its random numbers when an epoch begins, or has a generator or set_epoch(n)"
                )
        if loader.num_workers and not (self._per_sample or self._iterable):
            yield "per_sample=False: what workers draw at random is not repeated after a resume"


def _set(generators: Iterable[torch.Generator], states: Iterable[torch.Tensor]) -> None:
    for generator, state in zip(generators, states, strict=False):
        generator.set_state(state)


def _samplers(loader: DataLoader[Any]) -> list[Any]:
    """The samplers, from the outermost on."""
    found: list[Any] = []
    part: Any = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    if isinstance(loader.dataset, IterableDataset):
        return []
    while part is not None and not any(part is one for one in found):
        found.append(part)
        inner = getattr(part, "sampler", None)
        part = getattr(part, "batch_sampler", None) if inner is None else inner
    return found


def _generators(loader: DataLoader[Any]) -> list[torch.Generator]:
    """The generators that the user gave, each once."""
    owners = [loader, *_samplers(loader)]
    found = [getattr(owner, "generator", None) for owner in owners]
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())


def _isolated(batches: Iterator[Any]) -> Iterator[Any]:
    """Batches whose samples are seeded in this process, which draws for itself between them."""
    while True:
        with preserved_random_state():
            try:
                batch = next(batches)
            except StopIteration:
                return
        yield batch


class _Numbered:
    """A sampler's indices from a batch on; each with the seed of its number in the pass.

    Args:
        sampler: Of the user.
        batched: Whether it yields batches of indices.
        per_sample: Whether they get seeds.
        whole: Whether the dataset reads whole batches, which then get one.
    """

    def __init__(self, sampler: Any, batched: bool, per_sample: bool, whole: bool) -> None:
        self._own, self._batched = sampler, batched
        self._per_sample, self._whole = per_sample, whole
        self.begin(0, 0, 0, lambda: None)

    def begin(self, seed: int, sample_seed: int, start: int, begun: Callable[[], object]) -> None:
        self._seed, self._sample_seed, self._start, self._begun = seed, sample_seed, start, begun

    def __len__(self) -> int:
        return len(self._own)

    def __getattr__(self, name: str) -> Any:
        if name == "_own":
            raise AttributeError(name)
        return getattr(self._own, name)

    def __iter__(self) -> Iterator[Any]:
        # A generator, so that it begins when torch has drawn the workers' seed, as its own would.
        with seeded(self._seed):  # most samplers draw when they begin
            indices = iter(self._own)
            number = self._skip(indices)
            first = list(islice(indices, 1))
        self._begun()
        items = chain(first, indices)
        yield from self._with_seeds(items, number) if self._per_sample else items

    def _skip(self, indices: Iterator[Any]) -> int:
        """Pass over the batches before the start; returns how many seeds these had."""
        skipped = islice(indices, self._start)
        if self._batched and self._per_sample and not self._whole:
            return sum(len(list(item)) for item in skipped)
        return sum(1 for _ in skipped)

    def _with_seeds(self, items: Iterable[Any], number: int) -> Iterator[Any]:
        seed = self._sample_seed
        for item in items:
            if self._batched and not self._whole:
                batch = [(nth(seed, number + i), index) for i, index in enumerate(item)]
                number += len(batch)
                yield batch
            else:
                yield nth(seed, number), item
                number += 1


class StatefulLoader(Wrapped):
    """A dataloader that keeps its own state, as ``torchdata.StatefulDataLoader`` does.

    Attributes:
        generators: The user's own, of the dataloader and its samplers.
    """

    def __init__(self, loader: Any) -> None:
        super().__init__(loader)
        self.generators = _generators(loader) if isinstance(loader, DataLoader) else []
        self._saved: Any = None
        self._start = 0

    def close(self) -> None:
        """Nothing is held: the dataloader is the user's."""

    def seek(self, epoch: int, batch: int) -> None:
        """Have the next pass begin at ``batch``."""
        self._start = batch
        if callable(set_epoch := getattr(self.loader, "set_epoch", None)):
            set_epoch(epoch)

    def __iter__(self) -> Iterator[Any]:
        saved, self._saved = self._saved, None
        start, self._start = self._start, 0
        if start and saved is not None:
            self.loader.load_state_dict(saved)
            start = 0
        batches = iter(self.loader)
        return islice(batches, start, None) if start else batches

    def rank_state_dict(self, within: bool) -> dict[str, Any]:
        """Its state, within a pass; the states of its generators between two."""
        if within:
            return {"loader": self.loader.state_dict()}
        states = [generator.get_state() for generator in self.generators]
        return {"generators": states} if states else {}

    def load_rank_state_dict(self, state: dict[str, Any], shared: Container[int] = ()) -> None:
        """Take them back."""
        self._saved = state.get("loader")
        _set(self.generators, state.get("generators", ()))

    def remarks(self) -> Iterator[str]:
        """What cannot be made exact."""
        if getattr(self.loader, "generator", None) is not None:
            yield (
                f"{type(self.loader).__name__} with a generator of its own goes on exactly in the "
                "epoch that is resumed, and in another order in those after it; without one in the "
                "same"
            )
        if getattr(self.loader, "num_workers", 0):
            yield (
                f"{type(self.loader).__name__} is resumed by its own state, which does not hold "
                "the random states of its workers, unless its dataset keeps them"
            )

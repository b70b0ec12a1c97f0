"""Dataloaders whose passes are a pure function of (seed, epoch), starting at any batch."""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from itertools import chain, islice
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, IterDataPipe

from hookengine import (
    BatchSizeError,
    batch_size,
    copy_dataloader,
    dist,
    length_of,
    preserved_random_state,
    samplers_of,
    samples_per_batch,
)
from hookengine_seed.sample import (
    SeededDataset,
    SeededIterable,
    WorkerInit,
    derive,
    nth,
    seeded,
)


class Wrapped:
    """A dataloader that replaces the user's and forwards all other attributes to it."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __getattr__(self, name: str) -> Any:
        if name == "loader":
            raise AttributeError(name)
        return getattr(self.loader, name)  # dataset, batch_size, sampler, ...


class SeededLoader(Wrapped):
    """A torch DataLoader whose random numbers come from the run's seed.

    The sampler, batch sampler, generator, collate function and ``worker_init_fn`` stay the user's.
    Random numbers that a sampler draws from the global random state when a pass begins come from a
    seed of the pass instead. A pass that begins at a later batch skips the indices of the earlier
    batches without loading them.

    Args:
        loader: The user's DataLoader.
        seed: Returns the run's seed; called when a pass begins.
        phase: ``train``, ``val`` or ``test``.
        per_sample: Whether to seed each sample; by default, if workers read the samples.

    Attributes:
        generators: The user's generators: of the DataLoader and its samplers.
        samples_per_batch: See ``hookengine.samples_per_batch``.
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
        self.samples_per_batch = samples_per_batch(loader)
        self._cut: tuple[int, int, int] | None = None  # an epoch, a batch, its samples to leave out
        self._passed: Passed | None = None
        self._expected: tuple[int, int, Mapping[str, Any], Callable[[Any], object]] | None = None
        self._iterable = isinstance(loader.dataset, IterableDataset)
        self._piped = isinstance(loader.dataset, IterDataPipe)  # which torch seeds by itself
        wanted = loader.num_workers > 0 if per_sample is None else per_sample
        self._per_sample = wanted and not self._iterable
        self._isolated = self._per_sample and loader.num_workers == 0
        # A persistent worker gets its seed once for all epochs, so never from the user's generator.
        self._own = loader.generator is None or loader.persistent_workers
        self.generators = _generators(loader)
        self._begun = self._states()
        self._rewind: list[tuple[torch.Generator, torch.Tensor]] = []
        self._pass_seed = torch.zeros((), dtype=torch.int64)
        self._inner = self._rebuild(loader)

    def _rebuild(self, loader: DataLoader[Any]) -> DataLoader[Any]:
        """Copy the user's DataLoader, with its sampler, dataset and ``worker_init_fn`` wrapped."""
        replaced: dict[str, Any] = {}
        if not self._iterable:
            batched = loader.batch_sampler is not None
            whole = batched and SeededDataset(loader.dataset).__getitems__ is not None
            sampler = loader.batch_sampler if batched else loader.sampler
            self._numbered = _Numbered(sampler, batched, self._per_sample, whole)
            replaced["batch_sampler" if batched else "sampler"] = self._numbered
        if self._per_sample:
            replaced["dataset"] = SeededDataset(loader.dataset)
        elif self._iterable and loader.persistent_workers and not self._piped:
            self._pass_seed.share_memory_()  # type: ignore[no-untyped-call]
            replaced["dataset"] = SeededIterable(loader.dataset, self._pass_seed)
        if loader.num_workers:
            replaced["worker_init_fn"] = WorkerInit(loader.worker_init_fn)
        return copy_dataloader(loader, **replaced)

    def seek(self, epoch: int, batch: int) -> None:
        """Make the next pass that of ``epoch``, starting at ``batch``."""
        self._sought = epoch, batch

    def sample_at(self, epoch: int, batch: int) -> int | None:
        """Return how many samples come before a batch, or None if that is unknown."""
        size = self.samples_per_batch
        if size is None:
            return None
        length = None if self._iterable else length_of(self.loader.sampler)
        return batch * size if length is None else min(batch * size, length)

    def seek_sample(self, epoch: int, sample: int) -> int | None:
        """Make the pass of ``epoch`` leave out the samples before ``sample`` in their batch.

        Returns:
            The batch to start with; None if that is unknown, or if the dataset is iterable and the
            sample is not the first one of its batch.
        """
        self._cut = None
        size = self.samples_per_batch
        if size is None or (self._iterable and sample % size):
            return None
        if self.sample_at(epoch, -(-sample // size)) == sample and sample % size:
            return len(self.loader)  # after the last batch, which is short
        batch, left_out = divmod(sample, size)
        if left_out:
            self._cut = epoch, batch, left_out
        return batch

    def used(self, epoch: int, batch: int) -> Mapping[str, Any] | None:
        """Return what is in the batches before one of the current pass.

        Returns:
            ``samples``, their number, and ``indices``, a checksum, or None for an iterable dataset;
            None if the pass has not begun, or if batches of one size come from torch's samplers.
        """
        if self._expected is not None and self._expected[:2] == (epoch, batch):
            return self._expected[2]
        passed = self._passed
        return None if passed is None or passed.epoch != epoch else passed.before(batch)

    def expect(
        self, epoch: int, batch: int, used: Mapping[str, Any], found: Callable[[Any], object]
    ) -> None:
        """Compare the batches that a resumed pass leaves out with those that were trained.

        Args:
            epoch: The epoch that resumes.
            batch: The batch that it resumes with.
            used: What ``used`` returned when the state was saved.
            found: Called with what ``used`` returns here, once the pass has begun.
        """
        self._expected = epoch, batch, used, found

    def _record(self, epoch: int, start: int) -> Passed | None:
        """Return the record of a training pass, unless its sizes and its order are known."""
        known = all(_is_known(part) for part in samplers_of(self.loader))
        if self.samples_per_batch is not None and known:
            return None
        expected, self._expected = self._expected, None
        found = expected[3] if expected and expected[:2] == (epoch, start) else None
        self._passed = Passed(epoch, start, self._iterable, found)
        return self._passed

    def close(self) -> None:
        """Release persistent workers."""
        vars(self._inner)["_iterator"] = None

    def __iter__(self) -> Iterator[Any]:
        sought, self._sought = self._sought, None
        epoch, start = sought or ("other", 0)
        seed = derive(self._seed(), self._phase, epoch)
        for part in samplers_of(self.loader):
            if epoch != "other" and callable(set_epoch := getattr(part, "set_epoch", None)):
                set_epoch(epoch)
        if self._own:
            self._inner.generator = torch.Generator().manual_seed(derive(seed, "workers"))
        self._pass_seed.fill_(derive(seed, "worker", dist.get_rank()))
        rewind: list[tuple[torch.Generator, torch.Tensor]] = []
        if sought is not None:  # a training pass, not one that a hook makes in between
            rewind, self._rewind = self._rewind, []
        later = [(generator, generator.get_state()) for generator, _ in rewind]
        for generator, state in rewind:
            generator.set_state(state)
        passed = None
        if sought is not None:
            self._begun = self._states()
            passed = self._record(*sought)
        if self._iterable:
            return self._iterate(seed, start, passed)

        def begun() -> None:
            for generator, state in later:
                generator.set_state(state)

        cut = self._cut[1:] if self._cut and self._cut[0] == epoch else (0, 0)
        sample_seed = derive(seed, "sample", dist.get_rank())
        self._numbered.begin(seed, sample_seed, start, begun, cut, passed)
        return _isolated(iter(self._inner)) if self._isolated else iter(self._inner)

    def _iterate(self, seed: int, start: int, passed: Passed | None) -> Iterator[Any]:
        """Yield the batches of an iterable dataset; fetch and drop those before ``start``."""
        with seeded(seed):
            batches: Iterator[Any] = iter(self._inner)
            if passed is not None:
                batches = passed.watch(batches)
            first = list(islice(batches, start, start + 1))
        yield from first
        yield from batches

    def rank_state_dict(self, within: bool) -> dict[str, Any]:
        """Return the states of the user's generators, now and at the start of the current pass.

        Args:
            within: Whether a pass is in progress.
        """
        if not self.generators:
            return {}
        state = {"generators": self._states()}
        return {**state, "begun": self._begun} if within else state

    def load_rank_state_dict(self, state: dict[str, Any], shared: Container[int] = ()) -> None:
        """Restore the generators' states saved by ``rank_state_dict``.

        Args:
            state: The saved states.
            shared: The ids of generators that other dataloaders use too. These are rewound only
                while the next pass begins, and then set to their latest state again.
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
        """Yield what a resume cannot repeat exactly."""
        loader = self.loader
        if self._iterable:
            yield (
                f"{type(loader.dataset).__name__} is an iterable dataset: a resume within an epoch "
                "fetches and drops the batches before it"
            )
            if loader.num_workers == 0:
                yield (
                    "a resume does not repeat its random numbers after the first sample of an "
                    "epoch; with num_workers=1 it does"
                )
        for part in samplers_of(loader):
            module = type(part).__module__
            known = module.startswith("torch.") or hasattr(part, "set_epoch")
            if not known and getattr(part, "generator", None) is None:
                yield (
                    f"a resume repeats the order of {type(part).__name__} only if it draws its "
                    "random numbers when an epoch begins, or has a generator or set_epoch(n)"
                )
        if loader.num_workers and not (self._per_sample or self._iterable):
            yield "per_sample=False: a resume does not repeat the random numbers of workers"


def _set(generators: Iterable[torch.Generator], states: Iterable[torch.Tensor]) -> None:
    for generator, state in zip(generators, states, strict=False):
        generator.set_state(state)


def _is_known(sampler: Any) -> bool:
    return type(sampler).__module__.startswith(("torch.", "hookengine"))


def _generators(loader: DataLoader[Any]) -> list[torch.Generator]:
    """Find the generators that the user passed, each once."""
    owners = [loader, *samplers_of(loader)]
    found = [getattr(owner, "generator", None) for owner in owners]
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())


def _isolated(batches: Iterator[Any]) -> Iterator[Any]:
    """Yield batches, and keep seeding their samples from touching this process's random state."""
    while True:
        with preserved_random_state():
            try:
                batch = next(batches)
            except StopIteration:
                return
        yield batch


class Passed:
    """The batches of a training pass so far: how many samples, and which.

    Args:
        epoch: The epoch of the pass.
        start: The batch that the pass starts with.
        is_iterable: Whether to watch batches of samples instead of batches of indices.
        found: Called with what the batches before ``start`` hold.
    """

    def __init__(
        self, epoch: int, start: int, is_iterable: bool, found: Callable[[Any], object] | None
    ) -> None:
        self.epoch = epoch
        self._start, self._is_iterable, self._found = start, is_iterable, found
        self._totals: list[tuple[int | None, int | None]] = [(0, None if is_iterable else 0)]

    def watch(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Yield the batches, from the first one of the epoch on, and record them."""
        for number, batch in enumerate(batches, 1):
            self._totals.append(self._add(batch))
            if number == self._start and self._found is not None:
                self._found(self.before(number))
                self._found = None
            yield batch

    def _add(self, batch: Any) -> tuple[int | None, int | None]:
        samples, indices = self._totals[-1]
        if samples is None:
            return None, None
        try:
            samples += batch_size(batch) if self._is_iterable else len(batch)
        except (BatchSizeError, TypeError):
            return None, None
        if indices is not None:
            try:
                indices = zlib.crc32(array("q", batch).tobytes(), indices)
            except (TypeError, OverflowError):  # the indices are no numbers
                indices = None
        return samples, indices

    def before(self, batch: int) -> dict[str, Any] | None:
        """Return what the batches before one hold, or None if that is unknown."""
        if batch >= len(self._totals) or self._totals[batch][0] is None:
            return None
        samples, indices = self._totals[batch]
        return {"samples": samples, "indices": indices}


class _Numbered:
    """A sampler that starts at a batch and pairs each index with a seed by its place in the pass.

    Args:
        sampler: The user's sampler.
        batched: Whether it yields batches of indices.
        per_sample: Whether to pair indices with seeds.
        whole: Whether the dataset reads whole batches; each batch then gets one seed.
    """

    def __init__(self, sampler: Any, batched: bool, per_sample: bool, whole: bool) -> None:
        self._own, self._batched = sampler, batched
        self._per_sample, self._whole = per_sample, whole
        self.begin(0, 0, 0, lambda: None)

    def begin(
        self,
        seed: int,
        sample_seed: int,
        start: int,
        begun: Callable[[], object],
        cut: tuple[int, int] = (0, 0),
        passed: Passed | None = None,
    ) -> None:
        """Prepare the next pass.

        Args:
            seed: What the sampler draws from.
            sample_seed: What the seeds of samples derive from.
            start: The first batch.
            begun: Called when the sampler has drawn its order.
            cut: A batch, and how many of its first samples to leave out.
            passed: Records the batches of the pass.
        """
        self._passed = passed
        self._seed, self._sample_seed, self._start, self._begun = seed, sample_seed, start, begun
        self._cut = cut

    def __len__(self) -> int:
        return len(self._own)

    def __getattr__(self, name: str) -> Any:
        if name == "_own":
            raise AttributeError(name)
        return getattr(self._own, name)

    def __iter__(self) -> Iterator[Any]:
        # A generator, so that it starts after torch has drawn the workers' seed, as torch's does.
        with seeded(self._seed):  # most samplers draw when a pass begins
            indices = iter(self._own)
            if self._passed is not None and self._batched:
                indices = self._passed.watch(indices)
            number = self._skip(indices)
            first = list(islice(indices, 1))
        self._begun()
        items: Iterable[Any] = chain(first, indices)
        items = self._with_seeds(items, number) if self._per_sample else items
        yield from self._without_used(items) if self._cut[1] else items

    def _skip(self, indices: Iterator[Any]) -> int:
        """Skip the batches before the start; return how many seeds they had."""
        skipped = islice(indices, self._start)
        if self._batched and self._per_sample and not self._whole:
            return sum(len(list(item)) for item in skipped)
        return sum(1 for _ in skipped)

    def _without_used(self, items: Iterable[Any]) -> Iterator[Any]:
        """Leave out the samples that a run with other batches has used already."""
        cut, count = self._cut
        for number, item in enumerate(items, self._start):
            if number != cut:
                yield item
            elif self._whole and self._per_sample:
                yield item[0], item[1][count:]
            else:
                yield item[count:]

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
    """A dataloader that saves its own state, as ``torchdata.StatefulDataLoader`` does.

    Attributes:
        generators: The user's generators: of the dataloader and its samplers.
    """

    def __init__(self, loader: Any) -> None:
        super().__init__(loader)
        self.generators: list[torch.Generator] = []
        self.samples_per_batch: int | None = None
        if isinstance(loader, DataLoader):
            self.generators = _generators(loader)
            if not isinstance(loader.dataset, IterableDataset):
                self.samples_per_batch = loader.batch_size
        self._saved: Any = None
        self._lost = False
        self._sought: tuple[int, int] | None = None
        self._from = 0, 0, 0  # an epoch, and a batch of it that starts with this sample

    def close(self) -> None:
        """Do nothing: the user owns the dataloader and its workers."""

    def seek(self, epoch: int, batch: int) -> None:
        """Start the next pass at ``batch``."""
        self._sought = epoch, batch
        if callable(set_epoch := getattr(self.loader, "set_epoch", None)):
            set_epoch(epoch)

    def sample_at(self, epoch: int, batch: int) -> int | None:
        """Return how many samples come before a batch, or None if that is unknown."""
        size = self.samples_per_batch
        if size is None:
            return None
        when, start, sample = self._from
        if epoch != when or batch < start:
            start = sample = 0
        sample += (batch - start) * size
        length = length_of(self.loader.sampler)
        return sample if length is None else min(sample, length)

    def seek_sample(self, epoch: int, sample: int) -> int | None:
        """Return the batch that starts with a sample; None if that is unknown.

        The dataloader counts samples by itself: its batches are whole, from that sample on.
        """
        size, length = self.samples_per_batch, length_of(getattr(self.loader, "sampler", ()))
        if size is None:
            return None
        batch = sample // size
        if length is not None:
            left = length - sample
            batches = left // size if self.loader.drop_last else -(-left // size)
            batch = max(len(self.loader) - batches, 0)
        self._from = epoch, batch, sample
        return batch

    def __iter__(self) -> Iterator[Any]:
        sought, self._sought = self._sought, None
        if sought is None:  # a pass that a hook makes, not the training
            return iter(self.loader)
        epoch, start = sought
        saved, self._saved = self._saved, None
        sample = self.sample_at(epoch, start)
        if saved is not None and (start if sample is None else sample):
            self.loader.load_state_dict(saved)
            start = 0
        batches = iter(self.loader)
        return islice(batches, start, None) if start else batches

    def rank_state_dict(self, within: bool) -> dict[str, Any]:
        """Return the dataloader's state within a pass, its generators' states between passes."""
        if self._saved is not None:  # its pass has not resumed yet
            return {"loader": self._saved, "ranks": dist.get_world_size()}
        if within:
            return {"loader": self.loader.state_dict(), "ranks": dist.get_world_size()}
        states = [generator.get_state() for generator in self.generators]
        return {"generators": states} if states else {}

    def load_rank_state_dict(self, state: dict[str, Any], shared: Container[int] = ()) -> None:
        """Restore the states saved by ``rank_state_dict`` on the same number of ranks."""
        self._saved = state.get("loader")
        ranks = dist.get_world_size()
        self._lost = state.get("ranks", ranks) != ranks
        if self._lost:
            self._saved = None
        _set(self.generators, state.get("generators", ()))

    def remarks(self) -> Iterator[str]:
        """Yield what a resume cannot repeat exactly."""
        if self._lost:
            yield (
                f"the state of {type(self.loader).__name__} in the checkpoint belongs to another "
                "number of processes and is not used: samples of this epoch may be trained twice "
                "or not at all"
            )
        if getattr(self.loader, "generator", None) is not None:
            yield (
                f"{type(self.loader).__name__} has its own generator: a resume repeats the order "
                "of the current epoch, but later epochs get a different order. Without a generator "
                "they get the same order"
            )
        if getattr(self.loader, "num_workers", 0):
            yield (
                f"{type(self.loader).__name__} resumes from its own state, which does not include "
                "the random states of its workers unless its dataset saves them"
            )

"""Where a run is within an epoch, in samples: saving that place, finding it in other batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import TYPE_CHECKING, Any, cast

from hookengine import dist
from hookengine.batches import SampleCounter
from hookengine.loop.data import is_seekable, length_of
from hookengine.setup.dataloaders import copy_dataloader, samplers_of, samples_per_batch

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

    from hookengine.loop.loops import TrainLoop
    from hookengine.loop.progress import Progress
    from hookengine.runner import Runner


def describe_position(runner: Runner) -> dict[str, Any]:
    """Return where the run is in its epoch, and what it takes to find that place again.

    Returns:
        ``samples`` of the epoch that all ranks together have used, or None if that is unknown;
        ``used``, what the dataloader has counted on this rank, if its batches or order are yours;
        ``ranks`` that share an order; ``batch_size`` of one rank, or None; ``order``, the class of
        the sampler that draws the order, and its ``length``. Empty if the Runner does not train.
    """
    if runner.train_loop is None:
        return {}
    return _describe(runner.train_loop, runner.progress.epoch, runner.progress.batch)


def _describe(loop: TrainLoop, epoch: int, batch: int) -> dict[str, Any]:
    loader = loop.dataloader
    samplers = _samplers(loader)
    is_shared = any(hasattr(s, "num_replicas") or hasattr(s, "world_size") for s in samplers)
    ranks = dist.get_world_size() if is_shared else 1
    order = samplers[-1] if samplers else None
    length = None if order is None else length_of(order)
    if loop.resumed_at is not None and loop.resumed_at[:2] == (epoch, batch):
        samples: int | None = loop.resumed_at[2]
    elif (samples := _sample_at(loop, epoch, batch)) is not None:
        samples *= ranks
        if length is not None:  # ranks may have repeated some at the end
            samples = min(samples, length)
    return {
        "samples": samples,
        "used": ask(epoch, batch) if callable(ask := getattr(loader, "used", None)) else None,
        "ranks": ranks,
        "batch_size": samples_per_batch(loader),
        "order": None if order is None else type(order).__name__,
        "length": length,
    }


def _samplers(loader: Any) -> list[Any]:
    try:
        return samplers_of(loader)
    except AttributeError:
        return []


def _sample_at(loop: TrainLoop, epoch: int, batch: int) -> int | None:
    """Return how many samples of this rank come before a batch, or None if that is unknown."""
    loader: Any = loop.dataloader
    if callable(ask := getattr(loader, "sample_at", None)):
        samples: int | None = ask(epoch, batch)
        return samples
    if isinstance(loader, (list, tuple)):
        sizes = _sizes(loader, loop.runner)
        return None if sizes is None else sum(sizes[:batch])
    size = samples_per_batch(loader)
    if size is None:
        return None
    length = _samples_of_rank(loader)
    return batch * size if length is None else min(batch * size, length)


def _samples_of_rank(loader: Any) -> int | None:
    """Return how many samples a pass of this rank draws, or None if that is unknown."""
    return length_of(loader.sampler) if _samplers(loader) else None


def _sizes(batches: list[Any] | tuple[Any, ...], runner: Runner) -> list[int] | None:
    """Return the samples in each batch of a list, or None if they are unknown."""
    if dist.get_world_size() > 1:  # the sizes on other ranks may differ
        return None
    try:
        return [*map(SampleCounter(batches, runner.bare_model), batches)]
    except (TypeError, ValueError):
        return None


def resume_position(runner: Runner, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return the counters of a state, with ``batch`` counted in the batches of this Runner.

    If the batches differ, the dataloader is made to leave out the samples that were trained
    already, so that each sample of the epoch is trained once. Where that is not possible, a warning
    says which samples are trained twice, or that they are unknown.
    """
    progress, meta = dict(checkpoint["progress"]), checkpoint.get("meta", {})
    loop = runner.train_loop
    if loop is None:
        return progress
    loop.resumed_at = None
    if isinstance(cut := getattr(loop.dataloader, "batch_sampler", None), _Cut):
        loop.dataloader = copy_dataloader(cut.dataloader)  # of a state that was loaded before
    epoch, batch = progress["epoch"], progress["batch"]
    saved = meta.get("position", {})
    used = saved.get("samples")
    if not (batch or used):
        return progress
    now = _describe(loop, epoch, batch)
    if used is None or now["samples"] is None:
        progress["batch"] = _by_batches(runner, meta, now, epoch, batch)
        return progress
    place = _Place(runner, now, epoch, used)
    progress["batch"] = place.batch
    if place.samples != _describe(loop, epoch, place.batch)["samples"]:
        loop.resumed_at = epoch, place.batch, place.samples
    if used != now["samples"] or saved["ranks"] != now["ranks"]:
        place.log()
    if text := _another_order(saved, now):
        runner.logger.warning(
            f"{text}. Of the {used} samples that epoch {epoch + 1} has already trained on, some "
            "may be trained twice in it, and as many others not at all"
        )
    elif used == now["samples"] and saved["batch_size"] == now["batch_size"]:
        _compare_used(runner, saved, epoch, batch)
    return progress


class _Place:
    """The place in the batches of this Runner that comes after a number of samples.

    Args:
        runner: The Runner; its dataloader is made to start there.
        now: The description of its position.
        epoch: The epoch.
        used: The samples of the epoch that are used, on all ranks together.

    Attributes:
        batch: The batch to start with.
        samples: The samples before that place; fewer than ``used`` if some are repeated.
    """

    def __init__(self, runner: Runner, now: Mapping[str, Any], epoch: int, used: int) -> None:
        assert runner.train_loop is not None
        self._runner, self._epoch, self._used = runner, epoch, used
        self._size = now["batch_size"]
        self._length = length_of(runner.train_loop.dataloader)
        ranks = now["ranks"]
        sample, rest = divmod(used, ranks)
        self._uneven = rest
        if rest and self._within_batch(runner.train_loop, sample):
            sample += dist.get_rank() < rest  # these ranks have used one more
            self._uneven = 0
        self.batch, self._again = self._seek(runner.train_loop, sample)
        if self._length is not None and self.batch >= self._length:
            self.batch, self._again = self._length, 0
        self._cut = 0 if self._size is None or self._again else sample - self.batch * self._size
        self.samples = used - self._uneven - self._again * ranks

    def _within_batch(self, loop: TrainLoop, sample: int) -> bool:
        """Return whether a batch goes on after this sample and the next one."""
        if self._size is None:
            return False
        length = _samples_of_rank(loop.dataloader)
        left: int = self._size - sample % self._size
        return (left if length is None else min(left, length - sample)) > 1

    def _seek(self, loop: TrainLoop, sample: int) -> tuple[int, int]:
        """Make the dataloader start at a sample of this rank.

        Returns:
            The batch to start with, and how many of its samples were used but cannot be left out.
        """
        loader: Any = loop.dataloader
        if callable(seek := getattr(loader, "seek_sample", None)):
            batch = seek(self._epoch, sample)
            if batch is not None:
                return batch, 0
        if isinstance(loader, (list, tuple)):
            return _in_list(_sizes(loader, self._runner) or [], sample)
        length = _samples_of_rank(loader)
        if length is not None and sample >= length:
            return len(loader), 0
        batch, left = divmod(sample, self._size)
        if left and _samplers(loader) and not is_seekable(loader):
            cut = _Cut(loader, self._runner.progress, self._epoch, batch, left)
            replaced = {"batch_sampler": cut, "samples_per_batch": self._size}
            loop.dataloader = copy_dataloader(loader, **replaced)
            left = 0
        return batch, left

    def log(self) -> None:
        """Log where the epoch continues, and what is trained a second time."""
        of = "" if self._length is None else f" of {self._length}"
        text = f"the checkpoint was saved after {self._used} samples of epoch {self._epoch + 1}"
        if self.batch == self._length:
            self._runner.logger.info(f"{text}, which is thereby complete")
            return
        text += f"; the run resumes at batch {self.batch + 1}{of}"
        if self._cut > 0:
            text += f" without its first {self._cut} samples, so that each sample is trained once"
        if self._again:
            self._runner.logger.warning(
                f"{text}. The first {self._again} samples of batch {self.batch + 1} are trained a "
                "second time, because such a dataloader starts only at whole batches"
            )
        elif self._uneven:
            self._runner.logger.warning(
                f"{text}. {self._uneven} samples are trained a second time, because "
                f"{self._used} samples do not divide among {dist.get_world_size()} ranks"
            )
        else:
            self._runner.logger.info(text)


def _in_list(sizes: list[int], sample: int) -> tuple[int, int]:
    """Return the batch that holds a sample, and how many of its samples come before."""
    for batch, size in enumerate(sizes):
        if sample < size:
            return batch, sample
        sample -= size
    return len(sizes), 0


class _Cut:
    """A batch sampler that leaves out the first samples of one batch, in a pass that resumes there.

    Args:
        dataloader: The user's dataloader.
        progress: The counters, which tell whether a pass resumes.
        epoch: The epoch of the pass.
        batch: The batch.
        count: How many of its samples to leave out.
    """

    def __init__(
        self, dataloader: DataLoader[Any], progress: Progress, epoch: int, batch: int, count: int
    ) -> None:
        self.dataloader = dataloader
        self._own, self._progress = dataloader.batch_sampler, progress
        self._place, self._count = (epoch, batch), count

    def __len__(self) -> int:
        return len(cast("Sized", self._own))

    def __getattr__(self, name: str) -> Any:
        if name == "_own":
            raise AttributeError(name)
        return getattr(self._own, name)

    def __iter__(self) -> Iterator[list[Any]]:
        resumes = (self._progress.epoch, self._progress.batch) == self._place
        for number, indices in enumerate(cast("Iterable[list[Any]]", self._own)):
            cut = resumes and number == self._place[1]
            yield indices[self._count :] if cut else indices


def _another_order(saved: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return what makes the order of the samples another one, or ""."""
    then, here = saved["order"], now["order"]
    if then != here:
        return (
            f"the order of the samples comes from {here or 'no sampler'} here, from "
            f"{then or 'no sampler'} in the checkpoint"
        )
    if saved["length"] != now["length"] and here != "SequentialSampler":
        return (
            f"{here} draws another order for {now['length']} samples than for the "
            f"{saved['length']} samples in the checkpoint"
        )
    return ""


def _compare_used(runner: Runner, saved: Mapping[str, Any], epoch: int, batch: int) -> None:
    """Let the dataloader compare the batches that it leaves out with those that were trained.

    Those of the checkpoint are batches of rank 0. There may be as many batches here, but of other
    sizes, or in another order.
    """
    assert runner.train_loop is not None
    expect = getattr(runner.train_loop.dataloader, "expect", None)
    used, logger = saved.get("used"), runner.logger
    if used is None or not callable(expect) or dist.get_rank() != 0:
        return

    def warn(here: Mapping[str, Any] | None) -> None:
        start = (
            f"the first {batch} batches of epoch {epoch + 1}, which the run has trained on, hold"
        )
        if here is None or here == used:
            return
        if here["samples"] != used["samples"]:
            text = f"{start} {here['samples']} samples here, {used['samples']} in the checkpoint"
        elif None in (here["indices"], used["indices"]):
            return
        else:
            text = f"{start} other samples here than in the checkpoint"
        logger.warning(
            f"{text}. Samples of this epoch may be trained twice or not at all. The same batches, "
            "or a checkpoint at the end of an epoch, resume exactly"
        )

    expect(epoch, batch, used, warn)


def _by_batches(
    runner: Runner, meta: Mapping[str, Any], now: Mapping[str, Any], epoch: int, batch: int
) -> int:
    """Return the batch to start with where the samples in the batches are unknown."""
    assert runner.train_loop is not None
    loader: Any = runner.train_loop.dataloader
    length = length_of(loader)
    data, saved = meta.get("dataset", {}).get("train", {}), meta.get("position")
    then, ranks = data.get("batches"), meta.get("world_size", dist.get_world_size())
    same = then == length and ranks == dist.get_world_size()
    if saved is not None:
        kinds = ("order", "length", "batch_size")
        same = same and all(saved[kind] == now[kind] for kind in kinds)
        same = same and (saved["samples"] is None) == (now["samples"] is None)
    if same:
        _compare_used(runner, saved or {}, epoch, batch)
        return batch
    start = batch
    if then and length:
        samples = length_of(getattr(loader, "dataset", ()))
        if ranks != dist.get_world_size() or samples == data.get("samples"):
            start = batch * length // then
        start = min(start, length)
    of_then, of_now = (f" of {n}" if n else "" for n in (then, length))
    runner.logger.warning(
        f"the checkpoint was saved after {batch}{of_then} batches of epoch {epoch + 1}, and the "
        f"run resumes at batch {start + 1}{of_now}. How many samples these batches hold is "
        "unknown, so samples of this epoch may be trained twice or not at all. A DataLoader with a "
        "batch_size, or a checkpoint at the end of an epoch, resumes exactly"
    )
    return start

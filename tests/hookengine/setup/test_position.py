"""A run that resumes within an epoch, with other batches: each sample of the epoch, once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    TensorDataset,
)

from hookengine import BaseModel, Plugin
from tests.fixtures import MakeRunner


def numbered(samples: int) -> TensorDataset:
    """Samples whose first feature is their number."""
    inputs = torch.zeros(samples, 4)
    inputs[:, 0] = torch.arange(samples)
    return TensorDataset(inputs, torch.zeros(samples, dtype=torch.long))


class Seen(Plugin):
    """Keeps the samples of each epoch, and where the counters were; stops after some batches."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.stop_at = stop_at
        self.epochs: dict[int, list[list[int]]] = {}
        self.counters: list[tuple[int, int, bool]] = []

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any) -> None:
        assert batch_idx == runner.progress.batch
        numbers = (data_batch[0][:, 0] * 1).int().tolist()
        self.epochs.setdefault(runner.progress.epoch, []).append(numbers)

    def after_train_iter(self, runner: Any, batch_idx: int) -> None:
        progress = runner.progress
        self.counters.append((batch_idx, progress.iter, progress.is_last))
        if progress.iter == self.stop_at:
            runner.stop("enough")


def samples(*runs: Seen, epoch: int = 0) -> list[int]:
    """The samples of an epoch, over the runs that trained in it."""
    return [n for seen in runs for batch in seen.epochs.get(epoch, []) for n in batch]


Load = Callable[..., Any]


def loader(batch_size: int, count: int = 32, shuffle: bool = True, **options: Any) -> Any:
    return DataLoader(numbered(count), batch_size=batch_size, shuffle=shuffle, **options)


def start(make: MakeRunner, dataloader: Any, stop_at: int | None, **options: Any) -> Any:
    """A run until `stop_at`, and what it saw and left."""
    seen = Seen(stop_at)
    options.setdefault("plugins", ["seed"])
    plugins = [*options.pop("plugins"), seen]
    state = options.pop("state", None)
    options.setdefault("train_cfg", dict(max_epochs=2))
    runner = make(train_dataloader=dataloader, plugins=plugins, **options)
    if state is not None:
        runner.load_state_dict(state, allow=["dataset", "logging"])
    runner.train()
    return seen, runner


def logged(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join("".join(capsys.readouterr()).split())


@pytest.mark.parametrize("seed", [True, False], ids=["seed", "no seed"])
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("stop_at", [1, 3, 4])
@pytest.mark.parametrize(("before", "after"), [(8, 16), (16, 8), (8, 5), (4, 32)])
def test_each_sample_of_the_epoch_is_trained_once(
    make: MakeRunner, before: int, after: int, stop_at: int, drop_last: bool, seed: bool
) -> None:
    stop_at = min(stop_at, 32 // before)
    options: Any = dict(plugins=["seed"] if seed else [])
    shuffle = seed  # without the plugin, torch's shuffle differs from pass to pass
    one, first = start(make, loader(before, shuffle=shuffle), stop_at, **options)
    options["state"] = first.state_dict()
    dataloader = loader(after, shuffle=shuffle, drop_last=drop_last)
    two, second = start(make, dataloader, None, **options)
    epoch = samples(one, two)
    assert len(epoch) == len(set(epoch))
    dropped = 32 % after if drop_last else 0
    assert len(epoch) >= 32 - dropped
    assert len(samples(two, epoch=1)) == 32 - dropped
    assert two.epochs[1][0][0] >= 0
    assert len(two.epochs[1][0]) == after

    length = len(dataloader)
    lasts = [batch for batch, _, last in two.counters if last]
    assert lasts[-1] == length - 1
    assert two.counters[-1][0] == length - 1
    # every batch after the first ends where it would in an uninterrupted pass
    for batch_idx, batch in zip(
        range(length - len(two.epochs.get(0, [])), length), two.epochs.get(0, []), strict=True
    ):
        assert len(batch) <= min(after, 32 - batch_idx * after)
    iters = [i for _, i, _ in two.counters]
    assert iters == [*range(stop_at + 1, stop_at + 1 + len(iters))]
    assert second.progress.epoch == 2


def test_the_order_is_that_of_the_uninterrupted_pass(make: MakeRunner) -> None:
    whole, _ = start(make, loader(16), None)
    one, first = start(make, loader(8), 3)
    two, _ = start(make, loader(16), None, state=first.state_dict())
    assert samples(one, two) == samples(whole)
    assert samples(two, epoch=1) == samples(whole, epoch=1)


def test_it_says_where_the_epoch_continues(
    make: MakeRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    _, first = start(make, loader(8), 3)
    capsys.readouterr()
    start(make, loader(16), None, state=first.state_dict(), plugins=["seed", "logging"])
    out = " ".join("".join(capsys.readouterr()).split())
    assert "24 samples of epoch 1" in out
    assert "batch 2 of 2" in out
    assert "without its first 8 samples" in out


def test_nothing_is_said_where_the_batches_are_the_same(
    make: MakeRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    _, first = start(make, loader(8), 3)
    two, _ = start(make, loader(8), None, state=first.state_dict(), plugins=["seed", "logging"])
    assert [len(batch) for batch in two.epochs[0]] == [8]
    assert "samples of epoch" not in "".join(capsys.readouterr())


def test_an_epoch_boundary_is_plain(make: MakeRunner, capsys: pytest.CaptureFixture[str]) -> None:
    one, first = start(make, loader(8), None, train_cfg=dict(max_epochs=1))
    two, second = start(
        make, loader(16), None, state=first.state_dict(), plugins=["seed", "logging"]
    )
    assert sorted(samples(one)) == sorted(samples(two, epoch=1)) == [*range(32)]
    assert [len(batch) for batch in two.epochs[1]] == [16, 16]
    assert (second.progress.iter, second.progress.max_iters) == (6, 6)
    assert "samples of epoch" not in "".join(capsys.readouterr())


@pytest.mark.parametrize("plugins", [["seed"], []], ids=["seed", "no seed"])
def test_batches_that_change_again_within_an_epoch(
    make: MakeRunner, plugins: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def resume(size: int, stop_at: int | None, state: Any = None) -> Any:
        dataloader = loader(size, 64, shuffle=bool(plugins))
        return start(make, dataloader, stop_at, state=state, plugins=plugins)

    one, first = resume(8, 3)
    two, second = resume(16, 4, first.state_dict())
    three, third = resume(5, 6, second.state_dict())
    capsys.readouterr()
    four, fourth = resume(5, 7, third.state_dict())
    assert "samples" not in logged(capsys)
    five, _ = resume(32, None, fourth.state_dict())
    assert sorted(samples(one, two, three, four, five)) == [*range(64)]
    assert [len(b) for b in two.epochs[0]] == [8]
    assert len(samples(five, epoch=1)) == 64


@pytest.mark.parametrize("plugins", [["seed"], []], ids=["seed", "no seed"])
def test_states_that_are_loaded_one_after_the_other(make: MakeRunner, plugins: Any) -> None:
    states = [
        start(make, loader(8, shuffle=False), n, plugins=plugins)[1].state_dict() for n in (1, 2, 3)
    ]
    seen = Seen()
    runner = make(train_dataloader=loader(16, shuffle=False), plugins=[*plugins, seen])
    for state in (states[2], states[0], states[2]):
        runner.load_state_dict(state, allow=["dataset"])
    runner.train()
    assert samples(seen) == [*range(24, 32)]
    seen = Seen()
    runner = make(train_dataloader=loader(16, shuffle=False), plugins=[*plugins, seen])
    for state in (states[2], states[1]):
        runner.load_state_dict(state, allow=["dataset"])
    runner.train()
    assert samples(seen) == [*range(16, 32)]


@pytest.mark.parametrize("plugins", [["seed"], []], ids=["seed", "no seed"])
def test_a_state_that_is_saved_before_the_first_batch(make: MakeRunner, plugins: Any) -> None:
    options: Any = dict(plugins=plugins)
    one, first = start(make, loader(8, shuffle=False), 1, **options)
    between = make(train_dataloader=loader(16, shuffle=False), **options)
    between.load_state_dict(first.state_dict(), allow=["dataset"])
    options["state"] = between.state_dict()
    two, _ = start(make, loader(16, shuffle=False), None, **options)
    assert sorted(samples(one, two)) == [*range(32)]
    three, _ = start(make, loader(4, shuffle=False), None, **options)
    assert sorted(samples(one, three)) == [*range(32)]


@pytest.mark.parametrize("plugins", [["seed"], []], ids=["seed", "no seed"])
@pytest.mark.parametrize("iteration", [2, 3])
def test_an_error_in_the_resumed_epoch_repeats_no_sample(
    make: MakeRunner, plugins: Any, iteration: int
) -> None:
    one, first = start(make, loader(8, 64, shuffle=False), 1, plugins=plugins)
    seen = Seen()
    options: Any = dict(train_dataloader=loader(16, 64, shuffle=False))
    second = make(plugins=[*plugins, seen], train_cfg=dict(max_epochs=1), **options)
    second.load_state_dict(first.state_dict(), allow=["dataset"])
    left = [1]

    @second.on("before_train_iter", before="*")
    def fail(runner: Any) -> None:
        if runner.progress.iter == iteration - 1 and left:
            left.pop()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        second.train()
    second.train()
    assert sorted(samples(one, seen)) == [*range(64)]


def test_a_run_limited_in_iterations(make: MakeRunner) -> None:
    one, first = start(make, loader(8), 3, train_cfg=dict(max_iters=9, val_interval=100))
    two, second = start(
        make, loader(16), None, state=first.state_dict(), train_cfg=dict(max_iters=6)
    )
    assert sorted(samples(one, two)) == sorted(samples(two, epoch=1)) == [*range(32)]
    assert second.progress.iter == 6


def test_windows_of_accumulation(make: MakeRunner) -> None:
    plugins = ["seed", dict(type="accumulate", steps=2)]
    one, first = start(make, loader(4), 6, plugins=plugins)
    two, second = start(make, loader(16), None, state=first.state_dict(), plugins=plugins)
    assert sorted(samples(one, two)) == [*range(32)]
    assert [len(batch) for batch in two.epochs[0]] == [8]
    assert second.progress.step == 3 + 1 + 1


@pytest.mark.parametrize("after", [4, 16])
def test_the_batch_size_may_change_while_the_number_of_batches_does_not(
    make: MakeRunner, after: int
) -> None:
    one, first = start(make, loader(20, 33, shuffle=False), 1)
    two, _ = start(make, loader(32, 33, shuffle=False), None, state=first.state_dict())
    assert sorted(samples(one, two)) == [*range(33)]


def test_samples_that_are_appended(make: MakeRunner, capsys: pytest.CaptureFixture[str]) -> None:
    one, first = start(make, loader(8, 32, shuffle=False), 3)
    state = first.state_dict()
    two, _ = start(make, loader(8, 40, shuffle=False), None, state=state)
    assert sorted(samples(one, two)) == [*range(40)]
    assert "warning" not in "".join(capsys.readouterr())
    two, _ = start(make, loader(16, 40, shuffle=False), None, state=state)
    assert sorted(samples(one, two)) == [*range(40)]
    two, second = start(make, loader(8, 20, shuffle=False), None, state=state)  # fewer than used
    assert samples(two) == []
    assert sorted(samples(two, epoch=1)) == [*range(20)]
    assert second.progress.epoch == 2


def test_another_order_is_warned_about(
    make: MakeRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    _, first = start(make, loader(8), 3)
    state = first.state_dict()
    logging: Any = dict(plugins=["seed", "logging"], state=state)
    capsys.readouterr()
    start(make, loader(8, 40), None, **logging)
    assert "32 samples" in (text := logged(capsys))
    assert "40" in text
    assert "trained twice" in text
    start(make, loader(8, shuffle=False), None, **logging)
    text = logged(capsys)
    assert "RandomSampler" in text
    assert "SequentialSampler" in text
    assert "trained twice" in text


class Pairs(BatchSampler):
    """Batches of its own making."""

    def __init__(self, sampler: Any, size: int) -> None:
        super().__init__(sampler, size, False)

    def __iter__(self) -> Iterator[list[int]]:
        yield from list(super().__iter__())


class Stream(IterableDataset[Any]):
    def __init__(self, count: int = 32) -> None:
        self.count = count

    def __iter__(self) -> Iterator[Any]:
        yield from (numbered(self.count)[i] for i in range(self.count))


def batches(size: int) -> list[Any]:
    inputs, labels = numbered(32).tensors
    return [(inputs[i : i + size], labels[i : i + size]) for i in range(0, 32, size)]


class Loader:
    """A dataloader of the user's own."""

    def __init__(self, size: int) -> None:
        self.batches = batches(size)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


@pytest.mark.parametrize("plugins", [["seed"], []], ids=["seed", "no seed"])
@pytest.mark.parametrize(
    "build",
    [
        lambda size: DataLoader(
            numbered(32), batch_sampler=Pairs(SequentialSampler(range(32)), size)
        ),
        Loader,
    ],
    ids=["a batch sampler", "a dataloader"],
)
def test_unknown_batches_are_warned_about(
    make: MakeRunner, plugins: Any, build: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    _, first = start(make, build(8), 3, plugins=plugins)
    capsys.readouterr()
    options: Any = dict(plugins=[*plugins, "logging"], state=first.state_dict())
    start(make, build(16), None, **options)
    text = logged(capsys)
    assert "after 3 of 4 batches" in text
    assert "trained twice" in text
    two, _ = start(make, build(8), None, **options)
    assert "trained twice" not in logged(capsys)
    assert [len(batch) for batch in two.epochs[0]] == [8]


class Batches(BatchSampler):
    """Batches of given sizes, from samples in a given order."""

    def __init__(self, sizes: list[int], order: list[int] | None = None) -> None:
        super().__init__(range(sum(sizes)), 1, False)
        self.sizes, self.order = sizes, order or [*range(sum(sizes))]

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[list[int]]:
        order = iter(self.order)
        for size in self.sizes:
            yield [next(order) for _ in range(size)]


def own(sizes: list[int], order: list[int] | None = None) -> Any:
    return DataLoader(numbered(sum(sizes)), batch_sampler=Batches(sizes, order))


class Buckets(Sampler[int]):
    """Batches of one size in an order that depends on a seed."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __len__(self) -> int:
        return 20

    def __iter__(self) -> Iterator[int]:
        yield from torch.randperm(20, generator=torch.Generator().manual_seed(self.seed)).tolist()


def buckets(seed: int) -> Any:
    return DataLoader(numbered(20), batch_size=4, sampler=Buckets(seed))


class Batched(IterableDataset[Any]):
    """A stream that makes its batches."""

    def __init__(self, sizes: list[int]) -> None:
        self.sizes = sizes

    def __iter__(self) -> Iterator[Any]:
        inputs, labels = numbered(sum(self.sizes)).tensors
        yield from zip(inputs.split(self.sizes), labels.split(self.sizes), strict=True)


def batched(sizes: list[int]) -> Any:
    return DataLoader(Batched(sizes), batch_size=None)


SIZES = [4, 2, 6, 3, 5]


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (own(SIZES), own([1, 1, 1, 8, 9]), "hold 3 samples here, 12 in the checkpoint"),
        (own(SIZES), own(SIZES, [*range(19, -1, -1)]), "hold other samples here"),
        (own(SIZES), own([2, 4, 6, 5, 3]), ""),  # the same samples in batches of other sizes
        (own(SIZES), own(SIZES), ""),
        (buckets(1), buckets(2), "hold other samples here"),
        (buckets(1), buckets(1), ""),
        (batched(SIZES), batched([1, 1, 1, 8, 9]), "hold 3 samples here, 12 in the checkpoint"),
        (batched(SIZES), batched(SIZES), ""),
    ],
)
def test_as_many_batches_of_other_samples_are_warned_about(
    make: MakeRunner, before: Any, after: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    one, first = start(make, before, 3)
    capsys.readouterr()
    second = make(train_dataloader=after, plugins=["seed", "logging", seen := Seen()])
    second.load_state_dict(first.state_dict(), allow=["dataset", "logging"])
    again = second.state_dict()["meta"]["position"]["used"]
    assert again == first.state_dict()["meta"]["position"]["used"]  # also before the pass begins
    second.train()
    text = logged(capsys)
    assert ("trained twice" in text) is bool(message)
    assert message in text
    assert sorted(samples(one, seen)) == [*range(20)] or message


class Opaque:
    """A batch that only the model can count."""

    def __init__(self, data: Any) -> None:
        self.data = data


class Counting(BaseModel):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, batch: Opaque, mode: str) -> Any:
        return {"loss": (batch.data * self.weight).mean()}

    def _run_forward(self, data: Any, mode: str) -> Any:
        return self(data, mode)

    def count_samples(self, batch: Opaque) -> int:
        return len(batch.data)


def test_the_model_counts_the_samples_of_a_list_of_batches(make: MakeRunner) -> None:
    def run(sizes: list[int], stop_at: int | None, state: Any = None) -> list[int]:
        data = torch.arange(20.0)[:, None].split(sizes)
        runner = make(
            model=Counting(), train_dataloader=[*map(Opaque, data)], train_cfg=dict(max_epochs=1)
        )
        trained: list[int] = []

        @runner.on("before_train_iter")
        def see(runner: Any, data_batch: Any) -> None:
            trained.extend(data_batch.data[:, 0].int().tolist())
            if runner.progress.iter + 1 == stop_at:
                runner.stop("enough")

        if state is not None:
            runner.load_state_dict(state, allow=["dataset"])
        runner.train()
        states.append(runner.state_dict())
        return trained

    states: list[Any] = []
    one = run(SIZES, 3)
    assert sorted(one + run([4, 8, 4, 2, 2], None, states[0])) == [*range(20)]


@pytest.mark.parametrize("plugins", [["seed"], []], ids=["seed", "no seed"])
@pytest.mark.parametrize("build", [batches, lambda n: DataLoader(Stream(), n)], ids=["list", "it"])
def test_batches_that_cannot_be_cut(
    make: MakeRunner, plugins: Any, build: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = dict(max_epochs=2)
    one, first = start(make, build(8), 3, plugins=plugins, train_cfg=cfg)
    state = first.state_dict()
    capsys.readouterr()
    two, _ = start(make, build(16), None, plugins=[*plugins, "logging"], state=state)
    text = logged(capsys)
    assert "The first 8 samples of batch 2" in text
    assert "second time" in text
    assert Counter(Counter(samples(one, two)).values()) == {1: 24, 2: 8}
    two, _ = start(make, build(4), None, plugins=[*plugins, "logging"], state=state)
    assert "second time" not in logged(capsys)
    assert sorted(samples(one, two)) == [*range(32)]


def test_single_samples(make: MakeRunner) -> None:
    def single() -> Any:
        sampler = RandomSampler(range(32))
        return DataLoader(numbered(32), batch_size=None, sampler=sampler, collate_fn=whole)

    def whole(sample: Any) -> Any:
        return [part[None] for part in sample]

    one, first = start(make, loader(8), 3)
    two, second = start(make, single(), 30, state=first.state_dict())
    assert len(two.epochs[0]) == 8
    assert sorted(samples(one, two)) == [*range(32)]
    three, _ = start(make, loader(8), None, state=second.state_dict())
    assert sorted(samples(two, three, epoch=1)) == [*range(32)]


def test_a_wrapper_without_seek(make: MakeRunner) -> None:
    class Wrapper:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def __len__(self) -> int:
            return len(self.inner)

        def __iter__(self) -> Iterator[Any]:
            return iter(self.inner)

    class Ahead(Plugin):
        def setup_dataloader(self, dataloader: Any) -> Any:
            return Wrapper(dataloader)

    _, first = start(make, loader(8), 3, plugins=["seed", Ahead()])
    two, _ = start(make, loader(8), None, plugins=["seed", Ahead()], state=first.state_dict())
    assert len(two.epochs[0]) == 1


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # in torchdata
def test_a_dataloader_with_its_own_state(make: MakeRunner) -> None:
    stateful = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader

    def build(size: int, count: int = 40) -> Any:
        torch.manual_seed(5)
        return stateful(numbered(count), batch_size=size, shuffle=True)

    for before, after, stop_at in [(8, 16, 1), (8, 16, 3), (16, 8, 1), (8, 5, 3), (4, 16, 1)]:
        one, first = start(make, build(before), stop_at, train_cfg=dict(max_epochs=1))
        state, ranks = first.state_dict(), first.plugins.rank_state_dict()
        seen = Seen()
        second = make(
            train_dataloader=build(after), plugins=["seed", seen], train_cfg=dict(max_epochs=1)
        )
        second.load_state_dict(state, allow=["dataset"])
        second.plugins.load_rank_state_dict(ranks)
        again, kept = second.state_dict(), second.plugins.rank_state_dict()
        second.train()
        assert sorted(samples(one, seen)) == [*range(40)]
        assert [last for *_, last in seen.counters] == [False] * (len(seen.counters) - 1) + [True]

        three = Seen()  # from the state that was saved before the first batch
        third = make(
            train_dataloader=build(after), plugins=["seed", three], train_cfg=dict(max_epochs=1)
        )
        third.load_state_dict(again)
        third.plugins.load_rank_state_dict(kept)
        third.train()
        assert three.epochs == seen.epochs


def test_a_checkpoint_on_the_disk(make: MakeRunner, tmp_path: Path) -> None:
    allow = dict(type="checkpoint", allow=["dataset"])
    one, first = start(make, loader(8), 3, plugins=["seed", "checkpoint"], name="run")
    first.close()
    seen = Seen()
    second = make(
        train_dataloader=loader(16), plugins=["seed", allow, seen], name="run", resume="auto"
    )
    second.train()
    assert sorted(samples(one, seen)) == [*range(32)]


def test_an_old_checkpoint_without_a_position(make: MakeRunner) -> None:
    _, first = start(make, loader(8), 3)
    state = first.state_dict()
    del state["meta"]["position"]
    two, _ = start(make, loader(8), None, state=state)
    assert [len(batch) for batch in two.epochs[0]] == [8]

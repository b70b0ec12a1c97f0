"""One seed: the order of samples, augmentation in workers, and what is repeated after a resume."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
    get_worker_info,
)

from hookengine import Plugin, hookimpl
from tests.fixtures import MakeData, MakeRunner, Toy


class Noisy(Dataset[Any]):
    """Augments from all three random states; keeps which indices were read."""

    def __init__(self, samples: int = 20) -> None:
        self.samples = samples
        self.read: list[int] = []
        self.bias = 0.0

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.read.append(index)
        draws = torch.tensor([torch.rand(()), random.random(), np.random.rand(), self.bias])
        return draws.float(), torch.tensor(int(index) % 3)


class Stream(IterableDataset[Any]):
    """Shuffles, and augments, at random; its workers share the samples out."""

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for index in torch.randperm(20).tolist()[first::step]:
            yield torch.rand(4), torch.tensor(index % 3)

    def __len__(self) -> int:
        return 20


class Batches(Plugin):
    """Keeps the batches."""

    def __post_init__(self) -> None:
        self.seen: list[Any] = []

    def before_train_iter(self, data_batch: Any) -> None:
        self.seen.append([part.clone() for part in data_batch])


def train(make: MakeRunner, loader: Any, *plugins: Any, seed: int = 3, **options: Any) -> list[Any]:
    """The batches that a run trains on."""
    batches = Batches()
    seeded = {"type": "seed", "seed": seed, **options.pop("seed_options", {})}
    runner = make(train_dataloader=loader, plugins=[seeded, batches, *plugins], **options)
    runner.train()
    return batches.seen


def same(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a, b)
        for x, y in zip(one, other, strict=True)
        for a, b in zip(x, y, strict=True)
    )


def test_the_order_is_a_function_of_seed_and_epoch(make: MakeRunner, data: MakeData) -> None:
    def loader() -> Any:
        return DataLoader(data(), batch_size=4, shuffle=True)

    first = train(make, loader())
    torch.rand(7), random.random()  # what was drawn before is no matter
    assert same(first, train(make, loader()))
    assert not same(first, train(make, loader(), seed=4))
    assert not same(first[:5], first[5:])

    runner = make(train_dataloader=loader(), plugins=[dict(type="seed", seed=3)])
    wrapped = runner.train_loop.dataloader
    wrapped.seek(1, 0)
    assert same([list(batch) for batch in wrapped], first[5:])


def test_a_pass_from_a_later_batch_on_loads_nothing_before(make: MakeRunner) -> None:
    dataset = Noisy()
    loader = DataLoader(dataset, batch_size=4, shuffle=True)
    runner = make(train_dataloader=loader, plugins=[dict(type="seed", seed=3)])
    wrapped: Any = runner.train_loop.dataloader
    wrapped.seek(0, 0)
    list(wrapped)
    order, dataset.read = dataset.read, []
    wrapped.seek(0, 3)
    assert len(list(wrapped)) == 2
    assert dataset.read == order[12:]
    assert len(wrapped) == 5


@pytest.mark.process
@pytest.mark.parametrize("kind", ["batches", "single samples", "a subset"])
def test_augmentation_does_not_depend_on_the_number_of_workers(make: MakeRunner, kind: str) -> None:
    def loader(workers: int) -> Any:
        dataset: Any = Noisy()
        if kind == "a subset":
            dataset = Subset(dataset, range(18))
        size = None if kind == "single samples" else 4
        return DataLoader(dataset, batch_size=size, shuffle=True, num_workers=workers)

    def batches(workers: int, **options: Any) -> list[Any]:
        limit: dict[str, Any] = dict(train_cfg=dict(max_iters=8))
        collate = loader(workers)
        if kind == "single samples":
            collate.collate_fn = lambda sample: [part[None] for part in sample]
        return train(make, collate, **limit, **options)

    expected = batches(1)
    assert same(expected, batches(2))
    in_process = batches(0, seed_options=dict(per_sample=True))
    assert same(expected, in_process)
    draws = torch.cat([batch[0].flatten() for batch in expected])
    assert len(draws.unique()) > 0.7 * len(draws)  # every sample has draws of its own


def test_a_seed_for_each_sample_leaves_the_main_process_alone(make: MakeRunner) -> None:
    def weights(**options: Any) -> Any:
        draws = []

        class Draws(Plugin):
            def after_train_iter(self) -> None:
                draws.append((random.random(), np.random.rand(), torch.rand(()).item()))

        loader = DataLoader(Noisy(), batch_size=4)
        train(make, loader, Draws(), seed_options=options)
        return draws

    once = weights(per_sample=True)
    assert len({*once}) == len(once)  # the same seed again and again would repeat them


@pytest.mark.process
def test_datasets_that_read_whole_batches_still_do(make: MakeRunner) -> None:
    class Columns(Noisy):
        calls = 0

        def __getitems__(self, indices: list[int]) -> list[Any]:
            type(self).calls += 1
            assert isinstance(indices, list)
            noise = torch.rand(len(indices), 4)
            return [(row, torch.tensor(i % 3)) for row, i in zip(noise, indices, strict=True)]

    expected = train(make, DataLoader(Columns(), batch_size=4, num_workers=1))
    assert same(expected, train(make, DataLoader(Columns(), batch_size=4, num_workers=2)))
    train(make, DataLoader(Columns(), batch_size=4), seed_options=dict(per_sample=True))
    assert Columns.calls == 10


@pytest.mark.process
@pytest.mark.parametrize("workers", [0, 1])
def test_a_resume_with_other_batches_repeats_the_augmentation(
    make: MakeRunner, workers: int
) -> None:
    def loader(size: int) -> Any:
        return DataLoader(Noisy(), batch_size=size, shuffle=True, num_workers=workers)

    seeded = dict(type="seed", seed=3, per_sample=True)
    expected = torch.cat([inputs for inputs, _ in train(make, loader(4), seed_options=seeded)])
    first = make(train_dataloader=loader(4), plugins=[seeded])
    first.on("safe_point")(lambda runner: runner.stop("enough", now=True))
    first.train()
    seen = Batches()
    second = make(train_dataloader=loader(6), plugins=[seeded, seen])
    second.load_state_dict(first.state_dict(), allow=["dataset"])
    second.train()
    assert [len(inputs) for inputs, _ in seen.seen] == [2, 6, 6, 2, 6, 6, 6, 2]
    assert torch.equal(torch.cat([inputs for inputs, _ in seen.seen]), expected[4:])


def show_worker(worker_id: int) -> None:
    info = get_worker_info()
    assert info is not None
    info.dataset.bias = 10.0 + info.num_workers  # type: ignore[attr-defined]


@pytest.mark.process
def test_a_loader_that_the_user_built_keeps_its_parts(make: MakeRunner) -> None:
    dataset = Noisy()
    sampler = SequentialSampler(dataset)

    def collate(samples: list[Any]) -> Any:
        return [torch.stack([s[0] for s in samples]) * 0 + 7, torch.stack([s[1] for s in samples])]

    loader = DataLoader(dataset, 4, sampler=sampler, collate_fn=collate)
    batches = train(make, loader)
    assert torch.equal(batches[0][0], torch.full((4, 4), 7.0))
    assert dataset.read[:20] == [*range(20)]

    runner = make(train_dataloader=loader, plugins=["seed"])
    wrapped = runner.train_loop.dataloader
    assert wrapped.dataset is dataset
    assert wrapped.sampler is sampler
    assert wrapped.batch_size == 4

    told = DataLoader(Noisy(), 4, num_workers=2, worker_init_fn=show_worker)
    assert all((batch[0][:, 3] == 12).all() for batch in train(make, told))


def test_without_a_generator_of_its_own_the_order_is_torchs(
    make: MakeRunner, data: MakeData
) -> None:
    """With one, it is the very order of a plain loop over the same loader."""

    def loader() -> Any:
        own = torch.Generator().manual_seed(11)
        return DataLoader(data(), batch_size=4, shuffle=True, generator=own)

    plain = loader()
    expected = [batch for _ in range(2) for batch in plain]
    assert same(train(make, loader()), expected)


def generator_of_my_own() -> torch.Generator:
    return torch.Generator().manual_seed(5)


class Shuffled(Sampler[int]):
    """Draws from the global state when it begins."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        order = [*range(self.size)]
        random.shuffle(order)
        yield from order


class ByEpoch(Shuffled):
    """Told the epoch, as DistributedSampler is."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        yield from np.random.default_rng(self.epoch).permutation(self.size).tolist()


def stateful(**options: Any) -> Any:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchdata.stateful_dataloader import StatefulDataLoader

        data = TensorDataset(torch.randn(20, 4), torch.arange(20) % 3)
        return StatefulDataLoader(data, **options)


LOADERS: dict[str, Callable[[], Any]] = {
    "shuffled": lambda: DataLoader(Noisy(), 4, shuffle=True),
    "two workers": lambda: DataLoader(Noisy(), 4, shuffle=True, num_workers=2),
    "workers that persist": lambda: DataLoader(
        Noisy(), 4, shuffle=True, num_workers=2, persistent_workers=True
    ),
    "a generator": lambda: DataLoader(
        Noisy(), 4, shuffle=True, generator=generator_of_my_own(), num_workers=1
    ),
    "a generator, workers that persist": lambda: DataLoader(
        Noisy(),
        4,
        shuffle=True,
        generator=generator_of_my_own(),
        num_workers=1,
        persistent_workers=True,
    ),
    "with replacement": lambda: DataLoader(
        Noisy(), 4, sampler=RandomSampler(range(20), replacement=True, num_samples=18)
    ),
    "weighted": lambda: DataLoader(
        Noisy(), 4, sampler=WeightedRandomSampler([1.0] * 10 + [2.0] * 10, 19)
    ),
    "a sampler's own generator": lambda: DataLoader(
        Noisy(), 4, sampler=RandomSampler(range(20), generator=generator_of_my_own())
    ),
    "a sampler of the user's": lambda: DataLoader(Noisy(), 4, sampler=Shuffled(20)),
    "a sampler with set_epoch": lambda: DataLoader(Noisy(), 4, sampler=ByEpoch(20)),
    "a batch sampler": lambda: DataLoader(
        Noisy(), batch_sampler=BatchSampler(Shuffled(19), 4, drop_last=True), num_workers=1
    ),
    "an iterable dataset": lambda: DataLoader(Stream(), 4, num_workers=2),
    "an iterable dataset, workers that persist": lambda: DataLoader(
        Stream(), 4, num_workers=2, persistent_workers=True
    ),
    "stateful": lambda: stateful(batch_size=4, shuffle=True),
    "stateful, a worker": lambda: stateful(batch_size=4, shuffle=True, num_workers=1),
    "a list": lambda: [*DataLoader(TensorDataset(torch.randn(20, 4), torch.arange(20) % 3), 4)],
}


@pytest.mark.process
@pytest.mark.parametrize("name", LOADERS)
def test_cut_anywhere_the_batches_are_the_same(make: MakeRunner, name: str, tmp_path: Path) -> None:
    """Resumed from the checkpoint of any iteration, all later batches and weights are equal."""
    saving = dict(type="checkpoint", every="1 iterations", keep_last=None, asynchronous=False)
    torch.manual_seed(1)
    straight, cuts = Batches(), [0, 2, 4, 6]
    loader = LOADERS[name]()
    runner = make(
        train_dataloader=loader,
        plugins=[dict(type="seed", seed=9), saving, straight],
        name="straight",
        train_cfg=dict(max_epochs=3),
    )
    runner.train()
    runner.close()
    for cut in cuts:
        path = runner.run_dir / "checkpoints" / f"iter_{cut + 1}"
        torch.manual_seed(1)
        rest = Batches()
        resumed = make(
            train_dataloader=LOADERS[name](),
            plugins=[dict(type="seed", seed=9), "checkpoint", rest],
            resume=path,
            train_cfg=dict(max_epochs=3),
        )
        torch.rand(5), random.random(), np.random.rand()  # no matter
        resumed.train()
        resumed.close()
        assert same(rest.seen, straight.seen[cut + 1 :]), cut
        for key, value in runner.bare_model.state_dict().items():
            assert torch.equal(value, resumed.bare_model.state_dict()[key]), cut


def test_a_generator_that_training_and_validation_share(make: MakeRunner) -> None:
    def run(**options: Any) -> tuple[Any, list[Any]]:
        own, batches = generator_of_my_own(), Batches()
        runner = make(
            train_dataloader=DataLoader(Noisy(), 4, shuffle=True, generator=own),
            val_dataloader=DataLoader(Noisy(10), 4, shuffle=True, generator=own),
            validate=True,
            train_cfg=dict(max_iters=14, val_interval=2),
            plugins=[dict(type="checkpoint", every=3, keep_last=None), "seed", batches],
            **options,
        )
        runner.train()
        return runner, batches.seen

    straight, expected = run()
    for cut in (3, 6, 9):
        _, rest = run(resume=straight.run_dir / "checkpoints" / f"iter_{cut}")
        assert same(rest, expected[cut:]), cut


def test_with_a_seed_everything_is_seeded_before_the_model_is_built(
    make: MakeRunner, toy: type[Toy]
) -> None:
    draws = []

    def build() -> Any:
        draws.append((random.random(), np.random.rand(), torch.rand(()).item()))
        return toy()

    for seed in (5, 5, 6):
        make(model=build, plugins=[dict(type="seed", seed=seed)])
    assert draws[0] == draws[1] != draws[2]
    random.seed(5)
    assert draws[0][0] == random.random()


def test_without_one_torchs_is_used_and_nothing_is_seeded(make: MakeRunner) -> None:
    random.seed(1)
    expected = random.random()
    random.seed(1)
    runner = make(plugins=["seed"])  # which calls torch.manual_seed(0)
    assert runner.plugins["seed"].value == 0
    assert random.random() == expected
    assert torch.initial_seed() == 0


@pytest.mark.process
def test_validation_sees_the_same_each_time(make: MakeRunner) -> None:
    seen: list[Any] = []

    class Watch(Plugin):
        def before_val_iter(self, data_batch: Any) -> None:
            seen.append(data_batch)

    loader = DataLoader(Noisy(10), 4, shuffle=True, num_workers=1)
    make(validate=True, val_dataloader=loader, plugins=["seed", Watch()]).train()
    assert same(seen[:3], seen[3:])


def test_deterministic_algorithms_are_switched_on_and_back(make: MakeRunner) -> None:
    before = torch.get_deterministic_debug_mode()
    runner = make(plugins=[dict(type="seed", deterministic=True)])
    assert torch.are_deterministic_algorithms_enabled()
    runner.close()
    assert torch.get_deterministic_debug_mode() == before
    runner = make(plugins=[dict(type="seed", deterministic="warn")])
    assert torch.get_deterministic_debug_mode() == 1
    runner.close()


def test_another_seed_than_that_of_the_state_is_refused(make: MakeRunner) -> None:
    state = make(plugins=[dict(type="seed", seed=1)]).state_dict()
    with pytest.raises(ValueError, match="trained with seed 1, but this run has seed=2"):
        make(plugins=[dict(type="seed", seed=2)]).load_state_dict(state)
    runner = make(plugins=["seed"])
    runner.load_state_dict(state)
    assert runner.plugins["seed"].value == 1


@pytest.mark.process
@pytest.mark.parametrize(
    ("loader", "said"),
    [
        (lambda: DataLoader(Stream(), 4), "with num_workers=1 it does"),
        (LOADERS["a sampler of the user's"], "a resume repeats the order of Shuffled only if"),
        (LOADERS["stateful, a worker"], "does not include the random states of its workers"),
        (
            lambda: stateful(batch_size=4, generator=generator_of_my_own()),
            "later epochs get a different order",
        ),
        (lambda: (batch for batch in LOADERS["a list"]()), "generator is left unchanged"),
    ],
)
def test_what_cannot_be_exact_is_said(
    make: MakeRunner, loader: Any, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = dict(plugins=["seed", "logging"], train_cfg=dict(max_iters=3))
    make(train_dataloader=loader(), **options).train()
    assert said in capsys.readouterr().out
    make(train_dataloader=LOADERS["two workers"](), **options).train()
    assert "train_dataloader" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(seed=-1), "seed=-1"),
        (dict(seed="zero"), "seed='zero'"),
        (dict(deterministic="always"), "deterministic.*'always'"),
    ],
)
def test_bad_options_are_refused(make: MakeRunner, options: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        make(plugins=[dict(type="seed", **options)])


def test_a_wrapper_without_seek_gets_another_order_each_epoch(make: MakeRunner) -> None:
    class Wrapping(Plugin):
        def setup_dataloader(self, dataloader: Any) -> Any:
            class Wrapper:
                def __len__(self) -> int:
                    return len(dataloader)

                def __iter__(self) -> Iterator[Any]:
                    yield from dataloader

            return Wrapper()

    def loader() -> Any:
        return DataLoader(
            TensorDataset(torch.arange(20)[:, None] + torch.zeros(4), torch.arange(20) % 3),
            4,
            shuffle=True,
        )

    plain = train(make, loader())
    assert same(plain, train(make, loader(), Wrapping()))


@pytest.mark.process
def test_a_pass_by_hand_leaves_the_running_one_as_it_is(make: MakeRunner) -> None:
    def run(by_hand: bool, **options: Any) -> tuple[Any, list[Any]]:
        batches = Batches()
        runner = make(
            train_dataloader=DataLoader(
                Noisy(), 4, shuffle=True, generator=generator_of_my_own(), num_workers=1
            ),
            plugins=[
                dict(type="checkpoint", every="1 iterations", keep_last=None),
                "seed",
                batches,
            ],
            **options,
        )

        @runner.on("after_train_iter")
        def look(runner: Any) -> None:
            if by_hand and runner.progress.iter == 2:
                list(runner.train_loop.dataloader)

        runner.train()
        return runner, batches.seen

    straight, expected = run(True)
    _, rest = run(False, resume=straight.run_dir / "checkpoints" / "iter_3")
    assert same(rest[:2], expected[3:5])


class Ticking(DataLoader[Any]):
    """Asks its dataset for something when a pass begins."""

    def __len__(self) -> int:
        return len(self.batch_sampler.sampler) // 4

    @property
    def ticked(self) -> int:
        return int(self.dataset.samples)  # type: ignore[attr-defined]


class Endless(DataLoader[Any]):
    """Keeps one iterator for ever."""

    def __iter__(self) -> Any:
        return iter([*super().__iter__()])


@pytest.mark.process
@pytest.mark.parametrize(
    "loader",
    [
        lambda: DataLoader(Noisy(), 4, sampler=np.random.permutation(20)),
        lambda: DataLoader(Noisy(), 4, sampler=torch.randperm(20)),
        lambda: DataLoader(Noisy(), batch_sampler=[iter([0, 1]), iter([2, 3])], num_workers=1),  # type: ignore[list-item]
        lambda: DataLoader(Noisy(), batch_sampler=[torch.arange(4)] * 5, num_workers=1),  # type: ignore[list-item]
        lambda: Ticking(Noisy(), 4, num_workers=1),
        lambda: Endless(Noisy(), 4, num_workers=1),
        lambda: DataLoader(Noisy(), 4, num_workers=1, multiprocessing_context="spawn"),
    ],
    ids=["numpy", "a tensor", "iterators", "tensors", "a subclass", "its own __iter__", "spawned"],
)
def test_what_torch_takes_is_taken(make: MakeRunner, loader: Any) -> None:
    assert len(train(make, loader(), train_cfg=dict(max_iters=2))) == 2


@pytest.mark.parametrize("event", ["before_train", "before_train_epoch", "safe_point"])
def test_a_hook_that_draws_last_of_all_does_not_change_what_a_resume_repeats(
    make: MakeRunner, event: str
) -> None:
    class Draws(Plugin):
        def __post_init__(self) -> None:
            self.drawn: list[float] = []

    def draw(self: Any) -> None:
        self.drawn.append(torch.rand(()).item())

    setattr(Draws, event, hookimpl(trylast=True)(draw))

    def add_noise(runner: Any, optim_wrapper: Any) -> None:
        for parameter in optim_wrapper.parameters():
            parameter.grad.add_(torch.randn_like(parameter))

    def run(stop: int | None, resume: bool) -> Any:
        saving = dict(type="checkpoint", every="1 iterations")
        runner = make(
            plugins=["seed", Draws(), saving], name="run", resume="auto" if resume else None
        )
        runner.on("before_optim_step")(add_noise)
        if stop is not None:
            runner.on("after_train_iter", every=stop, once=True)(lambda: runner.stop())
        runner.train()
        runner.close()
        return runner.bare_model.net.weight.clone()

    whole = run(None, resume=False)
    shutil.rmtree(make().work_dir)
    for stop in (3, 5):
        run(stop, resume=False)
        assert torch.equal(run(None, resume=True), whole), stop
        shutil.rmtree(make().work_dir)

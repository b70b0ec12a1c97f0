"""What is changed in a dataloader so that its workers leave signals to the main process."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Iterator
from multiprocessing import context
from typing import Any

import pytest
from hookengine_checkpoint.workers import LeaveSignals, protected
from torch.utils.data import DataLoader

from tests.fixtures import MakeData, MakeRunner


def init(worker_id: int) -> None: ...


class OwnIter(DataLoader[Any]):
    def __iter__(self) -> Any:
        yield from super().__iter__()


class OwnContext(context.SpawnContext):
    """A context of the user's."""


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_a_copy_gets_what_its_workers_need(data: MakeData, method: str) -> None:
    loader: Any = DataLoader(
        data(), 4, num_workers=2, multiprocessing_context=method, worker_init_fn=init
    )
    given = loader.multiprocessing_context
    changed, restore = protected(loader)
    assert restore is None
    assert (loader.multiprocessing_context, loader.worker_init_fn) == (given, init)
    assert changed.dataset is loader.dataset
    assert isinstance(changed.worker_init_fn, LeaveSignals)
    assert changed.worker_init_fn.worker_init_fn is init
    assert changed.multiprocessing_context.get_start_method() == method
    assert (changed.multiprocessing_context is given) == (method == "fork")
    again, _ = protected(changed)  # of another Runner
    assert again.worker_init_fn.worker_init_fn is init
    assert again.multiprocessing_context.get_start_method() == method


def test_the_default_way_to_start_counts(data: MakeData, monkeypatch: pytest.MonkeyPatch) -> None:
    loader: Any = DataLoader(data(), 4, num_workers=1)
    default: Any = multiprocessing.get_context("forkserver")
    monkeypatch.setattr(multiprocessing, "get_start_method", default.get_start_method)
    changed: Any = protected(loader)[0]
    assert changed.multiprocessing_context.get_start_method() == "forkserver"
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda allow_none: None)
    first = multiprocessing.get_all_start_methods()[0]
    own: Any = protected(loader)[0].multiprocessing_context
    assert (own is None) == (first == "fork")


def test_a_dataloader_with_its_own_iter_is_changed_until_the_runner_closes(
    make: MakeRunner, data: MakeData
) -> None:
    loader: Any = OwnIter(
        data(), 4, num_workers=1, multiprocessing_context="spawn", worker_init_fn=init
    )
    given = loader.multiprocessing_context
    runner = make(train_dataloader=loader, plugins=["checkpoint"])
    used: Any = runner.dataloaders["train"]
    assert used is loader
    assert loader.worker_init_fn.worker_init_fn is init
    assert loader.multiprocessing_context is not given
    runner.close()
    assert (loader.multiprocessing_context, loader.worker_init_fn) == (given, init)


def test_what_is_left_alone(make: MakeRunner, data: MakeData) -> None:
    def batches() -> Iterator[Any]:
        yield from ()

    loader: Any
    for loader in ([1, 2], batches(), DataLoader(data(), 4)):
        assert protected(loader) == (loader, None)
    loader = DataLoader(data(), 4, num_workers=1, multiprocessing_context=OwnContext())
    changed: Any = protected(loader)[0]
    assert type(changed.multiprocessing_context) is OwnContext
    spawning = DataLoader(data(), 4, num_workers=1, multiprocessing_context="spawn")
    runner = make(train_dataloader=spawning, plugins=[dict(type="checkpoint", signals=[])])
    assert runner.dataloaders["train"] is spawning


def test_a_worker_keeps_the_handlers_of_the_users_code() -> None:
    def mine(number: int, frame: object) -> None: ...

    numbers = (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}
    order: list[Any] = []
    try:
        signal.signal(signal.SIGUSR1, mine)
        signal.signal(signal.SIGUSR2, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
        LeaveSignals(order.append)(3)
        assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & {*numbers}
        assert order == [3]
        assert signal.getsignal(signal.SIGUSR1) is mine
        assert signal.getsignal(signal.SIGUSR2) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        assert callable(signal.getsignal(signal.SIGTERM))
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
        for number, handler in before.items():
            signal.signal(number, handler)

"""What does not fit: named by the rank that sees it first, and every rank ends."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hookengine_checkpoint import Checkpoint
from hookengine_distributed import Distributed
from hookengine_distributed.sameness import described
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import BatchSampler, DataLoader, TensorDataset

from hookengine import BaseModel, Runner, dist
from hookengine.model import MMDistributedDataParallel
from tests.fixtures import MakeRunner
from tests.ranks import on_ranks


class Net(BaseModel):
    def __init__(self, hidden: int = 4) -> None:
        super().__init__()
        self.first = nn.Linear(4, hidden)
        self.second = nn.Linear(hidden, 3)
        self.unused = nn.Linear(2, 2)

    def forward(self, inputs: Tensor, labels: Tensor, mode: str = "tensor") -> Any:
        scores = self.second(self.first(inputs))
        return {"loss": F.cross_entropy(scores, labels)} if mode == "loss" else scores


class Used(Net):
    def forward(self, inputs: Tensor, labels: Tensor, mode: str = "tensor") -> Any:
        scores = self.second(self.first(inputs))
        loss = F.cross_entropy(scores, labels) + 0 * self.unused(inputs[:, :2]).sum()
        return {"loss": loss} if mode == "loss" else scores


class LazyHead(Used):
    """A buffer without a shape, of which DistributedDataParallel knows nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.lazy = nn.LazyBatchNorm1d(affine=False)


class OnOneRank(Used):
    """A branch that the first rank alone takes."""

    def forward(self, inputs: Tensor, labels: Tensor, mode: str = "tensor") -> Any:
        step = Used.forward if dist.get_rank() == 0 else Net.forward
        return step(self, inputs, labels, mode)


class NoGradient(Used):
    """A loss that the second rank has detached."""

    def forward(self, inputs: Tensor, labels: Tensor, mode: str = "tensor") -> Any:
        out = super().forward(inputs, labels, mode)
        return {"loss": out["loss"].detach()} if dist.get_rank() == 1 else out


class FrozenLater(Used):
    def train_step(self, data: Any, optim_wrapper: Any) -> dict[str, Tensor]:
        if optim_wrapper.steps == 1:
            self.unused.requires_grad_(False)
        return super().train_step(data, optim_wrapper)


class PastTheWrapper(Used):
    def train_step(self, data: Any, optim_wrapper: Any) -> dict[str, Tensor]:
        inputs, labels = self.data_preprocessor(data, True)
        losses = self.forward(inputs, labels, mode="loss")
        loss, log = self.parse_losses(losses)
        optim_wrapper.update_params(loss)
        return log


def samples(count: int) -> TensorDataset:
    return TensorDataset(torch.ones(count, 4), torch.zeros(count, dtype=torch.long))


def on_second(value: Any, otherwise: Any) -> Any:
    """``value`` on rank 1, ``otherwise`` on rank 0."""
    return value if int(os.environ["RANK"]) else otherwise


def loader(count: int = 16, **options: Any) -> DataLoader[Any]:
    return DataLoader(samples(count), **{"batch_size": 4, **options})


Case = tuple[Callable[[], dict[str, Any]], str]
SAME: dict[str, Case] = {
    "options": (
        lambda: dict(plugins=[dict(type="clip", max_norm=on_second(2.0, 1.0))]),
        r"the ranks differ in their options: the plugin 'clip' is .*1.0.* on rank 0 and .*2.0.* on "
        "rank 1",
    ),
    "plugins": (
        lambda: dict(plugins=on_second(["amp"], [])),
        r"the plugin 'amp' is missing on rank 0 and .* on rank 1",
    ),
    "train_cfg": (
        lambda: dict(train_cfg=dict(max_epochs=on_second(2, 1))),
        r"train_cfg is TrainCfg\(.*max_epochs=1.* on rank 0 and TrainCfg\(.*max_epochs=2",
    ),
    "optimizer": (
        lambda: dict(optim_wrapper=dict(optimizer=dict(type="SGD", lr=on_second(0.2, 0.1)))),
        r"differ in their optimizer 'optimizer': lr of group 0 is 0.1 on rank 0 and 0.2 on rank 1",
    ),
    "too large batches": (
        lambda: dict(train_dataloader=loader(16, batch_size=10, drop_last=True)),
        r"16 samples to train on are too few for 2 ranks with batches of 10 and drop_last=True",
    ),
    "several optimizers": (
        lambda: dict(
            plugins=[dict(type="distributed", strategy="fsdp")],
            optim_wrapper={
                n: dict(optimizer=dict(type="SGD", lr=0.1)) for n in ("first", "second")
            },
        ),
        r"several optimizers train parts of it. Use strategy='ddp'",
    ),
    "dataset": (
        lambda: dict(train_dataloader=loader(on_second(19, 16))),
        r"the ranks differ in their train_dataloader: samples is 16 on rank 0 and 19 on rank 1",
    ),
    "evaluation": (
        lambda: on_second({}, dict(val_dataloader=loader(), val_cfg=dict(loss=True))),
        r"val_cfg is EvalCfg\(loss=True\) on rank 0 and None on rank 1",
    ),
    "model": (
        lambda: dict(model=Used(on_second(5, 4))),
        r"differ in their model: first.weight is \(4, 4\) .* on rank 0 and \(5, 4\)",
    ),
    "lazy": (
        lambda: dict(model=LazyHead()),
        r"distributed: lazy.running_mean has no shape yet.* Run one batch through the model before",
    ),
    "more ranks than samples": (
        lambda: dict(train_dataloader=loader(1)),
        r"1 samples to train on are too few for 2 ranks with batches of 4: .*Start fewer proc",
    ),
    "fewer batches than ranks": (
        lambda: dict(train_dataloader=[tuple(samples(2).tensors)]),
        r"there are 1 batches to train on for 2 ranks",
    ),
    "unequal batches": (
        lambda: dict(
            train_dataloader=loader(16, batch_size=on_second(2, 4)),
        ),
        r"train_dataloader has 2, 4 batches on the ranks, but all ranks must train on the same",
    ),
    "split": (
        lambda: dict(
            train_dataloader=loader(15, batch_size=5),
            plugins=[dict(type="distributed", split_batches=True)],
        ),
        r"a batch of 5 samples cannot be split over 2 ranks: use a multiple of 2",
    ),
    "split of one's own batches": (
        lambda: dict(
            train_dataloader=DataLoader(
                samples(16), batch_sampler=list(BatchSampler(range(16), 4, False))
            ),
            plugins=[dict(type="distributed", split_batches=True)],
        ),
        r"but this dataloader has its own batch_sampler",
    ),
    "unused": (
        lambda: dict(model=Net()),
        r"2 parameters got no gradient on rank \d, .* wait: unused.weight, unused.bias. Make",
    ),
    "past the wrapper": (
        lambda: dict(model=PastTheWrapper()),
        r"the train_step of PastTheWrapper never called self\(...\) with gradients",
    ),
    "wrapper": (
        lambda: dict(plugins=[dict(type="distributed", options=dict(find_unused=True))]),
        r"unexpected keyword argument 'find_unused'",
    ),
    "wrapped": (
        lambda: dict(model=MMDistributedDataParallel(Used())),
        r"the model is already wrapped in MMDistributedDataParallel. Pass the model itself",
    ),
    "wrapped with a loss": (
        lambda: dict(model=DistributedDataParallel(nn.Linear(4, 1)), loss=F.mse_loss),
        r"the model is already wrapped in DistributedDataParallel. Pass the model itself",
    ),
    "foreign wrapper": (
        lambda: dict(plugins=[dict(type="distributed", wrapper="DistributedDataParallel")]),
        r"DistributedDataParallel has no train_step.*Derive it from MMDistributedDataParallel",
    ),
    "frozen later": (
        lambda: dict(model=FrozenLater()),
        r"2 parameters got no gradient on rank \d.*unused.weight, unused.bias.*for some epochs",
    ),
    "policy": (
        lambda: dict(
            plugins=[
                dict(type="distributed", strategy="fsdp", options=dict(auto_wrap_policy="Block"))
            ]
        ),
        r"the model has no part of class Block; it has .*Linear",
    ),
}


def outcome(folder: Path, options: dict[str, Any]) -> str:
    """The error that a rank ends with, and its notes."""
    try:
        with Runner(
            **{
                "model": Used(),
                "work_dir": folder,
                "train_dataloader": loader(),
                "train_cfg": dict(max_epochs=1),
                "optim_wrapper": dict(optimizer=dict(type="SGD", lr=0.1)),
                "device": "cpu",
                **options,
            }
        ) as runner:
            runner.train()
    except Exception as error:
        return " | ".join([f"{type(error).__name__}: {error}", *error.__notes__])
    return "trained"


def outcomes(folder: Path) -> dict[str, str]:
    return {name: outcome(folder, options()) for name, (options, _) in SAME.items()}


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    return on_ranks(2, outcomes, tmp_path_factory.mktemp("ranks"))


@pytest.mark.ranks
@pytest.mark.parametrize("name", SAME)
def test_what_all_ranks_see_is_the_same_error_on_all(both: list[dict[str, str]], name: str) -> None:
    for rank, ended in enumerate(both):
        assert re.search(SAME[name][1], ended[name]), ended[name]
        assert f"on rank {rank} of 2" in ended[name]


def test_options_that_are_sets_are_the_same_in_whatever_order() -> None:
    many = [f"plugin_{i}" for i in range(20)]
    assert described({"options": [{"b", "a"}]}) == described({"options": [["'a'", "'b'"]]})
    assert Checkpoint(allow=set(many)).allow == sorted(many)  # type: ignore[arg-type]


def go_on(folder: Path) -> list[str]:
    """Train again after an error that the script has caught."""
    ends = []
    runner = Runner(
        Used(),
        folder,
        train_dataloader=loader(),
        train_cfg=dict(max_epochs=1),
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.1)),
        device="cpu",
    )
    runner.on("after_train_iter")(lambda: 1 / 0)
    for _ in range(2):
        try:
            runner.train()
        except Exception as error:
            ends.append(f"{type(error).__name__}: {error}")
    return ends


@pytest.mark.ranks
def test_after_an_error_nothing_goes_on(tmp_path: Path) -> None:
    for ends in on_ranks(2, go_on, tmp_path):
        assert ends[0] == "ZeroDivisionError: division by zero"
        assert re.match(r"RankError: rank \d has already failed, .* Restart them all", ends[1])


def do_other_things(folder: Path) -> list[str]:
    """Ranks that call the Runner differently."""
    ends = []
    options: Any
    for options in (dict(), dict(val_dataloader=loader(), val_cfg=dict(loss=True))):
        runner = Runner(
            Used(),
            folder,
            train_dataloader=loader(),
            train_cfg=dict(max_epochs=1),
            optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.1)),
            device="cpu",
            **options,
        )
        try:
            if options and dist.get_rank() == 0:
                runner.val()
            else:
                runner.train(max_epochs=dist.get_rank() + 1)
        except ValueError as error:
            ends.append(str(error))
    return ends


@pytest.mark.ranks
def test_ranks_that_call_it_differently_are_told(tmp_path: Path) -> None:
    for ends in on_ranks(2, do_other_things, tmp_path):
        assert "differ in their training: max_epochs is 1 on rank 0 and 2 on rank 1" in ends[0]
        assert "rank 0 is at its validation, rank 1 at its training" in ends[1]


def no_gradient(folder: Path) -> str:
    return outcome(folder, dict(model=NoGradient()))


def unused_on_one(folder: Path) -> str:
    return outcome(folder, dict(model=OnOneRank()))


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("function", "message"),
    [
        (no_gradient, "ValueError: the loss does not require a gradient"),
        (unused_on_one, "RuntimeError: 2 parameters got no gradient on rank 1"),
    ],
)
def test_what_one_rank_sees_ends_the_other_with_it(
    tmp_path: Path, function: Any, message: str
) -> None:
    first, second = on_ranks(2, function, tmp_path)
    assert second.startswith(message)
    assert "another rank failed first" in first
    assert f"rank 1: {message}" in first


def test_a_missing_backend_names_those_that_are_there(
    make: MakeRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in dict(RANK=0, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=1).items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(ValueError, match=r"no backend 'mpi'; it has .*gloo"):
        make(plugins=[Distributed(backend="mpi")], device="cpu")
    monkeypatch.delenv("MASTER_PORT")
    with pytest.raises(ValueError, match=r"MASTER_PORT is not. Start the script with torchrun"):
        make(plugins=["distributed"], device="cpu")


def test_a_port_in_use_is_named_with_the_way_out(
    make: MakeRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        environment = dict(RANK=0, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        for name, value in environment.items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(RuntimeError, match="in use") as caught:
            make(plugins=["distributed"], device="cpu")
    assert any("torchrun --master-port PORT" in note for note in caught.value.__notes__)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(strategy="fsdp", wrapper="DataParallel"), "a strategy or a wrapper"),
        (dict(strategy="none", options=dict(a=1)), "wraps nothing"),
        (dict(strategy="zero"), "'ddp', 'fsdp' or 'none'"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        Distributed(**options)

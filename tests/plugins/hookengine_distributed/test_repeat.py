"""Two ranks repeat a step as one process does: DDP, FSDP, and a model that exchanges by itself."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as torch_dist
import torch.nn.functional as F
from hookengine_distributed.exchange import average_gradients
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from hookengine import BaseModel, Plugin, Runner, dist, hookimpl
from tests.ranks import on_ranks

pytestmark = pytest.mark.ranks


class Net(BaseModel):
    """A small classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).double()

    def forward(self, inputs: Tensor, labels: Tensor, mode: str = "tensor") -> Any:
        scores = self.net(inputs)
        return {"loss": F.cross_entropy(scores, labels)} if mode == "loss" else scores


class Exchanging(Net):
    """Exchanges the gradients itself, before a step."""

    def train_step(self, data: Any, optim_wrapper: Any) -> dict[str, Tensor]:
        with optim_wrapper.optim_context(self):
            loss = self(*self.data_preprocessor(data, True), mode="loss")["loss"]
        optim_wrapper.backward(loss)
        if optim_wrapper.will_step:
            for parameter in optim_wrapper.parameters() if dist.get_world_size() > 1 else ():
                torch_dist.all_reduce(parameter.grad.div_(dist.get_world_size()))
            optim_wrapper.step()
        return {"loss": loss.detach()}


class Two(BaseModel):
    """Two parts, each with an optimizer, trained in turn: as a GAN."""

    order: tuple[str, ...] = ("discriminator", "generator")
    toggles = False
    by_hand = False

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Linear(6, 6).double()
        self.discriminator = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)).double()

    def forward(self, inputs: Tensor, labels: Tensor, mode: str = "tensor") -> Any:
        return self.generator(inputs)

    def loss_of(self, part: str, real: Tensor) -> Tensor:
        if part == "generator":
            return F.softplus(-self.discriminator(self.generator(real))).mean()
        fake = self.discriminator(self.generator(real).detach())
        return F.softplus(fake).mean() + F.softplus(-self.discriminator(real)).mean()

    def train_step(self, data: Any, optim_wrapper: Any) -> dict[str, Tensor]:
        real, _ = self.data_preprocessor(data, True)
        for part in self.order:
            if self.toggles:
                self.discriminator.requires_grad_(part == "discriminator")
            if self.by_hand:
                optim_wrapper[part].backward(self.loss_of(part, real))
                optim_wrapper[part].step()
            else:
                with optim_wrapper[part].optim_context(self):
                    loss = self.loss_of(part, real)
                optim_wrapper[part].update_params(loss)
            if part == "generator" and not self.toggles:  # its loss has reached the other part
                optim_wrapper["discriminator"].zero_grad()
        return {}


class Toggling(Two):
    toggles = True


class GeneratorFirst(Two):
    order = ("generator", "discriminator")
    toggles = True


class TwoByHand(Two):
    by_hand = True


class Again(Plugin, name="again"):
    """Computes the gradients again a little uphill, as SAM does; compares those of the ranks."""

    optimizers: tuple[str, ...]

    def before_train(self) -> None:
        self.windows: dict[str, list[Any]] = {name: [] for name in self.optimizers}
        self.same = True

    @hookimpl(trylast=True)
    def before_train_iter(self, data_batch: Any) -> None:
        for window in self.windows.values():
            window.append(data_batch)

    @torch.no_grad()
    def before_optim_step(self, runner: Any, optim_wrapper: Any) -> None:
        window = self.windows.get(optim_wrapper.name)
        if window is None:
            return
        parameters = [p for p in optim_wrapper.parameters() if p.grad is not None]
        self._compare(parameters)
        before = [p.clone() for p in parameters]
        for parameter in parameters:
            assert parameter.grad is not None
            parameter.add_(parameter.grad, alpha=0.3)
        runner.repeat(*window)
        for parameter, value in zip(parameters, before, strict=True):
            parameter.copy_(value)
        self._compare(parameters)
        window.clear()
        runner.hooks.finish_gradients(runner, optim_wrapper)  # a second time changes nothing

    def _compare(self, parameters: list[Any]) -> None:
        own = [full(p.grad).clone() for p in parameters]
        first = [gradient.clone() for gradient in own]
        dist.broadcast_tensors(first)
        self.same &= all(map(torch.equal, own, first))


def full(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def samples(count: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(count, 6, generator=generator, dtype=torch.float64)
    return TensorDataset(inputs, torch.randint(3, (count,), generator=generator))


def unequal(rank: int | None) -> list[Any]:
    """Seven batches of 8 samples, of which rank 0 has 5 and rank 1 has 3."""
    data = samples(56)
    batches = [data[8 * i : 8 * i + 8] for i in range(7)]
    parts = {0: slice(0, 5), 1: slice(5, 8), None: slice(0, 8)}
    return [tuple(tensor[parts[rank]] for tensor in batch) for batch in batches]


SGD = dict(optimizer=dict(type="SGD", lr=0.2, momentum=0.9))
ACCUMULATE = dict(type="accumulate", steps=3)
BOTH: Any = dict(optim_wrapper=dict(generator=SGD, discriminator=SGD))


COMPILE = dict(type="compile", backend="eager")  # only on the ranks, to save time
COMPILE_PARTS = dict(COMPILE, modules=("generator", "discriminator"))


def kind(strategy: str, **options: Any) -> dict[str, Any]:
    return dict(type="distributed", strategy=strategy, options=options)


def compiled() -> Net:
    model = Net()
    if "RANK" in os.environ:
        model.compile(backend="eager")
    return model


CASES: dict[str, dict[str, Any]] = {
    "ddp": dict(),
    "ddp, accumulate": dict(plugins=[ACCUMULATE]),
    "ddp, unequal ranks": dict(plugins=[ACCUMULATE], unequal=True),
    "ddp, static graph": dict(plugins=[kind("ddp", static_graph=True), ACCUMULATE]),
    "ddp, unused": dict(plugins=[kind("ddp", find_unused_parameters=True)]),
    "ddp, compile": dict(plugins=[COMPILE]),
    "ddp, compiled before": dict(model=compiled),
    "ddp, closed by hand": dict(plugins=[ACCUMULATE], close=True),
    "fsdp": dict(plugins=[kind("fsdp")]),
    "fsdp, accumulate": dict(plugins=[kind("fsdp"), ACCUMULATE]),
    "fsdp, parts": dict(
        plugins=[
            kind("fsdp", auto_wrap_policy=["Linear"], sharding_strategy="SHARD_GRAD_OP"),
            ACCUMULATE,
        ]
    ),
    "fsdp, closed by hand": dict(plugins=[kind("fsdp"), ACCUMULATE], close=True),
    "none": dict(model=Exchanging, plugins=[kind("none")]),
    "none, accumulate": dict(model=Exchanging, plugins=[kind("none"), ACCUMULATE]),
}
for model in (Two, Toggling, GeneratorFirst, TwoByHand):
    for repeated in (["discriminator"], ["generator"], ["discriminator", "generator"]):
        CASES[f"{model.__name__}, {' and '.join(repeated)}"] = dict(
            BOTH, model=model, repeated=repeated
        )
for repeated in (["discriminator"], ["generator"]):
    CASES[f"Toggling, accumulate, {repeated[0]}"] = dict(
        BOTH,
        model=Toggling,
        repeated=repeated,
        plugins=[
            dict(type="accumulate", steps=3, optimizer="discriminator"),
            dict(type="accumulate", plugin_name="second", steps=2, optimizer="generator"),
        ],
    )
CASES["Toggling, compile"] = dict(
    CASES["Toggling, discriminator"],
    plugins=[COMPILE_PARTS],
)


def train(folder: Path) -> dict[str, Any]:
    """The weights that each case ends with, and whether the ranks' gradients were the same."""
    rank = int(os.environ["RANK"]) if "RANK" in os.environ else None
    ends: dict[str, Any] = {}
    monkeypatch = pytest.MonkeyPatch()
    for name, case in CASES.items():
        torch.manual_seed(0)
        again = Again(optimizers=tuple(case.get("repeated", ["optimizer"])))
        loader = DataLoader(samples(44), batch_size=8 if rank is None else 4)
        quiet = ["no:progress_bar", dict(type="logging", level="ERROR")]
        plugins = [p for p in case.get("plugins", ()) if rank is not None or p["type"] != "compile"]
        plugins += [again, *quiet]
        with Runner(
            case.get("model", Net)(),
            folder / name.replace(",", "").replace(" ", "_"),
            train_dataloader=unequal(rank) if case.get("unequal") else loader,
            train_cfg=dict(max_epochs=2),
            optim_wrapper=case.get("optim_wrapper", SGD),
            plugins=plugins,
            device="cpu",
        ) as runner:
            if case.get("close"):
                runner.on("after_train_iter")(close_at_the_fourth)
            buckets: list[int] = []
            averages: list[int] = []
            count_buckets(runner.model, buckets)
            with monkeypatch.context() as patch:
                patch.setattr("hookengine_distributed.average_gradients", counted(averages))
                runner.train()
            parameters = [*runner.bare_model.parameters()]
            ends[name] = {
                "weights": torch.cat([full(p).detach().flatten() for p in parameters]),
                "same": again.same,
                "steps": [w.steps for w in runner.optim_wrappers.values()],
                "buckets": len(buckets),
                "averages": len(averages),
            }
    return ends


def close_at_the_fourth(runner: Any) -> None:
    """Step in the middle of a window, whose gradients no backward pass has exchanged."""
    if runner.progress.iter == 4:
        assert runner.optim_wrapper.window_open
        runner.optim_wrapper.step()


def counted(averages: list[int]) -> Any:
    """Return ``average_gradients``, counting its calls."""

    def averaging(parameters: Any) -> None:
        averages.append(1)
        average_gradients(parameters)

    return averaging


def count_buckets(model: Any, buckets: list[int]) -> None:
    """Count what DDP exchanges in backward passes; each wrapper here has one bucket."""

    def count(state, bucket):  # DDP reads annotations
        buckets.append(1)
        tensor = bucket.buffer().div_(torch_dist.get_world_size())
        return (
            torch_dist.all_reduce(tensor, async_op=True)
            .get_future()
            .then(lambda future: future.value()[0])
        )

    wrappers = getattr(model, "wrappers", {"": model}).values()
    for wrapper in wrappers:
        if isinstance(wrapper, DistributedDataParallel):
            wrapper.register_comm_hook(None, count)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    return on_ranks(2, train, folder), train(tmp_path_factory.mktemp("one"))


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_repeat_a_step_as_one_process_with_batches_twice_as_large_does(
    both: tuple[list[Any], dict[str, Any]], name: str
) -> None:
    ranks, one = both
    for rank in ranks:
        assert rank[name]["steps"] == one[name]["steps"]
        torch.testing.assert_close(
            rank[name]["weights"], one[name]["weights"], rtol=1e-12, atol=1e-13
        )
        assert rank[name]["same"]
    assert torch.equal(ranks[0][name]["weights"], ranks[1][name]["weights"])


@pytest.mark.parametrize(
    ("name", "averaged"),
    [
        ("ddp", 0),
        ("ddp, accumulate", 0),
        ("ddp, unequal ranks", 0),
        ("ddp, closed by hand", 1),
        ("Toggling, discriminator", 0),
        ("Toggling, generator", 0),
    ],
)
def test_gradients_are_exchanged_once_per_step_and_once_per_repeat(
    both: tuple[list[Any], dict[str, Any]], name: str, averaged: int
) -> None:
    """In a backward pass, however many micro-batches a step has; no optimizer exchanges twice."""
    repeated = CASES[name].get("repeated", ["optimizer"])
    for rank in both[0]:
        steps = rank[name]["steps"]
        expected = sum(steps) + (steps[-1] if repeated == ["discriminator"] else steps[0])
        assert rank[name]["buckets"] + rank[name]["averages"] == expected
        assert rank[name]["averages"] == averaged

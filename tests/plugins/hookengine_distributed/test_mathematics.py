"""Two ranks compute what one process computes: DDP, and FSDP like DDP."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from hookengine import BaseMetric, BaseModel, Plugin, Runner, dist, hookimpl
from tests.ranks import on_ranks

pytestmark = pytest.mark.ranks


class Net(BaseModel):
    """A small classifier, in float64 unless told otherwise."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).to(dtype)

    def forward(self, inputs: Tensor, labels: Tensor, mode: str = "tensor") -> Any:
        scores = self.net(inputs)
        if mode == "loss":
            return {"loss": F.cross_entropy(scores, labels)}
        return (scores, labels) if mode == "predict" else scores


class OwnStep(Net):
    """With a train_step of its own, which calls the model twice."""

    def train_step(self, data: Any, optim_wrapper: Any) -> dict[str, Tensor]:
        with optim_wrapper.optim_context(self):
            inputs, labels = self.data_preprocessor(data, True)
            loss = F.cross_entropy(self(inputs, labels), labels)
            with torch.no_grad():
                teacher = self(inputs, labels)
            loss = loss + 0.1 * F.mse_loss(self(inputs * 0.5, labels), teacher)
        optim_wrapper.update_params(loss)
        return {"loss": loss.detach()}


class SeveralBackwards(Net):
    """Two backward passes after two forward passes, and one past the wrapper, before one step."""

    def train_step(self, data: Any, optim_wrapper: Any) -> dict[str, Tensor]:
        with optim_wrapper.optim_context(self):
            inputs, labels = self.data_preprocessor(data, True)
            first = F.cross_entropy(self(inputs, labels), labels)
            second = F.cross_entropy(self(0.5 * inputs, labels), labels)
        optim_wrapper.backward(first)
        optim_wrapper.backward(second)
        optim_wrapper.backward(F.cross_entropy(self.net(2 * inputs), labels))
        optim_wrapper.step()
        return {"loss": first.detach()}


class Thawed(Net):
    """Its first layer is frozen when the Runner is made, and trained from the second epoch on."""

    def __init__(self) -> None:
        super().__init__()
        self.net[0].requires_grad_(False)

    def train_step(self, data: Any, optim_wrapper: Any) -> dict[str, Tensor]:
        if optim_wrapper.steps == 6:
            self.net[0].requires_grad_(True)
        return super().train_step(data, optim_wrapper)


class Two(BaseModel):
    """Two parts, each with an optimizer, trained in turn: as a GAN."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Linear(6, 6).double()
        self.discriminator = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)).double()
        self.frozen = nn.Linear(6, 6).double().requires_grad_(False)

    def forward(self, inputs: Tensor, labels: Tensor, mode: str = "tensor") -> Any:
        return self.generator(inputs)

    def train_step(self, data: Any, optim_wrapper: Any) -> dict[str, Tensor]:
        real, _ = self.data_preprocessor(data, True)
        critic, maker = optim_wrapper["discriminator"], optim_wrapper["generator"]
        with critic.optim_context(self):
            fake = self.generator(self.frozen(real)).detach()
            loss = self.discriminator(fake).mean() - self.discriminator(real).mean()
        critic.update_params(loss)
        with maker.optim_context(self):
            loss = -self.discriminator(self.generator(self.frozen(real))).mean()
        maker.update_params(loss)
        return {"loss": loss.detach()}


class Accuracy(BaseMetric):
    """Share of right predictions."""

    def process(self, data_batch: Any, data_samples: Any) -> None:
        scores, labels = data_samples
        self.results += (scores.argmax(1) == labels).tolist()

    def compute_metrics(self, results: list[Any]) -> dict[str, Any]:
        return {"accuracy": sum(results) / len(results), "order": results}


def samples(count: int, dtype: torch.dtype = torch.float64) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(count, 6, generator=generator, dtype=torch.float64).to(dtype)
    return TensorDataset(inputs, torch.randint(3, (count,), generator=generator))


SGD = dict(optimizer=dict(type="SGD", lr=0.2, momentum=0.9))
ADAM = dict(optimizer=dict(type="AdamW", lr=0.01))
ACCUMULATE = dict(type="accumulate", steps=3)
CASES: dict[str, dict[str, Any]] = {
    "plain": dict(model=Net, optim_wrapper=SGD),
    "adam, schedule, clip": dict(
        model=Net,
        optim_wrapper=ADAM,
        plugins=[
            dict(type="clip", max_norm=0.05),
            dict(type="schedule", scheduler=dict(type="CosineAnnealingLR", T_max=20)),
        ],
    ),
    "accumulate": dict(model=Net, optim_wrapper=SGD, plugins=[ACCUMULATE]),
    "ema": dict(model=Net, optim_wrapper=SGD, plugins=[dict(type="ema", momentum=0.1)]),
    "own train_step": dict(model=OwnStep, optim_wrapper=SGD),
    "own train_step, accumulate": dict(model=OwnStep, optim_wrapper=SGD, plugins=[ACCUMULATE]),
    "several backward passes": dict(model=SeveralBackwards, optim_wrapper=SGD),
    "frozen at first": dict(model=Thawed, optim_wrapper=SGD),
    "static graph, accumulate": dict(
        model=Net,
        optim_wrapper=SGD,
        plugins=[ACCUMULATE, dict(type="distributed", options=dict(static_graph=True))],
    ),
    "two optimizers": dict(model=Two, optim_wrapper=dict(generator=SGD, discriminator=ADAM)),
    "two optimizers, accumulate": dict(
        model=Two,
        optim_wrapper=dict(generator=SGD, discriminator=SGD),
        plugins=[dict(type="accumulate", steps=3, optimizer="discriminator")],
    ),
}


def build(folder: Path, case: dict[str, Any], batch: int, **more: Any) -> Runner:
    """44 samples, shuffled: of 8 a step, the last batch is of 4."""
    options: dict[str, Any] = {
        "work_dir": folder,
        "train_dataloader": DataLoader(samples(44), batch_size=batch, shuffle=True),
        "train_cfg": dict(max_epochs=3),
        "device": "cpu",
        **case,
        **more,
    }
    torch.manual_seed(0)
    options["model"] = options["model"]()
    quiet = ["no:progress_bar", dict(type="seed", seed=3), dict(type="logging", level="ERROR")]
    options["plugins"] = [*options.get("plugins", ()), *quiet]
    return Runner(**options)


class Compare(Plugin):
    """Whether the gradients of all ranks were the same in every step."""

    same = True

    @hookimpl(tryfirst=True)
    def before_optim_step(self, optim_wrapper: Any) -> None:
        own = [p.grad for p in optim_wrapper.parameters() if p.grad is not None]
        first = [grad.clone() for grad in own]
        dist.broadcast_tensors(first)
        self.same &= all(map(torch.equal, own, first))


def weights(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def train(folder: Path, batch: int) -> dict[str, Any]:
    """The weights that each case ends with, and whether the ranks' gradients were the same."""
    ends: dict[str, Any] = {}
    for name, case in CASES.items():
        with build(folder / name, case, batch) as runner:
            compare = Compare()
            runner.plugins.add(compare)
            runner.train()
            ema = runner.plugins["ema"].averaged.module if "ema" in runner.plugins else None
            steps = [w.steps for w in runner.optim_wrapper.by_name().values()]
            ends[name] = {
                "weights": weights(runner.bare_model),
                "average": None if ema is None else weights(ema),
                "same": compare.same,
                "steps": steps,
            }
    return ends


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    return on_ranks(2, train, folder, 4), train(tmp_path_factory.mktemp("one"), 8)


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_are_one_process_with_batches_twice_as_large(
    both: tuple[list[Any], dict[str, Any]], name: str
) -> None:
    ranks, one = both
    for rank in ranks:
        assert rank[name]["steps"] == one[name]["steps"]
        for kind in ("weights", "average"):
            if one[name][kind] is not None:
                torch.testing.assert_close(
                    rank[name][kind], one[name][kind], rtol=1e-10, atol=1e-10
                )
    assert torch.equal(ranks[0][name]["weights"], ranks[1][name]["weights"])
    assert all(rank[name]["same"] for rank in ranks)


def unequal(rank: int | None) -> list[Any]:
    """Seven batches of 8 samples, of which rank 0 has 5 and rank 1 has 3."""
    data = samples(56)
    batches = [data[8 * i : 8 * i + 8] for i in range(7)]
    parts = {0: slice(0, 5), 1: slice(5, 8), None: slice(0, 8)}
    return [tuple(tensor[parts[rank]] for tensor in batch) for batch in batches]


def train_unequal(folder: Path) -> list[Tensor]:
    """Batches that are larger on one rank; bfloat16; a window that ends in another way."""
    rank = dist_rank()
    case = dict(model=Net, optim_wrapper=SGD)
    ends = []
    with build(
        folder / "unequal", case, 8, train_dataloader=unequal(rank), plugins=[ACCUMULATE]
    ) as runner:
        runner.train()
        ends.append(weights(runner.bare_model))
    data = DataLoader(samples(44, torch.float32), batch_size=8 if rank is None else 4)
    single = dict(model=Single, optim_wrapper=SGD, train_dataloader=data)
    with build(folder / "amp", single, 8, plugins=["amp"]) as runner:
        runner.train()
        ends.append(weights(runner.bare_model))
    with build(folder / "window", case, 8 if rank is None else 4, plugins=[ACCUMULATE]) as runner:
        close_at_the_fourth(runner)
        runner.train()
        ends.append(weights(runner.bare_model))
    return ends


def close_at_the_fourth(runner: Runner) -> None:
    """Step in the middle of a window, whose gradients no backward pass has exchanged."""

    @runner.on("after_train_iter")
    def close(runner: Any) -> None:
        if runner.progress.iter == 4:
            assert runner.optim_wrapper.window_open
            runner.optim_wrapper.step()


def dist_rank() -> int | None:
    return int(os.environ["RANK"]) if "RANK" in os.environ else None


def test_with_unequal_ranks_bfloat16_and_a_window_that_is_cut(tmp_path: Path) -> None:
    unequal_ends, amp, window = train_unequal(tmp_path / "one")
    for rank in on_ranks(2, train_unequal, tmp_path / "ranks"):
        torch.testing.assert_close(rank[0], unequal_ends, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(rank[1], amp, rtol=1e-2, atol=1e-2)  # 8 bits of mantissa
        torch.testing.assert_close(rank[2], window, rtol=1e-10, atol=1e-10)


class Single(Net):
    def __init__(self) -> None:
        super().__init__(torch.float32)


SHARDED = {
    "plain": dict(),
    "in host memory": dict(cpu_offload=True),
    "parts": dict(auto_wrap_policy=["Linear"], sharding_strategy="SHARD_GRAD_OP"),
}


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def train_sharded(folder: Path) -> dict[str, Any]:
    """20 steps of DDP and of FSDP: weights, moments, metrics."""
    case: dict[str, Any] = dict(
        model=Single,
        train_cfg=dict(max_iters=60, val_interval=30),
        train_dataloader=DataLoader(samples(44, torch.float32), batch_size=4, shuffle=True),
        val_dataloader=DataLoader(samples(17, torch.float32), batch_size=4),
        val_cfg=dict(loss=True),
        val_evaluator=Accuracy(),
    )
    ends: dict[str, Any] = {}
    kinds: dict[str, dict[str, Any]] = {"ddp": dict(type="distributed")}
    kinds |= {n: dict(type="distributed", strategy="fsdp", options=o) for n, o in SHARDED.items()}
    for name, kind in kinds.items():
        torch.manual_seed(0)
        model = Single()
        plugins = [
            kind,
            ACCUMULATE,
            dict(type="clip", max_norm=0.3),
            dict(type="ema", momentum=0.1),
        ]
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)  # of the model before sharding
        options = dict(case, model=lambda model=model: model, optim_wrapper=optimizer)
        with build(folder / name, options, 4, plugins=plugins) as runner:
            close_at_the_fourth(runner)
            metrics = runner.train()
            moments = [s[k] for s in optimizer.state.values() for k in ("exp_avg", "exp_avg_sq")]
            ema = runner.plugins["ema"].averaged.module
            ends[name] = {
                "steps": runner.progress.step,
                "weights": torch.cat([full(p).detach().flatten() for p in model.parameters()]),
                "moments": torch.cat([full(moment).flatten() for moment in moments]),
                "average": torch.cat([full(p).detach().flatten() for p in ema.parameters()]),
                "metrics": metrics,
                "local": sum(
                    (p.to_local() if hasattr(p, "to_local") else p).numel()
                    for p in model.parameters()
                ),
            }
    return ends


def test_fsdp_is_ddp_to_the_accuracy_of_float32(tmp_path: Path) -> None:
    for ends in on_ranks(2, train_sharded, tmp_path):
        ddp = ends["ddp"]
        assert ddp["steps"] > 20
        for name in SHARDED:
            fsdp = ends[name]
            assert fsdp["steps"] == ddp["steps"]
            assert fsdp["local"] < 0.6 * ddp["local"]
            for kind in ("weights", "moments", "average"):
                torch.testing.assert_close(fsdp[kind], ddp[kind], rtol=1e-4, atol=1e-6)
            assert fsdp["metrics"].keys() == ddp["metrics"].keys()
            assert fsdp["metrics"]["accuracy"] == ddp["metrics"]["accuracy"]
            assert len(fsdp["metrics"]["order"]) == 17
            assert abs(fsdp["metrics"]["loss"] - ddp["metrics"]["loss"]) < 1e-5


def skip_a_step(folder: Path) -> list[Any]:
    """float16, with a gradient that is infinite in one element, of one rank's samples."""
    ends = []
    for strategy in ("ddp", "fsdp"):
        case = dict(model=Single, optim_wrapper=ADAM)
        data = DataLoader(samples(44, torch.float32), batch_size=4, shuffle=True)
        amp = dict(type="amp", dtype="float16", init_scale=1024.0)
        plugins = [dict(type="distributed", strategy=strategy), amp]
        with build(folder / strategy, case, 4, train_dataloader=data, plugins=plugins) as runner:

            @runner.on("scale_loss")
            def spoil(runner: Any, loss: Tensor) -> Tensor | None:
                if runner.progress.iter == 5 and dist.get_rank() == 1:
                    return loss + runner.bare_model.net[0].weight[0, 0] * float("inf")
                return None

            runner.train()
            scale = runner.plugins["amp"].state_dict()["optimizer"]["scale"]
            end = torch.cat([full(p).detach().flatten() for p in runner.bare_model.parameters()])
            ends.append([runner.progress.step, runner.progress.iter, scale, end])
    return ends


def test_a_step_that_one_rank_must_skip_all_skip(tmp_path: Path) -> None:
    for ddp, fsdp in on_ranks(2, skip_a_step, tmp_path):
        assert ddp[:3] == fsdp[:3] == [17, 18, 512.0]
        assert torch.isfinite(ddp[3]).all()
        torch.testing.assert_close(fsdp[3], ddp[3])


def train_on_tokens(folder: Path) -> list[Tensor]:
    """Batches of which one has no valid token: alone, on one of two ranks, sharded."""
    rank = dist_rank()
    data = samples(32)
    labels = data.tensors[1].clone()
    labels[8:12] = -100
    batches = [(data.tensors[0][i : i + 4], labels[i : i + 4]) for i in range(0, 32, 4)]
    steps = 4 if rank is None else 2
    weigh = dict(type="accumulate", steps=steps, weight="token", tokens=1, ignore_index=-100)
    ends = []
    for strategy in ("ddp", "fsdp"):
        plugins = [weigh, dict(type="distributed", strategy=strategy, share_data=False)]
        own = batches if rank is None else batches[rank::2]
        case = dict(model=Net, optim_wrapper=SGD, train_dataloader=own)
        with build(folder / strategy, case, 4, plugins=plugins) as runner:
            runner.train()
            parameters = runner.bare_model.parameters()
            ends.append(torch.cat([full(p).detach().flatten() for p in parameters]))
    return ends


def test_a_batch_without_a_token_on_one_rank_counts_for_nothing(tmp_path: Path) -> None:
    alone, _ = train_on_tokens(tmp_path / "one")
    for ddp, fsdp in on_ranks(2, train_on_tokens, tmp_path / "ranks"):
        torch.testing.assert_close(ddp, alone, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(fsdp, alone, rtol=1e-10, atol=1e-10)

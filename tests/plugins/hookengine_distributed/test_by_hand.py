"""The wrappers as a user of MMEngine has them: by hand, registered, without a Runner."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as torch_dist
import torch.nn.functional as F
from hookengine_distributed.fsdp import parts_to_wrap
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hookengine import MODEL_WRAPPERS, BaseModel, OptimWrapper, OptimWrapperDict
from hookengine.model import (
    MMDistributedDataParallel,
    MMFullyShardedDataParallel,
    MMSeparateDistributedDataParallel,
    is_model_wrapper,
)
from tests.ranks import on_ranks


class Net(BaseModel):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).double()
        self.unused = nn.Linear(1, 1).double()

    def forward(self, inputs: Tensor, labels: Tensor, mode: str = "tensor") -> Any:
        scores = self.net(inputs)
        if mode == "loss":
            return {"loss": F.cross_entropy(scores, labels)}
        return scores.argmax(1) if mode == "predict" else scores


class Gan(BaseModel):
    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Linear(4, 4).double()
        self.discriminator = nn.Linear(4, 1).double()
        self.frozen = nn.Linear(4, 4).double().requires_grad_(False)
        self.calls: list[str] = []
        self.generator.register_forward_hook(lambda *_: self.calls.append("generator"))

    def forward(self, inputs: Tensor, mode: str = "tensor") -> Any:
        return self.generator(inputs)

    def train_step(self, data: Any, optim_wrapper: Any) -> dict[str, Tensor]:
        fake = self.generator(self.frozen(data[0]))
        loss = self.discriminator(fake.detach()).mean() - self.discriminator(data[0]).mean()
        optim_wrapper["discriminator"].update_params(loss)
        optim_wrapper["generator"].update_params(-self.discriminator(fake).mean())
        return {"loss": loss.detach()}


def batch(rank: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return [
        torch.randn(6, 4, generator=generator, dtype=torch.float64),
        torch.randint(3, (6,), generator=generator),
    ]


def flat(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def by_hand(folder: Path) -> dict[str, Any]:
    torch_dist.init_process_group("gloo")
    rank = torch_dist.get_rank()
    seen: dict[str, Any] = {}
    torch.manual_seed(rank)  # DDP gives all the weights of rank 0
    model = Net()
    model.unused.requires_grad_(False)
    runs: list[int] = []
    model.register_forward_hook(lambda *_: runs.append(1))
    wrapped: Any = MMDistributedDataParallel(model, broadcast_buffers=False)
    seen["wrapper"] = is_model_wrapper(wrapped), isinstance(wrapped, DistributedDataParallel)
    optim_wrapper = OptimWrapper(torch.optim.SGD(wrapped.parameters(), lr=0.1))
    for _ in range(3):
        losses = wrapped.train_step(batch(rank), optim_wrapper)
    seen["losses"] = [*losses]
    seen["ddp"] = flat(model)
    seen["forward hooks"] = len(runs)
    wrapped.eval()
    seen["predictions"] = [
        wrapped.val_step(batch(0)).tolist(),
        wrapped.test_step(batch(0)).tolist(),
    ]
    with wrapped.no_sync():  # what the user says, counts
        wrapped.train_step(batch(rank), optim_wrapper)
    seen["no_sync"] = flat(model)

    torch.manual_seed(rank)
    gan = Gan()
    separate: Any = MMSeparateDistributedDataParallel(gan)
    wrappers = {
        name: OptimWrapper(torch.optim.SGD(getattr(gan, name).parameters(), lr=0.1))
        for name in ("generator", "discriminator")
    }
    separate.train_step(batch(rank), OptimWrapperDict(**wrappers))
    seen["wrapped children"] = [*separate.wrappers]
    seen["names"] = [*gan.state_dict()][:2]
    seen["gan"] = flat(gan.generator), flat(gan.discriminator)
    seen["calls"] = gan.calls
    separate.train(False)
    seen["modes"] = [gan.training, separate.wrappers["generator"].training]
    with separate.no_sync():
        seen["sync"] = [w.require_backward_grad_sync for w in separate.wrappers.values()]

    torch.manual_seed(0)
    net = Net()
    sharded: Any = MMFullyShardedDataParallel(
        net,
        auto_wrap_policy=dict(type="size_based_auto_wrap_policy", min_num_params=30),
        mixed_precision=dict(param_dtype="float32", reduce_dtype="float32"),
        sharding_strategy="FULL_SHARD",
        backward_prefetch="BACKWARD_PRE",
    )
    seen["sharded"] = is_model_wrapper(sharded), [type(m).__name__ for m in net.net]
    optim_wrapper = OptimWrapper(torch.optim.SGD(sharded.parameters(), lr=0.1))
    sharded.train_step(batch(rank), optim_wrapper)
    seen["predicted"] = [*sharded.val_step(batch(0)).shape]
    torch_dist.barrier()
    return seen


@pytest.mark.ranks
def test_by_hand_they_do_what_the_plugin_does(tmp_path: Path) -> None:
    first, second = on_ranks(2, by_hand, tmp_path)
    torch.manual_seed(0)
    alone = Net()
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.1)
    inputs, labels = (torch.cat(pair) for pair in zip(batch(0), batch(1), strict=True))
    for _ in range(3):
        optimizer.zero_grad()
        alone(inputs, labels, mode="loss")["loss"].backward()
        optimizer.step()
    for seen in (first, second):
        torch.testing.assert_close(seen["ddp"], flat(alone), rtol=1e-12, atol=1e-12)
        assert seen["wrapper"] == (True, True)
        assert seen["losses"] == ["loss"]
        assert seen["forward hooks"] == 3  # once an iteration
        assert seen["predictions"][0] == seen["predictions"][1]
        assert seen["wrapped children"] == ["generator", "discriminator"]
        assert seen["names"] == ["generator.weight", "generator.bias"]
        assert seen["calls"] == ["generator"]
        assert seen["modes"] == [False, False]
        assert seen["sync"] == [False, False]
        assert seen["sharded"] == (True, ["FSDPLinear", "ReLU", "Linear"])
        assert seen["predicted"] == [6]
    assert not torch.equal(first["no_sync"], second["no_sync"])
    for one, other in zip(first["gan"], second["gan"], strict=True):
        assert torch.equal(one, other)


def anomalous(folder: Path) -> str:
    import contextlib
    import io

    torch_dist.init_process_group("gloo")
    wrapped: Any = MMDistributedDataParallel(
        Net(), detect_anomalous_params=True, find_unused_parameters=True
    )
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        optim_wrapper = OptimWrapper(torch.optim.SGD(wrapped.parameters(), lr=0.1))
        wrapped.train_step(batch(0), optim_wrapper)
    return printed.getvalue()


@pytest.mark.ranks
def test_parameters_without_a_part_in_the_loss_are_named(tmp_path: Path) -> None:
    for printed in on_ranks(2, anomalous, tmp_path):
        assert "2 parameters took no part in the loss" in printed
        assert "unused.weight [1, 1], unused.bias [1]" in printed


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 2)])


@pytest.mark.parametrize(
    ("policy", "names"),
    [
        (None, []),
        (70, ["0.attention", "0.layers.0", "1.attention", "1.layers.0"]),
        (300, ["0", "1"]),  # 288 of the attention and 90 of the layers
        (Block, ["0", "1"]),
        (["Block", nn.Linear], ["0.layers.0", "0.layers.1", "0", "1.layers.0", "1.layers.1", "1"]),
        (
            dict(type="transformer_auto_wrap_policy", transformer_layer_cls={Block}),
            ["0", "1"],
        ),
        (lambda module, recurse, nonwrapped_numel: isinstance(module, Block), ["0", "1"]),
    ],
)
def test_a_policy_chooses_parts_from_the_innermost_on(policy: Any, names: list[str]) -> None:
    model = nn.Sequential(Block(), Block())
    known = {id(module): name for name, module in model.named_modules()}
    assert [known[id(part)] for part in parts_to_wrap(model, policy)] == names


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(sharding_strategy="NO_SHARD"), r"Instead of NO_SHARD, use strategy='ddp'"),
        (dict(backward_prefetch="BACKWARD_POST"), "FSDP2 prefetches like"),
        (dict(param_init_fn=print), "Remove param_init_fn"),
        (dict(use_orig_params=False), "Remove param_init_fn and use_orig_params"),
        (dict(mixed_precision=dict(buffer_dtype="float32"), mesh=0), "Remove buffer_dtype"),
        (dict(mixed_precision="float16", mesh=0), "mixed_precision must be dict"),
        (dict(cpu_offload="yes", mesh=0), "cpu_offload must be True, False"),
    ],
)
def test_what_fsdp2_has_no_counterpart_for_is_refused(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        MMFullyShardedDataParallel(Net(), **options)


def test_parameters_beside_the_children_cannot_be_separate() -> None:
    model = Gan()
    model.scale = nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match="parameters outside its children \\(scale\\)"):
        MMSeparateDistributedDataParallel(model)
    with pytest.raises(ValueError, match="no child of Gan has parameters to train"):
        MMSeparateDistributedDataParallel(Gan().requires_grad_(False))


def test_a_wrapper_of_a_third_party_is_found_by_its_name() -> None:
    @MODEL_WRAPPERS.register_module()
    class TheirWrapper(MMDistributedDataParallel):
        pass

    assert MODEL_WRAPPERS.get("TheirWrapper") is TheirWrapper
    assert is_model_wrapper(TheirWrapper.__new__(TheirWrapper))

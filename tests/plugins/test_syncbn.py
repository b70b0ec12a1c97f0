"""SyncBatchNorm and back again."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as torch_dist
import torch.multiprocessing as mp
from torch import nn

from hookengine import Runner
from hookengine.model import convert_sync_batchnorm, revert_sync_batchnorm
from tests.ranks import free_port, spawn


class Nested(nn.Module):
    """Norms at every depth, shared, in containers, of several kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.BatchNorm1d(3, eps=1e-3, momentum=0.3)
        self.shared = nn.BatchNorm2d(4)
        self.block = nn.Sequential(
            nn.Conv2d(3, 4, 1), self.shared, nn.ModuleList([nn.BatchNorm3d(2)])
        )
        self.parts = nn.ModuleDict({"plain": nn.BatchNorm2d(4, affine=False)})
        self.stateless = nn.BatchNorm2d(4, track_running_stats=False)
        self.instance = nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
        self.group = nn.GroupNorm(2, 4)


def test_the_round_trip_keeps_everything() -> None:
    torch.manual_seed(0)
    model = Nested().double()
    model.one.weight.requires_grad_(False)
    model.block.eval()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape) if tensor.is_floating_point() else tensor + 3)
    before = dict(model.state_dict(keep_vars=True))
    modes = {name: module.training for name, module in model.named_modules()}
    kinds = {name: type(module) for name, module in model.named_modules()}
    options = {
        name: (m.eps, m.momentum, m.affine, m.track_running_stats)
        for name, m in model.named_modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm)
    }

    assert convert_sync_batchnorm(model) is model
    assert {*options} == {n for n, m in model.named_modules() if isinstance(m, nn.SyncBatchNorm)}
    assert type(model.instance) is nn.InstanceNorm2d
    assert model.block[1] is model.shared
    step: Any
    for step in (lambda m: m, revert_sync_batchnorm):
        model = step(model)
        after = model.state_dict(keep_vars=True)
        assert after.keys() == before.keys()
        for name, value in before.items():
            assert after[name] is value, name
            assert after[name].dtype == value.dtype
        assert {name: module.training for name, module in model.named_modules()} == modes
        for name, expected in options.items():
            m: Any = model.get_submodule(name)
            assert (m.eps, m.momentum, m.affine, m.track_running_stats) == expected
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert not model.one.weight.requires_grad


def test_a_layer_by_itself_and_one_that_torch_converted() -> None:
    layer = nn.BatchNorm2d(3)
    sync = convert_sync_batchnorm(layer)
    assert isinstance(sync, nn.SyncBatchNorm)
    assert convert_sync_batchnorm(sync) is sync
    assert type(revert_sync_batchnorm(sync)) is nn.BatchNorm2d
    foreign = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm2d(3)))
    reverted = revert_sync_batchnorm(foreign)
    torch.manual_seed(0)
    for shape in ((4, 3), (4, 3, 5), (4, 3, 5, 5)):
        inputs = torch.randn(shape)
        expected = nn.functional.batch_norm(inputs, None, None, training=True)
        torch.testing.assert_close(reverted(inputs), expected)


def test_a_layer_that_is_used_twice_is_one_afterwards() -> None:
    layer = nn.BatchNorm1d(3)
    model = convert_sync_batchnorm(nn.Sequential(layer, nn.ReLU(), layer))
    assert model[0] is model[2]
    assert isinstance(model[0], nn.SyncBatchNorm)
    model = revert_sync_batchnorm(model)
    assert model[0] is model[2] is layer


class Special(nn.BatchNorm1d):
    """A batch norm with a constructor, a buffer, a child and a hook of its own, and no bias."""

    def __init__(self, planes: int) -> None:
        super().__init__(planes)
        self.register_parameter("bias", None)
        self.register_buffer("extra", torch.tensor(5.0))
        self.child = nn.PReLU(init=0.9)
        self.calls = 0
        self.register_forward_hook(lambda *_: setattr(self, "calls", self.calls + 1))


def test_what_else_a_layer_holds_survives_the_round_trip() -> None:
    model = nn.Sequential(Special(3))
    special, keys = model[0], [*model.state_dict()]
    sync = convert_sync_batchnorm(model)[0]
    assert [*model.state_dict()] == keys
    assert sync.bias is None
    sync.eval()(torch.ones(2, 3))
    assert special.calls == 1
    sync.double()
    assert revert_sync_batchnorm(model)[0] is special
    assert [*model.state_dict()] == keys
    assert special.child.weight.item() == pytest.approx(0.9)
    assert special.weight.dtype == special.running_mean.dtype == torch.float64
    assert not special.training


def test_what_syncbatchnorm_cannot_stand_for_is_refused() -> None:
    class Activated(nn.BatchNorm1d):
        def forward(self, inputs: Any) -> Any:
            return super().forward(inputs).relu()

    parametrized = nn.BatchNorm1d(3)
    nn.utils.parametrize.register_parametrization(parametrized, "weight", nn.Identity())
    for layer, message in (
        (Activated(3), "Activated has its own forward"),
        (parametrized, "is parametrized"),
        (nn.LazyBatchNorm1d(), "has no shape yet. Run one batch"),
    ):
        with pytest.raises(ValueError, match=message):
            convert_sync_batchnorm(nn.Sequential(layer))


def test_another_implementation_is_refused() -> None:
    with pytest.raises(ValueError, match="implementation='mmcv' is not supported"):
        convert_sync_batchnorm(nn.BatchNorm2d(3), implementation="mmcv")


def build(tmp_path: Path, model: nn.Module) -> Runner:
    return Runner(
        model,
        tmp_path,
        train_dataloader=[(torch.ones(2, 3), torch.tensor([0, 1]))],
        train_cfg=dict(max_epochs=1),
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.1)),
        loss=nn.functional.cross_entropy,
        plugins=["syncbn"],
        defaults=(),
        device="cpu",
    )


def test_on_one_rank_it_is_inert(tmp_path: Path) -> None:
    with build(tmp_path, nn.Sequential(nn.BatchNorm1d(3))) as runner:
        assert type(runner.bare_model[0]) is nn.BatchNorm1d


def on_rank(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch_dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    with pytest.raises(ValueError, match="does not run on the CPU, where 2 ranks train this model"):
        build(folder, nn.Sequential(nn.BatchNorm1d(3)))  # type: ignore[arg-type]
    with build(folder, nn.Sequential(nn.Linear(3, 3))):  # type: ignore[arg-type]
        pass
    sys.stdout.flush()
    os._exit(0)


@pytest.mark.ranks
def test_on_cpu_ranks_it_says_that_torch_cannot(tmp_path: Path) -> None:
    spawn(2, on_rank, tmp_path, str(tmp_path))


def on_gpu(rank: int, port: int, folder: str) -> None:
    torch.cuda.set_device(rank)
    torch_dist.init_process_group(
        "nccl", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    torch.manual_seed(0)
    joint = torch.randn(8, 3)
    model = convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(3))).cuda()
    plain = nn.Sequential(nn.BatchNorm1d(3)).cuda()
    mine = model(joint.chunk(2)[rank].cuda())
    whole = plain(joint.cuda())
    torch.testing.assert_close(mine, whole.chunk(2)[rank])
    torch.testing.assert_close(model[0].running_var, plain[0].running_var)
    sys.stdout.flush()
    os._exit(0)


@pytest.mark.gpu
def test_over_two_gpus_it_is_batch_norm_over_the_joint_batch(tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    mp.spawn(on_gpu, (free_port(), str(tmp_path)), nprocs=2)

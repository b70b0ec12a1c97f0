"""On accelerators: NCCL, and shards that are copied from a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as torch_dist
from hookengine_checkpoint.sharded import Shards, assemble, split
from torch import nn

from hookengine.model import MMFullyShardedDataParallel
from tests.end_to_end.test_torchrun import ROOT, TORCHRUN, run
from tests.ranks import free_port

pytestmark = pytest.mark.gpu


def test_the_quickstart_on_two_gpus(tmp_path: Path) -> None:
    if torch.accelerator.device_count() < 2:
        pytest.skip("there is one accelerator here")
    example = ROOT / "examples" / "quickstart.py"
    code, printed = run([*TORCHRUN, "--standalone", "--nproc-per-node=2", example, tmp_path])
    assert code == 0, printed
    assert "nccl" in printed


def test_shards_on_a_gpu_are_copied_and_written(tmp_path: Path) -> None:
    address = f"tcp://127.0.0.1:{free_port()}"
    torch_dist.init_process_group("cpu:gloo,cuda:nccl", init_method=address, rank=0, world_size=1)
    try:
        model = nn.Linear(5, 3).cuda()
        expected = model.weight.detach().cpu()
        MMFullyShardedDataParallel(model)
        rest, tensors = split({"state_dict": model.state_dict()})
        shards = Shards()
        for _ in range(2):  # the second time into the same buffers
            shards.take(tensors)
        assert shards.write(tmp_path, ["weight", "bias"]) == []
        whole = assemble(tmp_path, rest)["state_dict"]
        assert torch.equal(whole["weight"], expected)
    finally:
        torch_dist.destroy_process_group()

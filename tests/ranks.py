"""Real processes over gloo on loopback, as torchrun would start them."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp


def free_port() -> int:
    """A port that nobody has at the moment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def on_ranks(world: int, function: Callable[..., Any], folder: Path, *args: Any) -> list[Any]:
    """Call ``function(folder, *args)`` on each of ``world`` ranks; what each has returned.

    An exception of one rank is one of the test.
    """
    folder.mkdir(parents=True, exist_ok=True)
    mp.spawn(_on_rank, (world, free_port(), function, str(folder), args), nprocs=world)
    outs = [folder / f"rank_{rank}.pth" for rank in range(world)]
    return [torch.load(out, weights_only=True) for out in outs]


def _on_rank(
    rank: int, world: int, port: int, function: Callable[..., Any], folder: str, args: Any
) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
    )
    torch.set_num_threads(1)
    out = function(Path(folder), *args)
    torch.save(out, Path(folder) / f"rank_{rank}.pth")
    sys.stdout.flush()
    os._exit(0)  # gloo's threads can abort a Python that finalizes: pytorch/pytorch#179291

"""Real processes over gloo on loopback, as torchrun would start them."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from tests import forks

# Below the ports that the system gives to sockets which ask for any: no connection takes one of
# these between the moment that it is found free and the moment that a rank listens on it.
_ports = itertools.count(10_000 + 41 * os.getpid() % 20_000)


def free_port() -> int:
    """A port that nobody has at the moment, and that nobody else is given."""
    for port in _ports:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("unreachable")


def on_ranks(world: int, function: Callable[..., Any], folder: Path, *args: Any) -> list[Any]:
    """Call ``function(folder, *args)`` on each of ``world`` ranks; what each has returned.

    What rank 0 prints is in ``folder / "printed_0"`` afterwards. An exception of one rank is one of
    the test.
    """
    folder.mkdir(parents=True, exist_ok=True)
    spawn(world, _on_rank, folder, world, function, folder, args)
    outs = [folder / f"rank_{rank}.pth" for rank in range(world)]
    return [torch.load(out, weights_only=True) for out in outs]


def spawn(world: int, function: Callable[..., Any], folder: Path, *args: Any) -> None:
    """Call ``function(rank, port, *args)`` in ``world`` forked processes, and wait for their end.

    As ``torch.multiprocessing.spawn``, but without the imports. Nobody listens on ``port`` yet.

    Args:
        folder: Where ``printed_RANK`` gets what a process prints.
    """
    forks.start_server(forks.RANKS)
    mp.start_processes(
        _as_rank,
        (dict(os.environ), folder, function, (free_port(), *args)),
        nprocs=world,
        start_method="forkserver",
    )


def _as_rank(
    rank: int, environment: dict[str, str], folder: Path, function: Callable[..., Any], args: Any
) -> None:
    out = folder / f"printed_{rank}"
    forks.become(environment, out, out)
    torch.set_num_threads(1)
    function(rank, *args)


def _on_rank(
    rank: int, port: int, world: int, function: Callable[..., Any], folder: Path, args: Any
) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
    )
    out = function(folder, *args)
    torch.save(out, folder / f"rank_{rank}.pth")
    sys.stdout.flush()
    os._exit(0)  # gloo's threads can abort a Python that finalizes: pytorch/pytorch#179291

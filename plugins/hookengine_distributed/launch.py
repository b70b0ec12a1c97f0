"""Where a process stands among the others, and the process group that joins them."""

from __future__ import annotations

import atexit
import os
import sys
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as torch_dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from hookengine import dist

NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Launch:
    """What ``torchrun`` tells a process by its environment.

    Attributes:
        rank: Number of the process.
        world_size: Number of processes.
        local_rank: Number of the process on its machine.
    """

    rank: int
    world_size: int
    local_rank: int

    @classmethod
    def read(cls, environment: Mapping[str, str] = os.environ) -> Launch | None:
        """What the environment says; None where there is one process.

        Raises:
            ValueError: it is not complete.
        """
        if int(environment.get("WORLD_SIZE", "1")) == 1:
            return None
        if missing := [name for name in NEEDED if name not in environment]:
            raise ValueError(
                f"WORLD_SIZE={environment['WORLD_SIZE']} is set and {', '.join(missing)} is not: "
                "start the script with torchrun, which sets them all, or unset WORLD_SIZE"
            )
        rank, world_size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        return cls(rank, world_size, int(environment.get("LOCAL_RANK", rank)))


def own_device(device: torch.device, launch: Launch) -> torch.device:
    """The accelerator of this process, of the kind that ``device`` is; the CPU stays.

    Raises:
        ValueError: this machine has fewer of them than processes.
    """
    if device.type in ("cpu", "meta"):
        return device
    count = torch.get_device_module(device).device_count()
    if count == 0:
        raise ValueError(
            f"this machine has no {device.type} device: train on the CPU with Runner(device='cpu')"
        )
    if launch.local_rank >= count:
        raise ValueError(
            f"rank {launch.rank} is process {launch.local_rank} of its machine, which has {count} "
            f"{device.type} devices: start at most {count} there (torchrun --nproc-per-node "
            f"{count}), or train on the CPU with Runner(device='cpu')"
        )
    own = torch.device(device.type, launch.local_rank)
    torch.get_device_module(own).set_device(own)
    return own


def choose_backend(device: torch.device, wanted: str | None) -> str:
    """The backend: torch's for the device, beside gloo for what is on the CPU.

    Raises:
        ValueError: this torch has none of that name.
    """
    backend = wanted or torch_dist.get_default_backend_for_device(device)
    for part in backend.split(","):
        name = part.rpartition(":")[2]
        if not torch_dist.is_backend_available(name):
            known = [b for b in torch_dist.Backend.backend_list if b != "undefined"]
            there = [b for b in known if torch_dist.is_backend_available(b)]
            raise ValueError(
                f"distributed: this torch has no backend {name!r}; it has {', '.join(there)}"
            )
    if ":" in backend or backend == "gloo":
        return backend
    return f"cpu:gloo,{device.type}:{backend}" if device.type != "cpu" else backend


def join(launch: Launch, backend: str, timeout: float | None) -> None:
    """Make the process group; it is left at the end of the process.

    Raises:
        RuntimeError: the processes do not find each other.
    """
    options: dict[str, Any] = {} if timeout is None else {"timeout": timedelta(seconds=timeout)}
    try:
        store, rank, world_size = next(rendezvous("env://", **options))
        store = PrefixStore(_meet(store, rank, world_size), store)
        torch_dist.init_process_group(
            backend, store=store, rank=rank, world_size=world_size, **options
        )
    except RuntimeError as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        fix = "see that all machines reach that address, and that all processes were started"
        if "in use" in str(error).lower():
            fix = (
                "another job has that port: give another one, torchrun --master-port PORT (or "
                "--rdzv-endpoint HOST:PORT); torchrun --standalone finds a free one"
            )
        error.add_note(f"rank {launch.rank} of {launch.world_size}, at {address}: {fix}")
        raise
    _Exit.joined = True


def _meet(store: Any, rank: int, world_size: int) -> str:
    """A name that the processes of this start have in common, and no earlier ones.

    torchrun keeps one store when it starts processes anew, with the addresses of those that are
    dead. So each says hello with a name of its own, to which rank 0 answers.

    Raises:
        RuntimeError: some do not come within the store's timeout.
    """
    own = uuid.uuid4().hex
    if rank > 0:
        store.set(f"hookengine/hello/{rank}", own)
        common = store.get(f"hookengine/answer/{own}").decode()
        store.set(f"hookengine/{common}/{rank}", "met")
        return str(common)
    deadline = time.monotonic() + store.timeout.total_seconds()
    answered: set[str] = set()
    missing = [*range(1, world_size)]
    while missing:
        for other in missing:
            if store.check([f"hookengine/hello/{other}"]):
                hello = store.get(f"hookengine/hello/{other}").decode()
                if hello not in answered:  # the first one may be of a process that is dead
                    answered.add(hello)
                    store.set(f"hookengine/answer/{hello}", own)
        missing = [r for r in missing if not store.check([f"hookengine/{own}/{r}"])]
        if missing and time.monotonic() > deadline:
            raise RuntimeError(
                f"of {world_size} processes these did not come: rank {', '.join(map(str, missing))}"
            )
        time.sleep(0.01 if missing else 0)
    return own


class _Exit:
    """Leaves the process group when the process ends, after the last Runner that uses it."""

    users = 0
    joined = False  # by us: a group that the user made is left to the user
    prepared = False
    now = False

    @classmethod
    def prepare(cls) -> None:
        if not cls.prepared:
            cls.prepared = True
            atexit.register(cls.begin)

    @classmethod
    def begin(cls) -> None:
        cls.now = True
        cls.leave_if_last()

    @classmethod
    def leave_if_last(cls) -> None:
        if cls.joined and cls.now and cls.users == 0 and dist.is_distributed():
            torch_dist.destroy_process_group()


def backend_of(device: torch.device) -> str:
    """The backend by which tensors on a device are exchanged."""
    config = str(torch_dist.get_backend_config())
    pairs = (part.partition(":") for part in config.split(","))
    return next((name for kind, _, name in pairs if kind == device.type), config)


def use() -> None:
    """Count one who uses the process group."""
    _Exit.prepare()
    _Exit.users += 1


def uncaught() -> BaseException | None:
    """The error that ends the process, where one does."""
    return getattr(sys, "last_value", None) if _Exit.now else None


def leave() -> None:
    """That one needs it no more."""
    _Exit.users -= 1
    _Exit.leave_if_last()

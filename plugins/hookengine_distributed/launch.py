"""The rank and device of a process, and the process group that connects the processes."""

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
    """The environment variables that ``torchrun`` sets for a process.

    Attributes:
        rank: The number of the process.
        world_size: The number of processes.
        local_rank: The number of the process on its machine.
    """

    rank: int
    world_size: int
    local_rank: int

    @classmethod
    def read(cls, environment: Mapping[str, str] = os.environ) -> Launch | None:
        """Read the environment; return None if there is only one process.

        Raises:
            ValueError: Some of the variables are missing.
        """
        if int(environment.get("WORLD_SIZE", "1")) == 1:
            return None
        if missing := [name for name in NEEDED if name not in environment]:
            raise ValueError(
                f"WORLD_SIZE={environment['WORLD_SIZE']} is set, but {', '.join(missing)} is not. "
                "Start the script with torchrun, which sets all of them, or unset WORLD_SIZE"
            )
        rank, world_size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        return cls(rank, world_size, int(environment.get("LOCAL_RANK", rank)))


def own_device(device: torch.device, launch: Launch) -> torch.device:
    """Return the accelerator of this process, of the same type as ``device``; the CPU is kept.

    Raises:
        ValueError: This machine has fewer accelerators than processes.
    """
    if device.type in ("cpu", "meta"):
        return device
    count = torch.get_device_module(device).device_count()
    if count == 0:
        raise ValueError(
            f"this machine has no {device.type} device. Train on the CPU with Runner(device='cpu')"
        )
    if launch.local_rank >= count:
        raise ValueError(
            f"rank {launch.rank} has local rank {launch.local_rank} on a machine with only {count} "
            f"{device.type} devices. Start at most {count} processes there (torchrun "
            f"--nproc-per-node {count}), or train on the CPU with Runner(device='cpu')"
        )
    own = torch.device(device.type, launch.local_rank)
    torch.get_device_module(own).set_device(own)
    return own


def choose_backend(device: torch.device, wanted: str | None) -> str:
    """Return the backend: by default torch's for the device; gloo is added for CPU tensors.

    Raises:
        ValueError: The installed torch has no backend of that name.
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
    """Create the process group, which is destroyed when the process ends.

    Raises:
        RuntimeError: The processes do not find each other.
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
        fix = "check that all machines can reach that address and that all processes have started"
        if "in use" in str(error).lower():
            fix = (
                "another job uses that port. Choose another with torchrun --master-port PORT (or "
                "--rdzv-endpoint HOST:PORT), or let torchrun --standalone find a free one"
            )
        error.add_note(f"rank {launch.rank} of {launch.world_size}, at {address}: {fix}")
        raise
    _Exit.joined = True


def _meet(store: Any, rank: int, world_size: int) -> str:
    """Return a name that only the processes of this start share, not those of earlier starts.

    torchrun keeps the store when it restarts processes, including the addresses of dead ones.
    Therefore each process announces itself under a unique name, to which rank 0 replies.

    Raises:
        RuntimeError: Some processes do not arrive within the store's timeout.
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
                if hello not in answered:  # the first one may come from a dead process
                    answered.add(hello)
                    store.set(f"hookengine/answer/{hello}", own)
        missing = [r for r in missing if not store.check([f"hookengine/{own}/{r}"])]
        if missing and time.monotonic() > deadline:
            raise RuntimeError(
                f"of {world_size} processes, these are missing: rank {', '.join(map(str, missing))}"
            )
        time.sleep(0.01 if missing else 0)
    return own


class _Exit:
    """Destroys the process group when the process ends, once no Runner uses it anymore."""

    users = 0
    joined = False  # by this plugin; a group that the user created is left to the user
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
    """Return the backend that exchanges tensors on a device."""
    config = str(torch_dist.get_backend_config())
    pairs = (part.partition(":") for part in config.split(","))
    return next((name for kind, _, name in pairs if kind == device.type), config)


def use() -> None:
    """Count one more user of the process group."""
    _Exit.prepare()
    _Exit.users += 1


def uncaught() -> BaseException | None:
    """Return the error that ends the process, or None."""
    return getattr(sys, "last_value", None) if _Exit.now else None


def leave() -> None:
    """Count one user fewer; at exit, the last one destroys the process group."""
    _Exit.users -= 1
    _Exit.leave_if_last()

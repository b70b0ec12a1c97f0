"""Describe the environment of a run: versions, devices, threads and the command line."""

from __future__ import annotations

import functools
import os
import platform
import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch


def without_secrets(command: list[str]) -> list[str]:
    """Return a command line with ``***`` in place of the values of options that look secret.

    Such options have names that end with ``key``, ``token``, ``secret`` or ``password``.
    """
    shown: list[str] = []
    for argument in command:
        name, equals, _ = argument.partition("=")
        if shown and _SECRET.fullmatch(shown[-1]) and not argument.startswith("-"):
            argument = "***"
        elif equals and _SECRET.fullmatch(name):
            argument = f"{name}=***"
        shown.append(argument)
    return shown


_SECRET = re.compile(r"-*[\w.-]*(key|token|secret|password)", re.IGNORECASE)


def describe_environment() -> dict[str, Any]:
    """Return versions, devices, threads and the command line as plain values.

    This is fast. With CUDA, it initializes ``torch.cuda`` to read the names of the devices.
    """
    devices = []
    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": dict(_versions()),
        "devices": devices,
        "cuda": torch.version.cuda,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "command": without_secrets(sys.argv),
    }


@functools.cache  # each look reads and parses the metadata
def _versions() -> Mapping[str, str]:
    found = {}
    for name in ("hookengine", "torch", "torchvision", "numpy", "pluggy", "pydantic"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found

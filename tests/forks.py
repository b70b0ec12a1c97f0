"""Processes that start at once: forked from one that has imported torch and started no thread.

An interpreter takes some seconds to import torch, the plugins and what they need. A fork server
(``multiprocessing``'s own, one for each worker of pytest-xdist) does that once. Every process of
a test is forked from it, with its own arguments, environment, folder and output, and ends with an
exit code or a signal like any other. A test of how an interpreter starts, or of what a module
imports, starts a new interpreter instead.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
import types
import warnings
from collections.abc import Callable, Mapping
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

PROCESS, RANKS = "hookengine.tests.process", "hookengine.tests.ranks"
"""The audit events of processes that are forked here; see ``conftest.py``."""

_PRELOADED = (
    *("torch", "torch.distributed.fsdp", "torch.distributed.checkpoint", "torch._dynamo"),
    *("hookengine", "hookengine.cli", "hookengine_logging.replay", "hookengine_checkpoint.sharded"),
    *("hookengine_accumulate", "hookengine_averaging", "hookengine_amp", "hookengine_clip"),
    *("hookengine_distributed.ddp", "hookengine_distributed.fsdp", "hookengine_init"),
    *("hookengine_preprocess", "hookengine_progress_bar", "hookengine_report"),
    *("hookengine_schedule", "hookengine_seed", "hookengine_syncbn", "hookengine_tensorboard"),
    *("hookengine_wandb", "hookengine_watch", "torchmetrics", "torchvision", "sklearn.datasets"),
    *("tensorboard.backend.event_processing.event_accumulator", "pytest", "hypothesis"),
)
# Their pools of threads would not survive the fork, and would make it unsafe.
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload([*_PRELOADED])


def start_server(kind: str) -> None:
    """Start the fork server if it does not run yet; call this before each start of a process.

    Args:
        kind: ``PROCESS`` or ``RANKS``, the marker that the test needs.
    """
    sys.audit(kind)
    before = {name: os.environ.get(name) for name in _ONE_THREAD}
    os.environ.update(_ONE_THREAD)
    try:
        forkserver.ensure_running()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def run(
    code: str,
    *arguments: str,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    stdin: str = "",
    stdout: Path | None = None,
    stderr: Path | None = None,
    strict: bool = False,
    new_session: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Run ``code`` as ``python -c`` would, in a forked process, and wait for its end.

    Args:
        code: Python source, which sees itself as ``__main__``.
        arguments: ``sys.argv[1:]``.
        cwd: The folder that it runs in; by default the current one.
        env: Its whole environment; by default the current one.
        stdin: What it reads from its standard input.
        stdout: A file or a terminal for what it prints; by default that is returned.
        stderr: The same for the standard error.
        strict: Whether every warning is an error, as under ``-W error``.
        new_session: Whether it leads a new session and process group.

    Returns:
        As ``subprocess.run`` does: the exit code, or the negative number of the signal.
    """
    with tempfile.TemporaryDirectory(prefix="fork") as name:
        folder = Path(name)
        outputs = {"stdout": stdout, "stderr": stderr}
        streams = [folder / "stdin", *(to or folder / name for name, to in outputs.items())]
        streams[0].write_text(stdin)
        for file in outputs:
            (folder / file).touch()
        process = _context.Process(
            target=_run,
            args=(code, arguments, cwd, dict(env or os.environ), streams, strict, new_session),
        )
        start_server(PROCESS)
        process.start()
        process.join()
        assert process.exitcode is not None
        printed = ["" if to else (folder / name).read_text() for name, to in outputs.items()]
        return subprocess.CompletedProcess(["-c", *arguments], process.exitcode, *printed)


def run_module(name: str, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a module as ``python -m name`` would; the rest is as for ``run``."""
    code = f"import runpy; runpy.run_module({name!r}, run_name='__main__', alter_sys=True)"
    return run(code, *arguments, **options)


def run_file(path: Path, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a file as ``python path`` would; the rest is as for ``run``."""
    code = f"import runpy; runpy.run_path({str(path)!r}, run_name='__main__')"
    return run(code, *arguments, **options)


def become(environment: Mapping[str, str], stdout: Path, stderr: Path) -> None:
    """Take over an environment, and print into files, or to terminals."""
    multiprocessing.set_start_method(None, force=True)  # of a dataloader's workers: the default
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, path in ((1, stdout), (2, stderr)):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOCTTY)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.stdout.reconfigure(line_buffering=os.isatty(1))  # type: ignore[union-attr]


def _run(
    code: str,
    arguments: tuple[str, ...],
    cwd: Path | None,
    environment: dict[str, str],
    streams: list[Path],
    strict: bool,
    new_session: bool,
) -> None:
    if new_session:
        os.setsid()
    become(environment, *streams[1:])
    sys.stdin = streams[0].open()
    os.chdir(cwd or os.getcwd())
    sys.argv = ["-c", *arguments]
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    warnings.resetwarnings()
    if strict:
        warnings.simplefilter("error")
    _as_an_interpreter(lambda: exec(compile(code, "<string>", "exec"), main.__dict__))


def _as_an_interpreter(call: Callable[[], Any]) -> None:
    """Call; then end as an interpreter does, which a forked process of Python does not."""
    code: Any = 0
    try:
        call()
    except SystemExit as end:
        code = end.code or 0
        if not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads, ends executors
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code & 0xFF)

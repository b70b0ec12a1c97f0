"""What a checkpoint costs beside a plain ``torch.save``: a ResNet-50 with SGD momentum.

*blocked* is how long the loop stands still, *complete* how long until the checkpoint is on disk,
checksum and fsync included, *lost* what a loop of small steps loses until then; each as a multiple
of the ``torch.save`` (which does neither) of the same round.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

Ends = Callable[[], object]


def checkpoints(rounds: int) -> None:
    """Measure and print one line per contender."""
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        runner = _runner(folder)
        stack.callback(runner.close)
        step = _small_step()
        contenders = {"torch.save": _plain(runner, folder), **_contenders(runner, folder, stack)}
        times: dict[str, list[tuple[float, float, float]]] = {key: [] for key in contenders}
        for round_ in range(-2, rounds):
            for key, begin in contenders.items():
                measured = _measure(begin, step)
                if round_ >= 0:
                    times[key].append(measured)
        _report(times)


def _report(times: dict[str, list[tuple[float, float, float]]]) -> None:
    plain = [complete for _, complete, _ in times["torch.save"]]
    print(
        f"checkpoint of a ResNet-50 with SGD momentum: torch.save {statistics.median(plain):.3f} s"
    )
    for key, measured in times.items():
        columns = []
        for index, name in enumerate(("blocked", "complete", "lost")):
            ratios = [m[index] / base for m, base in zip(measured, plain, strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            columns.append(f"{name} {middle:5.2f} ({low:.2f} to {high:.2f})")
        print(f"  {key:<32} {'  '.join(columns)}")


def _measure(begin: Callable[[], Ends], step: Callable[[], object]) -> tuple[float, float, float]:
    """Seconds blocked and until complete, alone; seconds that a loop loses meanwhile."""
    os.sync()  # what others have left unwritten is not to be waited for here
    start = time.perf_counter()
    end = begin()
    blocked = time.perf_counter() - start
    end()
    complete = time.perf_counter() - start
    os.sync()
    base = min(_timed(step, 50) for _ in range(3)) / 50
    start = time.perf_counter()
    end = begin()
    steps = 0
    while not _done(end):
        step()
        steps += 1
    end()
    lost = time.perf_counter() - start - steps * base
    return blocked, complete, lost


def _done(end: Ends) -> bool:
    poll = getattr(end, "done", None)
    return True if poll is None else bool(poll())


class _Ending:
    """Waits for the end of a save; ``done`` tells whether it has come."""

    def __init__(self, wait: Callable[[], object], done: Callable[[], bool]) -> None:
        self.wait = wait
        self.done = done

    def __call__(self) -> object:
        return self.wait()


def _timed(call: Callable[[], object], times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        call()
    return time.perf_counter() - start


def _small_step() -> Callable[[], object]:
    net = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 10))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    inputs, labels = torch.randn(128, 128), torch.randint(10, (128,))

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(inputs), labels).backward()
        optimizer.step()

    for _ in range(100):
        step()
    return step


def _runner(folder: Path) -> Any:
    from torchvision.models import resnet50

    from hookengine import Runner

    batch = torch.randn(2, 3, 32, 32), torch.zeros(2, dtype=torch.long)
    runner = Runner(
        resnet50(),
        folder,
        train_dataloader=[batch] * 2,
        train_cfg=dict(max_iters=2),
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.1, momentum=0.9)),
        loss=nn.functional.cross_entropy,
        plugins=["no:progress_bar", dict(type="logging", level="ERROR")],
    )
    runner.train()
    return runner


def _plain(runner: Any, folder: Path) -> Callable[[], Ends]:
    state = _state(runner)

    def begin() -> Ends:
        torch.save(state, folder / "plain.pth")
        return lambda: None

    return begin


def _state(runner: Any) -> dict[str, Any]:
    return {
        "state_dict": runner.bare_model.state_dict(),
        "optimizer": runner.optim_wrapper.state_dict(),
    }


def _contenders(
    runner: Any, folder: Path, stack: contextlib.ExitStack
) -> dict[str, Callable[[], Ends]]:
    plugin, state = runner.plugins["checkpoint"], _state(runner)

    def ours() -> Ends:
        plugin.begin_save(runner)  # as at a safe point
        return _Ending(lambda: plugin.wait(runner), lambda: plugin.written)

    found: dict[str, Callable[[], Ends]] = {"hookengine": ours}
    found["torch's dcp.async_save"] = _dcp(state, folder, stack)
    with contextlib.suppress(ImportError):
        from mmengine.runner import save_checkpoint

        def mmengine() -> Ends:
            save_checkpoint({"meta": {}, **state}, str(folder / "mmengine.pth"))
            return lambda: None

        found["mmengine's save_checkpoint"] = mmengine
    with contextlib.suppress(ImportError):
        from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

        def lightning() -> Ends:
            TorchCheckpointIO().save_checkpoint(state, folder / "lightning.ckpt")
            return lambda: None

        found["lightning's TorchCheckpointIO"] = lightning
    return found


def _dcp(state: dict[str, Any], folder: Path, stack: contextlib.ExitStack) -> Callable[[], Ends]:
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29555")
    dist.init_process_group("gloo", rank=0, world_size=1)
    stack.callback(dist.destroy_process_group)

    def begin() -> Ends:
        shutil.rmtree(folder / "dcp", ignore_errors=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            future: Any = dcp.async_save(state, checkpoint_id=str(folder / "dcp"))
        return _Ending(future.result, future.done)

    return begin

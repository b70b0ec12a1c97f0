"""What several ranks cost: collectives and bytes of an iteration, time beside plain DDP; saving.

    python benchmarks/distributed.py             # 2 ranks beside DDP by hand, then 1, 2 and 4 ranks
    python benchmarks/distributed.py --rounds 15

The ranks are processes over gloo on loopback, with one thread each. In every round each contender
trains once, in turn, the loop by hand twice; a ratio compares with the mean of these two, and the
median over the rounds is reported with the quartiles, by rank 0. Four ranks on fewer cores wait for
each other: their row shows what is to be paid at worst.
"""

from __future__ import annotations

import argparse
import math
import os
import socket
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.distributed as torch_dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from overhead import Timed
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import profile
from torch.utils.data import DataLoader, DistributedSampler
from workloads import W1, Classifier

from hookengine import BaseMetric, Runner, dist

ITERATIONS, WARMUP = 300, 60
LIMIT = 1.03
QUIET = ["no:progress_bar", dict(type="logging", level="ERROR")]


class Predictions(BaseMetric):
    """Keeps a score per sample."""

    def process(self, data_batch: Any, data_samples: Any) -> None:
        self.results += data_samples[0].argmax(1).tolist()

    def compute_metrics(self, results: list[Any]) -> dict[str, Any]:
        return {"mean": sum(results) / len(results)}


def loader(iterations: int) -> DataLoader[Any]:
    """Batches of 32 for each rank."""
    return W1.loader(iterations * dist.get_world_size())


def by_hand(net: Timed, batches: int) -> None:
    """DDP as torch's tutorial has it."""
    data = loader(batches).dataset
    sampler: Any = DistributedSampler(data, shuffle=False)
    model = DistributedDataParallel(net)
    optimizer = W1.optimizer(model)
    model.train()
    for inputs, labels in DataLoader(data, W1.batch_size, sampler=sampler):
        loss = F.cross_entropy(model(inputs), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def hookengine(net: Timed, batches: int, **options: Any) -> None:
    model = Classifier(net)
    with Runner(
        model,
        tempfile.mkdtemp(),
        loader(batches),
        optim_wrapper=W1.optimizer(model),
        train_cfg=dict(max_epochs=1),
        device="cpu",
        **options,
    ) as runner:
        runner.train()


def kernel(net: Timed, batches: int) -> None:
    hookengine(net, batches, defaults=("distributed", "preprocess"))


def defaults(net: Timed, batches: int) -> None:
    hookengine(net, batches, plugins=QUIET)


CONTENDERS: dict[str, Callable[[Timed, int], None]] = {
    "DDP by hand": by_hand,
    "DDP by hand, again": by_hand,
    "kernel, distributed": kernel,
    "all defaults": defaults,
}


class Counted(Timed):
    """Takes note of what is exchanged in twenty iterations."""

    def __init__(self, net: Any) -> None:
        super().__init__(net)
        self.profiler = profile(record_shapes=True)

    def forward(self, inputs: Tensor) -> Any:
        if len(self.times) == WARMUP:
            self.profiler.__enter__()
        elif len(self.times) == WARMUP + 20:
            self.profiler.__exit__(None, None, None)
        return super().forward(inputs)

    def exchanged(self) -> str:
        """Collectives and bytes per iteration."""
        events = [e for e in self.profiler.events() if e.name.startswith("gloo:")]
        sizes = Counter(math.prod(e.input_shapes[0]) for e in events)
        questions = sizes.pop(2, 0)  # the plugin's, whether a rank has a request: two float64
        number = sum(sizes.values())
        total = 4 * sum(size * count for size, count in sizes.items())
        text = f"{number / 20:g} collectives, {total / 20:,.0f} bytes"
        return f"{text}, and {questions} times 16 bytes in 20 iterations" if questions else text


def beside_ddp(rounds: int) -> list[str]:
    """Count, then time."""
    lines = []
    for name, run in CONTENDERS.items():
        net = Counted(W1.net())
        run(net, WARMUP + 40)
        if "again" not in name:
            lines.append(f"  {name:<24} {net.exchanged()} per iteration")
    times: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for round_ in range(rounds):
        order = [*CONTENDERS]
        for name in order[round_ % len(order) :] + order[: round_ % len(order)]:
            net_ = Timed(W1.net())
            CONTENDERS[name](net_, ITERATIONS)
            times[name].append(net_.microseconds(WARMUP, ITERATIONS))
    first, again, *others = CONTENDERS
    by_hand = [(a + b) / 2 for a, b in zip(times[first], times[again], strict=True)]
    lines.append(f"  {first:<24} {statistics.median(by_hand):.0f} us per iteration")
    for name in (again, *others):
        beside = times[first] if name == again else by_hand
        ratios = [a / b for a, b in zip(times[name], beside, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        target = f"  target {LIMIT}: {'ok' if middle <= LIMIT else 'MISSED'}"
        line = f"  {name:<24} {middle:.3f} times ({low:.3f} to {high:.3f})"
        lines.append(line if name == again else line + target)
    return lines


def evaluating_and_saving(rounds: int) -> list[str]:
    """Milliseconds of a validation and of saves, at this number of ranks."""
    spent: dict[str, list[float]] = {}

    def timed(name: str, call: Callable[[], object]) -> None:
        start = time.perf_counter()
        call()
        spent.setdefault(name, []).append(1e3 * (time.perf_counter() - start))

    for strategy in ("ddp", "fsdp"):
        model = Classifier(W1.net())
        with Runner(
            model,
            tempfile.mkdtemp(),
            loader(4),
            optim_wrapper=torch.optim.AdamW(model.parameters()),
            train_cfg=dict(max_epochs=1),
            val_dataloader=W1.loader(120),
            val_evaluator=Predictions(),
            plugins=[dict(type="distributed", strategy=strategy), *QUIET],
            device="cpu",
        ) as runner:
            runner.train()
            checkpoint = runner.plugins["checkpoint"]
            begin, wait = partial(checkpoint.begin_save, runner), partial(checkpoint.wait, runner)
            for _ in range(rounds):
                timed(f"{strategy}: validation of 3,840 samples", runner.val)
                timed(f"{strategy}: save, training waits", begin)
                timed(f"{strategy}: save, the rest behind it", wait)
        if dist.get_world_size() == 1:
            break  # there is nothing to shard
    return [f"  {name:<34} {statistics.median(values):7.1f} ms" for name, values in spent.items()]


def on_rank(rank: int, world: int, port: int, what: Callable[..., list[str]], rounds: int) -> None:
    """Run by each rank; the first one prints."""
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
    )
    torch.set_num_threads(1)
    if world > 1:
        torch_dist.init_process_group("gloo")
    lines = what(rounds)
    if rank == 0:
        print("\n".join(lines), flush=True)
    sys.stdout.flush()
    os._exit(0)


def spawn(world: int, what: Callable[..., list[str]], rounds: int) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(on_rank, (world, port, what, rounds), nprocs=world)


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args(None if arguments is None else [*arguments])
    print("2 ranks, an MLP of 135,000 parameters in float32, batches of 32 for each rank:")
    spawn(2, beside_ddp, options.rounds)
    for world in (1, 2, 4):
        print(f"{world} rank{'s' * (world > 1)}:")
        spawn(world, evaluating_and_saving, options.rounds)


if __name__ == "__main__":
    main()

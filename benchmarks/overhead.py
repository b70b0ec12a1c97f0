"""Microseconds per iteration that a framework adds to a loop written by hand.

All contestants train the same network on the same batches in one process, in turn, round after
round; each is compared with a loop by hand just before it, and the median over the rounds is
reported. The row of the loop by hand itself is the noise. Time is taken inside the network, at each
forward pass, so that what a framework does before its loop does not count. Peers that are not
installed are left out (``pip install "hookengine[bench]"``).

    python benchmarks/overhead.py [--rounds 25] [--only raw,bare,defaults] [--long]
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import json
import logging
import os
import platform
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from workloads import W0, W1, Classifier, Workload, raw_loop

from hookengine import Runner

RESULTS = Path(__file__).parent / "results"
ITERATIONS = {"w0": 800, "w1": 400}
WARMUP = 100
TARGETS = {
    ("w0", "bare"): (1.10, 20.0),
    ("w0", "defaults"): (None, 35.0),
    ("w1", "bare"): (1.02, None),
    ("w1", "defaults"): (1.04, None),
}


class Timed(nn.Module):
    """A network that takes the time at each of its training passes."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.times: list[float] = []

    def forward(self, inputs: Tensor) -> Any:
        self.times.append(perf_counter())
        return self.net(inputs)

    def microseconds(self, start: int, stop: int) -> float:
        """The mean time per iteration between two passes.

        An iteration that took more than five times the median was interrupted by something else
        on the machine and is left out, alike for all contestants; a line of a log is well below.
        """
        times = self.times[start:stop]
        if len(times) < stop - start:
            raise RuntimeError(f"only {len(self.times)} of {stop} passes were made")
        laps = [1e6 * (after - before) for before, after in itertools.pairwise(times)]
        limit = 5 * statistics.median(laps)
        return statistics.fmean(lap for lap in laps if lap < limit)


Contestant = Callable[[Workload, Timed, int], None]


def raw(work: Workload, net: Timed, iterations: int) -> None:
    raw_loop(net, work.optimizer(net), work.loader(iterations))


def with_runner(work: Workload, net: Timed, iterations: int, **options: Any) -> None:
    model = Classifier(net)
    with Runner(
        model,
        tempfile.mkdtemp(),
        work.loader(iterations),
        optim_wrapper=work.optimizer(model),
        train_cfg=dict(max_epochs=1),
        **options,
    ) as runner:
        runner.train()


def bare(work: Workload, net: Timed, iterations: int) -> None:
    with_runner(work, net, iterations, defaults=())


def defaults(work: Workload, net: Timed, iterations: int) -> None:
    with_runner(work, net, iterations)


def ignite(work: Workload, net: Timed, iterations: int) -> None:
    from ignite.engine import create_supervised_trainer

    trainer = create_supervised_trainer(net, work.optimizer(net), F.cross_entropy)
    trainer.run(work.loader(iterations), max_epochs=1)


def accelerate(work: Workload, net: Timed, iterations: int) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model, optimizer, loader = accelerator.prepare(
        net, work.optimizer(net), work.loader(iterations)
    )
    model.train()
    for inputs, labels in loader:
        loss = F.cross_entropy(model(inputs), labels)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()


def fabric(work: Workload, net: Timed, iterations: int) -> None:
    from lightning.fabric import Fabric

    engine = Fabric(accelerator="cpu", devices=1)
    model, optimizer = engine.setup(net, work.optimizer(net))
    loader = engine.setup_dataloaders(work.loader(iterations))
    model.train()
    for inputs, labels in loader:
        loss = F.cross_entropy(model(inputs), labels)
        engine.backward(loss)
        optimizer.step()
        optimizer.zero_grad()


def _lightning(work: Workload, net: Timed, iterations: int, full: bool) -> None:
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            inputs, labels = batch
            loss = F.cross_entropy(self.net(inputs), labels)
            if full:
                self.log("loss", loss, prog_bar=True)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return work.optimizer(self)

    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=full,
        enable_model_summary=False,
        default_root_dir=tempfile.mkdtemp(),
    )
    trainer.fit(Module(), work.loader(iterations))


def lightning(work: Workload, net: Timed, iterations: int) -> None:
    _lightning(work, net, iterations, full=False)


def lightning_full(work: Workload, net: Timed, iterations: int) -> None:
    _lightning(work, net, iterations, full=True)


def mmengine(work: Workload, net: Timed, iterations: int) -> None:
    from mmengine.model import BaseModel
    from mmengine.optim import OptimWrapper
    from mmengine.runner import Runner as MMRunner

    class Model(BaseModel):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, inputs: Tensor, labels: Tensor, mode: str) -> Any:
            return {"loss": F.cross_entropy(self.net(inputs), labels)}

    model = Model()
    runner = MMRunner(
        model,
        tempfile.mkdtemp(),
        work.loader(iterations),
        train_cfg=dict(by_epoch=True, max_epochs=1),
        optim_wrapper=OptimWrapper(work.optimizer(model)),
        default_hooks=dict(checkpoint=None),
        log_level="ERROR",
        experiment_name=tempfile.mktemp(),
    )
    runner.train()


CONTESTANTS: dict[str, tuple[str, Contestant]] = {
    "raw": ("the loop by hand", raw),
    "bare": ("hookengine, bare kernel", bare),
    "defaults": ("hookengine, default plugins", defaults),
    "ignite": ("ignite, no handlers", ignite),
    "fabric": ("lightning Fabric", fabric),
    "accelerate": ("accelerate", accelerate),
    "mmengine": ("mmengine, default hooks less checkpoint", mmengine),
    "lightning": ("lightning, bare", lightning),
    "lightning_full": ("lightning, bar and one logged value", lightning_full),
}
PACKAGES = {"fabric": "lightning", "lightning_full": "lightning"}


def installed(name: str) -> bool:
    """Whether a contestant can run here."""
    own = ("raw", "bare", "defaults")
    return name in own or importlib.util.find_spec(PACKAGES.get(name, name)) is not None


def run_once(name: str, work: Workload, iterations: int) -> Timed:
    """Run one contestant, in silence."""
    net = Timed(work.net())
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        CONTESTANTS[name][1](work, net, iterations)
    return net


def compare(names: list[str], rounds: int) -> dict[str, dict[str, dict[str, float]]]:
    """Run all contestants in turn, the loop by hand before each; the medians over the rounds."""
    table: dict[str, dict[str, dict[str, float]]] = {}
    for work in (W0, W1):
        iterations = ITERATIONS[work.name]
        pairs: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
        for _ in range(rounds):
            for name in names:
                by_hand, value = (
                    run_once(contestant, work, iterations).microseconds(WARMUP, iterations)
                    for contestant in ("raw", name)
                )
                pairs[name].append((value, by_hand))
        table[work.name] = {
            name: {
                "us": statistics.median(value for value, _ in pairs[name]),
                "over": statistics.median(value - by_hand for value, by_hand in pairs[name]),
                "ratio": statistics.median(value / by_hand for value, by_hand in pairs[name]),
            }
            for name in names
        }
    return table


def growth(name: str, iterations: int = 50_000, window: int = 5_000) -> float:
    """The last iterations of a long run over the first ones, relative to the loop by hand's."""
    ratios = []
    for contestant in (name, "raw"):
        net = run_once(contestant, W0, iterations)
        first = net.microseconds(WARMUP, WARMUP + window)
        ratios.append(net.microseconds(iterations - window, iterations) / first)
    return ratios[0] / ratios[1]


def plot(table: dict[str, dict[str, dict[str, float]]], path: Path) -> None:
    """Draw the overheads as bars."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(table), figsize=(11, 3.6), layout="constrained")
    for axis, (work, rows) in zip(axes, table.items(), strict=True):
        names = [name for name in rows if name != "raw"][::-1]
        values = [rows[name]["over"] for name in names]
        colors = ["#c2410c" if name in ("bare", "defaults") else "#94a3b8" for name in names]
        bars = axis.barh([CONTESTANTS[name][0] for name in names], values, color=colors)
        axis.bar_label(bars, fmt="%+.0f", padding=3)
        axis.margins(x=0.15)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xlabel("microseconds per iteration over the loop by hand")
        axis.set_title(f"{work}: {rows['raw']['us']:.0f} µs by hand", loc="left")
    axes[1].set_yticklabels([])
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--only", default=",".join(CONTESTANTS))
    parser.add_argument("--long", action="store_true", help="also: does the cost grow with time?")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    wanted = ["raw", *(name for name in options.only.split(",") if name != "raw")]
    names = [name for name in wanted if installed(name)]
    table = compare(names, options.rounds)
    print(f"{platform.machine()}, torch {torch.__version__}, Python {platform.python_version()}")
    for work, rows in table.items():
        print(f"\n{work}")
        for name, row in rows.items():
            ratio, over = TARGETS.get((work, name), (None, None))
            bounds = [f"<= {ratio}"] * (ratio is not None) + [f"<= +{over} µs"] * (over is not None)
            missed = (ratio and row["ratio"] > ratio) or (over and row["over"] > over)
            verdict = f"  ({', '.join(bounds)}: {'MISSED' if missed else 'ok'})" if bounds else ""
            print(
                f"  {CONTESTANTS[name][0]:42s} {row['us']:8.1f} µs  {row['over']:+8.1f} µs  "
                f"{row['ratio']:6.3f}{verdict}"
            )
    if options.long:
        for name in ("bare", "defaults"):
            print(f"\ngrowth over 50,000 iterations, {name}: {growth(name):.3f} (1 is none)")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "overhead.json").write_text(json.dumps(table, indent=2))
    if importlib.util.find_spec("matplotlib"):
        plot(table, RESULTS / "overhead.png")
        print(f"\nplot: {RESULTS / 'overhead.png'}", file=sys.stderr)


if __name__ == "__main__":
    main()

"""What single features cost beside the same thing written by hand, as ratios within one run.

    python benchmarks/features.py            # all
    python benchmarks/features.py init       # one of init, averaging, amp, accumulate, clip,
                                             # schedule, checkpoint, sinks

Each round runs every contender once, in turn; the ratio of a round compares neighbours in time, and
the median over the rounds is reported, with the quartiles. MMEngine takes part where it is
installed.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from averaging import averaging
from checkpoints import checkpoints
from sinks import sinks
from step_features import CASES, compare_steps
from torch import nn

from hookengine.model import BaseModule


def compare(
    name: str, contenders: dict[str, Callable[[], Callable[[], object]]], rounds: int
) -> None:
    """Time the contenders in turn and print the ratios to the first.

    Args:
        name: What is measured.
        contenders: By name a function that prepares a run, and returns what is timed.
        rounds: How many times.
    """
    times: dict[str, list[float]] = {key: [] for key in contenders}
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        for round_ in range(-2, rounds):  # two rounds to warm up
            for key, prepare in contenders.items():
                run = prepare()
                start = time.perf_counter()
                run()
                if round_ >= 0:
                    times[key].append(time.perf_counter() - start)
    first, *others = contenders
    print(f"{name}: {first} {1e3 * statistics.median(times[first]):.2f} ms")
    for key in others:
        ratios = [a / b for a, b in zip(times[key], times[first], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(f"  {key:<28} {middle:6.2f} times ({low:.2f} to {high:.2f})")


# -- weight initialization ------------------------------------------------------------------------


def by_hand(model: nn.Module) -> None:
    """What one would write oneself for the configuration below."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.constant_(module.bias, 0)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.weight, 1)
            nn.init.constant_(module.bias, 0)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.constant_(module.bias, 0)


INIT_CFG = [
    dict(type="Kaiming", layer="Conv2d"),
    dict(type="Constant", val=1, layer="BatchNorm2d"),
    dict(type="Normal", std=0.01, layer="Linear"),
]


def init_weights(rounds: int) -> None:
    """``init_weights`` with its record and report, the report's text thrown away."""
    from torchvision.models import resnet50

    bases: dict[str, Any] = {"hookengine": BaseModule}
    with contextlib.suppress(ImportError):
        from mmengine.logging import MMLogger
        from mmengine.model import BaseModule as MMBaseModule

        MMLogger.get_instance("bench").handlers[0].setStream(open(os.devnull, "w"))  # noqa: SIM115
        bases["mmengine 0.10.7"] = MMBaseModule

    def one_module(base: Any, net: nn.Module) -> Any:
        class Model(base):
            def __init__(self) -> None:
                super().__init__(copy.deepcopy(INIT_CFG))
                self.net = net

        return Model()

    def many_modules(base: Any) -> Any:
        class Layer(base):
            def __init__(self) -> None:
                super().__init__(dict(type="Kaiming", layer="Conv2d"))
                self.conv = nn.Conv2d(4, 4, 3)

        class Model(base):
            def __init__(self) -> None:
                super().__init__()
                for index in range(53):
                    self.add_module(f"layer{index}", Layer())

        return Model()

    cases: dict[str, tuple[Callable[[Any], Any], int]] = {
        "ResNet-50, one init_cfg": (lambda base: one_module(base, resnet50()), 1),
        "53 small convolutions, one init_cfg": (
            lambda base: one_module(
                base,
                nn.Sequential(
                    *[nn.Conv2d(4, 4, 3) for _ in range(53)], nn.BatchNorm2d(4), nn.Linear(4, 4)
                ),
            ),
            10,
        ),
        "53 small modules, an init_cfg each": (many_modules, 10),
    }
    for name, (make, factor) in cases.items():

        def prepare(base: Any, make: Callable[[Any], Any] = make) -> Callable[[], object]:
            return make(base).init_weights

        def prepare_by_hand(make: Callable[[Any], Any] = make) -> Callable[[], object]:
            model = make(BaseModule)
            return lambda: by_hand(model)

        contenders: dict[str, Callable[[], Callable[[], object]]] = {"by hand": prepare_by_hand}
        for key, base in bases.items():
            contenders[key] = lambda base=base, prepare=prepare: prepare(base)  # type: ignore[misc]
        compare(name, contenders, rounds * factor)


FEATURES: dict[str, Callable[[int], None]] = {"init": init_weights, "averaging": averaging}
FEATURES["checkpoint"] = checkpoints
FEATURES["sinks"] = sinks
for _feature in CASES:
    FEATURES[_feature] = partial(compare_steps, _feature)


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("features", nargs="*", choices=[[], *FEATURES], default=[])
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.features or FEATURES:
        FEATURES[name](options.rounds)


if __name__ == "__main__":
    main()

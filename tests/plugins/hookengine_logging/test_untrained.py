"""The warning about parameters that get gradients and are in no optimizer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hookengine import BaseModel, OptimWrapper, OptimWrapperDict
from tests.fixtures import MakeRunner

ADVICE = "get gradients, but are in no optimizer"


class Net(BaseModel):
    """A backbone, a head, and a part that is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)
        self.unused = nn.Linear(4, 3)

    def forward(self, inputs: Tensor, labels: Tensor, mode: str = "tensor") -> Any:
        scores = self.head(self.backbone(inputs))
        return {"loss": F.cross_entropy(scores, labels)} if mode == "loss" else scores


def warned(
    make: MakeRunner,
    capsys: pytest.CaptureFixture[str],
    model: Any,
    parameters: Any,
    kind: Any = torch.optim.SGD,
    **options: Any,
) -> list[str]:
    given = parameters if isinstance(parameters, OptimWrapperDict) else kind(parameters, lr=0.1)
    plugins = ["logging", *options.pop("plugins", ())]
    runner = make(model=model, optim_wrapper=given, plugins=plugins, **options)
    runner.train()
    return [line for line in capsys.readouterr().out.splitlines() if ADVICE in line]


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad])
@pytest.mark.parametrize(
    "plugins",
    [(), ("amp", "ema"), (dict(type="accumulate", steps=3), dict(type="clip", max_norm=1.0))],
)
def test_each_is_named_once(
    make: MakeRunner, capsys: pytest.CaptureFixture[str], kind: Any, plugins: Any
) -> None:
    model = Net()
    texts = warned(make, capsys, model, model.head.parameters(), kind, plugins=plugins)
    assert len(texts) == 1
    assert "backbone.weight, backbone.bias." in texts[0]
    assert "head" not in texts[0]
    assert "unused" not in texts[0]


@pytest.mark.parametrize("case", ["all", "frozen", "detached", "unused"])
def test_what_needs_no_warning(
    make: MakeRunner, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    model: Any = Net()
    parameters = [*model.head.parameters()]
    if case == "all":
        parameters = [*model.parameters()]
    elif case == "frozen":
        model.backbone.requires_grad_(False)
    elif case == "detached":
        model.backbone.register_forward_hook(lambda module, inputs, outputs: outputs.detach())
    else:
        parameters += model.backbone.parameters()
    assert warned(make, capsys, model, parameters) == []


def test_a_layer_that_is_unfrozen_and_not_added(
    make: MakeRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Net()
    model.backbone.requires_grad_(False)
    runner = make(
        model=model,
        optim_wrapper=torch.optim.SGD(model.head.parameters(), lr=0.1),
        plugins=["logging"],
        train_cfg=dict(max_epochs=4),
    )

    @runner.on("before_train_epoch")
    def unfreeze(runner: Any) -> None:
        model.backbone.requires_grad_(runner.progress.epoch >= 2)

    runner.train()
    printed = capsys.readouterr().out
    assert printed.count(ADVICE) == 1
    assert "backbone.weight, backbone.bias." in printed


@pytest.mark.parametrize("left_out", [False, True])
def test_any_of_several_optimizers_counts(
    make: MakeRunner, capsys: pytest.CaptureFixture[str], left_out: bool
) -> None:
    """As in a GAN, where the generator's loss also reaches the discriminator."""

    class Gan(BaseModel):
        def __init__(self) -> None:
            super().__init__()
            self.generator, self.discriminator = nn.Linear(4, 4), nn.Linear(4, 1)
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, inputs: Any, labels: Any, mode: str = "tensor") -> Any:
            return self.scale * self.discriminator(self.generator(inputs))

        def train_step(self, data: Any, optim_wrapper: Any) -> dict[str, Tensor]:
            for name, sign in (("discriminator", 1), ("generator", -1)):
                optim_wrapper[name].update_params(sign * self(*data).mean())
            return {}

    model = Gan()
    parameters = [*model.generator.parameters(), *([] if left_out else [model.scale])]
    wrappers = {
        "generator": OptimWrapper(torch.optim.SGD(parameters, lr=0.1)),
        "discriminator": OptimWrapper(torch.optim.SGD(model.discriminator.parameters(), lr=0.1)),
    }
    texts = warned(make, capsys, model, OptimWrapperDict(**wrappers))
    assert len(texts) == left_out
    assert "them: scale." in "".join(texts) or not left_out


def test_many_are_counted(make: MakeRunner, capsys: pytest.CaptureFixture[str]) -> None:
    class Deep(Net):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))  # type: ignore[assignment]

    model = Deep()
    (text,) = warned(make, capsys, model, model.head.parameters())
    assert "backbone.0.weight, " in text
    assert " and 3 more. " in text


def test_the_search_gets_rarer(make: MakeRunner) -> None:
    """The names of all parameters are looked up only in a few of the records."""
    calls: list[None] = []

    class Counting(Net):
        def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
            calls.append(None)
            return super().named_parameters(*args, **kwargs)

    def count(epochs: int) -> int:
        model = Counting()
        runner = make(model=model, plugins=["logging"], train_cfg=dict(max_epochs=epochs))
        calls.clear()
        runner.train()
        return len(calls)

    assert count(32) - count(4) == 3

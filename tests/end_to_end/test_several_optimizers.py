"""Each plugin between loss and step, per optimizer, beside a GAN that is trained by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from hookengine import BaseModel, Runner

PARTS = ("discriminator", "generator")
WINDOWS = {"discriminator": 2, "generator": 3}
NORMS = {"discriminator": 0.2, "generator": 0.1}
EPOCHS = 4


class GAN(BaseModel):
    """Two small networks that train against each other."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.generator = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 4))
        self.discriminator = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))

    def forward(self, real: Tensor, mode: str = "tensor") -> Tensor:
        raise NotImplementedError

    def loss_of(self, part: str, real: Tensor) -> Tensor:
        fake = self.generator(torch.randn(len(real), 2))
        if part == "generator":
            scores, wanted = self.discriminator(fake), torch.ones(len(real), 1)
        else:
            scores = self.discriminator(torch.cat([real, fake.detach()]))
            wanted = torch.cat([torch.ones(len(real), 1), torch.zeros(len(real), 1)])
        return F.binary_cross_entropy_with_logits(scores, wanted)

    def train_step(self, data: Any, optim_wrapper: Any) -> dict[str, Tensor]:
        (real,) = self.data_preprocessor(data, training=True)
        log_vars = {}
        for part in PARTS:
            self.discriminator.requires_grad_(part == "discriminator")
            with optim_wrapper[part].optim_context(self):
                losses: dict[str, Any] = {"loss": self.loss_of(part, real)}
            loss, parsed = self.parse_losses(losses)
            optim_wrapper[part].update_params(loss)
            log_vars[f"loss_{part}"] = parsed["loss"]
        return log_vars


def batches() -> DataLoader[Any]:
    real = torch.randn(21, 4, generator=torch.Generator().manual_seed(1)) + 2
    return DataLoader(TensorDataset(real), batch_size=3)


def plugins(dtype: str) -> list[Any]:
    amp = dict(type="amp", dtype=dtype, init_scale=2.0**20, growth_interval=3)
    each = [
        dict(type=kind, plugin_name=f"{kind} of {part}", optimizer=part, **options)
        for part in reversed(PARTS)
        for kind, options in (
            ("schedule", dict(scheduler="CosineAnnealingLR", by_epoch=False)),
            ("clip", dict(max_norm=NORMS[part])),
            ("accumulate", dict(steps=WINDOWS[part])),
        )
    ]
    return [*each, amp] if dtype != "float32" else each


def by_hand(dtype: str) -> tuple[GAN, dict[str, int], int]:
    model = GAN()
    optimizers, scalers, schedulers = {}, {}, {}
    for part in PARTS:
        optimizers[part] = torch.optim.SGD(getattr(model, part).parameters(), lr=0.5, momentum=0.9)
        scalers[part] = torch.amp.GradScaler(
            "cpu", init_scale=2.0**20, growth_interval=3, enabled=dtype == "float16"
        )
        total = EPOCHS * -(-7 // WINDOWS[part])
        schedulers[part] = torch.optim.lr_scheduler.CosineAnnealingLR(optimizers[part], total)
    steps, skipped = dict.fromkeys(PARTS, 0), 0
    torch.manual_seed(3)
    for _ in range(EPOCHS):
        for index, (real,) in enumerate(batches()):
            for part in PARTS:
                k = WINDOWS[part]
                model.discriminator.requires_grad_(part == "discriminator")
                enabled = dtype != "float32"
                kind = getattr(torch, dtype) if enabled else None
                with torch.autocast("cpu", kind, enabled=enabled):
                    loss = model.loss_of(part, real)
                held = min(k, 7 - index // k * k)
                scalers[part].scale(loss * (3 / (3 * held))).backward()
                if (index + 1) % k and index < 6:
                    continue
                parameters = [*getattr(model, part).parameters()]
                scalers[part].unscale_(optimizers[part])
                nn.utils.clip_grad_norm_(parameters, NORMS[part])
                before = scalers[part].get_scale()
                scalers[part].step(optimizers[part])
                scalers[part].update()
                optimizers[part].zero_grad()
                if scalers[part].get_scale() >= before:
                    steps[part] += 1
                    schedulers[part].step()
                else:
                    skipped += 1
    return model, steps, skipped


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_everything_per_optimizer(dtype: str, tmp_path: Path) -> None:
    sgd = dict(type="SGD", lr=0.5, momentum=0.9)
    with Runner(
        GAN(),
        tmp_path,
        train_dataloader=batches(),
        train_cfg=dict(max_epochs=EPOCHS),
        optim_wrapper={part: dict(optimizer=sgd) for part in reversed(PARTS)},
        plugins=plugins(dtype),
        defaults=(),
    ) as runner:
        runner.on("before_train")(lambda: torch.manual_seed(3))
        runner.train()
    model, steps, skipped = by_hand(dtype)
    for name, value in model.state_dict().items():
        assert torch.equal(value, runner.bare_model.state_dict()[name]), name
    assert {name: wrapper.steps for name, wrapper in runner.optim_wrapper.items()} == steps
    assert (skipped > 0) == (dtype == "float16"), "some steps are skipped"


def test_a_run_that_is_cut_goes_on(tmp_path: Path) -> None:
    def runner(epochs: int) -> Runner:
        sgd = dict(type="SGD", lr=0.5, momentum=0.9)
        made = Runner(
            GAN(),
            tmp_path,
            train_dataloader=batches(),
            train_cfg=dict(max_epochs=epochs),
            optim_wrapper={part: dict(optimizer=sgd) for part in PARTS},
            plugins=plugins("float16"),
            defaults=(),
        )
        made.on("before_train_epoch")(lambda runner: torch.manual_seed(runner.progress.epoch))
        return made

    straight, second = runner(EPOCHS), runner(EPOCHS)
    straight.train()
    first = runner(EPOCHS)
    first.train(max_epochs=2)
    torch.save(first.state_dict(), tmp_path / "state.pth")
    second.load_state_dict(torch.load(tmp_path / "state.pth", weights_only=True))
    second.train()
    for name, value in straight.bare_model.state_dict().items():
        assert torch.equal(value, second.bare_model.state_dict()[name]), name
    assert second.state_dict()["plugins"] == straight.state_dict()["plugins"]

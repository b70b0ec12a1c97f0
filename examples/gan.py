"""A small GAN learns to draw scikit-learn's digits: two optimizers and a train_step of its own.

    python examples/gan.py [work_dir] [epochs]

Each plugin may be given for one of the optimizers. What the generator draws is kept in the run's
folder, samples_*.png.
"""

import sys

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.utils import save_image

from hookengine import BaseModel, Plugin, Runner, dist

NOISE = 32


class GAN(BaseModel):
    def __init__(self):
        super().__init__()
        self.generator = nn.Sequential(
            nn.Linear(NOISE, 256), nn.BatchNorm1d(256), nn.ReLU(),
            nn.Linear(256, 256), nn.BatchNorm1d(256), nn.ReLU(),
            nn.Linear(256, 64), nn.Tanh(), nn.Unflatten(1, (1, 8, 8)),
        )  # fmt: skip
        self.discriminator = nn.Sequential(
            nn.Flatten(),
            nn.Linear(64, 256), nn.LeakyReLU(0.2), nn.Dropout(0.3),
            nn.Linear(256, 256), nn.LeakyReLU(0.2), nn.Dropout(0.3),
            nn.Linear(256, 1), nn.Flatten(0),
        )  # fmt: skip

    def draw(self, count):
        device = next(self.parameters()).device
        return self.generator(torch.randn(count, NOISE, device=device))

    def forward(self, images, mode="tensor"):
        return self.draw(len(images))

    def train_step(self, data, optim_wrapper):
        (images,) = self.data_preprocessor(data, training=True)
        log_vars = self.train_part("discriminator", images, optim_wrapper)
        log_vars |= self.train_part("generator", images, optim_wrapper)
        del log_vars["loss"]  # the sum of one part's
        return log_vars

    def train_part(self, name, images, optim_wrapper):
        self.discriminator.requires_grad_(name == "discriminator")
        with optim_wrapper[name].optim_context(self):
            losses = getattr(self, f"{name}_losses")(images)
        parsed_loss, log_vars = self.parse_losses(losses)
        optim_wrapper[name].update_params(parsed_loss)
        return log_vars

    def discriminator_losses(self, images):
        real = self.discriminator(images)
        fake = self.discriminator(self.draw(len(images)).detach())
        return {
            "loss_real": F.binary_cross_entropy_with_logits(real, torch.full_like(real, 0.9)),
            "loss_fake": F.binary_cross_entropy_with_logits(fake, torch.zeros_like(fake)),
        }

    def generator_losses(self, images):
        fake = self.discriminator(self.draw(len(images)))
        return {
            "loss_generator": F.binary_cross_entropy_with_logits(fake, torch.ones_like(fake)),
        }


class Samples(Plugin):
    """Draw the same 64 digits every few epochs."""

    every: int = 10

    def before_train(self, runner):
        generator = torch.Generator().manual_seed(0)
        self.noise = torch.randn(64, NOISE, generator=generator).to(runner.device)

    @torch.no_grad()
    def after_train_epoch(self, runner):
        if runner.progress.epoch % self.every == 0 and dist.is_main_process():
            digits = runner.bare_model.eval().generator(self.noise)
            path = runner.make_run_dir() / f"samples_{runner.progress.epoch:03}.png"
            save_image(F.interpolate(digits, scale_factor=8), path, normalize=True)


def main(work_dir="work_dir", epochs=60):
    torch.manual_seed(0)
    images = torch.tensor(load_digits().images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    adam = dict(type="Adam", lr=2e-4, betas=(0.5, 0.999))
    runner = Runner(
        model=GAN(),
        work_dir=work_dir,
        train_dataloader=DataLoader(TensorDataset(images), batch_size=32, shuffle=True),
        train_cfg=dict(max_epochs=epochs),
        optim_wrapper=dict(
            generator=dict(optimizer=dict(adam, lr=4e-4)),
            discriminator=dict(optimizer=adam),
        ),
        plugins=[
            dict(type="clip", max_norm=1.0, optimizer="discriminator"),
            dict(type="schedule", scheduler="CosineAnnealingLR"),
            Samples(every=max(epochs // 6, 1)),
        ],
    )
    with runner:
        runner.train()
    return runner


if __name__ == "__main__":
    main(*sys.argv[1:2], *map(int, sys.argv[2:3]))

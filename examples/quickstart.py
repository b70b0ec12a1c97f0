"""Fifteen minutes of hookengine: a small CNN learns scikit-learn's 1,797 handwritten digits."""

import sys

import torch
import torch.nn.functional as F
from rich import print
from rich.table import Table
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from hookengine import BaseMetric, BaseModel, Runner, dist


class DigitsCNN(BaseModel):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(64 * 2 * 2, 10),
        )  # fmt: skip

    def forward(self, images, labels, mode):
        scores = self.net(images)
        if mode == "loss":
            return {"loss": F.cross_entropy(scores, labels)}
        return scores, labels


class Accuracy(BaseMetric):
    def process(self, data_batch, data_samples):
        scores, labels = data_samples
        correct = (scores.argmax(dim=1) == labels).sum()
        self.results.append({"correct": correct.cpu(), "total": len(labels)})

    def compute_metrics(self, results):
        correct = sum(item["correct"] for item in results)
        return {"accuracy": 100 * correct / sum(item["total"] for item in results)}


def main(work_dir="work_dir"):
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16  # (1797, 1, 8, 8)
    data = TensorDataset(images, torch.tensor(digits.target))
    train, val = random_split(data, [1437, 360], generator=torch.Generator().manual_seed(0))

    with Runner(
        model=DigitsCNN(),
        work_dir=work_dir,
        train_dataloader=DataLoader(train, batch_size=32, shuffle=True),
        optim_wrapper=dict(optimizer=dict(type="AdamW", lr=2e-3)),
        train_cfg=dict(by_epoch=True, max_epochs=8, val_interval=1),
        val_dataloader=DataLoader(val, batch_size=120),
        val_cfg=dict(loss=True),
        val_evaluator=dict(type=Accuracy),
        plugins=["report"],
    ) as runner:
        metrics = runner.train()
    if not dist.is_main_process():  # started by torchrun, as in examples/digits_ddp.sh
        return metrics

    table = Table(title="digits: 1,437 images to train on, 360 to validate on")
    for column in ("epochs", "iterations", "val loss", "val accuracy", "files in"):
        table.add_column(column)
    progress, results = runner.progress, (f"{metrics['loss']:.3f}", f"{metrics['accuracy']:.2f} %")
    table.add_row(str(progress.epoch), str(progress.iter), *results, str(runner.run_dir))
    print(table)
    return metrics


if __name__ == "__main__":
    main(*sys.argv[1:])

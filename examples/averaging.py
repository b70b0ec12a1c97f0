"""What averaged weights do: validation accuracy, raw beside averaged, on scikit-learn's digits.

    python examples/averaging.py [work_dir] [epochs]

A small CNN is trained on few samples with noisy labels and a learning rate that stays large, so the
raw weights jump about; an exponential moving average (ema) and the mean of the last epochs (swa)
do not. The curves are drawn into averaging.png.
"""

import sys
from pathlib import Path
from statistics import mean

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from hookengine import BaseMetric, Plugin, Runner


class Accuracy(BaseMetric):
    def process(self, data_batch, data_samples):
        scores, labels = data_samples
        self.results.append(((scores.argmax(1) == labels).sum().item(), len(labels)))

    def compute_metrics(self, results):
        return {"accuracy": 100 * sum(r[0] for r in results) / sum(r[1] for r in results)}


class History(Plugin):
    """Keep the metrics of each validation."""

    def before_train(self):
        self.epochs, self.metrics = [], []

    def after_val_epoch(self, runner, metrics):
        self.epochs.append(runner.progress.epoch)
        self.metrics.append(dict(metrics))


def data():
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, val = order[:600], order[600:]
    noisy = labels.clone()
    wrong = train[:120]  # every fifth label is a random one
    noisy[wrong] = torch.randint(10, (120,), generator=torch.Generator().manual_seed(1))
    return TensorDataset(images[train], noisy[train]), TensorDataset(images[val], labels[val])


def run(work_dir, epochs, *plugins):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32 * 4, 10),
    )  # fmt: skip
    train, val = data()
    history = History()
    with Runner(
        net,
        work_dir,
        train_dataloader=DataLoader(train, batch_size=20, shuffle=True),
        train_cfg=dict(max_epochs=epochs),
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.05, momentum=0.9)),
        val_dataloader=DataLoader(val, batch_size=400),
        val_evaluator=dict(type=Accuracy),
        loss=F.cross_entropy,
        plugins=[*plugins, history],
    ) as runner:
        runner.train()
    return history


def main(work_dir="work_dir", epochs=30):
    ema = run(work_dir, epochs, dict(type="ema", momentum=0.01, gamma=20, evaluate="both"))
    swa = run(work_dir, epochs, dict(type="swa", begin=0.5))
    raw = [metrics["accuracy"] for metrics in ema.metrics]
    averaged = [metrics["ema/accuracy"] for metrics in ema.metrics]
    final = swa.metrics[-1]["swa/accuracy"]
    figure, axes = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    axes.plot(ema.epochs, raw, color="#94a3b8", label="raw weights")
    axes.plot(ema.epochs, averaged, color="#2563eb", linewidth=2, label="ema, momentum 0.01")
    axes.plot(epochs, final, "o", color="#b45309", markersize=8, label="swa over the last half")
    axes.axvline(epochs / 2, color="#b45309", linewidth=0.8, linestyle=":")
    low = min(min(raw[len(raw) // 3 :]), min(averaged[len(raw) // 3 :]))
    axes.set(xlabel="epoch", ylabel="validation accuracy, %", ylim=(low - 2, None))
    axes.set_title("Averaged weights on noisy digits", loc="left")
    axes.legend(loc="lower right", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    path = Path(work_dir) / "averaging.png"
    figure.savefig(path, dpi=130)
    plt.close(figure)
    raw_mean, averaged_mean = (mean(values[-epochs // 3 :]) for values in (raw, averaged))
    print(
        f"last third: raw {raw_mean:.2f} %, ema {averaged_mean:.2f} %; at the end swa {final:.2f} %"
    )
    print(f"plot: {path}")
    return raw, averaged, final


if __name__ == "__main__":
    main(*sys.argv[1:2], *map(int, sys.argv[2:3]))

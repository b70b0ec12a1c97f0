"""The examples run, as a user would run them."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hookengine import PLUGINS
from tests import forks
from tests.fixtures import MakeRunner

ROOT = Path(__file__).parents[2]


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.process
def test_quickstart_reaches_97_percent_and_ends_with_a_table(tmp_path: Path) -> None:
    done = forks.run_file(ROOT / "examples" / "quickstart.py", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (run,) = tmp_path.iterdir()
    history = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    validated = [record for record in history if record["phase"] == "val"]
    assert [record["epoch"] for record in validated] == list(range(1, 9))
    assert validated[-1]["accuracy"] >= 97
    assert f"{validated[-1]['accuracy']:.2f} %" in done.stdout
    assert "val accuracy" in done.stdout
    assert (run / "run.json").exists()


class SmallCifar:
    """Eight random images of CIFAR-10's shape, behind torchvision's signature."""

    def __init__(self, root: str, train: bool, download: bool, transform: Any) -> None:
        generator = np.random.default_rng(int(train))
        self.images = generator.integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
        self.labels = generator.integers(0, 10, 8)
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        return self.transform(Image.fromarray(self.images[index])), int(self.labels[index])


def test_the_seeds_cifar10_pipeline_runs(tmp_path: Path) -> None:
    runner = load("cifar10").main(dataset=SmallCifar, work_dir=tmp_path, max_epochs=2)
    assert runner.progress.step == 2
    assert set(runner.val_loop.metrics) == {"accuracy"}
    runner.close()


# -- the README ---------------------------------------------------------------------------------

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.process
def test_the_readmes_example_is_short_and_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = BLOCKS[0]
    assert len(example.splitlines()) <= 80
    monkeypatch.chdir(tmp_path)
    (tmp_path / "example.py").write_text(example)
    done = subprocess.run(
        [sys.executable, "example.py"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    (metrics,) = tmp_path.glob("work_dir/*/metrics.jsonl")
    last = json.loads(metrics.read_text().splitlines()[-1])
    assert last["phase"] == "val"
    assert last["accuracy"] >= 97


def test_the_readmes_hook_is_ten_lines_and_works(make: MakeRunner) -> None:
    (hook,) = (block for block in BLOCKS if "(Plugin)" in block)
    code = [line for line in hook.splitlines() if line.strip() and "import" not in line]
    assert len(code) <= 10
    namespace: dict[str, Any] = {}
    exec(hook, namespace)
    (plugin,) = (
        value
        for name, value in namespace.items()
        if isinstance(value, type) and value.__module__ == "builtins" and name != "Plugin"
    )
    plain, noisy = make(), make(plugins=[plugin()])
    plain.train()
    noisy.train()
    assert not plain.bare_model.net.weight.equal(noisy.bare_model.net.weight)


def test_the_readmes_other_snippets_are_python() -> None:
    for block in BLOCKS:
        compile(block, "README", "exec")


@pytest.mark.parametrize("name", PLUGINS.names())
def test_the_readme_lists_every_plugin(name: str) -> None:
    assert f"`{name}`" in README


def test_what_the_readme_links_to_is_there() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_gan_trains_both_its_parts_and_draws(tmp_path: Path) -> None:
    runner = load("gan").main(tmp_path, epochs=3)
    assert {name: one.steps for name, one in runner.optim_wrapper.items()} == {
        "generator": 3 * 57,
        "discriminator": 3 * 57,
    }
    last = json.loads((runner.run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    for name in ("loss_real", "loss_fake", "loss_generator", "discriminator/grad_norm"):
        assert 0 < last[name] < 10, name
    assert "loss" not in last
    for epoch in (1, 2, 3):
        with Image.open(runner.run_dir / f"samples_{epoch:03}.png") as image:
            assert image.size == (8 * 66 + 2, 8 * 66 + 2)


def test_the_averages_are_drawn(tmp_path: Path) -> None:
    raw, averaged, final = load("averaging").main(tmp_path, epochs=8)
    assert len(raw) == len(averaged) == 8
    assert averaged != raw
    assert 50 < final <= 100
    with Image.open(tmp_path / "averaging.png") as image:
        assert image.width > 800

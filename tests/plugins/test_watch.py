"""Histograms of gradients and parameters: those of the step, and nothing else changes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from hookengine import Histogram, Plugin, Record, Runner, Sink
from tests.fixtures import MakeRunner, Toy
from tests.ranks import on_ranks


class Keeping(Sink):
    """Keeps the histograms by iteration."""

    def __post_init__(self) -> None:
        self.media: dict[int, dict[str, Any]] = {}

    def write(self, record: Record) -> None:
        if record.media:
            self.media[record.iter] = dict(record.media)


class Real(Plugin):
    """Keeps copies of the gradients and parameters of each step."""

    def __post_init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def before_optim_step(self, runner: Any) -> None:
        named = runner.bare_model.named_parameters()
        kept = {}
        for name, parameter in named:
            kept[f"parameters/{name}"] = parameter.detach().clone()
            if parameter.grad is not None:
                kept[f"gradients/{name}"] = parameter.grad.clone()
        self.steps.append(kept)


def watched(make: MakeRunner, *plugins: Any, **options: Any) -> tuple[Any, Keeping]:
    sink = Keeping()
    watch = {k: options.pop(k) for k in ("what", "every", "bins") if k in options}
    runner = make(
        plugins=[dict(type="logging", interval=1), sink, dict(type="watch", **watch), *plugins],
        **options,
    )
    runner.train()
    runner.close()
    assert sink.failures == 0
    return runner, sink


def is_of(histogram: Histogram, tensor: Tensor) -> bool:
    """Whether these are torch's counts of these values."""
    values, (low, high) = tensor.double().reshape(-1), (tensor.min().item(), tensor.max().item())
    counts = torch.histc(values, len(histogram.counts), low, high)
    ends = histogram.edges[0], histogram.edges[-1]
    return histogram.counts == counts.tolist() and ends == (low, high)


@pytest.mark.parametrize(
    ("what", "kinds"),
    [
        ("gradients", {"gradients"}),
        ("parameters", {"parameters"}),
        ("all", {"gradients", "parameters"}),
    ],
)
def test_they_are_those_of_the_step(make: MakeRunner, what: str, kinds: set[str]) -> None:
    real = Real()
    _, sink = watched(make, real, what=what, every=1, bins=7)
    assert [*sink.media] == [*range(1, 11)]
    for iteration, media in sink.media.items():
        assert {name.partition("/")[0] for name in media} == kinds
        assert {name.partition("/")[2] for name in media} == {"net.weight", "net.bias"}
        for name, histogram in media.items():
            assert len(histogram.counts) == 7
            assert is_of(histogram, real.steps[iteration - 1][name]), (iteration, name)


def test_gradients_are_of_the_whole_batch_and_clipped(make: MakeRunner) -> None:
    real = Real()
    plugins = [dict(type="accumulate", steps=2), dict(type="clip", max_norm=0.01), real]
    _, sink = watched(make, *plugins, every=2)
    assert [*sink.media] == [2, 5, 9]  # the steps 1, 3 and 5; the end of an epoch is one
    for iteration, media in sink.media.items():
        for name, histogram in media.items():
            largest = max(map(abs, (histogram.edges[0], histogram.edges[-1])))
            assert largest <= 0.01, (iteration, name)


@pytest.mark.parametrize(("every", "expected"), [(3, [1, 4, 7, 10]), (10, [1]), (1000, [1])])
def test_they_are_taken_before_the_first_step_and_then_now_and_then(
    make: MakeRunner, every: int, expected: list[int]
) -> None:
    _, sink = watched(make, every=every)
    assert [*sink.media] == expected


def test_a_run_that_goes_on_keeps_the_rhythm(make: MakeRunner) -> None:
    sink = Keeping()
    plugins = [dict(type="logging", interval=1), dict(type="watch", every=3), sink]
    runner = make(plugins=plugins)
    states: list[Any] = []
    runner.on("safe_point")(lambda runner: states.append(copy.deepcopy(runner.state_dict())))
    runner.train()
    runner.close()
    rest = Keeping()
    again = make(plugins=[*plugins[:2], rest])
    again.load_state_dict(states[4])
    again.train()
    again.close()
    assert [*sink.media] == [1, 4, 7, 10]
    assert [iteration for iteration in rest.media if iteration > 5] == [7, 10]


def test_each_of_several_optimizers_has_its_own_parameters(make: MakeRunner) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)
            self.calls = 0

        def train_step(self, data: Any, optim_wrapper: Any) -> None:
            self.calls += 1
            optim_wrapper["a"].update_params(self.a(data[0]).sum())
            if self.calls % 2:
                optim_wrapper["b"].update_params(self.b(data[0]).square().sum())

    model = Two()
    sgd = torch.optim.SGD
    optimizers = dict(a=sgd(model.a.parameters(), lr=0.1), b=sgd(model.b.parameters(), lr=0.1))
    _, sink = watched(make, model=model, optim_wrapper=optimizers, every=4)
    a = {"gradients/a.weight", "gradients/a.bias"}
    b = {"gradients/b.weight", "gradients/b.bias"}
    assert {iteration: set(media) for iteration, media in sink.media.items()} == {
        1: a | b,
        5: a,
        9: a | b,  # the ninth step of one, the fifth of the other
    }


def test_a_parameter_without_a_gradient_has_no_histogram_of_it(
    make: MakeRunner,
) -> None:
    class Spare(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.spare = nn.Parameter(torch.ones(3))

    _, sink = watched(make, model=Spare(), what="all", every=5)
    assert "parameters/spare" in sink.media[1]
    assert "gradients/spare" not in sink.media[1]


def test_a_gradient_of_nans_is_counted_as_nothing(make: MakeRunner) -> None:
    class Spoils(Plugin):
        def before_optim_step(self, runner: Any) -> None:
            for parameter in runner.bare_model.parameters():
                parameter.grad.fill_(float("nan"))

    runner = make(
        plugins=[
            dict(type="logging", interval=1, nonfinite="warn"),
            sink := Keeping(),
            dict(type="watch", what="all", every=1),
            Spoils(),
        ]
    )
    runner.train()
    runner.close()
    assert sum(sink.media[1]["gradients/net.weight"].counts) == 0
    assert sum(sink.media[2]["parameters/net.weight"].counts) == 0
    assert runner.progress.iter == 10


def test_what_has_no_distribution_is_left_out_and_said_once(
    make: MakeRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(5, 3, sparse=True)
            self.empty = nn.Parameter(torch.zeros(0))
            self.phase = nn.Parameter(torch.zeros(1, dtype=torch.complex64))

        def forward(self, inputs: Tensor, labels: Tensor) -> Tensor:
            scores = self.words(labels) + self.phase.abs() + self.empty.sum()
            return nn.functional.cross_entropy(scores, labels)

        def train_step(self, data: Any, optim_wrapper: Any) -> dict[str, Tensor]:
            loss = self(*data)
            optim_wrapper.update_params(loss)
            return {"loss": loss.detach()}

    _, sink = watched(make, model=Odd(), what="all", every=1)
    assert {*sink.media[1]} == {"parameters/words.weight"}
    out = capsys.readouterr().out
    assert out.count("watch: gradients/words.weight is left out: complex and sparse") == 1
    assert out.count("watch: parameters/phase is left out") == 1
    assert out.count("watch: parameters/empty is left out") == 1


def test_weights_are_bit_identical_with_and_without(make: MakeRunner) -> None:
    plain = make(plugins=["logging"])
    plain.train()
    runner, _ = watched(make, what="all", every=1)
    assert torch.equal(plain.bare_model.net.weight, runner.bare_model.net.weight)


def test_nothing_is_read_from_the_device_between_records(
    make: MakeRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = []
    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy", "nonzero"):
        original = getattr(Tensor, name)

        def watch(self: Tensor, *a: Any, _name: str = name, _f: Any = original, **k: Any) -> Any:
            reads.append((runner.progress.iter, _name))
            return _f(self, *a, **k)

        monkeypatch.setattr(Tensor, name, watch)
    plugins = [dict(type="logging", interval=5), dict(type="watch", what="all", every=1)]
    runner = make(plugins=plugins, train_cfg=dict(max_iters=10))
    reads.clear()
    runner.train()
    # At the start of an epoch (here at 0 and 5) the DataLoader draws its seed.
    assert {iteration for iteration, _ in reads} == {0, 5, 10}
    assert "histogram" in (runner.run_dir / "metrics.jsonl").read_text()


def test_it_does_nothing_where_nobody_listens(make: MakeRunner) -> None:
    runner = make(plugins=[dict(type="watch", what="all", every=1)])
    runner.train()
    assert runner.progress.iter == 10


def watch_a_sharded_model(folder: Path) -> list[Any]:
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(8, 4), torch.arange(8) % 3)
    model = nn.Linear(4, 3)
    weight = model.weight.detach().clone()
    sink = Keeping()
    runner = Runner(
        model,
        folder,
        train_dataloader=DataLoader(data, batch_size=2),
        train_cfg=dict(max_epochs=1),
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.1)),
        loss=nn.functional.cross_entropy,
        device="cpu",
        plugins=[
            *("no:progress_bar", dict(type="logging", interval=1, level="ERROR")),
            *(dict(type="distributed", strategy="fsdp"), sink),
            dict(type="watch", what="all", every=1),
        ],
    )
    runner.train()
    runner.close()
    media = sink.media.get(1, {})
    right = not media or is_of(media["parameters/weight"], weight)
    return [right, {name: sum(histogram.counts) for name, histogram in media.items()}]


@pytest.mark.ranks
def test_what_is_sharded_is_counted_whole(tmp_path: Path) -> None:
    first, second = on_ranks(2, watch_a_sharded_model, tmp_path)
    sizes = {"weight": 12, "bias": 3}
    kinds = ("parameters", "gradients")
    assert first == [True, {f"{kind}/{n}": size for n, size in sizes.items() for kind in kinds}]
    assert second == [True, {}]

"""Lazy layers: an unknown shape is described as such, and a state holds only what has values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.utils.data import DataLoader

from hookengine import BaseModel, Runner, save_weights
from hookengine.model.lazy import count_parameters, lazy_names, with_lazy, without_lazy
from tests.fixtures import MakeData, MakeRunner

pytestmark = pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")


class Scale(LazyModuleMixin, nn.Module):
    """A user's own lazy layer, with a lazy buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.UninitializedParameter()
        self.register_buffer("offset", nn.UninitializedBuffer())

    def initialize_parameters(self, inputs: Tensor) -> None:
        if self.has_uninitialized_params():  # type: ignore[misc]
            self.weight.materialize(inputs.shape[1:])
            self.offset.materialize(inputs.shape[1:])  # type: ignore[operator]
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.offset)  # type: ignore[arg-type]

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs * self.weight + self.offset


class Lazy(BaseModel):
    def __init__(self, forgotten: bool = False) -> None:
        super().__init__()
        conv = nn.Sequential(nn.Unflatten(1, (1, 8)), nn.LazyConv1d(2, 3), nn.Flatten())
        layers = (nn.LazyBatchNorm1d(), nn.LazyLinear(8), Scale(), nn.Dropout(), conv)
        self.net = nn.Sequential(*layers, nn.LazyLinear(3))
        if forgotten:
            self.head = nn.Sequential(nn.LazyLinear(2), nn.LazyBatchNorm1d(affine=False))

    def forward(self, inputs: Tensor, labels: Tensor, mode: str = "tensor") -> Any:
        scores = self.net(inputs)
        if mode == "loss":
            return {"loss": F.cross_entropy(scores, labels)}
        return (scores, labels) if mode == "predict" else scores


DEFAULTS = ("seed", "preprocess", "init", "logging", "checkpoint")
ADAM = dict(optimizer=dict(type="AdamW", lr=0.1))


def parameters_in(runner: Runner) -> Any:
    return json.loads((runner.run_dir / "run.json").read_text())["parameters"]


def test_the_names_and_the_number_of_what_has_no_shape() -> None:
    model = nn.Sequential(nn.LazyBatchNorm1d(affine=False), nn.LazyLinear(2))
    assert lazy_names(model) == ["1.weight", "1.bias", "0.running_mean", "0.running_var"]
    assert count_parameters(model) is None
    model(torch.ones(2, 3))
    assert lazy_names(model) == []
    assert count_parameters(model) == 8


def test_a_state_without_what_has_no_values_can_be_loaded() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LazyBatchNorm1d())
    state = without_lazy(model.state_dict())
    assert [*state] == ["0.weight", "0.bias", "1.num_batches_tracked"]
    assert state._metadata["1"] == {"version": 2}
    other = nn.Sequential(nn.Linear(2, 2), nn.LazyBatchNorm1d())
    other.load_state_dict(with_lazy(other, state))
    assert torch.equal(other.state_dict()["0.weight"], state["0.weight"])
    assert other[1].has_uninitialized_params()
    other(torch.ones(2, 2))
    whole = other.state_dict()
    assert without_lazy(whole) is whole
    assert with_lazy(other, {}) == {}


def test_lazy_layers_train_with_the_default_plugins(make: MakeRunner) -> None:
    runner = make(model=Lazy(), validate=True, plugins=DEFAULTS, optim_wrapper=ADAM)
    counted = []
    runner.on("before_train")(lambda: counted.append(parameters_in(runner)))
    assert "Lazy" in repr(runner)
    runner.train()
    assert counted == [None]
    assert parameters_in(runner) == sum(p.numel() for p in runner.bare_model.parameters()) == 103


def test_a_resumed_run_is_the_same_bit_for_bit(
    make: MakeRunner, data: MakeData, tmp_path: Path
) -> None:
    def run(folder: str, **options: Any) -> Runner:
        return make(
            model=Lazy(),
            work_dir=tmp_path / folder,
            train_dataloader=DataLoader(data(), batch_size=4, shuffle=True),
            plugins=[dict(type="seed", seed=1), *DEFAULTS[1:]],
            optim_wrapper=ADAM,
            **options,
        )

    whole = run("whole")
    whole.train()
    first = run("parts")
    first.on("after_train_iter", every=3, once=True)(lambda: first.stop())
    first.train()
    first.close()
    second = run("parts", resume="auto")
    assert lazy_names(second.bare_model) == []
    second.train()
    assert second.progress.iter == whole.progress.iter == 10
    for name, value in whole.bare_model.state_dict().items():
        assert torch.equal(value, second.bare_model.state_dict()[name]), name


def test_a_layer_that_is_never_called_stays_out_of_the_checkpoint(
    make: MakeRunner, tmp_path: Path
) -> None:
    runner = make(model=Lazy(forgotten=True), plugins=DEFAULTS, name="run")
    runner.train()
    assert parameters_in(runner) is None
    runner.close()
    saved = torch.load(runner.run_dir / "checkpoints/latest/state.pth", weights_only=True)
    assert [n for n in saved["state_dict"] if "head" in n] == ["head.1.num_batches_tracked"]
    resumed = make(model=Lazy(forgotten=True), plugins=DEFAULTS, name="run", resume="auto")
    resumed.train(max_epochs=3)
    assert resumed.progress.iter == 15
    assert "head.0.weight" in lazy_names(resumed.bare_model)


def test_a_state_from_before_the_first_batch_can_be_loaded(make: MakeRunner) -> None:
    state = make(model=Lazy()).state_dict()
    runner = make(model=Lazy())
    runner.load_state_dict(state)
    runner.train()
    with pytest.raises(ValueError, match=r"missing: net\.0\.weight"):
        runner.load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(plugins=["ema"]), "net.0.weight has no shape yet.* Run one batch through the model"),
        (dict(plugins=["swa"]), "net.0.weight has no shape yet.* Run one batch through the model"),
        (
            dict(optim_wrapper=dict(**ADAM, paramwise=dict(flat_decay_mult=0.0))),
            "flat_decay_mult cannot tell whether it is flat. Run one batch through the model",
        ),
        (
            dict(optim_wrapper=torch.optim.SGD(nn.LazyLinear(3).parameters(), lr=1)),
            "holds a parameter of unknown shape that does not belong to the model",
        ),
    ],
)
def test_what_needs_the_shapes_says_so_when_it_is_built(
    make: MakeRunner, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(model=Lazy(), **options)


def test_an_init_cfg_of_a_lazy_layer_says_so_when_it_is_built(make: MakeRunner) -> None:
    model = Lazy()
    model.init_cfg = dict(type="Xavier", layer="Linear")
    with pytest.raises(ValueError, match=r"LazyLinear does not know its shape yet.* Run one batch"):
        make(model=model, plugins=["init"])
    called = Lazy()
    called.net(torch.ones(2, 4))
    called.init_cfg = dict(type="Xavier", layer="Linear")
    make(model=called, plugins=["init", "ema"]).train()


def test_an_optimizer_that_needs_the_shapes_says_so(make: MakeRunner) -> None:
    with pytest.raises(ValueError, match="2D parameters") as caught:
        make(model=Lazy(), optim_wrapper=dict(optimizer=dict(type="Muon")))
    assert "net.0.weight has no shape yet" in caught.value.__notes__[-1]


@pytest.mark.parametrize(
    ("plugins", "paramwise"),
    [
        (["amp"], None),
        ([dict(type="accumulate", steps=2)], None),
        ([dict(type="clip", max_norm=1.0)], None),
        ([dict(type="schedule", scheduler="CosineAnnealingLR")], None),
        ([dict(type="watch", what="all", every=1), "logging", "report", "tensorboard"], None),
        (["syncbn", "distributed"], None),
        ([], dict(custom_keys={"net.0": dict(lr_mult=0.5)}, norm_decay_mult=0.0)),
    ],
)
@pytest.mark.parametrize("forgotten", [False, True])
def test_the_other_plugins_train_lazy_layers(
    make: MakeRunner, plugins: list[Any], paramwise: Any, forgotten: bool
) -> None:
    optim_wrapper: dict[str, Any] = dict(optimizer=dict(type="SGD", lr=0.1))
    if paramwise is not None:
        optim_wrapper["paramwise"] = paramwise
    runner = make(model=Lazy(forgotten), plugins=plugins, optim_wrapper=optim_wrapper)
    runner.train()
    assert all(("head" in name) for name in lazy_names(runner.bare_model))
    assert torch.isfinite(runner.bare_model.net[-1].weight).all()


def test_weights_without_values_are_not_exported(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"weight has no values yet.* Run one batch"):
        save_weights(nn.LazyLinear(2).state_dict(), tmp_path / "weights.safetensors")

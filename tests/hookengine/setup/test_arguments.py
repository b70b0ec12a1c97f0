"""Tests of ``hookengine/setup/arguments.py``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from hookengine import (
    MODELS,
    OptimWrapper,
)
from hookengine.loop.data import dataset_size, length_of
from hookengine.setup.arguments import build_dataloader
from tests.fixtures import MakeData, MakeRunner, Toy
from tests.hookengine.lives import LOADER, Life, Plain


def test_a_dataloader_is_anything_iterable_or_the_arguments_of_one(data: MakeData) -> None:
    loader = build_dataloader(dict(dataset=data(), batch_size=4), "train_dataloader")
    assert isinstance(loader, DataLoader)
    assert length_of(loader) == 5
    assert dataset_size(loader) == 20
    batches = [1, 2]
    assert build_dataloader(batches, "train_dataloader") is batches
    assert dataset_size(batches) is None
    generator = (b for b in batches)
    assert build_dataloader(generator, "train_dataloader") is generator
    assert length_of(generator) is None

    class Indexed:
        def __getitem__(self, index: int) -> int:
            return [1, 2][index]

    assert list(build_dataloader(Indexed(), "train_dataloader")) == [1, 2]


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (3, TypeError, "val_dataloader must be iterable"),
        ([], ValueError, "val_dataloader is empty"),
        (dict(batch_size=3), ValueError, "needs a 'dataset'"),
        (dict(dataset=[1], batchsize=3), TypeError, "val_dataloader: .*batchsize"),
        (dict(dataset=[1], batch_size=3, drop_last=True), ValueError, "drop_last=True"),
    ],
)
def test_what_is_no_dataloader_is_answered(given: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        build_dataloader(given, "val_dataloader")


@pytest.mark.parametrize(
    "build",
    [
        lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
        lambda model: OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.1)),
        lambda model: dict(optimizer=torch.optim.SGD(model.parameters(), lr=0.1)),
        lambda model: dict(optimizer=dict(type="SGD", lr=0.1)),
        lambda model: dict(optimizer=dict(type=torch.optim.SGD, lr=0.1)),
        lambda model: dict(type="OptimWrapper", optimizer=dict(type="SGD", lr=0.1)),
    ],
)
def test_an_optimizer_is_given_in_any_of_these_ways(
    make: MakeRunner, toy: type[Toy], build: Any
) -> None:
    torch.manual_seed(0)
    model = toy()
    runner = make(model=model, optim_wrapper=build(model))
    runner.train()
    other = make()
    other.train()
    assert torch.equal(model.net.weight, other.bare_model.net.weight)


def test_a_model_is_a_module_a_dict_or_a_function(make: MakeRunner, toy: type[Toy]) -> None:
    MODELS.register_module("runner_toy", module=toy, force=True)
    for model in (toy(), dict(type="runner_toy"), toy, lambda: dict(type="runner_toy")):
        runner = make(model=model)
        assert type(runner.bare_model) is toy
        runner.train()


def test_dataloaders_are_given_as_the_arguments_of_one(make: MakeRunner, data: MakeData) -> None:
    runner = make(train_dataloader=dict(dataset=data(), batch_size=5, shuffle=True))
    runner.train()
    assert runner.progress.iter == 8


MISTAKES = [
    (dict(train_cfg=dict(max_epoch=3)), ValueError, "unknown option 'max_epoch'. Did you mean"),
    (dict(train_cfg=None), ValueError, "training needs train_cfg in addition to train_dataloader"),
    (dict(optim_wrapper=None), ValueError, "training needs optim_wrapper in addition to"),
    (dict(val_dataloader=LOADER), ValueError, "val_dataloader .*Pass val_evaluator or val_cfg"),
    (dict(test_evaluator=object()), ValueError, "testing needs test_dataloader in addition to"),
    (dict(val_cfg=dict()), ValueError, "val_cfg .*Pass val_dataloader and val_evaluator"),
    (
        dict(val_cfg=dict(los=True)),
        ValueError,
        "val_cfg: unknown option 'los'. Did you mean 'loss'",
    ),
    (dict(train_dataloader=[]), ValueError, "train_dataloader is empty"),
    (dict(model=Plain()), TypeError, r"Plain has no train_step. Derive .* loss=F.cross_entropy"),
    (dict(model=3), TypeError, "model must be an nn.Module, got int"),
    (dict(loss=F.cross_entropy), TypeError, "Toy is a BaseModel, .* Remove loss="),
    (dict(optim_wrapper=dict(lr=0.1)), ValueError, "needs an 'optimizer'"),
    (dict(optim_wrapper=3), TypeError, "optim_wrapper takes an optimizer"),
    (dict(optim_wrapper=dict(optimizer=3)), TypeError, r"optim_wrapper\['optimizer'\] takes"),
    (
        dict(optim_wrapper=dict(optimizer=dict(type="SDG", lr=1))),
        KeyError,
        "unknown optimizer 'SDG'. Did you mean 'SGD'",
    ),
    (
        dict(optim_wrapper=torch.optim.SGD(Plain().parameters(), lr=0.1)),
        ValueError,
        r"parameter of shape \(3, 4\) that does not belong to the model",
    ),
    (dict(plugins=["ema2000"]), KeyError, "unknown plugin 'ema2000'"),
    (dict(validator=3), TypeError, "Runner: unknown argument 'validator'"),
]


@pytest.mark.parametrize(("options", "error", "message"), MISTAKES)
def test_a_mistake_gets_one_clear_error_at_construction(
    make: MakeRunner, options: Any, error: type, message: str
) -> None:
    with pytest.raises(error, match=message):
        make(**options)


def test_an_error_in_building_the_optimizer_says_what_was_built(make: MakeRunner) -> None:
    with pytest.raises(TypeError) as caught:
        make(optim_wrapper=dict(optimizer=dict(type="SGD", learning_rate=0.1)))
    (note,) = caught.value.__notes__
    assert note.startswith("while building optim_wrapper['optimizer']={'type': 'SGD'")


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (lambda o, t: None, TypeError, r"the loss <lambda> returned None"),
        (lambda o, t: F.cross_entropy(o, t).detach(), ValueError, "does not require a gradient"),
        (lambda o, t: 3.0, TypeError, "'loss' must be a tensor"),
        (lambda o, t: {"cost": o.sum()}, ValueError, "must contain 'loss'"),
    ],
)
def test_a_loss_that_is_none_shows_in_the_first_iteration(
    make: MakeRunner, loss: Any, error: type, message: str
) -> None:
    runner = make(model=Plain(), loss=loss)
    with pytest.raises(error, match=message):
        runner.train()
    assert runner.progress.iter == 0


def test_what_it_has_no_parts_for_is_answered(make: MakeRunner) -> None:
    idle = make(train_dataloader=None, train_cfg=None, optim_wrapper=None)
    with pytest.raises(ValueError, match="needs train_dataloader, train_cfg and optim_wrapper"):
        idle.train()
    with pytest.raises(ValueError, match="Pass val_dataloader and val_evaluator"):
        idle.val()
    with pytest.raises(ValueError, match="Pass test_dataloader and test_evaluator"):
        idle.test()


def test_more_mistakes_are_answered(make: MakeRunner, data: MakeData) -> None:
    class Centres(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.centre = nn.Parameter(torch.zeros(3))

    options: Any
    for options, error, message in [
        (dict(train_dataloader=data()), TypeError, "single samples instead of batches. Wrap it"),
        (dict(model=Plain(), loss="cross_entropy"), TypeError, "loss must be callable"),
        (dict(model=Plain(), loss=Centres()), TypeError, "Centres has parameters, which"),
        (dict(plugins=[3]), TypeError, r"plugin 'int' \(3\) implements no event"),
        (dict(plugins=Life()), TypeError, r"Write plugins=\[...\]"),
    ]:
        with pytest.raises(error, match=message):
            make(**options)
    make(plugins=None)
    three = [(torch.ones(2, 4), torch.ones(2), torch.ones(2))]
    with pytest.raises(
        TypeError, match=r"a tuple of 3 \(Tensor\[2, 4\], Tensor\[2\], Tensor\[2\]\)"
    ):
        make(model=Plain(), loss=F.cross_entropy, train_dataloader=three).train()

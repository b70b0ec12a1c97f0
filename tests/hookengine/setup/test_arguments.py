"""Tests of ``hookengine/setup/arguments.py``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from hookengine import (
    MODELS,
    OptimWrapper,
    Plugin,
)
from hookengine.loop.data import dataset_size, length_of
from hookengine.setup.arguments import build_dataloader
from tests.fixtures import MakeData, MakeRunner, Toy, toy_data
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


def several() -> dict[str, Any]:
    """What users of other frameworks pass for several sets of data."""
    first, second = toy_data(8), toy_data(8, seed=1)
    loaders = DataLoader(first, batch_size=4), DataLoader(second, batch_size=4)

    class Own:
        """A dataloader that is not torch's."""

        dataset = first

        def __iter__(self) -> Any:
            return iter(loaders[0])

    return {
        "a list of dataloaders": [*loaders],
        "a tuple of dataloaders": loaders,
        "one dataloader in a list": [loaders[0]],
        "dataloaders by name": {"a": loaders[0], "b": loaders[1]},
        "a list of datasets": [first, second],
        "datasets by name": {"a": first, "b": second},
        "a list of dicts": [dict(dataset=first, batch_size=4), dict(dataset=second, batch_size=4)],
        "dicts by name": {"a": dict(dataset=first), "b": dict(dataset=second)},
        "a dataloader among batches": [first.tensors, loaders[0]],
        "own dataloaders": [Own(), Own()],
        "generators": [(batch for batch in loader) for loader in loaders],
        "iterable datasets": [Stream(), Stream()],
    }


class Stream(IterableDataset[Any]):
    """A dataset without a length."""

    def __iter__(self) -> Any:
        return iter(toy_data(8))


@pytest.mark.parametrize("phase", ["train", "val", "test"])
@pytest.mark.parametrize("kind", several())
def test_several_dataloaders_are_refused_at_construction(
    make: MakeRunner, phase: str, kind: str
) -> None:
    message = rf"{phase}_dataloader .*takes one dataloader.*ConcatDataset"
    with pytest.raises(TypeError, match=message):
        make(
            validate=phase == "val",
            test=phase == "test",
            **{f"{phase}_dataloader": several()[kind]},
        )


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ([toy_data(8), toy_data(8)], r"a list of datasets.*ConcatDataset"),
        ((toy_data(8),), r"a tuple of datasets.*ConcatDataset"),
        ([dict(type=TensorDataset)] * 2, r"a list of datasets.*ConcatDataset"),
        (DataLoader(toy_data(8)), "a DataLoader, which"),
        (TensorDataset, "the class TensorDataset"),
        ("path/to/data", "a str"),
    ],
)
def test_a_dataset_that_is_none_is_refused_at_construction(
    make: MakeRunner, dataset: Any, message: str
) -> None:
    with pytest.raises(TypeError, match=f"the dataset of val_dataloader is {message}"):
        make(validate=True, val_dataloader=dict(dataset=dataset, batch_size=4))
    if not isinstance(dataset, type):
        with pytest.raises(TypeError, match=f"the dataset of val_dataloader is {message}"):
            make(validate=True, val_dataloader=DataLoader(dataset, batch_size=4))


@pytest.mark.parametrize("given", [DataLoader, "path", b"path"])
def test_a_class_or_a_text_is_no_dataloader(make: MakeRunner, given: Any) -> None:
    with pytest.raises(TypeError, match="val_dataloader must be iterable"):
        make(validate=True, val_dataloader=given)


def test_lists_of_batches_are_dataloaders(make: MakeRunner) -> None:
    batch: Any = toy_data(8).tensors
    named = dict(inputs=batch[0], labels=batch[1])
    for batches in ([batch], (batch, batch), [list(batch)], [named]):
        runner = make(train_dataloader=batches, validate=True, val_dataloader=batches)
        assert "accuracy" in runner.train()
    batches = [{**named, "dataset": ["coco"] * 8}]
    assert build_dataloader(batches, "val_dataloader") is batches
    datasets: Any = [toy_data(4), toy_data(4)]
    loader = DataLoader(datasets, collate_fn=lambda each: each[0][:])  # each one is a batch
    assert build_dataloader(loader, "val_dataloader") is loader


def once() -> dict[str, Any]:
    """Dataloaders that can be used only once."""
    loader = DataLoader(toy_data(8), batch_size=4)
    return {
        "a generator": (batch for batch in loader),
        "an iterator of a list": iter([toy_data(8).tensors]),
        "an iterator of torch": iter(loader),
        "map": map(tuple, loader),
        "zip": zip(*toy_data(8).tensors, strict=True),
    }


@pytest.mark.parametrize("kind", once())
@pytest.mark.parametrize(
    "cfg", [dict(max_epochs=2), dict(max_iters=3, val_interval=2), dict(max_epochs=9, val_begin=8)]
)
def test_an_iterator_is_refused_if_it_is_to_be_validated_on_again(
    make: MakeRunner, kind: str, cfg: dict[str, int]
) -> None:
    with pytest.raises(TypeError, match=r"val_dataloader is an iterator .* validates \d times"):
        make(validate=True, val_dataloader=once()[kind], train_cfg=cfg)


@pytest.mark.parametrize(
    "cfg", [dict(max_epochs=1), dict(max_epochs=9, val_begin=9), dict(max_iters=3)]
)
def test_an_iterator_is_enough_for_a_single_validation(
    make: MakeRunner, cfg: dict[str, int]
) -> None:
    for kind in ("a generator", "an iterator of torch"):
        runner = make(validate=True, val_dataloader=once()[kind], train_cfg=cfg)
        assert "accuracy" in runner.train()
        with pytest.raises(ValueError, match=r"val dataloader yielded no batch.*used only once"):
            runner.val()


def test_an_iterator_that_starts_over_validates_every_epoch(make: MakeRunner) -> None:
    class Restarts:
        """As the iterators of DALI."""

        def __iter__(self) -> Any:
            self.batches = iter([toy_data(8).tensors])
            return self

        def __next__(self) -> Any:
            return next(self.batches)

    assert "accuracy" in make(validate=True, val_dataloader=Restarts()).train()


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


def test_a_wrapper_without_the_steps_of_the_model_is_refused(make: MakeRunner) -> None:
    class Wrapping(Plugin, name="wrapping"):
        def wrap_model(self, model: nn.Module) -> nn.Module:
            return nn.Sequential(model)

    expected = (
        r"plugin 'wrapping' returned a Sequential from wrap_model, .* no train_step, val_step\."
    )
    with pytest.raises(TypeError, match=expected):
        make(plugins=[Wrapping()], validate=True)

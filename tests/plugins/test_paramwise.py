"""Parameter groups by name, layer and kind of parameter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hookengine.model import param_groups
from tests.fixtures import MakeRunner, Toy


class Net(nn.Module):
    """A backbone with norms, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.backbone = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4))
        self.head = nn.Linear(4, 3)
        self.scale = nn.Parameter(torch.ones(()))


def treatment(module: nn.Module, **options: Any) -> dict[str, tuple[float, float]]:
    """(learning rate, weight decay) by name."""
    groups = param_groups(module, lr=1.0, weight_decay=1.0, **options)
    names = {parameter: name for name, parameter in module.named_parameters()}
    assert len({g["group_name"] for g in groups}) == len(groups)
    return {names[p]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}


def test_without_rules_there_is_one_group_of_all() -> None:
    net = Net()
    (group,) = param_groups(net, lr=0.1)
    assert {*group["params"]} == {*net.parameters()}
    assert group["lr"] == 0.1
    assert "weight_decay" not in group


def test_the_usual_no_decay_for_norms_and_biases() -> None:
    treated = treatment(Net(), norm_decay_mult=0, bias_decay_mult=0)
    undecayed = {name for name, (_, decay) in treated.items() if decay == 0}
    assert undecayed == {
        "backbone.0.bias", "backbone.1.weight", "backbone.1.bias", "backbone.2.bias", "head.bias"
    }  # fmt: skip
    assert {lr for lr, _ in treated.values()} == {1.0}


def test_the_longest_name_wins_and_others_fill_in_what_it_leaves_open() -> None:
    treated = treatment(
        Net(),
        custom_keys={
            "backbone": dict(lr_mult=0.1),
            "backbone.2": dict(lr_mult=0.5, decay_mult=3),
            "head": dict(decay_mult=2),
        },
        bias_lr_mult=7,
        norm_decay_mult=0,
    )
    assert treated == {
        "embed.weight": (1, 1),
        "scale": (1, 1),
        "backbone.0.weight": (0.1, 1),
        "backbone.0.bias": (0.1, 1),
        "backbone.1.weight": (0.1, 0),
        "backbone.1.bias": (0.1, 0),
        "backbone.2.weight": (0.5, 3),
        "backbone.2.bias": (0.5, 3),
        "head.weight": (1, 2),
        "head.bias": (7, 2),
    }


def test_layers_by_class_and_flat_parameters() -> None:
    class Special(nn.Linear):
        pass

    net = Net()
    net.head = Special(4, 3)
    treated = treatment(
        net,
        layers={
            "Linear": dict(lr_mult=2),
            "Special": dict(lr_mult=3),
            "Embedding": dict(decay_mult=0),
        },
        flat_decay_mult=0.5,
    )
    assert treated["head.weight"] == (3, 1)
    assert treated["backbone.0.weight"] == (2, 1)
    assert treated["backbone.0.bias"] == (2, 0.5)
    assert treated["embed.weight"] == (1, 0)
    assert treated["scale"] == (1, 0.5)


def test_norms_of_others_are_known_by_name() -> None:
    class LlamaRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

    assert treatment(nn.Sequential(LlamaRMSNorm()), norm_decay_mult=0) == {"0.weight": (1, 0)}


def test_frozen_parameters_stay_in_their_groups() -> None:
    net = Net()
    expected = treatment(net, custom_keys={"backbone": dict(lr_mult=0.1)})
    net.backbone.requires_grad_(False)
    assert treatment(net, custom_keys={"backbone": dict(lr_mult=0.1)}) == expected
    net.requires_grad_(False)
    assert treatment(net, custom_keys={"backbone": dict(lr_mult=0.1)}) == expected
    with pytest.raises(ValueError, match="Sequential has no parameters"):
        param_groups(nn.Sequential(), lr=0.1)


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_a_layer_that_is_unfrozen_later_trains(
    make: MakeRunner, toy: type[Toy], optimizer: str
) -> None:
    def run(paramwise: dict[str, Any] | None) -> Any:
        torch.manual_seed(0)
        model = toy()
        model.net.bias.requires_grad_(False)
        cfg = dict(optimizer=dict(type=optimizer, lr=0.1, weight_decay=0.5), paramwise=paramwise)
        runner = make(model=model, optim_wrapper=cfg if paramwise else dict(cfg, paramwise=None))
        frozen = model.net.bias.clone()

        @runner.on("before_train_epoch")
        def unfreeze(runner: Any) -> None:
            if runner.progress.epoch == 1:
                assert torch.equal(model.net.bias, frozen)
                model.net.bias.requires_grad_(True)

        runner.train()
        assert not torch.equal(model.net.bias, frozen)
        return model.net.bias

    assert torch.equal(run(dict(custom_keys={"bias": dict(lr_mult=1.0)})), run(None))


def test_tied_weights_are_taken_once_and_refused_where_they_are_treated_in_two_ways() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(3, 4)
            self.head = nn.Linear(4, 3, bias=False)
            self.head.weight = self.embed.weight

    assert treatment(Tied(), bias_decay_mult=0) == {"embed.weight": (1, 1)}
    with pytest.raises(ValueError, match=r"'embed.weight' and 'head.weight' are the same"):
        param_groups(Tied(), lr=1, custom_keys={"head": dict(lr_mult=0.1)})
    shared = nn.Linear(2, 2)
    twice = nn.Sequential(shared, shared)
    assert len(treatment(twice, bias_lr_mult=2)) == 2


def test_through_the_runner(make: MakeRunner) -> None:
    runner = make(
        optim_wrapper=dict(
            optimizer=dict(type="AdamW", lr=0.1), paramwise=dict(bias_decay_mult=0, bias_lr_mult=2)
        )
    )
    groups = runner.optim_wrapper.param_groups
    assert [(g["lr"], g["weight_decay"]) for g in groups] == [(0.1, 0.01), (0.2, 0.0)]
    runner.train()
    again = make(
        optim_wrapper=dict(
            optimizer=dict(type="AdamW", lr=0.1), paramwise=dict(bias_decay_mult=0, bias_lr_mult=2)
        )
    )
    again.load_state_dict(runner.state_dict())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            dict(custom_keys={"backbon.0.": {"lr_mult": 1}}),
            ValueError,
            "matches no parameter of Net",
        ),
        (dict(custom_keys={"heed": {"lr_mult": 1}}), ValueError, "Did you mean 'head'"),
        (dict(layers={"Conv2d": {"lr_mult": 1}}), ValueError, "'Conv2d' in layers matches no"),
        (dict(custom_keys=["head"]), TypeError, "custom_keys takes a dict"),
        (dict(custom_keys={"head": 0.1}), TypeError, r"custom_keys\['head'\] takes dict\(lr_mult"),
        (dict(layers={"Linear": {"lr": 1}}), TypeError, "has no option 'lr'"),
        (
            dict(layers={"Linear": {"lr_mult": -1}}),
            ValueError,
            "lr_mult=-1 is not a valid multiplier",
        ),
        (dict(custom_keys={"head": {"lr_mult": float("nan")}}), ValueError, "lr_mult=nan is no"),
        (dict(bias_lr_mult=-1), ValueError, "bias_lr_mult=-1 is not a valid multiplier"),
        (dict(norm_decay_mult="2"), ValueError, "norm_decay_mult='2' is not a valid multiplier"),
        (dict(bias_lr_mul=1), TypeError, "bias_lr_mul"),
    ],
)
def test_what_cannot_be_is_refused(options: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        param_groups(Net(), lr=0.1, weight_decay=0.1, **options)


def test_what_the_runner_refuses(make: MakeRunner, toy: type[Toy]) -> None:
    model = toy()
    rules = dict(bias_lr_mult=2)
    with pytest.raises(ValueError, match=r"which is already built. Pass dict\(type='SGD'"):
        make(
            model=model,
            optim_wrapper=dict(optimizer=torch.optim.SGD(model.parameters(), 0.1), paramwise=rules),
        )
    for name in ("bias_lr_mul", "bypass_duplicate", "lr"):
        with pytest.raises(TypeError, match=f"paramwise: unknown option '{name}'.*bias_lr_mult"):
            make(optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.1), paramwise={name: 1}))
    with pytest.raises(TypeError, match="paramwise takes a dict"):
        make(optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.1), paramwise=3))
    with pytest.raises(TypeError, match="'paramwise_cfg' comes from MMEngine"):
        make(optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.1), paramwise_cfg=rules))
    with pytest.raises(ValueError, match="a multiplier of weight_decay needs the optimizer's"):
        param_groups(nn.Linear(1, 1), lr=0.1, bias_decay_mult=0)


def test_an_optimizer_by_name_gets_the_part_of_its_name(make: MakeRunner) -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = Net(), Net()

        def train_step(self, data: Any, optim_wrapper: Any) -> Any: ...

    model = Pair()
    sgd = dict(type="SGD", lr=0.1)
    runner = make(
        model=model,
        optim_wrapper=dict(
            a=dict(optimizer=sgd, paramwise=dict(bias_lr_mult=2)), b=dict(optimizer=sgd)
        ),
    )
    assert {*runner.optim_wrapper["a"].parameters()} == {*model.a.parameters()}
    assert {*runner.optim_wrapper["b"].parameters()} == {*model.b.parameters()}
    assert len(runner.optim_wrapper["a"].param_groups) == 2
    with pytest.raises(KeyError, match=r"unknown part of the model 'c'.*Known: a, b.*you built"):
        make(model=Pair(), optim_wrapper=dict(c=dict(optimizer=sgd)))

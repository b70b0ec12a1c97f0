"""Averaged models: their numbers, their states, and what they refuse."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hookengine.model import (
    BaseAveragedModel,
    ExponentialMovingAverage,
    MomentumAnnealingEMA,
    StochasticWeightAverage,
)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def move(model: nn.Module, seed: int) -> None:
    """Other weights and buffers, as a training step would leave."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
            else:
                tensor.add_(1)


def history(averaged: BaseAveragedModel, model: nn.Module, updates: int) -> list[dict[str, Tensor]]:
    """The model's states at the updates."""
    states = []
    for seed in range(updates):
        move(model, seed)
        states.append({n: v.clone() for n, v in model.state_dict().items()})
        averaged.update_parameters(model)
    return states


def weights(kind: str, steps: int, interval: int) -> float:
    """The weight of the value taken in, by the formulas of the papers."""
    return {
        "ema": 0.1,
        "annealing": max(0.1, 5 / (5 + steps)),
        "swa": 1 / (steps // interval + 1),
    }[kind]


CLASSES = {
    "ema": lambda model, **o: ExponentialMovingAverage(model, momentum=0.1, **o),
    "annealing": lambda model, **o: MomentumAnnealingEMA(model, momentum=0.1, gamma=5, **o),
    "swa": StochasticWeightAverage,
}


@pytest.mark.parametrize("update_buffers", [False, True])
@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize("kind", CLASSES)
def test_the_average_is_that_of_the_formula(kind: Any, interval: int, update_buffers: bool) -> None:
    model = net().double()
    averaged = CLASSES[kind](model, interval=interval, update_buffers=update_buffers)
    states = history(averaged, model, 8)
    expected = states[0]
    for steps, state in enumerate(states):
        for name, value in state.items():
            is_parameter = name in dict(model.named_parameters())
            if value.is_floating_point() and (is_parameter or update_buffers):
                if steps and steps % interval == 0:
                    weight = weights(kind, steps, interval)
                    expected[name] = expected[name] + weight * (value - expected[name])
            else:
                expected[name] = value
    actual = averaged.module.state_dict()
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-12, atol=1e-12)
    assert averaged.steps == 8


def test_the_mean_of_all_values_is_what_swa_gives() -> None:
    model = net().double()
    averaged = StochasticWeightAverage(model)
    states = history(averaged, model, 6)
    for name, parameter in averaged.module.named_parameters():
        mean = torch.stack([state[name] for state in states]).mean(0)
        torch.testing.assert_close(parameter, mean, rtol=1e-12, atol=1e-12)


def test_a_subclass_that_only_defines_avg_func_works() -> None:
    class Halving(BaseAveragedModel):
        def avg_func(self, averaged_param: Tensor, source_param: Tensor, steps: int) -> None:
            averaged_param.add_(source_param).div_(2)

    class Slower(ExponentialMovingAverage):
        def avg_func(self, averaged_param: Tensor, source_param: Tensor, steps: int) -> None:
            averaged_param.lerp_(source_param, 0.5)

    for cls in (Halving, Slower):
        model = net()
        averaged = cls(model)
        first, second = history(averaged, model, 2)
        for name, parameter in averaged.module.named_parameters():
            torch.testing.assert_close(parameter, (first[name] + second[name]) / 2)


def test_the_copy_is_a_copy_without_gradients_and_forward_is_its() -> None:
    model = net().eval()
    averaged = ExponentialMovingAverage(model)
    inputs = torch.ones(2, 3)
    assert torch.equal(averaged(inputs), model(inputs))
    assert not any(parameter.requires_grad for parameter in averaged.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_state_has_the_keys_of_mmengine_and_goes_on() -> None:
    model = net()
    averaged = MomentumAnnealingEMA(model, momentum=0.01, gamma=3)
    assert [*averaged.state_dict()] == ["steps", *(f"module.{n}" for n in model.state_dict())]
    assert averaged.state_dict()["steps"].dtype == torch.int64
    history(averaged, model, 3)
    other = MomentumAnnealingEMA(net(), momentum=0.01, gamma=3)
    other.load_state_dict(averaged.state_dict())
    twin = copy.deepcopy(averaged)
    move(model, 9)
    for one in (averaged, other, twin):
        one.update_parameters(model)
        for a, b in zip(one.state_dict().values(), averaged.state_dict().values(), strict=True):
            assert torch.equal(a, b)


def test_steps_that_somebody_sets_count() -> None:
    model = net()
    averaged = StochasticWeightAverage(model)
    history(averaged, model, 3)
    averaged.steps.fill_(0)
    move(model, 5)
    averaged.update_parameters(model)
    assert all(
        torch.equal(a, b)
        for a, b in zip(averaged.module.parameters(), model.parameters(), strict=True)
    )


def test_tensors_that_are_replaced_are_found_again() -> None:
    class Assigns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)
            self.register_buffer("mean", torch.zeros(2))
            self.register_buffer("count", torch.tensor(1.0))

    model = Assigns()
    averaged = ExponentialMovingAverage(model, momentum=0.5)
    averaged.update_parameters(model)
    model.mean, model.count = torch.ones(2), torch.tensor(2.0)
    averaged.update_parameters(model)
    assert averaged.module.mean.tolist() == [1, 1]
    assert averaged.module.count.item() == 2
    state = {name: torch.full_like(value, 3.0) for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    averaged.load_state_dict(
        {name: value.clone() for name, value in averaged.state_dict().items()}, assign=True
    )
    before = averaged.module.layer.weight.clone()
    averaged.update_parameters(model)
    torch.testing.assert_close(averaged.module.layer.weight.data, (before + 3) / 2)
    model.layer = nn.Linear(2, 2)
    averaged.update_parameters(model)
    averaged.double()
    averaged.update_parameters(model)
    assert averaged.module.layer.weight.dtype == torch.float64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.add_module("3", nn.Linear(2, 2)), r"3\.bias is new; 3\.weight is new"),
        (lambda m: m.__setitem__(2, nn.Linear(4, 5)), r"2\.bias is \(5,\), averaged \(2,\)"),
        (lambda m: m[1].register_buffer("more", torch.ones(1)), "buffers.*1.more is new"),
    ],
)
def test_a_model_of_another_architecture_is_refused_and_nothing_is_lost(
    change: Any, message: str
) -> None:
    model = net()
    averaged = ExponentialMovingAverage(model)
    history(averaged, model, 2)
    before = {name: value.clone() for name, value in averaged.state_dict().items()}
    change(model)
    with pytest.raises(ValueError, match=message):
        averaged.update_parameters(model)
    assert all(torch.equal(value, before[name]) for name, value in averaged.state_dict().items())


def test_a_model_that_is_moved_is_found_again() -> None:
    model = net()
    averaged = ExponentialMovingAverage(model, momentum=0.5)
    history(averaged, model, 2)
    model.double()  # replaces the buffers
    move(model, 7)
    averaged.update_parameters(model)
    torch.testing.assert_close(averaged.module[1].running_mean.double(), model[1].running_mean)


def test_a_layer_that_is_deleted_is_noticed_in_time() -> None:
    model = net()
    averaged = ExponentialMovingAverage(model)
    averaged.update_parameters(model)
    del model[2]
    with pytest.raises(ValueError, match=r"it lacks 2\.bias"):
        for _ in range(100):
            averaged.update_parameters(model)


def test_a_parameter_in_a_layer_that_had_none_is_noticed() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    averaged = ExponentialMovingAverage(model)
    averaged.update_parameters(model)
    model[1].weight = nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match=r"1\.weight is new"):
        averaged.update_parameters(model)


def test_another_device_or_dtype_holds_the_average() -> None:
    model = net()
    averaged = ExponentialMovingAverage(model, momentum=0.5, device="cpu")
    averaged.module.double()
    states = history(averaged, model, 2)
    weight = averaged.module[0].weight
    assert weight.dtype == torch.float64
    torch.testing.assert_close(
        weight.data, (states[0]["0.weight"].double() + states[1]["0.weight"]) / 2
    )


def test_memory_does_not_grow() -> None:
    model = net()
    averaged = ExponentialMovingAverage(model)
    pointers = [tensor.data_ptr() for tensor in averaged.state_dict().values()]
    history(averaged, model, 4)
    assert [tensor.data_ptr() for tensor in averaged.state_dict().values()] == pointers


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: ExponentialMovingAverage(m, momentum=0), "between 0 and 1, got 0"),
        (lambda m: ExponentialMovingAverage(m, momentum=1.5), "between 0 and 1, got 1.5"),
        (lambda m: MomentumAnnealingEMA(m, gamma=0), "gamma must be above 0"),
        (lambda m: StochasticWeightAverage(m, interval=0), "interval must be 1 or more"),
    ],
)
def test_bad_arguments_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(net())


def test_a_momentum_as_optimizers_have_it_is_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"momentum=0.9 .*Did you mean 0.1\?"):
        ExponentialMovingAverage(net(), momentum=0.9)


def test_a_model_that_was_refused_is_refused_again() -> None:
    model = net()
    averaged = ExponentialMovingAverage(model)
    averaged.update_parameters(model)
    model.add_module("3", nn.Linear(2, 2))
    for _ in range(3):
        with pytest.raises(ValueError, match="is new"):
            averaged.update_parameters(model)
    assert averaged.steps == 1


def test_a_part_that_is_moved_is_found_again() -> None:
    model = nn.Sequential(*[nn.BatchNorm1d(2) for _ in range(3)])
    averaged = ExponentialMovingAverage(model, momentum=0.5)
    averaged.update_parameters(model)
    model[1].double().float()
    model[1].running_mean.fill_(7)
    averaged.update_parameters(model)
    assert averaged.module[1].running_mean.tolist() == [7, 7]
    plain = nn.Linear(2, 2)
    averaged = ExponentialMovingAverage(plain, momentum=0.5)
    averaged.update_parameters(plain)
    plain.double()
    averaged.update_parameters(plain)
    assert averaged.module.weight.dtype == torch.float32


def test_what_is_no_model_is_answered() -> None:
    averaged = ExponentialMovingAverage(net())
    with pytest.raises(TypeError, match=r"an nn\.Module; got SGD"):
        averaged.update_parameters(torch.optim.SGD(net().parameters(), lr=1))  # type: ignore[arg-type]


def test_complex_parameters_are_averaged() -> None:
    model: Any = nn.Module()
    model.weight = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    averaged = ExponentialMovingAverage(model, momentum=0.5)
    averaged.update_parameters(model)
    with torch.no_grad():
        model.weight += 2j
    averaged.update_parameters(model)
    assert averaged.module.weight.tolist() == [1j, 1j]


def test_an_avg_func_from_elsewhere_is_asked() -> None:
    class Half:
        def avg_func(self, averaged_param: Tensor, source_param: Tensor, steps: int) -> None:
            averaged_param.lerp_(source_param, 0.5)

    class Mixed(Half, ExponentialMovingAverage):
        pass

    mixed = Mixed(nn.Linear(1, 1))
    own = ExponentialMovingAverage(nn.Linear(1, 1))
    own.avg_func = Half().avg_func  # type: ignore[method-assign]
    for averaged in (mixed, own):
        model = nn.Linear(1, 1)
        for value in (0.0, 1.0):
            nn.init.constant_(model.weight, value)
            averaged.update_parameters(model)
        assert averaged.module.weight.item() == 0.5

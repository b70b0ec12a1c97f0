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
    assert averaged.module.weight.dtype == torch.float64


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


# -- weights with a low precision ---------------------------------------------------------------

LOW = [torch.bfloat16, torch.float16]


def constant(value: float, dtype: torch.dtype, **buffers: Tensor) -> nn.Module:
    model = nn.Linear(2, 2).to(dtype)
    nn.init.constant_(model.weight, value)
    nn.init.constant_(model.bias, value)
    for name, buffer in buffers.items():
        model.register_buffer(name, buffer)
    return model


def moving(averaged: BaseAveragedModel, model: Any, updates: int) -> None:
    """Start at 1, then update with 2."""
    averaged.update_parameters(model)
    nn.init.constant_(model.weight, 2)
    for _ in range(updates):
        averaged.update_parameters(model)


@pytest.mark.parametrize("dtype", [*LOW, torch.float8_e4m3fn, torch.float32, torch.float64])
def test_small_movements_of_weights_with_a_low_precision_add_up(dtype: torch.dtype) -> None:
    model = constant(1, torch.float32).to(dtype)
    averaged = ExponentialMovingAverage(model)
    averaged.update_parameters(model)
    with torch.no_grad():
        model.weight.copy_(torch.full((2, 2), 2.0))
    for _ in range(3000):
        averaged.update_parameters(model)
    expected = torch.full((2, 2), 2 - (1 - 0.0002) ** 3000)
    precise = averaged.state_dict()["module.weight"]
    assert precise.dtype == (dtype if dtype.itemsize > 2 else torch.float32)
    torch.testing.assert_close(precise.float(), expected, rtol=1e-4, atol=0)
    weight: Any = averaged.module.weight
    assert weight.dtype == dtype
    assert torch.equal(weight.float(), precise.to(dtype).float())


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("kind", CLASSES)
def test_every_average_of_a_low_precision_is_that_of_float32(kind: str, dtype: torch.dtype) -> None:
    low, high = net().to(dtype), net()
    averages = [CLASSES[kind](model, update_buffers=True) for model in (low, high)]
    for seed in range(300):
        move(low, seed)
        high.load_state_dict(low.state_dict())
        for averaged, model in zip(averages, (low, high), strict=True):
            averaged.update_parameters(model)
    mine, expected = (averaged.state_dict() for averaged in averages)
    for name, value in expected.items():
        assert torch.equal(mine[name], value), name


def test_an_avg_func_of_a_subclass_gets_the_precise_average() -> None:
    class Slow(BaseAveragedModel):
        def avg_func(self, averaged_param: Tensor, source_param: Tensor, steps: int) -> None:
            assert averaged_param.dtype == source_param.dtype == torch.float32
            averaged_param.lerp_(source_param, 0.001)

    model = constant(1, torch.bfloat16)
    averaged = Slow(model)
    moving(averaged, model, 100)
    assert averaged.state_dict()["module.weight"][0, 0].item() == pytest.approx(2 - 0.999**100)


@pytest.mark.parametrize("dtype", LOW)
def test_a_copy_of_a_low_precision_is_called_as_the_model_is(dtype: torch.dtype) -> None:
    model = net().to(dtype)
    averaged = StochasticWeightAverage(model)
    history(averaged, model, 3)
    averaged.eval()
    assert averaged(torch.ones(2, 3, dtype=dtype)).dtype == dtype
    assert averaged.module(torch.ones(2, 3, dtype=dtype)).dtype == dtype


def test_a_state_of_precise_averages_continues_exactly() -> None:
    def states(cut: int) -> dict[str, Tensor]:
        model = constant(1, torch.bfloat16)
        averaged = ExponentialMovingAverage(model)
        moving(averaged, model, cut)
        other = ExponentialMovingAverage(model)
        other.load_state_dict({n: v.clone() for n, v in averaged.state_dict().items()})
        for _ in range(300 - cut):
            other.update_parameters(model)
        return other.state_dict()

    straight, cut = states(300), states(111)
    assert straight.keys() == cut.keys() == {"steps", "module.weight", "module.bias"}
    for name, value in straight.items():
        assert torch.equal(value, cut[name]), name


def test_a_state_of_a_low_precision_can_be_loaded() -> None:
    model = constant(1, torch.bfloat16)
    averaged = ExponentialMovingAverage(model, momentum=0.001)
    state = {n: v.clone() for n, v in averaged.state_dict().items()}
    state["module.weight"] = torch.full((2, 2), 1.5, dtype=torch.bfloat16)
    state["steps"].fill_(5)
    averaged.load_state_dict(state)
    assert averaged.state_dict()["module.weight"].dtype == torch.float32
    averaged.update_parameters(model)
    assert averaged.state_dict()["module.weight"][0, 0].item() == pytest.approx(1.4995)
    assert state["module.weight"].tolist() == [[1.5, 1.5], [1.5, 1.5]]


def test_a_teacher_inside_a_model_keeps_its_precise_averages() -> None:
    class Student(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = constant(1, torch.bfloat16)
            self.teacher = ExponentialMovingAverage(self.net)

    student, other = Student(), Student()
    moving(student.teacher, student.net, 100)
    other.load_state_dict({n: v.clone() for n, v in student.state_dict().items()})
    for each in (student, other, copy.deepcopy(student)):
        each.teacher.update_parameters(each.net)
        value = each.state_dict()["teacher.module.weight"][0, 0].item()
        assert value == pytest.approx(2 - 0.9998**101, rel=1e-6)


def test_a_conversion_keeps_the_averages() -> None:
    for before, after in (
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float16),
        (torch.float16, torch.float64),
    ):
        model = constant(1, before)
        averaged = ExponentialMovingAverage(model)
        moving(averaged, model, 100)
        averaged.to(after)
        assert averaged.module.weight.dtype == after
        averaged.update_parameters(model)
        value = averaged.state_dict()["module.weight"][0, 0].item()
        assert value == pytest.approx(2 - 0.9998**101, rel=1e-6), (before, after)


def test_what_other_code_writes_to_the_copy_is_where_the_average_continues() -> None:
    model = constant(1, torch.bfloat16)
    averaged = ExponentialMovingAverage(model, momentum=0.001)
    moving(averaged, model, 10)

    def write(value: float, how: str) -> None:
        weight: Any = averaged.module.weight
        if how == "in place":
            nn.init.constant_(weight, value)
        elif how == "data":
            weight.data = torch.full((2, 2), value, dtype=torch.bfloat16)
        else:
            state = {**averaged.module.state_dict(), "weight": torch.full((2, 2), value)}
            averaged.module.load_state_dict(state)

    for value, how in ((4, "in place"), (6, "data"), (8, "state")):
        write(value, how)
        averaged.update_parameters(model)
        now = averaged.state_dict()["module.weight"][0, 0].item()
        assert now == pytest.approx(value - 0.001 * (value - 2)), how


def test_tied_weights_of_a_low_precision_stay_tied() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).bfloat16()
    model[1].weight = model[0].weight
    averaged = ExponentialMovingAverage(model, momentum=0.001)
    history(averaged, model, 50)
    assert averaged.module[0].weight is averaged.module[1].weight
    state = averaged.state_dict()
    assert torch.equal(state["module.0.weight"], state["module.1.weight"])
    assert state["module.1.weight"].dtype == torch.float32


@pytest.mark.filterwarnings("ignore:ComplexHalf support")
def test_complex_weights_of_a_low_precision_are_averaged() -> None:
    model: Any = nn.Module()
    model.weight = nn.Parameter(torch.ones(2, dtype=torch.complex32))
    averaged = ExponentialMovingAverage(model)
    averaged.update_parameters(model)
    with torch.no_grad():
        model.weight.copy_(torch.full((2,), 1 + 1j))
    for _ in range(1000):
        averaged.update_parameters(model)
    value = averaged.state_dict()["module.weight"][0].item()
    assert value == pytest.approx(1 + (1 - 0.9998**1000) * 1j, rel=1e-5)


def test_a_model_of_a_low_precision_may_have_a_precise_copy() -> None:
    model = constant(1, torch.bfloat16)
    averaged = ExponentialMovingAverage(model)
    averaged.module.float()
    pointers = [tensor.data_ptr() for tensor in averaged.state_dict().values()]
    moving(averaged, model, 100)
    assert [tensor.data_ptr() for tensor in averaged.state_dict().values()] == pointers
    assert averaged.module.weight[0, 0].item() == pytest.approx(2 - 0.9998**100, rel=1e-6)


# -- buffers that change ------------------------------------------------------------------------


class Caches(nn.Module):
    """A layer with the buffers that a test gives it."""

    def __init__(self, persistent: bool = True, **buffers: Tensor | None) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer, persistent=persistent)


def after_two_updates(model: nn.Module, change: Any, **options: Any) -> Any:
    """The copy, after an update before and one after the change."""
    averaged = ExponentialMovingAverage(model, momentum=0.5, **options)
    averaged.update_parameters(model)
    with torch.no_grad():
        change(model)
    averaged.update_parameters(model)
    return averaged.module


def grow(model: Any) -> None:
    model.cache = torch.arange(8.0)


def grow_in_place(model: Any) -> None:
    model.cache.data = torch.arange(8.0)


def shrink(model: Any) -> None:
    model.cache = torch.arange(1.0)


def clear(model: Any) -> None:
    model.cache = None


def expand(model: Any) -> None:
    model.cache = torch.arange(4.0).expand(3, 4)


def count(model: Any) -> None:
    model.cache = torch.arange(4)


def mask(model: Any) -> None:
    model.cache = torch.arange(4) > 1


def register(model: Any) -> None:
    model.register_buffer("later", torch.ones(3), persistent=False)


CHANGES = [grow, grow_in_place, shrink, clear, expand, count, mask, register]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("first", [torch.zeros(4), None])
def test_buffers_outside_the_state_dict_are_left_alone(change: Any, first: Tensor | None) -> None:
    if first is None and change is grow_in_place:
        return
    model = Caches(persistent=False, cache=None if first is None else first.clone())
    module = after_two_updates(model, change, update_buffers=True)
    assert module.cache is None if first is None else torch.equal(module.cache, first)
    assert not hasattr(module, "later")


@pytest.mark.parametrize("update_buffers", [False, True])
@pytest.mark.parametrize("change", CHANGES[:-1])
@pytest.mark.parametrize("first", [torch.zeros(4), None, torch.zeros(1).expand(4)])
def test_buffers_of_the_state_dict_follow_the_model(
    change: Any, first: Tensor | None, update_buffers: bool
) -> None:
    if first is None and change is grow_in_place:
        return
    model: Any = Caches(cache=None if first is None else copy.deepcopy(first))
    module = after_two_updates(model, change, update_buffers=update_buffers)
    if model.cache is None:
        assert module.cache is None
    else:
        assert torch.equal(module.cache, model.cache)
        assert module.cache.dtype == model.cache.dtype
        assert module.cache.data_ptr() != model.cache.data_ptr()


@pytest.mark.parametrize("update_buffers", [False, True])
def test_a_buffer_that_grows_in_every_step_is_followed(update_buffers: bool) -> None:
    model: Any = Caches(bank=torch.zeros(0, 2))
    averaged: Any = ExponentialMovingAverage(model, momentum=0.5, update_buffers=update_buffers)
    for step in range(5):
        model.bank = torch.cat([model.bank, torch.full((1, 2), float(step))])
        averaged.update_parameters(model)
        assert torch.equal(averaged.module.bank, model.bank)
    other: Any = ExponentialMovingAverage(Caches(bank=model.bank.clone()), momentum=0.5)
    other.load_state_dict(averaged.state_dict())
    assert torch.equal(other.module.bank, model.bank)


@pytest.mark.parametrize("update_buffers", [False, True])
def test_expanded_buffers_are_copied_or_averaged(update_buffers: bool) -> None:
    def change(model: Any) -> None:
        model.mask = torch.arange(3.0, 7.0).expand(3, 4)
        model.windows = torch.arange(8.0).unfold(0, 4, 1)

    mask, windows = torch.ones(4).expand(3, 4), torch.zeros(8).unfold(0, 4, 1)
    module = after_two_updates(
        Caches(mask=mask, windows=windows), change, update_buffers=update_buffers
    )
    after = torch.arange(3.0, 7.0).expand(3, 4)
    assert torch.equal(module.mask, (after + 1) / 2 if update_buffers else after)
    after = torch.arange(8.0).unfold(0, 4, 1)
    assert torch.equal(module.windows, after / 2 if update_buffers else after)


@pytest.mark.parametrize("update_buffers", [False, True])
@pytest.mark.parametrize(
    "view", [lambda t: t, lambda t: t[:], lambda t: t[1:], lambda t: t.view(2, 2)]
)
def test_buffers_that_share_memory_are_averaged_once(view: Any, update_buffers: bool) -> None:
    one = torch.zeros(4)
    model: Any = Caches(one=one, other=view(one))
    module = after_two_updates(
        model, lambda model: model.one.fill_(2), update_buffers=update_buffers
    )
    expected = torch.full((4,), 1.0 if update_buffers else 2.0)
    assert torch.equal(module.one, expected)
    assert torch.equal(module.other, view(expected))


@pytest.mark.parametrize("update_buffers", [False, True])
def test_buffers_that_no_longer_share_memory_keep_apart(update_buffers: bool) -> None:
    one = torch.zeros(4)
    for other in (one, one[:]):
        model: Any = Caches(one=one.fill_(0), other=other)

        def change(model: Any) -> None:
            model.one, model.other = torch.full((4,), 2.0), torch.full((4,), 4.0)

        module = after_two_updates(model, change, update_buffers=update_buffers)
        assert module.one.tolist() == [1.0 if update_buffers else 2.0] * 4
        assert module.other.tolist() == [2.0 if update_buffers else 4.0] * 4


def test_parameters_that_share_memory_are_averaged_once() -> None:
    model: Any = nn.Module()
    model.weight = nn.Parameter(torch.zeros(2, 3))
    model.transposed = nn.Parameter(model.weight.data.t())
    module = after_two_updates(model, lambda model: model.weight.fill_(2))
    assert torch.equal(module.weight, torch.ones(2, 3))
    assert torch.equal(module.transposed, torch.ones(3, 2))


def test_weights_that_are_no_longer_tied_keep_apart() -> None:
    model: Any = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    nn.init.zeros_(model[0].weight)

    def change(model: Any) -> None:
        model[1].weight = nn.Parameter(torch.full((2, 2), 4.0))

    module = after_two_updates(model, change)
    assert torch.equal(module[0].weight, torch.zeros(2, 2))
    assert torch.equal(module[1].weight, torch.full((2, 2), 2.0))
    assert not module[1].weight.requires_grad


def test_a_converted_copy_keeps_its_dtype_whatever_the_models_becomes() -> None:
    model: Any = Caches(cache=torch.zeros(4))
    averaged: Any = ExponentialMovingAverage(model)
    averaged.module.double()
    averaged.update_parameters(model)
    model.cache = torch.arange(4.0, dtype=torch.bfloat16)
    model.layer.bfloat16()
    averaged.update_parameters(model)
    assert averaged.module.layer.weight.dtype == averaged.module.cache.dtype == torch.float64
    assert averaged.module.cache.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("update_buffers", [False, True])
def test_a_buffer_that_gets_another_dtype_does_so_in_the_copy(update_buffers: bool) -> None:
    model: Any = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).half()
    averaged: Any = ExponentialMovingAverage(model, momentum=0.5, update_buffers=update_buffers)
    averaged.update_parameters(model)
    model[1].float()
    model[1].running_var.fill_(2e5)  # infinite in float16
    averaged.update_parameters(model)
    copied = averaged.module[1]
    expected = 100000.5 if update_buffers else 2e5
    assert copied.running_var.tolist() == averaged.state_dict()["module.1.running_var"].tolist()
    assert copied.running_var.tolist() == [expected] * 2
    assert copied.weight.dtype == torch.float32
    assert averaged.module[0].weight.dtype == torch.float16


def replace_the_data(model: Any) -> None:
    model[1].running_mean.data = model[1].running_mean.data.double()


def double_the_middle(model: Any) -> None:
    model[1].double()


def double_a_weight(model: Any) -> None:
    model[1].weight.data = model[1].weight.data.double()


@pytest.mark.parametrize("change", [replace_the_data, double_the_middle, double_a_weight])
@pytest.mark.parametrize("kind", [*CLASSES, "own"])
def test_a_dtype_that_changes_mid_run_changes_no_average(kind: str, change: Any) -> None:
    """torch raises an error only after it has averaged the tensors before the changed one."""

    class Own(BaseAveragedModel):
        def avg_func(self, averaged_param: Tensor, source_param: Tensor, steps: int) -> None:
            averaged_param.lerp_(source_param, 0.25)

    build: Any = {**CLASSES, "own": Own}[kind]
    changing, steady = net(), net()
    averaged, other = (build(model, update_buffers=True) for model in (changing, steady))
    history(other, steady, 5)
    history(averaged, changing, 3)
    change(changing)
    for seed in (3, 4):
        move(changing, seed)
        averaged.update_parameters(changing)
        dtypes = [value.dtype for value in averaged.module.state_dict().values()]
        assert dtypes == [value.dtype for value in changing.state_dict().values()]
    for name, value in other.module.state_dict().items():
        torch.testing.assert_close(averaged.module.state_dict()[name].to(value.dtype), value)


@pytest.mark.parametrize("update_buffers", [False, True])
def test_a_sparse_buffer_is_copied(update_buffers: bool) -> None:
    model: Any = Caches(cache=torch.eye(3).to_sparse())
    averaged: Any = ExponentialMovingAverage(model, update_buffers=update_buffers)
    for size in range(3):
        model.cache = torch.diag(torch.tensor([1.0, size, 0])).to_sparse()
        averaged.update_parameters(model)
        assert torch.equal(averaged.module.cache.to_dense(), model.cache.to_dense())
    assert averaged.state_dict()["module.cache"].is_sparse


def test_a_new_buffer_of_the_state_dict_is_named_and_nothing_changes() -> None:
    model: Any = Caches(cache=None)
    averaged: Any = ExponentialMovingAverage(model)
    averaged.update_parameters(model)
    model.cache = torch.ones(2)
    model.register_buffer("later", torch.ones(2))
    with pytest.raises(ValueError, match=r"different buffers: later is new\. Pass a model"):
        averaged.update_parameters(model)
    assert averaged.module.cache is None


def test_lazy_layers_are_refused_before_their_first_forward_pass() -> None:
    for lazy in (nn.LazyLinear(3), nn.LazyBatchNorm1d()):
        model = nn.Sequential(lazy)
        with pytest.raises(ValueError, match=r"0\.\w+ has no shape yet.*Run one batch"):
            ExponentialMovingAverage(model)
        model(torch.randn(5, 2))
        averaged = ExponentialMovingAverage(model)
        averaged.update_parameters(model)
        assert averaged.eval()(torch.ones(5, 2)).shape == model(torch.ones(5, 2)).shape

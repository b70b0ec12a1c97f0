"""Clipping is torch's, and its norm is logged as it was before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hookengine_clip import Clip
from torch import Tensor, nn
from torch.utils.data import DataLoader

from hookengine import Plugin
from tests.fixtures import MakeData, MakeRunner, Toy


class Seen(Plugin):
    """Keeps what the optimizer gets, and what is logged."""

    def before_train(self) -> None:
        self.gradients: list[list[Tensor]] = []
        self.logged: list[Any] = []

    def optim_step(self, optim_wrapper: Any) -> None:
        self.gradients.append([p.grad.clone() for p in optim_wrapper.parameters()])

    def log(self, values: Any) -> None:
        self.logged.append(values)


def by_hand(toy: type[Toy], data: Any, clip: Any) -> tuple[list[list[Tensor]], list[Any]]:
    torch.manual_seed(0)
    net = toy().net
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    gradients, norms = [], []
    for _ in range(2):
        for inputs, labels in DataLoader(data(), batch_size=4):
            F.cross_entropy(net(inputs), labels).backward()
            norms.append(clip(net.parameters()))
            gradients.append([p.grad.clone() for p in net.parameters()])
            optimizer.step()
            optimizer.zero_grad()
    return gradients, norms


def clip_value(parameters: Any) -> Tensor:
    parameters = [*parameters]
    norm = nn.utils.get_total_norm([p.grad for p in parameters])
    nn.utils.clip_grad_value_(parameters, 0.05)
    return norm


@pytest.mark.parametrize(
    ("options", "clip"),
    [
        (dict(max_norm=0.3), lambda p: nn.utils.clip_grad_norm_(p, 0.3)),
        (dict(max_norm=0.2, norm_type=1), lambda p: nn.utils.clip_grad_norm_(p, 0.2, 1)),
        (
            dict(max_norm=0.2, norm_type="inf"),
            lambda p: nn.utils.clip_grad_norm_(p, 0.2, float("inf")),
        ),
        (
            dict(max_norm=float("inf")),
            lambda p: nn.utils.get_total_norm([q.grad for q in p]),
        ),
        (dict(clip_value=0.05), clip_value),
    ],
)
def test_it_is_torchs(
    make: MakeRunner, toy: type[Toy], data: MakeData, options: Any, clip: Any
) -> None:
    seen = Seen()
    make(plugins=[Clip(**options), seen]).train()
    gradients, norms = by_hand(toy, data, clip)
    for mine, theirs in zip(seen.gradients, gradients, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert [values["grad_norm"].item() for values in seen.logged] == [n.item() for n in norms]
    assert all(isinstance(values["grad_norm"], Tensor) for values in seen.logged)


def test_what_others_add_to_the_gradients_is_clipped_too(make: MakeRunner) -> None:
    class Adds(Plugin):
        def before_optim_step(self, optim_wrapper: Any) -> None:
            for parameter in optim_wrapper.parameters():
                parameter.grad += 5

    seen = Seen()
    make(plugins=[Clip(max_norm=0.5), Adds(), seen]).train()
    for gradients in seen.gradients:
        norm = torch.cat([g.flatten() for g in gradients]).norm().item()
        assert norm == pytest.approx(0.5, rel=1e-4)


class Pair(nn.Module):
    """Two parts with an optimizer each."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

    def train_step(self, data: Any, optim_wrapper: Any) -> dict[str, Tensor]:
        for name in ("a", "b"):
            loss = F.cross_entropy(getattr(self, name)(data[0]), data[1])
            optim_wrapper[name].update_params(loss)
        return {}


def test_each_optimizer_has_a_norm_of_its_own(make: MakeRunner) -> None:
    seen = Seen()
    runner = make(
        model=Pair(),
        optim_wrapper={n: dict(optimizer=dict(type="SGD", lr=0.1)) for n in ("a", "b")},
        plugins=[
            Clip(max_norm=0.1, optimizer="a"),
            Clip(max_norm=0.2, optimizer="b", plugin_name="clip_b"),
            seen,
        ],
    )
    runner.train()
    norms = [torch.cat([g.flatten() for g in each]).norm().item() for each in seen.gradients]
    assert norms == pytest.approx([0.1, 0.2] * 10, rel=1e-4)
    assert {name for values in seen.logged for name in values} == {"a/grad_norm", "b/grad_norm"}


class Infinite(Plugin):
    """Makes the gradients of the fourth iteration infinite."""

    def backward(self, runner: Any, optim_wrapper: Any, loss: Any) -> bool:
        loss.backward()
        if runner.progress.iter == 3:
            next(optim_wrapper.parameters()).grad.fill_(float("inf"))
        return True


@pytest.mark.parametrize("max_norm", [1.0, float("inf")])
def test_a_norm_that_is_not_finite_stops_before_the_step(make: MakeRunner, max_norm: float) -> None:
    runner = make(plugins=[Infinite(), Clip(max_norm=max_norm, error_if_nonfinite=True)])
    with pytest.raises(FloatingPointError, match=r"of 'optimizer' is inf.*was not taken") as error:
        runner.train()
    assert "raised by plugin 'clip'" in error.value.__notes__[0]
    assert runner.progress.step == 3
    assert bool(torch.isfinite(runner.bare_model.net.weight).all())


def test_a_step_that_amp_skips_is_no_error_and_no_record(make: MakeRunner) -> None:
    seen = Seen()
    amp = dict(type="amp", dtype="float16", init_scale=8.0)
    runner = make(plugins=[Infinite(), amp, Clip(max_norm=1.0, error_if_nonfinite=True), seen])
    runner.train()
    assert runner.progress.step == 9
    norms = [v["grad_norm"] for v in seen.logged if "grad_norm" in v]
    assert len(norms) == 9
    assert bool(torch.isfinite(torch.stack(norms)).all())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(max_norm=0), "max_norm=0: Input should be greater than 0"),
        (dict(clip_value=-1), "clip_value=-1: Input should be greater than 0"),
        (dict(), "either max_norm.*or clip_value"),
        (dict(max_norm=1, clip_value=1), "either max_norm.*or clip_value"),
        (dict(max_norm=1, clip_grad=1), "'clip_grad' comes from MMEngine"),
    ],
)
def test_bad_options_are_refused(options: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        Clip(**options)


def test_a_second_one_for_the_same_optimizer_is_refused(make: MakeRunner) -> None:
    with pytest.raises(ValueError, match="'optimizer' are already clipped by the plugin 'clip'"):
        make(plugins=[Clip(max_norm=1), Clip(clip_value=1, plugin_name="second")])


def test_an_unknown_optimizer_is_refused(make: MakeRunner) -> None:
    with pytest.raises(KeyError, match="unknown optimizer 'critic'"):
        make(plugins=[Clip(max_norm=1, optimizer="critic")])


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("norm_type", [2.0, 1.0, float("inf")])
def test_the_norm_of_finite_float16_gradients_is_finite(
    make: MakeRunner, mixed: bool, norm_type: float
) -> None:
    class Large(Plugin):
        def before_optim_step(self, optim_wrapper: Any) -> None:
            for parameter in optim_wrapper.parameters():
                parameter.grad = torch.full_like(parameter, 30_000)

    model: Any = nn.Sequential(nn.Linear(4, 30), nn.Linear(30, 3)).half()
    if mixed:
        model[1].float()
    model.forward = lambda inputs: model[1](
        model[0](inputs.half()).to(model[1].weight.dtype)
    ).float()
    seen = Seen()
    runner = make(
        model=model,
        loss=F.cross_entropy,
        plugins=[Large(), Clip(max_norm=3.0, norm_type=norm_type), seen],
    )
    runner.train()
    count = sum(parameter.numel() for parameter in model.parameters())
    norm = 30_000 * {2.0: count**0.5, 1.0: count, float("inf"): 1}[norm_type]
    assert seen.logged[0]["grad_norm"].item() == pytest.approx(norm, rel=1e-3)
    clipped = torch.cat([g.flatten().double() for g in seen.gradients[0]])
    assert clipped.norm(norm_type).item() == pytest.approx(3.0, rel=1e-2)

"""Copies of models that hold functions: compiled parts, functions set on an instance, hooks."""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from hookengine.model import ExponentialMovingAverage
from tests.fixtures import MakeRunner

INPUTS = torch.linspace(-1, 1, 15).reshape(5, 3)


def plain() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(weight_norm(nn.Linear(3, 4)), nn.BatchNorm1d(4), nn.Linear(4, 2))


def compiled(forward: Any, seen: Any = None) -> Any:
    """Compile with a backend that counts its graphs."""

    def backend(graph: Any, inputs: Any) -> Any:
        if seen is not None:
            seen.append(graph)
        return graph.forward

    return torch.compile(forward, backend=backend, fullgraph=True)


def assert_independent(model: Any) -> None:
    """Check that the averaged copy computes with its weights, and leaves the model alone."""
    averaged = ExponentialMovingAverage(model)
    with torch.no_grad():
        expected = averaged(INPUTS)
        for parameter in model.parameters():
            parameter.mul_(2).add_(1)
        state = {name: value.clone() for name, value in model.state_dict().items()}
        torch.testing.assert_close(averaged(INPUTS), expected)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name


def compile_part(model: Any) -> None:
    model[0].compile(backend="eager")


def compile_whole(model: Any) -> None:
    model.compile(backend="eager")


def compile_forward(model: Any) -> None:
    model.forward = compiled(model.forward)


def compile_forward_of_a_part(model: Any) -> None:
    model[0].forward = compiled(model[0].forward)


@pytest.mark.process
@pytest.mark.parametrize(
    "change", [compile_part, compile_whole, compile_forward, compile_forward_of_a_part]
)
def test_the_copy_of_a_compiled_model_calls_its_own_layers(change: Callable[[Any], None]) -> None:
    model = plain()
    change(model)
    assert_independent(model)


@pytest.mark.process
def test_the_copy_compiles_nothing_so_that_the_model_may_be_compiled_as_often() -> None:
    graphs: list[Any] = []
    model = plain()
    model.forward = compiled(model.forward, graphs)
    model[0]._compiled_call_impl = compiled(model[0]._call_impl, graphs)
    with torch.no_grad():
        ExponentialMovingAverage(model)(INPUTS)
    assert graphs == []


@pytest.mark.process
@pytest.mark.parametrize("plugin", [dict(type="ema", evaluate="both"), dict(type="swa", begin=1)])
def test_a_compiled_part_changes_no_number_of_a_run(make: MakeRunner, plugin: Any) -> None:
    """Evaluating the copy must not move the ``_u`` and ``_v`` of spectral norm, either."""
    results = []
    for wrap in (lambda layer: layer, compiled):
        torch.manual_seed(0)
        layers = nn.Sequential(spectral_norm(nn.Linear(4, 4)), nn.BatchNorm1d(4), nn.Linear(4, 3))
        layers[0] = wrap(layers[0])
        cfg = dict(max_epochs=2, val_interval=1)
        runner = make(
            model=layers, loss=F.cross_entropy, plugins=[plugin], train_cfg=cfg, validate=True
        )
        metrics = runner.train()
        results.append((metrics, runner.bare_model.state_dict()))
    (metrics, state), (others, other) = results
    assert metrics == pytest.approx(others)
    for name, value in state.items():
        torch.testing.assert_close(value, other[name])


def doubled(module: Any, inputs: Tensor) -> Any:
    return 2 * type(module).forward(module, inputs)


def bind_a_method(model: Any) -> None:
    model[0].forward = types.MethodType(doubled, model[0])


def bind_a_partial(model: Any) -> None:
    model[0].forward = functools.partial(doubled, model[0])


def bind_a_decorated_method(model: Any) -> None:
    forward = model[0].forward

    @functools.wraps(forward)
    def decorated(inputs: Tensor) -> Any:
        return 2 * forward(inputs)

    model[0].forward = decorated


def bind_a_tensor(model: Any) -> None:
    weight = model[2].weight
    model[2].forward = lambda inputs, more=(weight,): inputs @ more[0].T


def hook_of_a_closure(model: Any) -> None:
    model[0].register_forward_hook(lambda module, inputs, output: model[1](output))


def hook_of_a_partial(model: Any) -> None:
    layer = [model[1]]
    model[0].register_forward_hook(
        functools.partial(lambda *given: layer[0](given[-1] + 0 * given[0]), 1.0)
    )


def refer_weakly(model: Any) -> None:
    root = weakref.ref(model)
    model[2].forward = lambda inputs: root()[2].bias + inputs[:, :2]


@pytest.mark.parametrize(
    "change",
    [
        bind_a_method,
        bind_a_partial,
        bind_a_decorated_method,
        bind_a_tensor,
        hook_of_a_closure,
        hook_of_a_partial,
        refer_weakly,
    ],
)
def test_functions_of_an_instance_use_the_copys_layers(change: Callable[[Any], None]) -> None:
    model = plain()
    change(model)
    assert_independent(model)


def test_a_function_without_parts_of_the_model_is_shared() -> None:
    seen: list[Any] = []
    model = plain()
    model[0].register_forward_hook(lambda module, inputs, output: seen.append(module))
    averaged: Any = ExponentialMovingAverage(model)
    averaged(INPUTS)
    assert seen == [averaged.module[0]]


class Holder:
    """An object that a copy cannot look into."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.call = lambda inputs: module(inputs)

    def __call__(self, *inputs: Any) -> Any:
        return self.call(inputs[-1])


NET: Any = None


def read_a_global(inputs: Tensor) -> Any:
    return NET[0](inputs)


def hook_with_an_object(model: Any, holder: Any) -> None:
    model[0].register_forward_hook(lambda *_: holder.module(_[-1]))


def set_an_object(model: Any, holder: Any) -> None:
    model[0].forward = holder


def set_a_function_that_reads_a_global(model: Any, holder: Any) -> None:
    model[0].forward = read_a_global


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (hook_with_an_object, r"0\._forward_hooks holds a Holder that holds parts of the model"),
        (set_an_object, r"0\.forward holds a Holder that"),
        (
            set_a_function_that_reads_a_global,
            r"0\.forward calls read_a_global, which reads .*'NET'",
        ),
    ],
)
@pytest.mark.parametrize("plugin", ["ema", dict(type="swa", begin=1)])
def test_what_a_copy_cannot_follow_is_refused_when_ema_or_swa_is_enabled(
    make: MakeRunner, monkeypatch: pytest.MonkeyPatch, change: Any, message: str, plugin: Any
) -> None:
    model = plain()
    monkeypatch.setitem(globals(), "NET", [model[1]])
    change(model, Holder(model[1]))
    with pytest.raises(ValueError, match=message + r".* would use the raw weights.*MethodType"):
        make(model=model, loss=F.cross_entropy, plugins=[plugin])

"""Initializers: numbers against torch.nn.init, matching, and mistakes."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from hookengine import WEIGHT_INITIALIZERS
from hookengine.model import (
    BaseInit,
    Caffe2XavierInit,
    ConstantInit,
    KaimingInit,
    NormalInit,
    TruncNormalInit,
    UniformInit,
    XavierInit,
    bias_init_with_prob,
    caffe2_xavier_init,
    constant_init,
    initialize,
    kaiming_init,
    normal_init,
    trunc_normal_init,
    uniform_init,
    xavier_init,
)

init = nn.init


def inverse_cdf(weight: Tensor, mean: float, std: float, a: float, b: float) -> None:
    """MMEngine's truncated normal, written as its source (weight_init.py) states the method."""
    low, high = (stats.norm.cdf((bound - mean) / std) for bound in (a, b))
    with torch.no_grad():
        uniform = torch.empty_like(weight).uniform_(2 * low - 1, 2 * high - 1)
        weight.copy_((torch.erfinv(uniform) * (std * math.sqrt(2)) + mean).clamp(a, b))


# name, class, function, options, what torch does
CASES: list[tuple[str, type, Callable[..., None], dict[str, Any], Callable[[Tensor], Any]]] = [
    ("Constant", ConstantInit, constant_init, dict(val=3), lambda w: init.constant_(w, 3)),
    ("Xavier", XavierInit, xavier_init, {}, lambda w: init.xavier_normal_(w, gain=1)),
    (
        "Xavier",
        XavierInit,
        xavier_init,
        dict(gain=0.5, distribution="uniform"),
        lambda w: init.xavier_uniform_(w, gain=0.5),
    ),
    ("Normal", NormalInit, normal_init, {}, lambda w: init.normal_(w, 0, 1)),
    ("Normal", NormalInit, normal_init, dict(mean=1, std=0.01), lambda w: init.normal_(w, 1, 0.01)),
    ("TruncNormal", TruncNormalInit, trunc_normal_init, {}, lambda w: inverse_cdf(w, 0, 1, -2, 2)),
    (
        "TruncNormal",
        TruncNormalInit,
        trunc_normal_init,
        dict(mean=0.1, std=0.02, a=-0.01, b=0.12),
        lambda w: inverse_cdf(w, 0.1, 0.02, -0.01, 0.12),
    ),
    ("Uniform", UniformInit, uniform_init, {}, lambda w: init.uniform_(w, 0, 1)),
    ("Uniform", UniformInit, uniform_init, dict(a=-2, b=1), lambda w: init.uniform_(w, -2, 1)),
    (
        "Kaiming",
        KaimingInit,
        kaiming_init,
        {},
        lambda w: init.kaiming_normal_(w, a=0, mode="fan_out", nonlinearity="relu"),
    ),
    (
        "Kaiming",
        KaimingInit,
        kaiming_init,
        dict(a=0.1, mode="fan_in", nonlinearity="leaky_relu", distribution="uniform"),
        lambda w: init.kaiming_uniform_(w, a=0.1, mode="fan_in", nonlinearity="leaky_relu"),
    ),
    (
        "Caffe2Xavier",
        Caffe2XavierInit,
        caffe2_xavier_init,
        {},
        lambda w: init.kaiming_uniform_(w, a=1, mode="fan_in", nonlinearity="leaky_relu"),
    ),
]
IDS = [f"{name}-{options}" for name, _, _, options, _ in CASES]


def layers() -> list[Any]:
    torch.manual_seed(1)
    return [nn.Linear(5, 7), nn.Conv2d(3, 8, 3, groups=1), nn.ConvTranspose1d(4, 6, 2)]


def reference(fill: Callable[[Tensor], Any], bias: float) -> list[Tensor]:
    expected = layers()
    torch.manual_seed(0)
    for layer in expected:
        fill(layer.weight)
        init.constant_(layer.bias, bias)
    return [tensor for layer in expected for tensor in layer.parameters()]


def assert_same(modules: list[nn.Module], expected: list[Tensor], name: str) -> None:
    actual = [tensor for module in modules for tensor in module.parameters()]
    for a, b in zip(actual, expected, strict=True):
        if name == "TruncNormal":  # scipy's distribution function is another's last bit
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
        else:
            assert torch.equal(a, b)


@pytest.mark.parametrize(("name", "cls", "function", "options", "fill"), CASES, ids=IDS)
def test_the_function_gives_torchs_numbers(
    name: str, cls: type, function: Any, options: Any, fill: Any
) -> None:
    modules = layers()
    torch.manual_seed(0)
    for module in modules:
        assert function(module, **options, bias=0.5) is None
    assert_same(modules, reference(fill, 0.5), name)


@pytest.mark.parametrize(("name", "cls", "function", "options", "fill"), CASES, ids=IDS)
def test_the_class_gives_torchs_numbers(
    name: str, cls: type, function: Any, options: Any, fill: Any
) -> None:
    modules = layers()
    model = nn.Sequential(*modules)
    layer = ["Linear", "Conv2d", "ConvTranspose1d"]
    assert WEIGHT_INITIALIZERS.get(name) is cls
    torch.manual_seed(0)
    WEIGHT_INITIALIZERS.build(dict(type=name, layer=layer, bias=2, **options))(model)
    assert_same(modules, reference(fill, 2), name)


def test_signatures_and_defaults_are_mmengines() -> None:
    def parameters(function: Any) -> str:
        found = inspect.signature(function).parameters.values()
        return ", ".join(str(p.replace(annotation=p.empty)) for p in found)

    assert parameters(constant_init) == "module, val, bias=0"
    assert parameters(xavier_init) == "module, gain=1, bias=0, distribution='normal'"
    assert parameters(normal_init) == "module, mean=0, std=1, bias=0"
    assert parameters(trunc_normal_init) == "module, mean=0, std=1, a=-2, b=2, bias=0"
    assert parameters(uniform_init) == "module, a=0, b=1, bias=0"
    assert parameters(kaiming_init) == (
        "module, a=0, mode='fan_out', nonlinearity='relu', bias=0, distribution='normal'"
    )
    assert parameters(caffe2_xavier_init) == "module, bias=0"
    assert parameters(bias_init_with_prob) == "prior_prob"
    assert parameters(BaseInit) == "bias=0, bias_prob=None, layer=None"
    assert parameters(ConstantInit) == "val, **kwargs"
    assert parameters(XavierInit) == "gain=1, distribution='normal', **kwargs"
    assert parameters(NormalInit) == "mean=0, std=1, **kwargs"
    assert parameters(TruncNormalInit) == "mean=0, std=1, a=-2, b=2, **kwargs"
    assert parameters(UniformInit) == "a=0, b=1, **kwargs"
    assert parameters(KaimingInit) == (
        "a=0, mode='fan_out', nonlinearity='relu', distribution='normal', **kwargs"
    )
    assert parameters(Caffe2XavierInit) == "**kwargs"


def test_truncated_normal_has_its_distribution() -> None:
    module = nn.Linear(400, 400)
    trunc_normal_init(module, mean=0.5, std=2, a=-1, b=3)
    weight = module.weight.detach().numpy().ravel()
    assert weight.min() >= -1
    assert weight.max() <= 3
    expected = stats.truncnorm((-1 - 0.5) / 2, (3 - 0.5) / 2, loc=0.5, scale=2)
    assert stats.kstest(weight, expected.cdf).statistic < 0.005


def test_truncated_normal_warns_where_the_bounds_are_far_off() -> None:
    with pytest.warns(UserWarning, match="more than 2 std"):
        trunc_normal_init(nn.Linear(2, 2), mean=10, std=1)


def test_caffe2_xavier_has_its_bound() -> None:
    module = nn.Linear(300, 200)
    caffe2_xavier_init(module)
    assert module.weight.abs().max().item() == pytest.approx(math.sqrt(3 / 300), rel=1e-2)


def test_what_a_module_does_not_have_is_passed_over() -> None:
    normal_init(nn.ReLU())
    plain = nn.Linear(2, 2, bias=False)
    constant_init(plain, 2, bias=3)
    assert plain.weight.tolist() == [[2, 2], [2, 2]]
    constant_init(nn.BatchNorm1d(3, affine=False), 1)


@pytest.mark.parametrize("probability", [0.01, 0.5, 0.9])
def test_a_bias_from_a_probability(probability: float) -> None:
    bias = bias_init_with_prob(probability)
    assert bias == pytest.approx(float(-np.log((1 - probability) / probability)))
    assert torch.sigmoid(torch.tensor(bias)).item() == pytest.approx(probability)
    module: Any = nn.Sequential(nn.Linear(2, 2))
    NormalInit(std=0.01, bias_prob=probability, layer="Linear")(module)
    assert torch.sigmoid(module[0].bias)[0].item() == pytest.approx(probability, rel=1e-5)


@pytest.mark.parametrize(
    ("layer", "touched"),
    [
        ("Conv2d", {"0"}),
        ("_ConvNd", {"0"}),  # a direct base class
        (["_BatchNorm", "Linear"], {"1", "2"}),
        (["Linear", "GroupNorm"], {"2"}),  # a list may name more than there is
    ],
)
def test_a_layer_matches_by_its_class_or_a_direct_base(layer: Any, touched: set[str]) -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1), nn.Linear(1, 1))
    ConstantInit(val=7, layer=layer)(model)
    assert {name for name, m in model.named_children() if (m.weight == 7).all()} == touched


def test_children_come_before_parents_as_module_apply_has_it() -> None:
    """So that the same random state gives MMEngine's numbers also where both match."""

    class Outer(nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 2)
            self.inner = nn.Linear(2, 2)

    model = Outer()
    torch.manual_seed(0)
    NormalInit(layer="Linear")(model)
    torch.manual_seed(0)
    assert torch.equal(model.inner.weight, torch.empty(2, 2).normal_())
    assert torch.equal(model.weight, torch.empty(2, 2).normal_())


def test_an_initializer_of_ones_own_says_how_to_fill() -> None:
    class Eye(BaseInit):
        def fill(self, weight: Tensor) -> None:
            init.eye_(weight)

    model: Any = nn.Sequential(nn.Linear(3, 3))
    Eye(layer="Linear", bias=1)(model)
    assert torch.equal(model[0].weight, torch.eye(3))
    assert torch.equal(model[0].bias, torch.ones(3))
    assert Eye()._get_init_info() == "Eye, bias=0"

    class Scaled(Eye):
        def __init__(self, scale: float, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.scale = scale

        def fill(self, weight: Tensor) -> None:
            weight.fill_(self.scale)  # autograd does not look

    Scaled(0.5, layer="Linear")(model)
    assert model[0].weight.unique().tolist() == [0.5]
    assert Scaled(0.5)._get_init_info() == "Scaled: scale=0.5, bias=0"

    class NotInPlace(BaseInit):
        def fill(self, weight: Tensor) -> Tensor:
            return torch.zeros_like(weight)

    with pytest.raises(TypeError, match=r"NotInPlace\.fill returned a new tensor"):
        NotInPlace(layer="Linear")(model)
    with pytest.raises(NotImplementedError, match="BaseInit implements neither fill nor __call__"):
        BaseInit(layer="Linear")(model)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: NormalInit(bias="0"), TypeError, "bias must be a number, got '0'"),
        (lambda: NormalInit(bias_prob="a"), TypeError, "bias_prob must be a float"),
        (lambda: NormalInit(bias_prob=1.5), ValueError, "between 0 and 1, got 1.5"),
        (lambda: NormalInit(bias_prob=0.1, bias=1), ValueError, "both set the bias"),
        (lambda: NormalInit(layer=3), TypeError, "layer must be a class name"),
        (lambda: NormalInit(layer=[nn.Linear]), TypeError, "layer must be a class name"),
        (lambda: NormalInit(layer={"Linear": 1}), TypeError, "layer must be a class name"),
        (lambda: XavierInit(distribution="gauss"), ValueError, "'uniform' or 'normal', got 'gau"),
        (lambda: KaimingInit(distribution="gauss"), ValueError, "'uniform' or 'normal'"),
        (lambda: xavier_init(nn.Linear(1, 1), distribution="x"), ValueError, "'uniform' or 'norm"),
        (lambda: kaiming_init(nn.Linear(1, 1).weight), TypeError, "expected a module.*Parameter"),  # type: ignore[arg-type]
        (lambda: trunc_normal_init(nn.Linear(1, 1), a=2), ValueError, "a below b, got std=1, a=2"),
        (lambda: bias_init_with_prob(0), ValueError, "between 0 and 1, got 0"),
        (lambda: normal_init(nn.LazyLinear(3)), ValueError, "Run one batch through"),
    ],
)
def test_mistakes_are_answered(build: Callable[[], Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        build()


@pytest.mark.parametrize(
    "initializer",
    [
        ConstantInit(val=2.0, bias=1.0, layer="Linear"),
        ConstantInit(val=2.0, bias_prob=0.5, layer=["Linear", "Conv1d"]),
        NormalInit(layer="Linear"),
        XavierInit(layer="Linear"),
        UniformInit(layer="Linear"),
        KaimingInit(layer="Linear"),
        TruncNormalInit(layer="Linear"),
        Caffe2XavierInit(layer="Linear"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_initializer_may_be_applied_to_a_model_most_of_which_does_not_match(
    initializer: Any,
) -> None:
    """As MMEngine's and mmcv's documents do; only an ``init_cfg`` must match something."""
    conv, linear = nn.Conv2d(1, 1, 1), nn.Linear(2, 2)
    before = conv.weight.clone(), linear.weight.clone()
    nn.Sequential(conv, nn.Sequential(nn.ReLU(), linear)).apply(initializer)
    assert torch.equal(conv.weight, before[0])
    assert not torch.equal(linear.weight, before[1])
    initializer(nn.ReLU())
    initializer(nn.Conv2d(1, 1, 1))
    ConstantInit(val=1.0)(nn.ReLU())
    with pytest.raises(ValueError, match="Linear"):
        initialize(nn.Sequential(nn.ReLU()), dict(type="Constant", val=1.0, layer="Linear"))

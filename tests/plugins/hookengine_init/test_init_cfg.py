"""init_cfg: what it selects, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hookengine import WEIGHT_INITIALIZERS
from hookengine.model import BaseInit, ConstantInit, constant_init, initialize


class FooNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.feat = nn.Conv2d(3, 4, 3)
        self.reg = nn.Conv2d(4, 2, 3)
        self.head = nn.Sequential(nn.Conv2d(4, 2, 3), nn.BatchNorm2d(2))
        self.scale = nn.Parameter(torch.ones(1))


def values(module: nn.Module) -> tuple[float, float]:
    """The one value of the weight and of the bias."""
    (weight,), (bias,) = (set(t.flatten().tolist()) for t in (module.weight, module.bias))
    return weight, bias


def test_one_dict_or_a_list_in_order() -> None:
    net = FooNet()
    initialize(net, dict(type="Constant", layer="Conv2d", val=1, bias=2))
    assert values(net.feat) == values(net.head[0]) == (1, 2)
    initialize(
        net,
        [
            dict(type="Constant", layer="Conv2d", val=3),
            dict(type=ConstantInit, layer="BatchNorm2d", val=4, bias_prob=0.5),
        ],
    )
    assert values(net.feat) == (3, 0)
    assert values(net.head[1]) == (4, 0)


def test_an_override_has_its_own_type_or_the_outer_one() -> None:
    net = FooNet()
    outer = dict(type="Constant", val=1, bias=2, layer="Conv2d")
    initialize(net, dict(outer, override=dict(type="Constant", name="reg", val=3, bias=4)))
    assert (values(net.feat), values(net.reg)) == ((1, 2), (3, 4))
    several = [dict(type="Constant", name="reg", val=5), dict(name="head")]
    initialize(net, dict(outer, override=several))
    assert values(net.reg) == (5, 0)
    assert values(net.head[1]) == (1, 2)  # all of it, whatever the class


def test_an_override_alone_leaves_the_rest_and_may_be_deep() -> None:
    net = FooNet()
    before = net.feat.weight.clone()
    initialize(net, dict(type="Constant", val=9, override=dict(name="head.1")))
    assert torch.equal(net.feat.weight, before)
    assert values(net.head[1]) == (9, 0)


def test_the_configuration_is_not_changed() -> None:
    cfg = dict(type="Constant", val=1, layer=["Conv2d"], override=[dict(name="reg")])
    initialize(FooNet(), cfg)
    assert cfg == dict(type="Constant", val=1, layer=["Conv2d"], override=[dict(name="reg")])


def test_an_initializer_that_was_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fives(BaseInit):
        def __call__(self, module: nn.Module) -> None:
            for parameter in module.parameters():
                nn.init.constant_(parameter, 5)

    monkeypatch.setitem(WEIGHT_INITIALIZERS._registered, "Fives", Fives)
    net = FooNet()
    initialize(net, dict(type="Fives"))  # decides by itself: needs no layer
    assert {v for p in net.parameters() for v in p.flatten().tolist()} == {5}
    initialize(net, dict(type="Constant", val=1, override=dict(type="Fives", name="reg")))
    with pytest.raises(ValueError, match="layer='Linear' matches nothing in FooNet"):
        initialize(net, dict(type="Fives", layer="Linear"))


@pytest.mark.parametrize(
    ("cfg", "error", "message"),
    [
        ("Constant", TypeError, "init_cfg must be a dict or a list of dicts, got 'Constant'"),
        ([1], TypeError, r"init_cfg must be a dict or a list of dicts, got \[1\]"),
        (dict(layer="Conv2d"), KeyError, "needs a 'type'"),
        (dict(type="Kaimin", layer="Conv2d"), KeyError, "Did you mean 'Kaiming'.*Known: Caffe2Xav"),
        (dict(type="Normal"), ValueError, r"Add layer=.*FooNet has Conv2d \(3\), BatchNorm2d \(1"),
        (
            dict(type="Normal", layer="Conv3d"),
            ValueError,
            r"layer='Conv3d' matches nothing in FooNet, which has Conv2d \(3\).*mean 'Conv2d'",
        ),
        (
            dict(type="Normal", layer=["linear", "Conv1d"]),
            ValueError,
            r"layer=\['linear', 'Conv1d'\] matches nothing",
        ),
        (
            dict(type="Normal", layer="Conv2d", override=3),
            TypeError,
            "override must be a dict or a",
        ),
        (
            dict(type="Normal", layer="Conv2d", override=dict(type="Xavier")),
            ValueError,
            "an override needs the 'name' of a submodule, got {'type': 'Xavier'}",
        ),
        (
            dict(type="Normal", layer="Conv2d", override=dict(name="reg", std=1)),
            ValueError,
            "override of 'reg' has options but no 'type'",
        ),
        (
            dict(type="Normal", layer="Conv2d", override=dict(name="reh")),
            ValueError,
            "override names 'reh', but FooNet has no such submodule. It has feat, reg, head",
        ),
        (
            dict(type="Normal", override=dict(name="reg", type="Xavier", layer="Conv2d")),
            ValueError,
            "override of 'reg' initializes the whole submodule. Remove 'layer'",
        ),
        (
            dict(type="Normal", layer="Conv2d", bias=0, bias_prob=0.1),
            ValueError,
            "bias=0 and bias_prob=0.1 both set the bias",
        ),
        (
            dict(type="Xavier", layer="Conv2d", distribution="x"),
            ValueError,
            "'uniform' or 'normal'",
        ),
        (dict(type="Constant", layer="Conv2d"), TypeError, "'Constant' needs the option val"),
        (
            dict(type="Normal", layers="Conv2d"),
            TypeError,
            "no option 'layers'. Did you mean 'layer'",
        ),
        (dict(type="Pretrained", chekpoint="x"), TypeError, "Did you mean 'checkpoint'"),
        (dict(type="Pretrained", checkpoint=None), TypeError, "must be a path or a URL, got None"),
        (
            dict(type="TruncNormal", layer="Conv2d", std=0),
            ValueError,
            "std must be positive and a below b, got std=0, a=-2, b=2",
        ),
        (
            dict(type="Normal", layer="Conv2d", override=dict(name="scale")),
            ValueError,
            "not a module",
        ),
        (dict(type=dict, val=1), TypeError, "must build a callable that takes a module"),
        (
            dict(type="Normal", layer="Conv2d", sdt=1),
            TypeError,
            r"no option 'sdt'\. Did you mean 'std'\? It takes mean, std, bias",
        ),
    ],
)
def test_mistakes_are_answered_and_nothing_is_changed(cfg: Any, error: type, message: str) -> None:
    net = FooNet()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(error, match=message) as caught:
        initialize(net, cfg)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    if isinstance(cfg, dict):
        assert f"in the init_cfg of FooNet: {cfg!r}" in caught.value.__notes__


def test_a_misspelt_name_in_a_list_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="layer 'conv2D' matches nothing.*mean 'Conv2d'"):
        initialize(FooNet(), dict(type="Normal", layer=["conv2D", "BatchNorm2d"]))


def test_an_error_names_the_layer() -> None:
    with pytest.raises(ValueError, match="Fan in and fan out") as caught:
        initialize(FooNet(), dict(type="Kaiming", layer="BatchNorm2d"))
    assert any("at the layer BatchNorm2d(2, " in note for note in caught.value.__notes__)


@pytest.mark.parametrize(
    ("layer", "names"),
    [
        (nn.MultiheadAttention(2, 1), "in_proj_weight, .*in_proj_bias"),
        (nn.LSTM(2, 2), "weight_ih_l0"),
    ],
)
def test_layers_without_weight_and_bias_are_refused(layer: nn.Module, names: str) -> None:
    name = type(layer).__name__
    with pytest.raises(ValueError, match=f"{name} has neither 'weight' nor 'bias'.*{names}"):
        initialize(nn.Sequential(layer), dict(type="Normal", layer=name))


def test_layers_without_any_parameter_are_warned_of() -> None:
    net = nn.Sequential(nn.ReLU(), nn.BatchNorm1d(2, affine=False), nn.Linear(1, 1))
    for layer in ("ReLU", "BatchNorm1d"):
        with pytest.warns(UserWarning, match=f"{layer} has no weight and no bias"):
            initialize(net, dict(type="Constant", val=1, layer=layer))
    with pytest.warns(UserWarning, match="ReLU has no weight and no bias"):
        initialize(net, dict(type="Constant", val=1, override=dict(name="0")))
    initialize(net, dict(type="Constant", val=1, layer=["BatchNorm1d", "Linear"]))


def test_a_parametrized_weight_is_set_through_its_parametrization() -> None:
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)))
    torch.manual_seed(0)
    initialize(net, dict(type="Normal", layer="ParametrizedLinear"))
    torch.manual_seed(0)
    torch.testing.assert_close(net[0].weight, torch.empty(2, 3).normal_())
    spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 2))
    constant_init(spectral, 1)
    assert spectral.parametrizations.weight.original.unique().tolist() == [1]

    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

        def right_inverse(self, x: Tensor) -> Tensor:
            return x / 2

    register = nn.utils.parametrize.register_parametrization
    linear = register(nn.Linear(2, 2), "bias", Twice())
    constant_init(linear, 1, bias=4)
    assert linear.bias.tolist() == [4, 4]
    linear = register(nn.Linear(2, 2), "bias", nn.Tanh())  # which torch cannot invert
    with pytest.warns(UserWarning, match="Linear computes its bias from other parameters"):
        constant_init(linear, 1, bias=4)


def test_a_weight_that_is_a_buffer_is_filled_in_silence() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("weight", torch.zeros(2))

    frozen = Frozen()
    constant_init(frozen, 7)
    assert frozen.weight.tolist() == [7, 7]


def test_a_weight_that_a_hook_computes_is_warned_of() -> None:
    with pytest.warns(FutureWarning):
        net = nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 2)))
    with pytest.warns(UserWarning, match="Linear computes its weight from other parameters"):
        initialize(net, dict(type="Normal", layer="Linear"))


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(TypeError, match=r"expects an nn\.Module, got str"):
        initialize("net", dict(type="Normal", layer="Linear"))  # type: ignore[arg-type]


def test_a_mistake_in_a_later_configuration_is_found_before_anything_is_changed() -> None:
    net = FooNet()
    before = net.feat.weight.clone()
    with pytest.raises(KeyError, match="Did you mean 'Kaiming'"):
        initialize(net, [dict(type="Constant", val=1, layer="Conv2d"), dict(type="Kaimin")])
    assert torch.equal(net.feat.weight, before)

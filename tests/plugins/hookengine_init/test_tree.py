"""init_weights: the order from the top down, who is called, what is left, and the report."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hookengine import MODEL_WRAPPERS, WEIGHT_INITIALIZERS
from hookengine.model import (
    BaseInit,
    BaseModule,
    ConstantInit,
    ModuleDict,
    ModuleList,
    PretrainedInit,
    Sequential,
    init_weights,
    update_init_info,
)


def constant(val: float, **options: Any) -> dict[str, Any]:
    return dict(type="Constant", val=val, layer="Linear", **options)


class Block(BaseModule):
    """One linear layer, with an init_cfg of its own."""

    def __init__(self, init_cfg: Any = None) -> None:
        super().__init__(init_cfg)
        self.fc = nn.Linear(2, 2)


class Net(BaseModule):
    """Children by name."""

    inner: Any

    def __init__(self, init_cfg: Any = None, **children: nn.Module) -> None:
        super().__init__(init_cfg)
        self.first = nn.Linear(2, 2)
        for name, child in children.items():
            self.add_module(name, child)


class Custom(nn.Module):
    """As the seed's ToyConv: initialises itself."""

    def __init__(self) -> None:
        super().__init__()
        self.weight_of_its_own = nn.Parameter(torch.empty(2))
        self.untouched = nn.Parameter(torch.ones(2))
        self.calls = 0

    def init_weights(self) -> None:
        self.calls += 1
        self.weight_of_its_own.data.fill_(6)


def weight(module: Any) -> float:
    """The one value of a linear layer's weight."""
    (value,) = set(module.weight.flatten().tolist())
    return float(value)


def report(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """What the console's table says, by the parameter's name."""
    rows = {}
    for line in capsys.readouterr().out.splitlines():
        name, bracket, rest = line.strip().partition(" [")
        if line.startswith("  ") and bracket:
            rows[name.strip()] = rest.partition("] ")[2].strip()
    return rows


# -- the way down -------------------------------------------------------------------------------


def test_the_inner_configuration_wins_over_the_outer() -> None:
    net = Net(constant(1), own=Block(constant(2)), plain=Block(), deep=Net(own=Block(constant(3))))
    net.init_weights()
    assert (weight(net.first), weight(net.own.fc), weight(net.plain.fc)) == (1, 2, 1)
    assert (weight(net.deep.first), weight(net.deep.own.fc)) == (1, 3)
    assert all(m.is_init for m in net.modules() if isinstance(m, BaseModule))


def test_containers_have_their_own() -> None:
    net = Net(
        constant(1),
        listed=ModuleList([nn.Linear(2, 2)], init_cfg=constant(2)),
        named=ModuleDict({"a": nn.Linear(2, 2)}, init_cfg=constant(3)),
        in_order=Sequential(nn.Linear(2, 2), Block(constant(5)), init_cfg=constant(4)),
    )
    net.init_weights()
    assert (weight(net.listed[0]), weight(net.named["a"])) == (2, 3)
    assert (weight(net.in_order[0]), weight(net.in_order[1].fc)) == (4, 5)


def test_base_modules_are_found_within_plain_containers() -> None:
    net = Net(constant(1), plain=nn.Sequential(nn.ModuleList([Block(constant(2))])))
    net.init_weights()
    assert weight(net.plain[0][0].fc) == 2


def test_a_child_with_a_hand_written_init_weights_is_called_once() -> None:
    custom = Custom()
    net = Net(constant(1), custom=custom, again=custom)
    net.init_weights()
    assert custom.calls == 1
    assert custom.weight_of_its_own.tolist() == [6, 6]


def test_one_that_is_no_direct_child_is_left_and_said_so(
    capsys: pytest.CaptureFixture[str],
) -> None:
    net = Net(constant(1), wrapped=nn.Sequential(Custom()))
    net.init_weights()
    assert net.wrapped[0].calls == 0
    text = capsys.readouterr().out
    assert "  wrapped.0: init_weights() of Custom was not called, since it is not a direct" in text


def test_a_subclass_may_override_it_and_call_super() -> None:
    class Mine(Block):
        def init_weights(self) -> None:
            super().init_weights()
            nn.init.constant_(self.fc.bias, 8)

    net = Net(constant(1), mine=Mine(constant(2)))
    net.init_weights()
    assert weight(net.mine.fc) == 2
    assert net.mine.fc.bias.tolist() == [8, 8]


def test_model_wrappers_are_seen_through(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    net = Net(parallel=nn.DataParallel(Block(constant(2))), own=Wrapper(Custom()))
    net.init_weights()
    assert weight(net.parallel.module.fc) == 2
    assert net.own.module.calls == 0  # not known to be one
    monkeypatch.setitem(MODEL_WRAPPERS._registered, "Wrapper", Wrapper)
    net = Net(own=Wrapper(Custom()))
    net.init_weights()
    assert net.own.module.calls == 1


def test_pretrained_comes_last(tmp_path: Path) -> None:
    net = Net(inner=Block())
    state = {name: torch.full_like(value, 9) for name, value in net.state_dict().items()}
    torch.save(state, tmp_path / "net.pth")
    pretrained = dict(type="Pretrained", checkpoint=str(tmp_path / "net.pth"))
    net = Net([pretrained, constant(1)], inner=Block(constant(2)))
    net.init_weights()
    assert (weight(net.first), weight(net.inner.fc)) == (9, 9)

    # Also as the override of a part that has an init_cfg of its own.
    part = dict(pretrained, name="inner", prefix="inner")
    for override in (part, [part, dict(type="Constant", name="first", val=4)]):
        net = Net(constant(1, override=override), inner=Block(constant(2)))
        net.init_weights()
        assert weight(net.inner.fc) == 9
        assert weight(net.first) == (1 if override is part else 4)
        assert len(net.inner.loaded_tensors) == 2


def test_what_loads_comes_last_also_under_a_name_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Mine(PretrainedInit): ...

    monkeypatch.setitem(WEIGHT_INITIALIZERS._registered, "Mine", Mine)
    torch.save({"fc.weight": torch.full((2, 2), 9.0), "fc.bias": torch.ones(2)}, tmp_path / "b.pth")
    for kind in ("Mine", Mine, "Pretrained"):
        load = dict(type=kind, checkpoint=str(tmp_path / "b.pth"))
        for cfg in (
            constant(1, override=dict(load, name="inner")),
            dict(type="Constant", val=1, override=[dict(load, name="inner"), dict(name="first")]),
        ):
            net = Net(cfg, inner=Block(constant(2)))
            net.init_weights()
            assert (weight(net.first), weight(net.inner.fc)) == (1, 9)


def test_what_overrides_pretrained_weights_comes_after_them(tmp_path: Path) -> None:
    source = Net(inner=Block())
    torch.save(source.state_dict(), tmp_path / "net.pth")
    override = dict(type="Constant", name="first", val=3)
    cfg = dict(type="Pretrained", checkpoint=str(tmp_path / "net.pth"), override=override)
    net = Net(cfg, inner=Block(constant(2)))
    net.init_weights()
    assert weight(net.first) == 3
    assert torch.equal(net.inner.fc.weight, source.inner.fc.weight)


def test_an_initializer_of_ones_own_beside_what_loads_is_called_once(tmp_path: Path) -> None:
    calls = []

    class Own(BaseInit):
        def __call__(self, module: nn.Module) -> None:
            calls.append(self.layer)
            for parameter in module.parameters():
                nn.init.constant_(parameter, 9)

    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "fc.pth")
    load = dict(type="Pretrained", name="first", checkpoint=str(tmp_path / "fc.pth"))
    net = Net(dict(type=Own, layer="Linear", override=load), inner=Block(constant(2)))
    net.init_weights()
    assert calls == [["Linear"]]
    assert weight(net.inner.fc) == 2


def test_what_torch_compile_has_wrapped_is_initialised_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    fills = []

    class Counting(ConstantInit):
        def fill(self, weight: Tensor) -> None:
            fills.append(weight)
            super().fill(weight)

    own = dict(type=Counting, val=2, layer="Linear")

    def compiled(module: nn.Module) -> Any:
        return torch.compile(module, backend="eager")

    net = Net(
        constant(1),
        compiled=compiled(Block(own)),
        deep=nn.Sequential(compiled(Block(own))),
        custom=compiled(Custom()),
    )
    net.init_weights()
    assert len(fills) == 2
    assert weight(net.compiled.fc) == weight(net.deep[0].fc) == 2
    assert f"initialized by init_weights() of {__name__}.Custom" in capsys.readouterr().out
    net.is_init = False
    net.init_weights()
    assert len(fills) == 4


def test_other_modules_are_left_out_of_a_call_if_you_say_so() -> None:
    net = Net(constant(1), custom=Custom())
    before = [parameter.clone() for parameter in net.custom.parameters()]
    init_weights(net, init_foreign=False)
    assert all(map(torch.equal, net.custom.parameters(), before))
    assert net.is_init


def test_a_second_call_warns_and_does_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    net = Net(constant(1), custom=Custom())
    net.init_weights()
    net.first.weight.data.fill_(4)
    capsys.readouterr()
    with pytest.warns(
        UserWarning, match=r"init_weights\(\) of Net was called before: nothing is"
    ) as caught:
        net.init_weights()
    assert caught[0].filename == __file__
    assert weight(net.first) == 4
    assert net.custom.calls == 1
    assert capsys.readouterr().out == ""
    net.is_init = False
    net.init_weights()
    assert weight(net.first) == 1


def test_initialised_anew_the_inner_configuration_still_wins() -> None:
    net = Net(constant(1), inner=Block(constant(2)))
    net.init_weights()
    net.is_init = False
    net.init_weights()
    assert (weight(net.first), weight(net.inner.fc)) == (1, 2)


def test_a_part_that_is_initialised_already_is_not_again() -> None:
    net = Net(inner=Block(constant(2)))
    net.inner.init_weights()
    net.inner.fc.weight.data.fill_(5)
    net.init_weights()
    assert weight(net.inner.fc) == 5


def test_the_same_seed_gives_the_same_weights_and_the_hand_written_ones() -> None:
    net = Net(
        [dict(type="Kaiming", layer="Linear")], inner=Block(dict(type="Xavier", layer="Linear"))
    )
    torch.manual_seed(0)
    net.init_weights()
    torch.manual_seed(0)
    expected = nn.init.kaiming_normal_(torch.empty(2, 2), mode="fan_out")
    nn.init.kaiming_normal_(torch.empty(2, 2), mode="fan_out")  # of inner.fc, which Xavier replaces
    assert torch.equal(net.first.weight, expected)
    assert torch.equal(net.inner.fc.weight, nn.init.xavier_normal_(torch.empty(2, 2)))


def test_it_is_a_function_too() -> None:
    block = Block(constant(3))
    init_weights(block)
    assert weight(block.fc) == 3


# -- what stays ---------------------------------------------------------------------------------


def test_loaded_tensors_are_never_initialised(capsys: pytest.CaptureFixture[str]) -> None:
    trained = Net(inner=Block(), custom=Custom())
    trained.custom.weight_of_its_own.data.fill_(1)
    state = trained.state_dict()
    del state["first.bias"]
    net = Net(constant(1, bias=7), inner=Block(constant(2)), custom=Custom())
    net.load_state_dict(state, strict=False)
    net.init_weights()
    for name, value in state.items():
        assert torch.equal(net.state_dict()[name], value), name
    assert net.first.bias.tolist() == [7, 7]  # which the state lacked
    assert net.custom.calls == 0
    rows = report(capsys)
    assert rows["first.bias"] == "ConstantInit: val=1, bias=7"
    assert rows["first.weight"] == "already loaded from a state dict: left unchanged"


def test_a_loaded_part_of_a_model_stays_too() -> None:
    net = Net(constant(1), inner=Block(constant(2)))
    state = Block().state_dict()
    net.inner.load_state_dict(state)
    net.init_weights()
    assert torch.equal(net.inner.fc.weight, state["fc.weight"])
    assert weight(net.first) == 1


def test_children_without_parameters_are_initialised_beside_what_is_kept() -> None:
    class Anchors(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("sizes", torch.zeros(2))

        def init_weights(self) -> None:
            self.sizes.fill_(5)

    net = Net(constant(1), back=Block(), anchors=Anchors())
    net.back.load_state_dict(Block().state_dict())
    net.init_weights()
    assert net.anchors.sizes.tolist() == [5, 5]


def test_what_user_code_takes_away_from_what_is_kept_does_not_disturb() -> None:
    class Removing(Block):
        def init_weights(self) -> None:
            self.fc.bias = None  # type: ignore[assignment]

    net = Net(mine=Removing())
    net.load_state_dict({"mine.fc.bias": torch.ones(2)}, strict=False)
    net.init_weights()
    assert net.mine.fc.bias is None


def test_a_model_that_is_loaded_whole_is_not_touched_at_all(tmp_path: Path) -> None:
    net = Net(dict(type="Pretrained", checkpoint=str(tmp_path / "gone.pth")))
    net.load_state_dict(Net().state_dict())
    net.init_weights()
    assert net.is_init


def test_a_head_that_is_new_since_the_loading_is_initialised() -> None:
    net = Net(constant(1))
    net.load_state_dict(Net().state_dict())
    net.first = nn.Linear(2, 5)
    net.init_weights()
    assert weight(net.first) == 1


def test_a_part_to_be_initialised_anew_is_though_the_whole_was_loaded() -> None:
    net = Net(constant(1), inner=Block(constant(2)))
    net.load_state_dict(Net(inner=Block()).state_dict())
    net.inner.is_init = False
    net.init_weights()
    assert weight(net.inner.fc) == 2
    assert len(net.first.weight.unique()) == 4


def test_loading_with_assign_counts_as_loading() -> None:
    net, state = Net(constant(1)), Net().state_dict()
    net.load_state_dict(state, assign=True)
    net.init_weights()
    assert net.first.weight.data_ptr() == state["first.weight"].data_ptr()


def test_initialised_anew_after_loading_where_it_is_asked_for() -> None:
    net = Net(constant(1))
    net.load_state_dict(Net().state_dict())
    net.is_init = False
    net.init_weights()
    assert weight(net.first) == 1


# -- failures -----------------------------------------------------------------------------------


def test_an_error_names_the_part_and_leaves_no_trace() -> None:
    net = Net(constant(1), deep=Net(inner=Block(dict(type="Normal", layer="Conv2d"))))
    with pytest.raises(ValueError, match="layer='Conv2d' matches nothing in Block") as caught:
        net.init_weights()
    assert any("in the init_cfg of Block 'deep.inner'" in note for note in caught.value.__notes__)
    assert not net.is_init
    assert not any("_params_init_info" in m.__dict__ for m in net.modules())
    copy.deepcopy(net)


def test_after_an_error_a_second_try_is_as_the_first() -> None:
    missing = dict(type="Pretrained", checkpoint="nowhere.pth")
    net = Net([missing, constant(1)], inner=Net(constant(2), deep=Block(constant(3))))
    with pytest.raises(FileNotFoundError):
        net.init_weights()
    assert not any(m.is_init for m in net.modules() if isinstance(m, BaseModule))
    net.init_cfg = constant(1)
    net.init_weights()
    assert (weight(net.first), weight(net.inner.first)) == (1, 2)
    assert weight(net.inner.deep.fc) == 3


def test_an_error_leaves_shared_parts_as_they_were() -> None:
    shared = Block(constant(2))
    net = Net(constant(1), a=shared, b=Net(c=shared), bad=Block(dict(type="Normal", layer="GRU")))
    shared.load_state_dict(Block().state_dict())
    shared.is_init = True
    with pytest.raises(ValueError, match="matches nothing"):
        net.init_weights()
    assert shared.is_init
    assert len(shared.loaded_tensors) == 2
    assert not net.b.is_init


def test_a_configuration_that_is_none_names_the_part() -> None:
    with pytest.raises(TypeError, match="init_cfg must be a dict") as caught:
        Net(inner=Block("Kaiming")).init_weights()
    assert "in Block 'inner'" in caught.value.__notes__


def test_an_error_in_code_of_others_names_it() -> None:
    class Broken(nn.Module):
        def init_weights(self, std: float) -> None: ...

    with pytest.raises(TypeError, match="std") as caught:
        Net(broken=Broken()).init_weights()
    assert "in init_weights() of Broken 'broken'" in caught.value.__notes__


def test_what_was_loaded_is_back_after_an_error() -> None:
    net = Net(constant(1), bad=Block(dict(type="Normal", layer="Conv2d")))
    state = {"first.weight": torch.full((2, 2), 5.0)}
    net.load_state_dict(state, strict=False)
    with pytest.raises(ValueError, match="matches nothing"):
        net.init_weights()
    assert weight(net.first) == 5


# -- the report ---------------------------------------------------------------------------------


def test_each_parameter_is_listed_with_its_shape_and_who_changed_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    net = Net(constant(1, override=dict(name="b", type="Xavier")), b=nn.Linear(2, 3), c=Custom())
    net.init_weights()
    text = capsys.readouterr().out
    assert "weights of Net, 6 parameters" in text
    assert "  b.weight             [3, 2]  XavierInit: gain=1, distribution=normal, bias=0" in text
    assert f"  c: initialized by init_weights() of {__name__}.Custom; to leave it unchanged" in text


@pytest.mark.parametrize(
    ("cfg", "said"),
    [
        (dict(type="Constant", val=2), "ConstantInit: val=2, bias=0"),
        (dict(type="Xavier", bias=1), "XavierInit: gain=1, distribution=normal, bias=1"),
        (dict(type="Normal", std=0.1), "NormalInit: mean=0, std=0.1, bias=0"),
        (dict(type="TruncNormal"), "TruncNormalInit: a=-2, b=2, mean=0, std=1, bias=0"),
        (dict(type="Uniform", bias_prob=0.5), "UniformInit: a=0, b=1, bias=-0.0"),
        (
            dict(type="Kaiming"),
            "KaimingInit: a=0, mode=fan_out, nonlinearity=relu, distribution=normal, bias=0",
        ),
        (
            dict(type="Caffe2Xavier"),
            "Caffe2XavierInit: a=1, mode=fan_in, nonlinearity=leaky_relu, distribution=uniform, "
            "bias=0",
        ),
    ],
)
def test_the_initializer_is_named_with_its_options(
    cfg: Any, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Block(dict(cfg, layer="Linear")).init_weights()
    assert report(capsys) == {"fc.weight": said, "fc.bias": said}


def test_a_constant_that_was_there_already_keeps_who_set_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As the seed's chapter shows for the bias that Xavier sets to the 0 that Kaiming had set."""
    override = dict(name="first", type="Xavier")
    Net(dict(type="Kaiming", layer="Linear", override=override)).init_weights()
    rows = report(capsys)
    assert rows["first.weight"].startswith("XavierInit")
    assert rows["first.bias"].startswith("KaimingInit")


def test_what_nobody_changed_is_said_so(capsys: pytest.CaptureFixture[str]) -> None:
    Net(custom=Custom()).init_weights()
    rows = report(capsys)
    same = "The value is the same before and after calling `init_weights` of Net"
    user = "Initialized by user-defined `init_weights` in Custom"
    assert rows["custom.weight_of_its_own"] == user
    assert rows["custom.untouched"] == rows["first.weight"] == same


def test_code_of_others_is_told_from_what_it_calls(capsys: pytest.CaptureFixture[str]) -> None:
    class Mine(Block):
        def __init__(self) -> None:
            super().__init__(constant(2))
            self.before, self.after = nn.Linear(2, 2), nn.Linear(2, 2)
            self.inner = Block(dict(type="Normal", layer="Linear"))

        def init_weights(self) -> None:
            self.before.weight.data.fill_(3)
            super().init_weights()
            self.after.bias.data.fill_(4)
            nn.init.zeros_(self.inner.fc.bias)

    Net(mine=Mine()).init_weights()
    rows = report(capsys)
    mine = "Initialized by user-defined `init_weights` in Mine"
    assert rows["mine.before.weight"] == "ConstantInit: val=2, bias=0"
    assert rows["mine.after.weight"] == "ConstantInit: val=2, bias=0"
    assert rows["mine.after.bias"] == mine
    assert rows["mine.inner.fc.weight"] == "NormalInit: mean=0, std=1, bias=0"
    assert rows["mine.inner.fc.bias"] == mine


def test_what_the_model_itself_does_afterwards_is_not_in_the_report_of_a_direct_call(
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Mine(Block):
        def init_weights(self) -> None:
            super().init_weights()
            nn.init.zeros_(self.fc.weight)

    Mine(constant(2)).init_weights()
    text = capsys.readouterr().out
    assert "2 parameters, before what its own init_weights() does after super()" in text


def test_a_tensor_that_the_file_does_not_give_is_named_after_who_set_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"fc.weight": torch.ones(2, 2), "fc.bias": torch.ones(5)}, tmp_path / "net.pth")
    pretrained = dict(type="Pretrained", checkpoint=str(tmp_path / "net.pth"))
    Block([constant(2), dict(pretrained, ignore_mismatched_sizes=True)]).init_weights()
    rows = report(capsys)
    assert rows["fc.weight"].startswith("PretrainedInit: load from")
    assert rows["fc.bias"] == "ConstantInit: val=2, bias=0"


def test_foreign_modules_of_one_class_share_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    net = Net(many=nn.Sequential(Custom(), Custom(), Custom()))
    net.init_weights()
    lines = [line for line in capsys.readouterr().out.splitlines() if "Custom was not" in line]
    assert len(lines) == 1
    assert lines[0].startswith("  many.0, ..., many.2: init_weights() of Custom was not called")


def test_layers_that_an_initializer_treats_by_itself_are_watched(
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Own(ConstantInit):
        def init_layer(self, layer: nn.Module, write: Any = None) -> Any:
            layer.weight.data.fill_(4)

    class OtherFill(ConstantInit):
        def fill(self, weight: Tensor) -> None:
            nn.init.eye_(weight)

    Block(dict(type=Own, val=1, layer="Linear")).init_weights()
    assert report(capsys)["fc.weight"] == "Own: val=1, bias=0"
    Block([constant(1), dict(type=OtherFill, val=1, layer="Linear")]).init_weights()
    assert report(capsys)["fc.weight"] == "OtherFill: val=1, bias=0"


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.float8_e4m3fn, torch.complex64, torch.float64], ids=str
)
def test_changes_are_seen_in_every_dtype(
    dtype: torch.dtype, capsys: pytest.CaptureFixture[str]
) -> None:
    class Typed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            values = torch.full((3,), 60000.0).to(dtype)
            self.a, self.b = (nn.Parameter(values.clone(), requires_grad=False) for _ in "ab")

        def init_weights(self) -> None:
            self.a.data[0] = 3

    Net(child=Typed()).init_weights()
    rows = report(capsys)
    assert rows["child.a"] == "Initialized by user-defined `init_weights` in Typed"
    assert rows["child.b"].startswith("The value is the same")


def test_parameters_that_are_replaced_are_named_too(capsys: pytest.CaptureFixture[str]) -> None:
    class Replacing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2))

        def init_weights(self) -> None:
            self.weight = nn.Parameter(torch.ones(2))

    Net(child=Replacing()).init_weights()
    expected = "Initialized by user-defined `init_weights` in Replacing"
    assert report(capsys)["child.weight"] == expected


def test_an_initializer_of_ones_own_may_say_what_it_did(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Quiet:
        def __call__(self, module: nn.Module) -> None:
            module.fc.weight.data.fill_(1)

    class Talking(BaseInit):
        def __call__(self, module: nn.Module) -> None:
            module.fc.bias.data.fill_(1)
            update_init_info(module, init_info="set to one")

    monkeypatch.setitem(WEIGHT_INITIALIZERS._registered, "Quiet", Quiet)
    monkeypatch.setitem(WEIGHT_INITIALIZERS._registered, "Talking", Talking)
    Block([dict(type="Quiet"), dict(type="Talking")]).init_weights()
    assert report(capsys) == {"fc.weight": "Quiet", "fc.bias": "set to one"}
    with pytest.raises(RuntimeError, match="no init_weights"):
        update_init_info(Block(), "x")


def test_lazy_and_meta_parameters_do_not_disturb_it(capsys: pytest.CaptureFixture[str]) -> None:
    class Lazy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.LazyLinear(2)
            self.meta = nn.Linear(2, 2, device="meta")

        def init_weights(self) -> None:
            nn.init.zeros_(self.meta.weight)

    with pytest.raises(ValueError, match="LazyLinear does not know its shape"):
        Net(constant(1), lazy=Lazy()).init_weights()
    capsys.readouterr()
    Net(dict(type="Constant", val=1, override=dict(name="first")), lazy=Lazy()).init_weights()
    assert "lazy.fc.weight    lazy    The value is the same" in capsys.readouterr().out


def test_on_the_meta_device_nothing_is_said_to_be_initialised(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with torch.device("meta"):
        net = Net(constant(1))
    net.init_weights()
    assert report(capsys)["first.weight"].startswith("The value is the same")


def test_shared_parameters_are_listed_once(capsys: pytest.CaptureFixture[str]) -> None:
    net = Net(constant(1), tied=nn.Linear(2, 2))
    net.tied.weight = net.first.weight
    net.init_weights()
    assert set(report(capsys)) == {"first.weight", "first.bias", "tied.bias"}


def test_the_report_of_a_vector_of_nan_is_not_a_change(capsys: pytest.CaptureFixture[str]) -> None:
    class Nan(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight: Tensor = nn.Parameter(torch.full((2,), torch.nan))

        def init_weights(self) -> None: ...

    Net(child=Nan()).init_weights()
    assert report(capsys)["child.weight"].startswith("The value is the same")

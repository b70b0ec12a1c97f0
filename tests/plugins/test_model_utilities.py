"""Model utilities: wrappers, merged losses, parameters that a loss does not reach."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from hookengine import MODEL_WRAPPERS, Registry
from hookengine.model import detect_anomalous_params, is_model_wrapper, merge_dict

# -- is_model_wrapper ---------------------------------------------------------------------------


def test_torchs_wrappers_and_their_subclasses_are_wrappers() -> None:
    class Mine(nn.DataParallel): ...

    assert is_model_wrapper(nn.DataParallel(nn.Linear(1, 1)))
    assert is_model_wrapper(Mine(nn.Linear(1, 1)))
    assert issubclass(nn.parallel.DistributedDataParallel, tuple(MODEL_WRAPPERS.objects()))
    assert not is_model_wrapper(nn.Linear(1, 1))


def test_wrappers_of_others_are_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODEL_WRAPPERS, "_registered", {})

    @MODEL_WRAPPERS.register_module()
    class Wrapper(nn.Module): ...

    assert is_model_wrapper(Wrapper())
    own = Registry("hookengine.nothing", "wrapper")
    assert not is_model_wrapper(Wrapper(), registry=own)
    own.register_module(module=Wrapper)
    assert is_model_wrapper(Wrapper(), registry=own)


# -- merge_dict ---------------------------------------------------------------------------------


def test_dicts_are_merged_into_a_new_one_and_the_last_wins() -> None:
    first = dict(a=1, b=2)
    assert merge_dict(first, dict(b=3), dict(c=4)) == dict(a=1, b=3, c=4)
    assert first == dict(a=1, b=2)
    assert merge_dict() == {}
    with pytest.raises(TypeError, match="expects dicts, got list, int"):
        merge_dict({}, [], 3)  # type: ignore[arg-type]


class Head(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": x.sum(), "accuracy": x.max()}


class TwoStages(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rpn, self.roi = Head(), Head()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return merge_dict(self.rpn(x), {"own": x + 1}, self.roi(x * 2))


@pytest.mark.parametrize("leaf", [False, True])
def test_a_model_that_merges_losses_is_traced(leaf: bool) -> None:
    class Tracer(fx.Tracer):
        def is_leaf_module(self, module: nn.Module, name: str) -> bool:
            return leaf and isinstance(module, Head)

    model, x = TwoStages(), torch.tensor([1.0, 2.0])
    traced = fx.GraphModule(model, Tracer().trace(model))
    expected, actual = model(x), traced(x)
    assert expected.keys() == actual.keys() == {"loss", "accuracy", "own"}
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
    assert actual["loss"].item() == 6


# -- detect_anomalous_params --------------------------------------------------------------------


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(2, 2)
        self.forgotten = nn.Linear(2, 2)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x).sum()


def test_parameters_without_a_part_in_the_loss_are_named(
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = Branches()
    loss = model(torch.ones(2))
    assert detect_anomalous_params(loss, model) == ["forgotten.weight", "forgotten.bias"]
    text = capsys.readouterr().out
    assert "error" in text
    assert "2 parameters took no part in the loss" in text
    assert "forgotten.weight [2, 2], forgotten.bias [2]" in text
    with pytest.raises(TypeError, match=r"one tensor, got dict\. Pass the sum of several losses"):
        detect_anomalous_params({"loss": loss}, model)  # type: ignore[arg-type]
    loss.backward()
    unreached = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert unreached == ["forgotten.weight", "forgotten.bias"]


def test_nothing_is_said_where_all_took_part(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Linear(2, 2)
    assert detect_anomalous_params(model(torch.ones(2)).sum(), model) == []
    assert capsys.readouterr().out == ""


def test_a_loss_without_a_graph_reaches_nothing() -> None:
    model = nn.Linear(2, 2)
    assert detect_anomalous_params(torch.tensor(1.0), model) == ["weight", "bias"]
    scale = nn.ParameterDict({"scale": nn.Parameter(torch.tensor(1.0))})
    assert detect_anomalous_params(scale["scale"], scale) == []


def test_a_graph_deeper_than_pythons_recursion_is_searched() -> None:
    model = nn.ParameterList([nn.Parameter(torch.ones(1)) for _ in range(2)])
    loss = model[0] * 1
    for _ in range(5000):
        loss = loss + 1
    assert detect_anomalous_params(loss, model) == ["1"]


def test_checkpointed_activations_are_seen_through() -> None:
    model = Branches()
    loss = checkpoint(model, torch.ones(2), use_reentrant=False)
    assert detect_anomalous_params(loss, model) == ["forgotten.weight", "forgotten.bias"]


def test_a_lazy_layer_that_was_never_called_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.ModuleList([nn.Linear(2, 1), nn.LazyLinear(3)])
    assert detect_anomalous_params(model[0](torch.ones(2)).sum(), model) == ["1.weight", "1.bias"]
    assert "1.weight of unknown shape, 1.bias of unknown shape" in capsys.readouterr().out

"""Models as the seed documents them."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict, UserDict, defaultdict
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from hookengine import (
    MODELS,
    BaseModel,
)
from hookengine.events.dispatch import SILENT
from hookengine.model import BaseDataPreprocessor
from tests.fixtures import MakeData, MakeRunner, Toy, ToyAccuracy
from tests.hookengine.model.blocks import tensors


def test_forward_is_abstract() -> None:
    with pytest.raises(TypeError, match="abstract"):
        BaseModel()  # type: ignore[abstract]


class Encoding(UserDict[str, Any]):
    """As BatchEncoding of transformers: it moves its tensors itself."""

    def to(self, device: Any) -> Encoding:
        self.data = {key: getattr(v, "to", lambda _, v=v: v)(device) for key, v in self.items()}
        return self


class Modes(BaseModel):
    """Tells how forward was called."""

    def forward(self, *args: Any, mode: str = "tensor", **kwargs: Any) -> Any:
        return (args, kwargs, mode)


@pytest.mark.parametrize(
    ("batch", "args", "kwargs"),
    [
        ((1, "a"), (1, "a"), {}),
        ([1, "a"], (1, "a"), {}),
        ({"x": 1, "y": None}, (), dict(x=1, y=None)),
        (OrderedDict(x=1), (), dict(x=1)),
        (defaultdict(int, x=1), (), dict(x=1)),
        (MappingProxyType({"x": 1}), (), dict(x=1)),
        (UserDict(x=1), (), dict(x=1)),
        (Encoding(x=1), (), dict(x=1)),
    ],
)
def test_a_batch_becomes_the_arguments_of_forward(batch: Any, args: Any, kwargs: Any) -> None:
    model = Modes()
    assert model.val_step(batch) == (args, kwargs, "predict")
    assert model.test_step(batch) == (args, kwargs, "predict")
    assert model._run_forward(batch, "loss") == (args, kwargs, "loss")


def test_a_mapping_reaches_forward_whatever_the_data_preprocessor_returns() -> None:
    model = Modes(data_preprocessor=nn.Identity())
    model.data_preprocessor.forward = lambda data, training: data  # type: ignore[method-assign]
    for batch in (UserDict(x=1), Encoding(x=1), MappingProxyType({"x": 1})):
        assert model.val_step(batch) == ((), dict(x=1), "predict")


def test_an_encoding_of_a_tokenizer_trains_as_a_dict_does(make: MakeRunner, data: MakeData) -> None:
    def weights(kind: Any) -> Tensor:
        inputs, labels = data().tensors
        batches = [kind(inputs=inputs[:8], labels=labels[:8]), kind(inputs=inputs, labels=labels)]
        runner = make(train_dataloader=batches, val_dataloader=batches, val_evaluator=ToyAccuracy())
        runner.train()
        return cast(Tensor, runner.bare_model.net.weight)

    expected = weights(dict)
    for kind in (UserDict, Encoding, lambda **batch: MappingProxyType(batch)):
        assert torch.equal(weights(kind), expected)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_a_forward_that_does_not_take_nested_tensors_is_named(layout: Any) -> None:
    nested = torch.nested.nested_tensor([torch.ones(2, 1), torch.ones(3, 1)], layout=layout)
    with pytest.raises(TypeError) as caught:
        Toy().val_step((nested, nested, nested))
    assert caught.value.__notes__[0].startswith("Toy.forward got a batch of 3 (")


def test_any_other_batch_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="dict, tuple or list"):
        Modes().val_step(torch.ones(2))


def test_a_forward_that_returns_none_is_said_so() -> None:
    class Silent(BaseModel):
        def forward(self, mode: str) -> None: ...

    with pytest.raises(TypeError, match=r"Silent.forward\(mode='predict'\) returned None"):
        Silent().val_step(())


def test_losses_are_summed_and_everything_is_logged() -> None:
    losses: dict[str, Any] = {
        **tensors(loss_cls=[1.0, 3.0], accuracy=0.5),
        "loss_box": [torch.tensor([1.0, 2.0]), torch.tensor(4.0)],
    }
    loss, log_vars = Modes().parse_losses(losses)
    assert loss.item() == 2 + 1.5 + 4
    assert list(log_vars) == ["loss", "loss_cls", "accuracy", "loss_box"]
    assert {k: v.item() for k, v in log_vars.items()} == {
        "loss": 7.5,
        "loss_cls": 2.0,
        "accuracy": 0.5,
        "loss_box": 5.5,
    }
    assert not any(value.requires_grad for value in log_vars.values())


def test_the_sum_is_under_loss_also_where_one_of_them_has_that_name() -> None:
    loss, log_vars = Modes().parse_losses(tensors(loss=1.0, aux_loss=2.0))
    assert (loss.item(), log_vars["loss"].item(), log_vars["aux_loss"].item()) == (3, 3, 2)


def test_a_single_loss_gets_no_node_of_its_own() -> None:
    for name in ("loss", "loss_ce"):
        value = torch.tensor(2.0, requires_grad=True) * 3
        loss, log_vars = Modes().parse_losses(OrderedDict({name: value}))
        assert loss is value
        assert log_vars["loss"].item() == 6
    loss, _ = Modes().parse_losses({"loss": torch.ones(2, requires_grad=True) * 3})
    assert loss.item() == 3


def test_losses_may_be_in_any_mapping() -> None:
    loss, _ = Modes().parse_losses(MappingProxyType(tensors(loss_a=1.0, loss_b=2.0)))
    assert loss.item() == 3


@pytest.mark.parametrize(
    ("losses", "error", "message"),
    [
        (torch.tensor(1.0), TypeError, r"dict\(loss=loss\); got Tensor"),
        ({"loss": 3.0}, TypeError, "'loss' must be a tensor or a list of tensors, got float"),
        ({"loss": []}, TypeError, "got list"),
        ({"cost": torch.tensor(1.0)}, ValueError, r"must contain 'loss', got \['cost'\]"),
        ({}, ValueError, "must contain 'loss'"),
    ],
)
def test_losses_of_another_kind_are_answered(losses: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        Modes().parse_losses(losses)


def test_train_step_preprocesses_for_training_and_steps(toy: type[Toy], data: MakeData) -> None:
    from hookengine import OptimWrapper

    seen = []

    class Preprocessor(nn.Module):
        def forward(self, data: Any, training: bool = False) -> Any:
            seen.append(training)
            return data

    model = toy()
    model.data_preprocessor = Preprocessor()
    wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.1))
    before = model.net.weight.clone()
    log_vars = model.train_step(data().tensors, wrapper)
    assert set(log_vars) == {"loss"}
    assert not torch.equal(model.net.weight, before)
    model.val_step(data().tensors)
    assert set(model.loss_step(data().tensors)) == {"loss"}
    assert seen == [True, False, False]


def test_the_data_preprocessor_is_built_from_what_is_given() -> None:
    assert type(Modes().data_preprocessor) is BaseDataPreprocessor
    assert Modes(dict(non_blocking=True)).data_preprocessor._non_blocking
    image = Modes(dict(type="ImgDataPreprocessor", mean=[0.5], std=[0.5])).data_preprocessor
    assert type(image).__name__ == "ImgDataPreprocessor"
    own = nn.Identity()
    assert Modes(own).data_preprocessor is own
    with pytest.raises(TypeError, match=r"dict or an nn\.Module"):
        Modes(3)  # type: ignore[arg-type]
    with pytest.raises(KeyError, match="Did you mean 'ImgDataPreprocessor'"):
        Modes(dict(type="ImgDataPreprocesor"))


def test_every_way_of_moving_takes_the_preprocessors_along_at_any_nesting() -> None:
    inner = Modes()
    outer = nn.Sequential(nn.ModuleDict({"part": inner}))
    outer.to("meta")
    assert inner.data_preprocessor.device == torch.device("meta")
    model: Any = Modes()
    assert model.to("meta") is model
    assert model.data_preprocessor.device.type == "meta"
    model = Modes()
    assert model.double().data_preprocessor.device.type == "cpu"
    assert model.cpu().data_preprocessor.device.type == "cpu"
    assert not any("data_preprocessor" in name for name in model.state_dict())


@pytest.mark.parametrize("backend", ["npu", "mlu", "musa"])
def test_an_accelerator_that_is_not_there_is_said_so(backend: str) -> None:
    with pytest.raises(RuntimeError, match=f"Import torch_{backend} first"):
        getattr(Modes(), backend)()


@pytest.mark.parametrize("backend", ["npu", "mlu", "musa"])
def test_another_vendors_method_takes_the_preprocessor_along(backend: str) -> None:
    model = Modes()
    assert getattr(model, backend)("meta") is model  # the device that every torch has
    assert model.data_preprocessor.device.type == "meta"


@pytest.mark.gpu
def test_cuda_takes_the_preprocessor_along() -> None:
    model: Any = Modes().cuda()
    assert model.data_preprocessor.device.type == "cuda"
    (moved,), _, _ = model.val_step((torch.ones(1),))
    assert moved.device.type == "cuda"
    assert model.cpu().data_preprocessor.device.type == "cpu"


def test_a_copied_or_pickled_model_does_not_speak_for_the_runner(
    make: MakeRunner, tmp_path: Path
) -> None:
    runner = make()
    assert runner.bare_model._hooks() is runner.hooks
    twin = copy.deepcopy(runner.bare_model)
    assert twin._hooks() is SILENT
    assert pickle.loads(pickle.dumps(runner.bare_model))._hooks() is SILENT


def test_the_seeds_toy_model_runs() -> None:
    @MODELS.register_module(force=True)
    class ToyModel(BaseModel):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Sequential()
            self.backbone.add_module("conv1", nn.Conv2d(3, 6, 5))
            self.backbone.add_module("pool", nn.AdaptiveAvgPool2d(1))
            self.backbone.add_module("flat", nn.Flatten())
            self.backbone.add_module("fc", nn.Linear(6, 10))
            self.criterion = nn.CrossEntropyLoss()

        def forward(self, batch_inputs: Tensor, data_samples: Any, mode: str = "tensor") -> Any:
            data_samples = torch.stack(data_samples)
            feats = self.backbone(batch_inputs)
            if mode == "tensor":
                return feats
            if mode == "predict":
                return torch.argmax(feats, 1)
            return dict(loss=self.criterion(feats, data_samples))

    model = MODELS.build(dict(type="ToyModel"))
    batch = dict(batch_inputs=torch.rand(2, 3, 8, 8), data_samples=[torch.tensor(1)] * 2)
    assert model.val_step(batch).shape == (2,)
    assert model(**batch).shape == (2, 10)

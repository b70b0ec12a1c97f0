"""Models as the seed documents them."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hookengine.model
from hookengine import (
    MODELS,
    BaseModel,
    BaseModule,
    ModuleDict,
    ModuleList,
    Registry,
    Sequential,
)
from hookengine.events.dispatch import SILENT
from hookengine.model import BaseDataPreprocessor
from hookengine.model.stub import stub
from tests.fixtures import MakeData, MakeRunner, Toy


def test_forward_is_abstract() -> None:
    with pytest.raises(TypeError, match="abstract"):
        BaseModel()  # type: ignore[abstract]


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
    ],
)
def test_a_batch_becomes_the_arguments_of_forward(batch: Any, args: Any, kwargs: Any) -> None:
    model = Modes()
    assert model.val_step(batch) == (args, kwargs, "predict")
    assert model.test_step(batch) == (args, kwargs, "predict")
    assert model._run_forward(batch, "loss") == (args, kwargs, "loss")


def test_any_other_batch_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="dict, tuple or list"):
        Modes().val_step(torch.ones(2))


def test_a_forward_that_returns_none_is_said_so() -> None:
    class Silent(BaseModel):
        def forward(self, mode: str) -> None: ...

    with pytest.raises(TypeError, match=r"Silent.forward\(mode='predict'\) returned None"):
        Silent().val_step(())


def tensors(**values: Any) -> dict[str, Any]:
    return {name: torch.tensor(value, requires_grad=True) for name, value in values.items()}


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
    with pytest.raises(RuntimeError, match=f"import torch_{backend} first"):
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


def test_init_weights_asks_the_plugin_or_says_that_there_is_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Module(BaseModule): ...

    module = Module(init_cfg=dict(type="Constant", val=1))
    assert module.init_cfg == dict(type="Constant", val=1)
    assert not module.is_init
    called: list[Any] = []
    monkeypatch.setitem(MODELS._registered, "init_weights", called.append)
    module.init_weights()
    assert called == [module]
    monkeypatch.setattr(Registry, "__contains__", lambda self, name: False)
    with pytest.raises(RuntimeError, match=r"no installed plugin.*torch.nn.init"):
        module.init_weights()


class Block(BaseModule):
    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 2)
        for name, part in parts.items():
            self.add_module(name, part)


def loaded(module: Any) -> set[str]:
    """Names of the tensors of a BaseModule that it knows as loaded."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return {name for name, tensor in tensors if any(tensor is t for t in module.loaded_tensors)}


def test_a_module_knows_which_tensors_were_loaded_into_it() -> None:
    whole = nn.Sequential(Block(), Block())
    assert loaded(whole[0]) == set()
    state = {name: value for name, value in whole.state_dict().items() if name != "1.fc.bias"}
    whole.load_state_dict(state, strict=False)
    assert loaded(whole[0]) == {"fc.weight", "fc.bias"}
    assert loaded(whole[1]) == {"fc.weight"}
    for twin in (copy.deepcopy(whole), pickle.loads(pickle.dumps(whole)), whole.double()):
        assert loaded(twin[1]) == {"fc.weight"}


def test_what_is_replaced_or_renamed_in_loading_counts_and_what_does_not_fit_does_not() -> None:
    block = Block()
    block.load_state_dict(Block().state_dict(), assign=True)
    assert loaded(block) == {"fc.weight", "fc.bias"}

    def rename(module: Any, state: Any, prefix: str, *_: Any) -> None:
        state[prefix + "weight"] = state.pop(prefix + "old")

    block = Block()
    block.fc.register_load_state_dict_pre_hook(rename)
    block.load_state_dict({"fc.old": torch.ones(2, 2)}, strict=False)
    assert loaded(block) == {"fc.weight"}

    block = Block(inner=Block())
    with pytest.raises(RuntimeError, match="size mismatch"):
        block.load_state_dict({"inner.fc.bias": torch.ones(7), "inner.fc.weight": torch.ones(2, 2)})
    assert loaded(block) == set()  # what a BaseModule within knows, it knows itself
    assert loaded(block.inner) == {"fc.weight"}


def test_shared_modules_on_the_meta_device_are_known_as_loaded_by_assignment() -> None:
    for _ in range(20):  # a freed parameter's id may be taken by the next one
        with torch.device("meta"):
            block = Block()
            block.twin = block.fc
        block.load_state_dict(
            {
                f"{n}.{p}": torch.ones(2, 2)[0 if p == "bias" else slice(None)]
                for n in ("fc", "twin")
                for p in ("weight", "bias")
            },
            assign=True,
        )
        assert loaded(block) == {"fc.weight", "fc.bias"}


def test_what_takes_the_place_of_a_loaded_tensor_is_not_loaded() -> None:
    block = Block()
    block.load_state_dict(Block().state_dict())
    block.fc = nn.Linear(2, 2)
    assert loaded(block) == set()


def test_inference_tensors_load_as_in_any_module() -> None:
    with torch.inference_mode():
        block = Block()
        block.load_state_dict(Block().state_dict())


def test_a_module_to_be_initialised_anew_forgets_at_every_depth() -> None:
    block = Block(inner=nn.Sequential(Block()))
    block.load_state_dict(block.state_dict())
    block.is_init = block.inner[0].is_init = True
    block.is_init = False
    assert not block.inner[0].is_init
    assert loaded(block) == loaded(block.inner[0]) == set()


def test_init_cfg_is_a_copy_and_shows_in_the_repr() -> None:
    class Module(BaseModule): ...

    cfg: dict[str, Any] = dict(type="Constant", val=[1])
    module = Module(cfg)
    cfg["val"].append(2)
    assert module.init_cfg == dict(type="Constant", val=[1])
    assert "init_cfg={'type': 'Constant', 'val': [1]}" in repr(module)
    assert "init_cfg" not in repr(Module())


def test_containers_have_an_init_cfg() -> None:
    cfg = dict(type="Constant", val=1)
    layers = [nn.Linear(2, 3), nn.Linear(3, 1)]
    sequential = Sequential(*layers, init_cfg=cfg)
    assert sequential(torch.ones(1, 2)).shape == (1, 1)
    listed = ModuleList(layers, init_cfg=cfg)
    named = ModuleDict({"a": layers[0]}, init_cfg=cfg)
    assert (len(sequential), len(listed), list(named)) == (2, 2, ["a"])
    for container in (sequential, listed, named):
        assert isinstance(container, BaseModule)
        assert container.init_cfg == cfg
    assert set(sequential.state_dict()) == set(nn.Sequential(*layers).state_dict())


def test_a_copied_or_pickled_model_does_not_speak_for_the_runner(
    make: MakeRunner, tmp_path: Path
) -> None:
    runner = make()
    assert runner.bare_model._hooks is runner.hooks
    twin = copy.deepcopy(runner.bare_model)
    assert twin._hooks is SILENT
    assert pickle.loads(pickle.dumps(runner.bare_model))._hooks is SILENT


def test_type_checkers_see_the_names_that_plugins_offer() -> None:
    path = Path(hookengine.model.__file__).with_suffix(".pyi")
    assert path.read_text() == stub(), "run `make docs`"
    offered = set(MODELS.own_entry_points())
    assert offered <= set(hookengine.model.__all__) <= set(dir(hookengine.model))


def test_an_unknown_name_of_the_module_is_answered() -> None:
    with pytest.raises(ImportError, match="BaseDataPreprocesor"):
        from hookengine.model import BaseDataPreprocesor  # type: ignore[attr-defined]  # noqa: F401
    with pytest.raises(AttributeError, match="Did you mean 'BaseDataPreprocessor'"):
        hookengine.model.BaseDataPreprocesor  # type: ignore[attr-defined]  # noqa: B018
    assert not hasattr(hookengine.model, "__wrapped__")


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

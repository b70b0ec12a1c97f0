"""The plugin init: when a Runner initialises, what it leaves, and what it tells."""

from __future__ import annotations

import copy
import json
import os
import pickle
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as torch_dist
import torch.nn.functional as F
from torch import Tensor, nn

from hookengine import DEFAULT_PLUGINS, BaseModel, Plugin, Runner, Sequential
from tests.fixtures import MakeData, MakeRunner, ToyAccuracy
from tests.ranks import spawn

ON: dict[str, Any] = dict(defaults=("init",))


class Net(BaseModel):
    """A backbone and a head, which the tests' data fit."""

    def __init__(self, init_cfg: Any = dict(type="Normal", layer="Linear")) -> None:  # noqa: B006
        super().__init__(init_cfg=init_cfg)
        self.backbone = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, inputs: Tensor, labels: Tensor, mode: str = "tensor") -> Any:
        scores = self.head(self.backbone(inputs))
        if mode == "loss":
            return {"loss": F.cross_entropy(scores, labels)}
        return scores, labels


def test_it_is_on_by_default_and_can_be_switched_off(make: MakeRunner) -> None:
    assert "init" in DEFAULT_PLUGINS
    model = Net()
    before = model.head.weight.clone()
    make(model=model, plugins=["no:init"], defaults=("init",))
    assert torch.equal(model.head.weight, before)
    make(model=model, **ON)
    assert not torch.equal(model.head.weight, before)
    assert model.is_init


def test_the_weights_are_those_of_the_configuration(make: MakeRunner) -> None:
    torch.manual_seed(0)
    model = Net()
    state = torch.get_rng_state()
    make(model=lambda: torch.set_rng_state(state) or model, **ON)  # type: ignore[func-returns-value]
    torch.set_rng_state(state)
    assert torch.equal(model.backbone.weight, torch.empty(4, 4).normal_())
    assert torch.equal(model.head.weight, torch.empty(3, 4).normal_())


def test_it_comes_before_conversion_wrapping_optimizers_and_loading(make: MakeRunner) -> None:
    class Watch(Plugin):
        def initialize_model(self, model: Any) -> None:
            seen.append(("initialize", model.is_init, next(model.parameters()).device.type))

        def convert_model(self, model: Any) -> None:
            seen.append(("convert", model.is_init))

        def wrap_model(self, model: Any) -> None:
            seen.append(("wrap", model.is_init))

        def resume(self, runner: Any) -> None:
            runner.bare_model.load_state_dict(trained)
            seen.append(("resume", runner.model.is_init))

    seen: list[Any] = []
    trained = Net().state_dict()
    runner = make(model=Net(), plugins=[Watch()], **ON)
    expected = [("initialize", True, "cpu"), ("convert", True), ("wrap", True), ("resume", True)]
    assert seen == expected
    state = runner.bare_model.state_dict()
    assert all(torch.equal(state[name], trained[name]) for name in trained)


def test_weights_that_were_there_before_the_runner_stay(make: MakeRunner) -> None:
    source = Net()
    model = Net()
    model.load_state_dict(source.state_dict())
    make(model=model, **ON)
    assert torch.equal(model.head.weight, source.head.weight)


def test_a_second_runner_does_not_initialise_trained_weights(make: MakeRunner) -> None:
    class Mine(Net):
        def init_weights(self) -> None:  # calls no super().init_weights()
            nn.init.ones_(self.head.weight)

    for model in (Net(), Mine()):
        make(model=model, **ON).train()
        trained = model.head.weight.clone()
        make(model=model, **ON)
        assert torch.equal(model.head.weight, trained)


def test_a_runner_that_does_not_train_leaves_the_model_alone(
    tmp_path: Path, data: MakeData, accuracy: type[ToyAccuracy]
) -> None:
    model = Net()
    before = model.head.weight.clone()
    evaluation: dict[str, Any] = dict(
        val_dataloader=[data().tensors], val_evaluator=accuracy(), work_dir=tmp_path, **ON
    )
    with Runner(model, **evaluation) as runner:
        runner.val()
    assert torch.equal(model.head.weight, before)
    assert not model.is_init


def test_evaluating_a_model_whose_pretrained_weights_were_not_loaded_is_warned_of(
    tmp_path: Path, data: MakeData, accuracy: type[ToyAccuracy], capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(Net().state_dict(), tmp_path / "net.pth")
    evaluation: dict[str, Any] = dict(
        val_dataloader=[data().tensors], val_evaluator=accuracy(), work_dir=tmp_path
    )
    cfg = dict(type="Pretrained", checkpoint=str(tmp_path / "net.pth"))
    for prepare, warned in (
        (lambda model: None, True),
        (lambda model: model.init_weights(), False),
        (lambda model: model.load_state_dict(Net().state_dict()), False),
    ):
        model = Net(cfg)
        prepare(model)
        capsys.readouterr()
        with Runner(model, **evaluation) as runner:
            runner.val()
        assert ("the init_cfg names pretrained weights" in capsys.readouterr().out) == warned


def test_a_plain_module_is_never_initialised(make: MakeRunner) -> None:
    class LikeTimm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 3)

        def init_weights(self, mode: str = "") -> None:
            raise AssertionError("pretrained weights would be lost")

        def forward(self, inputs: Tensor) -> Tensor:
            return self.head(inputs)

    make(model=LikeTimm(), loss=F.cross_entropy, **ON)


def test_the_parts_of_a_plain_module_that_wait_are_told_of(
    make: MakeRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    model = nn.Sequential(Sequential(nn.Linear(4, 3), init_cfg=dict(type="Normal", layer="Linear")))
    make(model=model, loss=F.cross_entropy, defaults=("init", "logging"))
    assert (
        "the init_cfg of '0' takes effect only if you call its init_weights()"
        in capsys.readouterr().out
    )
    model[0].init_weights()
    capsys.readouterr()
    make(model=model, loss=F.cross_entropy, defaults=("init", "logging"))
    assert "takes effect" not in capsys.readouterr().out


def test_keep_leaves_named_parts_as_they_are(
    make: MakeRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    class Pretrained(nn.Linear):
        def init_weights(self) -> None:
            raise AssertionError("was to be kept")

    model = Net()
    model.backbone = Pretrained(4, 4)
    kept, fresh = model.backbone.weight.clone(), model.head.weight.clone()
    options = dict(type="init", keep="backbone")  # or several, in a tuple
    make(model=model, plugins=[options], defaults=("init", "logging"))
    assert torch.equal(model.backbone.weight, kept)
    assert not torch.equal(model.head.weight, fresh)
    text = capsys.readouterr().out
    assert "backbone.weight  [4, 4]  kept as it was: keep='backbone'" in text
    with pytest.raises(ValueError, match="keep='': Net has no such submodule"):
        make(model=Net(), plugins=[dict(type="init", keep=[""])], **ON)
    with pytest.raises(
        ValueError, match=r"keep='bakbone': Net has no.*mean 'backbone'.*has data_p"
    ):
        make(model=Net(), plugins=[dict(type="init", keep=["bakbone"])], **ON)


class LikeTimm(nn.Module):
    """A backbone of another library, which draws its weights in its constructor."""

    def __init__(self, state: Any = None) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.init_weights()
        if state is not None:
            self.load_state_dict(state)

    def init_weights(self, mode: str = "") -> None:
        nn.init.normal_(self.stem.weight)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.norm(self.stem(inputs))


class LikeTransformers(LikeTimm):
    """One that calls init_weights for each part."""

    def init_weights(self, mode: str = "") -> None:
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight)


@pytest.mark.parametrize("kind", [LikeTimm, LikeTransformers])
def test_init_weights_of_modules_of_others_is_called_only_if_asked_for(
    make: MakeRunner, capsys: pytest.CaptureFixture[str], kind: Any
) -> None:
    told = f"init_weights() of 'backbone' ({__name__}.{kind.__name__}) was not called"
    for option, called in ((None, False), (False, False), (True, True)):
        model: Any = Net(dict(type="Normal", override=dict(name="head")))
        model.backbone = kind()
        before = model.backbone.stem.weight.clone()
        head = model.head.weight.clone()
        make(
            model=model,
            plugins=[dict(type="init", init_foreign=option)],
            defaults=("init", "logging"),
        )
        assert torch.equal(model.backbone.stem.weight, before) is not called
        assert not torch.equal(model.head.weight, head)
        text = capsys.readouterr().out
        assert text.count(told) == (option is None)
        assert ("dict(type='init', init_foreign=True)" in text) == (option is None)
        listed = f"backbone: initialized by init_weights() of {__name__}.{kind.__name__}"
        assert (listed in text) == called


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_what_an_init_cfg_around_it_has_redrawn_is_said_at_any_depth(
    make: MakeRunner, capsys: pytest.CaptureFixture[str], depth: int
) -> None:
    model: Any = Net(dict(type="Normal", layer="Linear"))
    backbone: Any = LikeTimm()
    before = backbone.stem.weight.clone()
    name = "backbone" + ".0" * depth
    for _ in range(depth):
        backbone = nn.Sequential(backbone)
    model.backbone = backbone
    make(model=model, defaults=("init", "logging"))
    found = dict(model.named_modules())[name]
    assert not torch.equal(found.stem.weight, before)
    printed = capsys.readouterr().out
    assert f"an init_cfg around '{name}'" in printed
    assert f"keep=('{name}',)" in printed


def test_init_weights_that_needs_arguments_is_an_error_only_if_it_is_asked_for(
    make: MakeRunner,
) -> None:
    class Needs(LikeTimm):
        def init_weights(self, mode: str) -> None:  # type: ignore[override]
            raise AssertionError

    model: Any = Net()
    model.backbone = Needs.__new__(Needs)
    nn.Module.__init__(model.backbone)
    model.backbone.stem = nn.Linear(4, 4)
    with pytest.raises(TypeError, match="mode") as caught:
        make(model=model, plugins=[dict(type="init", init_foreign=True)], **ON)
    assert any("in init_weights() of Needs 'backbone'" in note for note in caught.value.__notes__)
    make(model=model, **ON)


def test_base_modules_within_modules_of_others_are_initialized(
    make: MakeRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    def inner() -> Any:
        return Sequential(nn.Linear(4, 4), init_cfg=dict(type="Constant", val=3, layer="Linear"))

    model: Any = Net(None)
    model.backbone = LikeTimm()
    model.backbone.block = nn.ModuleList([inner(), LikeTimm()])
    model.others = nn.Sequential(LikeTimm())
    model.others[0].block = inner()
    weights = [model.backbone.stem.weight, model.others[0].stem.weight]
    before = [weight.clone() for weight in weights]
    make(model=model, defaults=("init", "logging"))
    assert all(map(torch.equal, weights, before))
    assert (model.backbone.block[0][0].weight == 3).all()
    assert (model.others[0].block[0].weight == 3).all()
    text = capsys.readouterr().out
    assert "others.0: init_weights() of LikeTimm was not called, since it is not a dir" in text
    assert "init_weights() of 'backbone' " in text
    assert text.count("was not called") == 2, "once for all within a module of others"


@pytest.mark.parametrize("asked", [None, True])
@pytest.mark.parametrize("how", ["alone", "copied", "in a container", "as a part", "assigned"])
def test_weights_loaded_into_a_plain_module_stay(
    make: MakeRunner, capsys: pytest.CaptureFixture[str], how: str, asked: Any
) -> None:
    state = {name: torch.full_like(t, 2) for name, t in LikeTimm().state_dict().items()}
    backbone: Any = LikeTimm()
    if how == "in a container":
        whole = nn.Sequential(nn.Identity(), backbone)
        whole.load_state_dict({f"1.{name}": value for name, value in state.items()})
    elif how == "as a part":
        for name, part in backbone.named_children():
            part.load_state_dict(
                {k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(name)}
            )
    else:
        backbone.load_state_dict(state, assign=how == "assigned")
    if how == "copied":
        backbone = pickle.loads(pickle.dumps(copy.deepcopy(backbone)))
    layers = ["Linear", "BatchNorm1d"]
    model: Any = Net(dict(type="Constant", val=5, bias=5, layer=layers))
    model.backbone = backbone
    model.backbone.added = nn.Linear(1, 1)
    options = [dict(type="init", init_foreign=asked)]
    make(model=model, plugins=options, defaults=("init", "logging"))
    for name, tensor in model.backbone.state_dict().items():
        assert (tensor == (5 if "added" in name else 2)).all(), name
    assert (model.head.weight == 5).all()
    text = capsys.readouterr().out
    assert "backbone.stem.weight   [4, 4]  already loaded from a state dict: left unch" in text


def test_an_init_cfg_that_reaches_into_a_module_of_others_is_told_of(
    make: MakeRunner, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for option in (None, False):
        model: Any = Net(dict(type="Constant", val=5, layer="Linear"))
        model.backbone = LikeTimm()
        plugins = [dict(type="init", init_foreign=option)]
        make(model=model, plugins=plugins, defaults=("init", "logging"))
        text = capsys.readouterr().out
        assert "an init_cfg around 'backbone'" in text
        assert "has initialized 2 of its parameters (stem.weight, ...)" in text
        assert "keep=('backbone',)" in text

    source = LikeTimm()
    torch.save(source.state_dict(), tmp_path / "net.pth")
    loading = dict(type="Pretrained", name="backbone", checkpoint=str(tmp_path / "net.pth"))
    model = Net(dict(type="Constant", val=5, layer="Linear", override=loading))
    model.backbone = LikeTimm()
    make(model=model, defaults=("init", "logging"))
    assert torch.equal(model.backbone.stem.weight, source.stem.weight)
    text = capsys.readouterr().out
    assert "an init_cfg around" not in text
    assert "was not called" not in text


def test_a_backbone_that_is_loaded_as_a_whole_is_not_told_of(
    make: MakeRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    model: Any = Net()
    model.backbone = LikeTimm(LikeTimm().state_dict())
    make(model=model, defaults=("init", "logging"))
    assert "was not called" not in capsys.readouterr().out


def test_a_new_layer_of_a_loaded_backbone_is_initialized(make: MakeRunner) -> None:
    model: Any = Net(dict(type="Constant", val=5, layer="Linear"))
    model.backbone = LikeTimm(LikeTimm().state_dict())
    kept = model.backbone.stem
    model.backbone.stem = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model.backbone.old = kept
    before = kept.weight.clone()
    make(model=model, **ON)
    assert (model.backbone.stem[0].weight == 5).all()
    assert torch.equal(kept.weight, before)
    model.is_init = False
    make(model=model, **ON)
    assert (kept.weight == 5).all()


def test_the_model_s_own_init_weights_is_called_and_named(
    make: MakeRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    class Mine(Net):
        def init_weights(self) -> None:
            super().init_weights()
            nn.init.constant_(self.head.bias, 3)

    model = Mine()
    make(model=model, defaults=("init", "logging"))
    assert model.head.bias.tolist() == [3, 3, 3]
    text = capsys.readouterr().out
    assert "head.bias        [3]     Initialized by user-defined `init_weights` in Mine" in text
    assert text.count("weights of Mine") == 1


def test_a_seeded_initialization_depends_on_the_seed_alone(make: MakeRunner) -> None:
    class Draws(Net):
        def init_weights(self) -> None:
            super().init_weights()
            nn.init.constant_(self.head.bias, random.random() + np.random.rand())

    def initialised(draws: int, seed: int | None) -> tuple[list[Tensor], float]:
        model = Draws()

        def factory() -> Net:
            torch.manual_seed(5)
            random.seed(5)
            np.random.seed(5)
            for _ in range(draws):
                torch.rand(3), random.random(), np.random.rand()
            return model

        make(model=factory, plugins=[dict(type="init", seed=seed)], **ON)
        after = torch.rand(1).item()
        weights = [model.backbone.weight, model.head.weight, model.head.bias]
        return [w.detach().clone() for w in weights], after

    (a, _), (b, _) = initialised(0, seed=3), initialised(7, seed=3)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    (c, after) = initialised(0, seed=4)
    assert not torch.equal(a[0], c[0])
    torch.manual_seed(5)
    assert after == torch.rand(1).item()  # nor does what follows depend on it
    assert not torch.equal(initialised(0, seed=None)[0][0], initialised(7, seed=None)[0][0])


def test_the_whole_report_is_in_the_run_s_log_and_a_short_one_on_the_console(
    make: MakeRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Net()
    model.many = nn.Sequential(*[nn.Linear(1, 1) for _ in range(30)])
    runner = make(model=model, defaults=("init", "logging"))
    console = capsys.readouterr().out
    assert "weights of Net, 64 parameters\n" in console
    assert console.endswith("\n  (in full in run.log)\n")
    assert "64 x backbone.weight, ..., many.29.bias  95 values  NormalInit: mean=0" in console
    assert "many.7.weight" not in console
    runner.train()
    log = (runner.run_dir / "run.log").read_text()
    assert sum(line.startswith("  many.") for line in log.splitlines()) == 60
    assert "  many.7.weight    [1, 1]  NormalInit: mean=0, std=1, bias=0" in log
    options = json.loads((runner.run_dir / "run.json").read_text())["plugins"][0]["options"]
    assert options == {"keep": [], "init_foreign": None, "seed": None}


def test_a_model_without_any_init_cfg_says_nothing(
    make: MakeRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    make(model=Net(None), defaults=("init", "logging"))
    assert "weights of" not in capsys.readouterr().out


def test_a_mistake_names_the_plugin_and_the_event(make: MakeRunner) -> None:
    with pytest.raises(ValueError, match="layer='Conv2d' matches nothing in Net") as caught:
        make(model=Net(dict(type="Normal", layer="Conv2d")), **ON)
    assert any("'init'" in note and "initialize_model" in note for note in caught.value.__notes__)


def test_bad_options_are_answered() -> None:
    from hookengine import PLUGINS

    for options, message in (
        (dict(keep=3), "keep=3"),
        (dict(seed=-1), "seed=-1"),
        (dict(kep=()), "unknown option 'kep'. Did you mean 'keep'"),
    ):
        with pytest.raises(TypeError, match=message):
            PLUGINS.build(dict(type="init", **options))


# -- several ranks ------------------------------------------------------------------------------


def on_rank(rank: int, port: int, folder: str) -> None:
    """Run by each rank, which draws weights of its own; an assertion fails the test."""
    torch.set_num_threads(1)
    torch_dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    torch.manual_seed(rank)
    for by_hand in (False, True):
        model = Net()
        if by_hand and rank == 1:  # one rank alone: the others must not wait for it
            model.init_weights()
        runner = Runner(
            model,
            folder,
            train_dataloader=[(torch.ones(2, 4), torch.zeros(2, dtype=torch.long))] * 2,
            train_cfg=dict(max_epochs=1),
            optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.1)),
        )
        for tensor in model.state_dict().values():
            both = [torch.empty_like(tensor) for _ in range(2)]
            torch_dist.all_gather(both, tensor)
            assert torch.equal(both[0], both[1])
        runner.close()
    Sequential(nn.Linear(1, 1), init_cfg=dict(type="Normal", layer="Linear")).init_weights()
    torch_dist.barrier()
    torch_dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads can abort a Python that finalizes: pytorch/pytorch#179291


@pytest.mark.ranks
def test_all_ranks_hold_the_same_weights(tmp_path: Path) -> None:
    spawn(2, on_rank, tmp_path, str(tmp_path))
    printed = "".join((tmp_path / f"printed_{rank}").read_text() for rank in range(2))
    assert printed.count("weights of Net") == 2  # by rank 0, once for each model
    assert printed.count("weights of Sequential") == 1  # by a direct call, outside of a Runner

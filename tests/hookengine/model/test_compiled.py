"""Models that the user compiled with ``torch.compile`` before the Runner got them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from hookengine import BaseModel, Plugin, names_as_in, original_names
from hookengine.model.compiled import compile_in_place
from tests.fixtures import MakeRunner, Toy


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(module: nn.Module) -> Any:
    """Wrap a module; nothing is compiled before it is called."""
    return torch.compile(module, backend="eager")


class Seen(Plugin):
    """Counts the events of the losses."""

    losses: Any = 0

    def after_forward(self) -> None:
        self.losses += 1


class Parts(BaseModel):
    """A model of a compiled part and another one."""

    def __init__(self, backend: Any = "eager") -> None:
        super().__init__()
        self.body = torch.compile(
            nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), backend=backend
        )
        self.net = nn.Linear(4, 3)

    def forward(self, inputs: Tensor, labels: Tensor, mode: str = "tensor") -> Any:
        scores = self.net(self.body(inputs))
        if mode == "loss":
            return {"loss": F.cross_entropy(scores, labels)}
        return (scores, labels) if mode == "predict" else scores


@pytest.fixture
def graphs(fresh_dynamo: None) -> tuple[Any, list[int]]:
    """A backend that runs what it gets, and the sizes of the graphs that it got."""
    sizes: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        sizes.append(len(graph.graph.nodes))
        return graph.forward

    return backend, sizes


@pytest.mark.process
def test_a_compiled_model_trains_compiled_with_all_its_events_and_plain_names(
    make: MakeRunner, graphs: tuple[Any, list[int]]
) -> None:
    backend, sizes = graphs
    model = Toy()
    twin = copy.deepcopy(model)
    wrapper: Any = torch.compile(model, backend=backend)
    seen = Seen()
    optimizer = torch.optim.SGD(wrapper.parameters(), lr=0.1)
    runner = make(model=wrapper, plugins=[seen, "ema"], optim_wrapper=optimizer, validate=True)
    runner.train()
    plain = make(model=twin, validate=True)
    plain.train()
    assert seen.losses == 10
    assert sizes, "the model was compiled"
    assert runner.bare_model is model
    state = runner.state_dict()
    assert [*state["state_dict"]] == ["net.weight", "net.bias"]
    assert state["meta"]["optimizers"]["optimizer"]["parameters"] == [["net.weight", "net.bias"]]
    assert not any("_orig_mod" in name for name in state["ema_state_dict"])
    assert runner.describe()["model"] == "Toy"
    assert torch.equal(runner.bare_model.net.weight, plain.bare_model.net.weight)
    assert wrapper(*next(iter(runner.dataloaders["train"]))).shape == (4, 3)  # still of use


@pytest.mark.process
def test_a_compiled_plain_module_has_the_names_of_the_module(
    make: MakeRunner, graphs: tuple[Any, list[int]]
) -> None:
    backend, sizes = graphs
    module = nn.Sequential(nn.Linear(4, 3))
    runner = make(model=lambda: torch.compile(module, backend=backend), loss=F.cross_entropy)
    runner.train()
    assert [*runner.state_dict()["state_dict"]] == ["0.weight", "0.bias"]
    assert len(sizes) == 1


@pytest.mark.process
def test_a_compiled_part_runs_compiled_and_has_plain_names(
    make: MakeRunner, graphs: tuple[Any, list[int]]
) -> None:
    backend, sizes = graphs
    runner = make(model=Parts(backend), plugins=["ema"])
    runner.train()
    assert len(sizes) == 1
    state = runner.state_dict()
    names = [name for key in ("state_dict", "ema_state_dict") for name in state[key]]
    assert "body.0.weight" in names
    assert "module.body.0.weight" in names
    assert not any("_orig_mod" in name for name in names)


def test_a_part_that_is_also_used_uncompiled_is_left_but_its_names_are_plain(
    make: MakeRunner,
) -> None:
    model = Toy()
    net = model.net
    model.fast = compiled(net)
    runner = make(model=model)
    assert model.net is net
    assert type(model.fast).__name__ == "OptimizedModule"
    assert net._compiled_call_impl is None
    state = runner.state_dict()
    expected = ["net.weight", "net.bias", "fast.weight", "fast.bias"]
    assert [*state["state_dict"]] == expected
    state["state_dict"]["net.bias"] = state["state_dict"]["fast.bias"] = torch.ones(3)
    runner.load_state_dict(state)
    assert runner.bare_model.net.bias.tolist() == [1, 1, 1]


def test_a_state_saved_with_compiled_parts_and_their_names_is_resumed(make: MakeRunner) -> None:
    """As it was saved when the names were kept, or by another trainer."""

    def with_inner(names: Any) -> Any:
        return [name.replace("body.", "body._orig_mod.") for name in names]

    runner = make(model=Parts(), plugins=["ema"])
    state = runner.state_dict()
    for key in ("state_dict", "ema_state_dict"):
        values = [torch.full_like(value, 2) for value in state[key].values()]
        state[key] = dict(zip(with_inner(state[key]), values, strict=True))
    described = state["meta"]["optimizers"]["optimizer"]
    described["parameters"] = [with_inner(group) for group in described["parameters"]]
    runner.load_state_dict(state)
    assert runner.bare_model.body[0].bias.tolist() == [2, 2, 2, 2]
    assert runner.plugins["ema"].averaged.module.body[0].bias.tolist() == [2, 2, 2, 2]


class Forwarding(nn.Module):
    """A wrapper that passes every attribute on, as PEFT's and FSDP's do."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


@pytest.mark.parametrize(
    "wrap",
    [
        Forwarding,
        lambda model: Forwarding(Forwarding(model)),
        lambda model: compiled(Forwarding(model)),
        nn.DataParallel,
        lambda model: nn.DataParallel(compiled(model)),
        AveragedModel,
    ],
)
def test_any_other_wrapper_around_a_base_model_is_refused_with_the_way(
    make: MakeRunner, wrap: Any
) -> None:
    with pytest.raises(
        TypeError, match=r"already wrapped in .* Pass the model itself.* of the Toy bypasses"
    ):
        make(model=wrap(Toy()))
    with pytest.raises(TypeError, match="'distributed' wraps the model"):
        make(model=wrap(Toy()), loss=F.cross_entropy if wrap is not AveragedModel else None)


def test_a_wrapper_with_its_own_train_step_emits_the_events_of_the_model_in_it(
    make: MakeRunner,
) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = Toy()

        def train_step(self, data: Any, optim_wrapper: Any) -> Any:
            return self.module.train_step(data, optim_wrapper)

    seen = Seen()
    runner = make(model=Own(), plugins=[seen])
    runner.train()
    assert seen.losses == 10
    runner.close()
    runner.bare_model.module.parse_losses({"loss": torch.ones(())})
    assert seen.losses == 10, "nothing is emitted after the Runner is closed"


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_wrappers_of_plain_modules_train_as_before(make: MakeRunner) -> None:
    for wrap in (nn.DataParallel, Forwarding, torch.jit.script, AveragedModel):
        runner = make(model=wrap(nn.Linear(4, 3)), loss=F.cross_entropy)
        runner.train()
        assert runner.progress.step == 10


def test_what_looks_like_a_module_but_is_none_is_not_called_to_make_one(make: MakeRunner) -> None:
    class Proxy:
        def __init__(self, module: nn.Module) -> None:
            self.module = module

        def __getattr__(self, name: str) -> Any:
            return getattr(self.module, name)

        def __call__(self, *args: Any) -> Any:
            return self.module(*args)

    with pytest.raises(TypeError, match=r"must be an nn\.Module, got Proxy"):
        make(model=Proxy(Toy()))


def test_hooks_of_a_compiled_part_keep_it_in_place() -> None:
    model: Any = Parts()
    model.body.register_forward_hook(lambda *_: None)
    assert compile_in_place(model) is model
    assert type(model.body).__name__ == "OptimizedModule"


def test_a_compiled_part_in_two_places_of_containers() -> None:
    part = compiled(nn.Linear(2, 2))
    model: Any = nn.ModuleDict({"a": nn.ModuleList([part]), "b": part})
    assert compile_in_place(compiled(model)) is model
    assert [*model.state_dict()] == ["a.0.weight", "a.0.bias", "b.weight", "b.bias"]
    assert model["a"][0] is model["b"]


def test_names_in_both_directions() -> None:
    plain = Parts()
    compile_in_place(plain)
    parts = Parts()
    whole = compiled(Parts())
    for source in (plain, parts, whole):
        state = source.state_dict()
        names = original_names(state)
        assert [*names] == [*plain.state_dict()]
        assert names._metadata["body.1"]["version"] == 2
        for target in (plain, parts, whole):
            target.load_state_dict(names_as_in(target, state))
    state = plain.state_dict()
    assert original_names(state) is state
    both = {"a.b": 1, "a._orig_mod.b": 2}
    assert original_names(both) is both, "nothing is lost"

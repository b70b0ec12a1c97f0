"""The model is compiled where it is, or goes on without."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hookengine_compile import Compile
from torch import nn

from tests.fixtures import MakeRunner, Toy

pytestmark = [pytest.mark.process, pytest.mark.usefixtures("fresh_dynamo")]


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the run warned of; torch's compiler has records of its own."""
    records = [r for r in caplog.records if r.name == "hookengine" and r.levelname == "WARNING"]
    return [record.message for record in records]


@pytest.fixture
def graphs() -> tuple[Any, list[int]]:
    """A backend that runs what it gets, and the sizes of the graphs that it got."""
    sizes: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        sizes.append(len(graph.graph.nodes))
        return graph.forward

    return backend, sizes


def test_a_compiled_run_gives_the_same_weights(
    make: MakeRunner, graphs: tuple[Any, list[int]]
) -> None:
    backend, sizes = graphs
    compiled, plain = make(plugins=[Compile(backend=backend)], validate=True), make(validate=True)
    assert len(sizes) == 1, "something small was tried"
    for runner in (compiled, plain):
        runner.train()
    assert len(sizes) > 2, "training and validation were compiled"
    state, expected = compiled.bare_model.state_dict(), plain.bare_model.state_dict()
    assert state.keys() == expected.keys(), "no prefix"
    assert all(torch.equal(state[name], expected[name]) for name in state)
    assert compiled.val_loop.metrics == plain.val_loop.metrics


def test_the_default_backend_really_compiles(make: MakeRunner) -> None:
    if not _compiler_works():
        pytest.skip("torch.compile has no compiler here")
    runner, plain = make(plugins=["compile"]), make()
    runner.train()
    plain.train()
    torch.testing.assert_close(runner.bare_model.net.weight, plain.bare_model.net.weight)


def _compiler_works() -> bool:
    try:
        torch.compile(lambda x: x * 2)(torch.ones(2))
    except Exception:
        return False
    return True


def test_a_plain_module_is_compiled_with_its_loss(
    make: MakeRunner, graphs: tuple[Any, list[int]]
) -> None:
    backend, sizes = graphs
    runner = make(model=nn.Linear(4, 3), loss=F.cross_entropy, plugins=[Compile(backend=backend)])
    runner.train()
    assert len(sizes) == 2
    assert [*runner.state_dict()["state_dict"]] == ["weight", "bias"]


def test_a_copy_is_not_compiled_and_the_model_still_trains_after_the_run(
    make: MakeRunner, graphs: tuple[Any, list[int]]
) -> None:
    backend, _ = graphs
    runner = make(plugins=[Compile(backend=backend)])
    runner.train()
    twin = copy.deepcopy(runner.bare_model)
    assert torch.equal(twin.net.weight, runner.bare_model.net.weight)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's
def test_parts_by_name(make: MakeRunner, graphs: tuple[Any, list[int]]) -> None:
    backend, sizes = graphs
    make(plugins=[Compile(backend=backend, modules=("net",), fullgraph=True)]).train()
    assert len(sizes) == 2
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    plugin = Compile(backend=backend, modules=("1",))
    make(model=model, loss=F.cross_entropy, plugins=[plugin]).train()
    assert len(sizes) == 3
    with pytest.raises(KeyError, match="no part 'head'; it has data_preprocessor, net"):
        make(plugins=[Compile(backend=backend, modules=("head",))])


class Layers(nn.Sequential):
    """A subclass of torch's container without a forward of its own."""


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.layer(inputs).relu()


PARTS = {
    "a layer": lambda: nn.Linear(4, 4),
    "a container": lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh()),
    "a subclass of a container": lambda: Layers(nn.Linear(4, 4), nn.BatchNorm1d(4)),
    "a module with its own forward": Block,
    "that in a container": lambda: nn.Sequential(Block(), Block()),
}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's
@pytest.mark.parametrize("kind", PARTS)
def test_parts_of_every_kind_are_compiled(
    make: MakeRunner, graphs: tuple[Any, list[int]], kind: str
) -> None:
    backend, sizes = graphs
    torch.manual_seed(0)
    model = nn.Sequential(PARTS[kind](), nn.Linear(4, 3))
    twin = copy.deepcopy(model)
    plugin = Compile(backend=backend, modules=("0",))
    compiled = make(model=model, loss=F.cross_entropy, plugins=[plugin])
    before = len(sizes)
    compiled.train()
    assert len(sizes) == before + 1
    plain = make(model=twin, loss=F.cross_entropy)
    plain.train()
    state, expected = (runner.state_dict()["state_dict"] for runner in (compiled, plain))
    assert state.keys() == expected.keys(), "no prefix"
    assert all(torch.equal(state[name], expected[name]) for name in state)


def test_a_train_step_of_its_own_is_warned_of(
    make: MakeRunner,
    graphs: tuple[Any, list[int]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    backend, _ = graphs

    class Own(Toy):
        def train_step(self, data: Any, optim_wrapper: Any) -> Any:
            return super().train_step(data, optim_wrapper)

    make(plugins=[Compile(backend=backend)])
    make(model=Own(), plugins=[Compile(backend=backend, modules=("net",))])
    assert not told(caplog)
    make(model=Own(), plugins=[Compile(backend=backend)])
    assert "Own overrides train_step, so only what it calls as self(...)" in told(caplog)[0]


def test_without_a_compiler_the_run_goes_on_after_one_warning(
    make: MakeRunner, caplog: pytest.LogCaptureFixture
) -> None:
    def absent(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("No working C++ compiler found\nand a long explanation")

    runner, plain = make(plugins=[Compile(backend=absent)], validate=True), make()
    runner.train()
    plain.train()
    assert torch.equal(runner.bare_model.net.weight, plain.bare_model.net.weight)
    (text,) = told(caplog)
    assert "the model is not compiled" in text
    assert "No working C++ compiler found" in text
    assert "long explanation" not in text


def test_the_real_compiler_is_absent(
    make: MakeRunner, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch._inductor.config as inductor

    monkeypatch.setattr(inductor.cpp, "cxx", ("no-such-compiler",))
    monkeypatch.setattr(inductor, "fx_graph_cache", False)
    runner = make(plugins=["compile"])
    runner.train()
    assert runner.progress.step == 10
    (text,) = told(caplog)
    assert "the model is not compiled" in text
    assert "Install a C++ compiler" in text


def test_bad_options_are_refused() -> None:
    with pytest.raises(TypeError, match="mode='fast'"):
        Compile(mode="fast")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"unknown backend 'inductr'; known: .*inductor"):
        Compile(backend="inductr")
    with pytest.raises(TypeError, match="a mode or options"):
        Compile(mode="max-autotune", options={"trace.enabled": True})
    with pytest.raises(TypeError, match=r"options=\{'nonsense': 1\}: .*nonsense"):
        Compile(options={"nonsense": 1})
    with pytest.raises(TypeError, match=r"backend.*=3"):
        Compile(backend=3)  # type: ignore[arg-type]

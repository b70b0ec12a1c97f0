"""Optimizer wrappers: without a Runner as with one, and every event of a step."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hookengine import OptimWrapper, OptimWrapperDict, Plugin
from hookengine.loop.optim import combine
from tests.fixtures import MakeRunner, Toy


@pytest.fixture
def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(2, 1).double()


@pytest.fixture
def wrapper(layer: nn.Linear) -> OptimWrapper:
    return OptimWrapper(torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9))


def loss_of(layer: nn.Linear) -> Tensor:
    return layer(torch.ones(3, 2, dtype=torch.float64)).square().mean()


def test_without_a_runner_it_is_the_recipe_by_hand(layer: nn.Linear, wrapper: OptimWrapper) -> None:
    twin = nn.Linear(2, 1).double()
    twin.load_state_dict(layer.state_dict())
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    for _ in range(5):
        with wrapper.optim_context(layer):
            loss = loss_of(layer)
        wrapper.update_params(loss)
        loss_of(twin).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(layer.weight, twin.weight)
    assert wrapper.steps == 5
    assert layer.weight.grad is None
    assert not wrapper.window_open


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda layer: layer(torch.ones(3, 2).double()), r"scalar, got shape \(3, 1\)"),
        (lambda layer: loss_of(layer).detach(), "does not require a gradient"),
    ],
)
def test_a_loss_that_cannot_be_backpropagated_is_answered(
    layer: nn.Linear, wrapper: OptimWrapper, bad: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        wrapper.update_params(bad(layer))


def test_backward_and_step_by_hand(layer: nn.Linear, wrapper: OptimWrapper) -> None:
    before = layer.weight.clone()
    wrapper.backward(loss_of(layer))
    assert wrapper.window_open
    assert torch.equal(layer.weight, before)
    wrapper.step()
    assert wrapper.steps == 1
    assert not wrapper.window_open
    wrapper.backward(loss_of(layer))
    wrapper.zero_grad()
    assert layer.weight.grad is None
    assert not wrapper.window_open


def test_state_and_learning_rates(layer: nn.Linear, wrapper: OptimWrapper) -> None:
    wrapper.update_params(loss_of(layer))
    other = OptimWrapper(torch.optim.SGD(nn.Linear(2, 1).double().parameters(), lr=0.3))
    other.load_state_dict(wrapper.state_dict())
    assert other.get_lr() == [0.1]
    assert [tuple(p.shape) for p in other.parameters()] == [(1, 2), (1,)]
    assert other.param_groups is other.optimizer.param_groups
    assert "steps=1" in repr(wrapper)


def test_what_mmengine_gave_the_wrapper_is_answered(layer: nn.Linear) -> None:
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    with pytest.raises(TypeError, match=r"'clip_grad' comes from MMEngine.*type='clip'"):
        OptimWrapper(optimizer, clip_grad=dict(max_norm=1))  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"type='accumulate', steps"):
        OptimWrapper(optimizer, accumulative_counts=2)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"expected a torch\.optim\.Optimizer"):
        OptimWrapper(dict(type="SGD"))  # type: ignore[arg-type]


class Steps(Plugin):
    """Answers every event of a step, and notes it."""

    scale: float = 1.0
    veto: bool = False
    skip: bool = False
    own: bool = False

    def __post_init__(self) -> None:
        self.log: list[Any] = []

    def should_step(self, optim_wrapper: Any) -> bool:
        self.log.append("should_step")
        return not self.veto

    def forward_context(self, phase: str) -> Any:
        @contextmanager
        def context() -> Any:
            self.log.append(f"enter {phase}")
            yield
            self.log.append("exit")

        return context()

    def scale_loss(self, loss: Tensor) -> Tensor:
        self.log.append("scale_loss")
        return loss * self.scale

    def backward(self, loss: Tensor) -> bool | None:
        self.log.append("backward")
        if self.own:
            loss.backward()
            return True
        return None

    def before_optim_step(self) -> None:
        self.log.append("before_optim_step")

    def optim_step(self, optim_wrapper: Any) -> bool | None:
        self.log.append("optim_step")
        if self.own:
            optim_wrapper.optimizer.step()
            return True
        return False if self.skip else None

    def after_optim_step(self, optim_wrapper: Any) -> None:
        self.log.append(f"after_optim_step {optim_wrapper.steps}")


BEGIN = ["should_step", "enter train", "exit", "scale_loss", "backward"]


@pytest.mark.parametrize(
    ("options", "expected", "steps"),
    [
        ({}, [*BEGIN, "before_optim_step", "optim_step", "after_optim_step 1"], 1),
        ({"own": True}, [*BEGIN, "before_optim_step", "optim_step", "after_optim_step 1"], 1),
        ({"skip": True}, [*BEGIN, "before_optim_step", "optim_step"], 0),
        ({"veto": True}, BEGIN, 0),
    ],
)
def test_the_events_of_a_step(make: MakeRunner, options: Any, expected: Any, steps: int) -> None:
    plugin = Steps(**options)
    runner = make(plugins=[plugin], train_cfg=dict(max_iters=1))
    before = runner.bare_model.net.weight.clone()
    runner.train()
    assert plugin.log == expected
    assert runner.progress.step == steps
    assert torch.equal(runner.bare_model.net.weight, before) == (steps == 0)
    assert (runner.bare_model.net.weight.grad is None) != bool(options.get("veto"))


def test_a_train_step_of_its_own_emits_the_same(make: MakeRunner) -> None:
    class Own(Toy):
        def train_step(self, data: Any, optim_wrapper: Any) -> Any:
            data = self.data_preprocessor(data)
            losses = self(*data, mode="loss")
            loss, log_vars = self.parse_losses(losses)
            optim_wrapper.update_params(loss)
            return log_vars

    plugin = Steps()
    runner = make(model=Own(), plugins=[plugin], train_cfg=dict(max_iters=1))
    runner.on("after_forward")(lambda: plugin.log.append("after_forward"))
    runner.train()
    assert plugin.log == [
        "after_forward",
        "should_step",
        "scale_loss",
        "backward",
        "before_optim_step",
        "optim_step",
        "after_optim_step 1",
    ]


def test_contexts_are_entered_in_order_and_left_in_reverse_also_after_an_error() -> None:
    log = []

    @contextmanager
    def context(name: str) -> Any:
        log.append(f"enter {name}")
        try:
            yield
        finally:
            log.append(f"exit {name}")

    @contextmanager
    def broken() -> Any:
        raise LookupError("no")
        yield

    with combine((context("a"), context("b"))):
        log.append("inside")
    with combine(()):
        pass
    assert log == ["enter a", "enter b", "inside", "exit b", "exit a"]
    log.clear()
    with pytest.raises(LookupError), combine((context("a"), broken())):
        raise AssertionError("entered")
    assert log == ["enter a", "exit a"]


class Pair(nn.Module):
    """Two parts with an optimizer each, as a GAN has."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 3)
        self.b = nn.Linear(4, 3)

    def train_step(self, data: Any, optim_wrapper: Any) -> dict[str, Tensor]:
        inputs, labels = data
        losses = {}
        for name in ("a", "b"):
            loss = nn.functional.cross_entropy(getattr(self, name)(inputs), labels)
            optim_wrapper[name].update_params(loss)
            losses[f"loss_{name}"] = loss.detach()
        return losses


def test_several_optimizers(make: MakeRunner) -> None:
    model = Pair()
    runner = make(
        model=model,
        optim_wrapper=dict(
            a=torch.optim.SGD(model.a.parameters(), lr=0.1),
            b=dict(optimizer=torch.optim.Adam(model.b.parameters(), lr=0.01)),
        ),
    )
    assert runner.optim_wrapper["b"].name == "b"
    runner.train()
    assert {name: one.steps for name, one in runner.optim_wrapper.items()} == {"a": 10, "b": 10}
    assert runner.progress.step == 10
    state = runner.state_dict()
    assert set(state["optimizer"]) == {"a", "b"}
    assert state["progress"]["steps"] == {"a": 10, "b": 10}
    runner.load_state_dict(state)
    with pytest.raises(ValueError, match=r"\['a'\].*\['a', 'b'\]"):
        runner.optim_wrapper.load_state_dict({"a": {}})


def test_several_optimizers_are_chosen_by_the_model(
    layer: nn.Linear, make: MakeRunner, toy: type[Toy]
) -> None:
    both = OptimWrapperDict(a=OptimWrapper(torch.optim.SGD(layer.parameters(), lr=0.1)))
    assert (list(both), len(both), list(both.keys())) == (["a"], 1, ["a"])
    with pytest.raises(TypeError, match=r"optim_wrapper\['a'\].update_params\(loss\)"):
        both.update_params(loss_of(layer))
    with pytest.raises(TypeError, match="Choose one"):
        both.optim_context(layer)
    with pytest.raises(KeyError, match="unknown optimizer 'b'"):
        both["b"]
    assert both.by_name("a") == both.by_name() == {"a": both["a"]}
    with pytest.raises(KeyError, match="unknown optimizer 'b'"):
        both.by_name("b")
    with pytest.raises(KeyError, match="unknown optimizer 'b'"):
        both["a"].by_name("b")
    with pytest.raises(TypeError, match="expected an OptimWrapper for 'a'"):
        OptimWrapperDict(a=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one"):
        OptimWrapperDict()
    model = toy()
    with pytest.raises(TypeError, match="Write a train_step"):
        make(model=model, optim_wrapper=dict(a=torch.optim.SGD(model.parameters(), lr=0.1)))


@pytest.mark.parametrize(
    ("event", "answer", "message"),
    [
        ("after_forward", [1], r"plugin 'wrong' must return a dict of losses by name or None"),
        ("scale_loss", 2.0, r"plugin 'wrong' must return a tensor or None, got 2.0"),
        ("forward_context", True, r"plugin 'wrong' must return a context manager"),
        ("should_step", "later", r"plugin 'wrong' must return True, False or None, got 'later'"),
        ("backward", "later", r"plugin 'wrong' must return True, False or None, got 'later'"),
        ("optim_step", "later", r"plugin 'wrong' must return True, False or None, got 'later'"),
        ("optim_step", 1, r"plugin 'wrong' must return True, False or None, got 1"),
        ("agree", "stop", r"plugin 'wrong' must return a dict of requests"),
        ("wrap_model", lambda batch: batch, r"plugin 'wrong' must return a module"),
        ("setup_dataloader", 5, r"plugin 'wrong' must return a dataloader"),
    ],
)
def test_an_answer_that_will_not_do_names_who_gave_it(
    make: MakeRunner, event: str, answer: Any, message: str
) -> None:
    wrong = type("Wrong", (), {event: lambda self: answer})
    with pytest.raises(TypeError, match=message) as caught:
        make(plugins=[wrong()]).train()
    assert "raised by plugin 'wrong'" in caught.value.__notes__[0]


def test_a_state_within_a_window_is_warned_of_and_so_is_a_run_that_was_left_in_one(
    make: MakeRunner, caplog: pytest.LogCaptureFixture
) -> None:
    class Leaves(Plugin):
        def should_step(self) -> bool:
            return False

        def after_train_iter(self, runner: Any) -> None:
            if runner.progress.iter == 3:
                runner.state_dict()
                raise KeyboardInterrupt

    runner = make(plugins=[Leaves()])
    with pytest.raises(KeyboardInterrupt):
        runner.train()
    assert "state_dict() was called between two optimizer steps" in caplog.text
    caplog.clear()
    runner.train()
    assert "the gradients since the last step are dropped" in caplog.text
    caplog.clear()
    plain = make()
    plain.train()
    plain.state_dict()
    assert not caplog.records


# -- Runner.repeat ---------------------------------------------------------------------------------


class Again(Plugin):
    """Computes the gradients of each step again, after moving the weights by ``shift``."""

    shift: float = 0.0
    optimizer: str = "optimizer"

    def __post_init__(self) -> None:
        self.batch: Any = None
        self.outputs: list[Any] = []
        self.gradients: list[list[Tensor]] = []

    def before_train_iter(self, data_batch: Any) -> None:
        self.batch = data_batch

    @torch.no_grad()  # as plugins that edit weights have it
    def before_optim_step(self, runner: Any, optim_wrapper: Any) -> None:
        if optim_wrapper.name != self.optimizer:
            return
        for parameter in optim_wrapper.parameters():
            parameter.add_(self.shift)
        self.outputs += runner.repeat(self.batch)
        for parameter in optim_wrapper.parameters():
            parameter.sub_(self.shift)
        self.gradients.append([p.grad.clone() for p in optim_wrapper.parameters()])


def test_repeat_computes_the_gradients_anew_with_the_current_weights(make: MakeRunner) -> None:
    again = Again(shift=0.5)
    runner = make(plugins=[again], train_cfg=dict(max_iters=1))
    by_hand = copy.deepcopy(runner.bare_model)
    runner.train()
    with torch.no_grad():
        for parameter in by_hand.parameters():
            parameter.add_(0.5)
    loss = by_hand(*again.batch, mode="loss")["loss"]
    loss.backward()
    assert torch.equal(again.outputs[0]["loss"], loss)
    for mine, theirs in zip(again.gradients[0], by_hand.parameters(), strict=True):
        assert torch.equal(mine, theirs.grad)
    assert (runner.progress.iter, runner.progress.step, runner.optim_wrapper.steps) == (1, 1, 1)


class ByHand(Toy):
    """Calls the methods of the optimizer wrapper one by one."""

    way: str

    def train_step(self, data: Any, optim_wrapper: Any) -> Any:
        if "zero_grad first" in self.way:
            optim_wrapper.zero_grad()
        if "context" in self.way:
            with optim_wrapper.optim_context(self):
                losses = [self(*self.data_preprocessor(data), mode="loss") for _ in range(2)]
        else:
            losses = [self(*self.data_preprocessor(data), mode="loss") for _ in range(2)]
        first, second = (one["loss"] for one in losses)
        if "update_params" in self.way:
            optim_wrapper.update_params(0.25 * first + 0.75 * second)
        else:
            optim_wrapper.backward(0.25 * first)
            optim_wrapper.backward(0.75 * second)
            optim_wrapper.step()
        if "zero_grad last" in self.way:
            optim_wrapper.zero_grad()
        return {"loss": first.detach()}


@pytest.mark.parametrize(
    "way",
    [
        "update_params",
        "context, update_params",
        "backward, step",
        "context, backward, step",
        "zero_grad first, backward, step",
        "context, update_params, zero_grad last",
    ],
)
def test_repeat_with_unchanged_weights_changes_nothing_however_train_step_is_written(
    make: MakeRunner, way: str
) -> None:
    def train(*plugins: Any) -> Any:
        torch.manual_seed(0)
        model = ByHand()
        model.way = way
        runner = make(model=model, plugins=plugins)
        asked: list[int] = []
        runner.on("should_step")(lambda: asked.append(1))
        runner.train()
        return runner, len(asked)

    (repeated, asked), (plain, asked_plain) = train(Again()), train()
    assert torch.equal(repeated.bare_model.net.weight, plain.bare_model.net.weight)
    assert (repeated.progress.step, asked) == (plain.progress.step, asked_plain)


class Interleaved(Pair):
    """Asks for both steps before it takes either; part a reaches the weights of part b."""

    reaches = False

    def train_step(self, data: Any, optim_wrapper: Any) -> dict[str, Tensor]:
        inputs, labels = data
        losses = {}
        for name in ("a", "b"):
            with optim_wrapper[name].optim_context(self):
                scores = getattr(self, name)(inputs)
                if self.reaches and name == "a":
                    scores = scores + self.b(inputs)
                losses[name] = nn.functional.cross_entropy(scores, labels)
        for name, loss in losses.items():
            optim_wrapper[name].update_params(loss)
        return {f"loss_{name}": loss.detach() for name, loss in losses.items()}


@pytest.mark.parametrize("kind", [Pair, Interleaved])
@pytest.mark.parametrize("repeated", ["a", "b"])
def test_repeat_for_one_optimizer_leaves_the_others_as_they_are(
    make: MakeRunner, kind: type[Pair], repeated: str
) -> None:
    """The other optimizer accumulates over the epoch, by a veto in four of five iterations."""
    other = {"a": "b", "b": "a"}[repeated]

    class Watches(Again):
        def before_optim_step(self, runner: Any, optim_wrapper: Any) -> None:
            seen = [state_of(runner)]
            super().before_optim_step(runner, optim_wrapper)
            seen.append(state_of(runner))
            if optim_wrapper.name == self.optimizer:
                for before, after in zip(*seen, strict=True):
                    assert before is after or torch.equal(before, after)

        def should_step(self, runner: Any, optim_wrapper: Any) -> bool:
            asked.append(optim_wrapper.name)
            return optim_wrapper.name == repeated or runner.progress.is_last

    def state_of(runner: Any) -> list[Any]:
        wrapper = runner.optim_wrapper[other]
        gradients = [None if p.grad is None else p.grad.clone() for p in wrapper.parameters()]
        return [*gradients, wrapper.window_open, wrapper.will_step, wrapper._asked]

    asked: list[str] = []
    ends = []
    for again in (Watches(optimizer=repeated), Watches(optimizer="neither")):
        torch.manual_seed(0)
        model = kind()
        wrappers = {n: torch.optim.SGD(getattr(model, n).parameters(), lr=0.1) for n in "ab"}
        runner = make(model=model, optim_wrapper=wrappers, plugins=[again])
        runner.train()
        steps = {name: wrapper.steps for name, wrapper in runner.optim_wrapper.items()}
        assert steps == {repeated: 10, other: 2}
        ends.append(torch.cat([p.flatten() for p in model.parameters()]))
    assert torch.equal(*ends)
    assert len(asked) == 2 * 20


def test_a_repeated_loss_adds_to_the_gradients_of_every_parameter_that_it_reaches(
    make: MakeRunner,
) -> None:
    """What the docstring of ``Runner.repeat`` says of a loss of one part that reaches another."""
    sizes = []
    for again in (Again(optimizer="a"), Again(optimizer="neither")):
        torch.manual_seed(0)
        model = Interleaved()
        model.reaches = True
        wrappers = {n: torch.optim.SGD(getattr(model, n).parameters(), lr=0.1) for n in "ab"}
        runner = make(
            model=model, optim_wrapper=wrappers, plugins=[again], train_cfg=dict(max_iters=1)
        )

        @runner.on("optim_step")
        def measure(runner: Any, optim_wrapper: Any) -> None:
            if optim_wrapper.name == "a":
                sizes.append(runner.bare_model.b.weight.grad.clone())

        runner.train()
    assert torch.equal(sizes[0], 2 * sizes[1])


def test_several_batches_add_their_gradients_and_the_last_pass_ends_with_the_step(
    make: MakeRunner,
) -> None:
    passes: list[Any] = []

    class Passes(Plugin):
        def should_step(self) -> None:
            """Be a plugin that may accumulate gradients."""

        def before_repeat(self, optim_wrapper: Any, data_batch: Any) -> None:
            passes.append((optim_wrapper.window_open, optim_wrapper.will_step, len(data_batch[0])))

        def before_optim_step(self, runner: Any, optim_wrapper: Any) -> None:
            one = [p.grad.clone() for p in optim_wrapper.parameters()]
            assert len(runner.repeat(batch, batch, batch)) == 3
            for grad, parameter in zip(one, optim_wrapper.parameters(), strict=True):
                torch.testing.assert_close(parameter.grad, 3 * grad)
            assert optim_wrapper.will_step

    (batch, *_) = make().dataloaders["train"]  # type: ignore[misc]
    make(plugins=[Passes()], train_cfg=dict(max_iters=1)).train()
    assert passes == [(False, False, 4), (True, False, 4), (True, True, 4)]


class Critic(Toy):
    """Steps twice in an iteration."""

    def train_step(self, data: Any, optim_wrapper: Any) -> Any:
        for _ in range(2):
            optim_wrapper.update_params(self(*data, mode="loss")["loss"])
        return {}


class Silent(Toy):
    """Backpropagates in its first iteration only."""

    seen = 0

    def train_step(self, data: Any, optim_wrapper: Any) -> Any:
        self.seen += 1
        if self.seen == 1:
            optim_wrapper.update_params(self(*data, mode="loss")["loss"])
        return {}


def nested(runner: Any, batch: Any) -> None:
    runner.on("before_repeat", once=True)(lambda: runner.repeat(batch))
    runner.repeat(batch)


@pytest.mark.parametrize(
    ("model", "call", "error", "message"),
    [
        (Toy, lambda runner, batch: runner.repeat(), ValueError, "needs the batch of this step"),
        (
            Toy,
            lambda runner, batch: runner.repeat(batch, batch),
            ValueError,
            "no plugin accumulates",
        ),
        (Toy, nested, RuntimeError, "nor within a repeated pass"),
        (Silent, lambda runner, batch: runner.repeat(batch), RuntimeError, "did not backpropagate"),
        (Critic, lambda runner, batch: runner.repeat(batch), RuntimeError, "one step per train_st"),
        (
            Toy,
            lambda runner, batch: runner.optim_wrapper.step(),
            RuntimeError,
            r"in the middle of a step.*call runner.repeat\(data_batch\) in before_optim_step",
        ),
        (
            Toy,
            lambda runner, batch: runner.model.train_step(batch, runner.optim_wrapper),
            RuntimeError,
            r"call runner.repeat\(data_batch\)",
        ),
        (
            Toy,
            lambda runner, batch: runner.optim_wrapper.backward(
                runner.model(*batch, mode="loss")["loss"]
            ),
            RuntimeError,
            r"call runner.repeat\(data_batch\)",
        ),
    ],
)
def test_what_cannot_be_repeated_is_answered_and_training_can_continue(
    make: MakeRunner, model: Any, call: Any, error: Any, message: str
) -> None:
    torch.manual_seed(0)
    runner = make(model=model())
    (batch, *_) = runner.dataloaders["train"]  # type: ignore[misc]
    runner.on("before_optim_step", once=True)(lambda: call(runner, batch))
    with pytest.raises(error, match=message):
        runner.train()
    assert_usable(runner)
    if model is not Silent:
        torch.manual_seed(0)
        plain = make(model=model())
        plain.train()
        runner.train()
        assert runner.progress.epoch == plain.progress.epoch
        assert runner.progress.step == plain.progress.step
        assert torch.equal(runner.bare_model.net.weight, plain.bare_model.net.weight)


def assert_usable(runner: Any) -> None:
    wrapper = runner.optim_wrapper
    assert (wrapper.stepping, wrapper.will_step) == (False, True)
    assert (wrapper._repeating, wrapper._passed) == (None, False)


def test_repeat_within_a_step_of_another_optimizer_is_answered(make: MakeRunner) -> None:
    model = Interleaved()
    wrappers = {n: torch.optim.SGD(getattr(model, n).parameters(), lr=0.1) for n in "ab"}
    runner = make(model=model, optim_wrapper=wrappers)

    @runner.on("before_optim_step")
    def step_both(optim_wrapper: Any) -> None:
        if optim_wrapper.name == "a":
            runner.optim_wrapper["b"].step()
        else:
            runner.repeat([])

    with pytest.raises(RuntimeError, match="neither within another step"):
        runner.train()


def test_repeat_outside_of_a_step_is_answered(make: MakeRunner) -> None:
    runner = make()
    (batch, *_) = runner.dataloaders["train"]  # type: ignore[misc]
    with pytest.raises(RuntimeError, match="Call it in before_optim_step"):
        runner.repeat(batch)
    runner.on("after_optim_step")(lambda: runner.repeat(batch))
    with pytest.raises(RuntimeError, match="Call it in before_optim_step"):
        runner.train()


def test_a_repeated_pass_may_discard_gradients_that_it_does_not_step_with(make: MakeRunner) -> None:
    """As a train_step does that measures a gradient before the one of the step."""

    class Measures(Toy):
        def train_step(self, data: Any, optim_wrapper: Any) -> Any:
            optim_wrapper.backward(10 * self(*data, mode="loss")["loss"])
            optim_wrapper.zero_grad()
            optim_wrapper.update_params(self(*data, mode="loss")["loss"])
            return {}

    weights = []
    for again in (True, False):
        runner, kept = make(model=Measures()), list[Any]()
        runner.on("before_train_iter")(lambda data_batch, kept=kept: kept.append(data_batch))
        if again:
            runner.on("before_optim_step")(lambda runner, kept=kept: runner.repeat(kept[-1]))
        torch.manual_seed(0)
        runner.bare_model.net.reset_parameters()
        runner.train()
        weights.append(runner.bare_model.net.weight)
    assert torch.equal(*weights)


def test_a_step_is_not_taken_after_a_repeat_that_failed(make: MakeRunner) -> None:
    runner = make()
    weight = runner.bare_model.net.weight.clone()

    @runner.on("before_optim_step")
    def careless(runner: Any) -> None:
        with pytest.raises(TypeError):
            runner.repeat("no batch")

    with pytest.raises(RuntimeError, match=r"are gone, because runner.repeat\(\) raised an error"):
        runner.train()
    assert torch.equal(runner.bare_model.net.weight, weight)
    runner.plugins.remove("careless")
    runner.train()


def test_a_pass_is_not_repeated_while_its_gradients_are_finished(make: MakeRunner) -> None:
    runner = make()
    batch = next(iter(runner.dataloaders["train"]))
    runner.on("before_optim_step")(lambda: runner.repeat(batch))
    told = []

    @runner.on("finish_gradients")
    def again(runner: Any) -> None:
        with pytest.raises(RuntimeError, match="Call it in before_optim_step"):
            runner.repeat(batch)
        told.append(runner.progress.iter)

    runner.train(max_epochs=1)
    assert told == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


@pytest.mark.parametrize("event", ["before_repeat", "after_forward", "scale_loss", "backward"])
def test_an_error_in_a_repeated_pass_leaves_the_optimizer_usable(
    make: MakeRunner, event: str
) -> None:
    runner, plain = make(plugins=[Again()]), make()

    def fail(runner: Any) -> None:
        if runner.optim_wrapper.stepping:
            runner.plugins.remove(f"{event}:fail")
            raise LookupError(event)

    runner.on(event)(fail)
    with pytest.raises(LookupError, match=event):
        runner.train()
    assert_usable(runner)
    runner.train()
    plain.train()
    assert runner.progress.step == plain.progress.step == 10
    assert torch.equal(runner.bare_model.net.weight, plain.bare_model.net.weight)

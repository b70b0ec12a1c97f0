"""Mixed precision equals torch's recipe, to the last bit; and what it refuses."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from hookengine_amp import SKIPS_BEFORE_A_WARNING, Amp
from torch.utils.data import DataLoader

from hookengine import Plugin, hookimpl
from tests.fixtures import MakeData, MakeRunner, Toy

OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
    "fused": lambda parameters: torch.optim.Adam(parameters, lr=0.01, fused=True),
}


class Overflow(Plugin):
    """Makes the gradients of some iterations infinite, while they are still scaled."""

    at: tuple[int, ...] = (17, 18)

    def before_train(self, runner: Any) -> None:
        self.runner = runner

    def backward(self, runner: Any, loss: Any) -> bool:
        loss.backward()
        if runner.progress.iter in self.at:
            weight = runner.bare_model.net.weight
            weight.grad = weight.grad * float("inf")
        return True


def by_hand(toy: type[Toy], data: Any, optimizer: Any, dtype: torch.dtype, steps: int) -> Any:
    """The recipe of torch's documentation; see torch.amp's examples."""
    torch.manual_seed(0)
    net = toy().net
    optimizer = OPTIMIZERS[optimizer](net.parameters())
    scaler = torch.amp.GradScaler(
        "cpu", init_scale=2.0**10, growth_interval=7, enabled=dtype is torch.float16
    )
    done = 0
    scales = []
    while done < steps:
        for inputs, labels in DataLoader(data(), batch_size=4):
            with torch.autocast("cpu", dtype):
                loss = F.cross_entropy(net(inputs), labels)
            scaler.scale(loss).backward()
            if done in (17, 18) and dtype is torch.float16:
                assert net.weight.grad is not None
                net.weight.grad = net.weight.grad * float("inf")
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            scales.append(scaler.get_scale())
            done += 1
    return net, optimizer, scales


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_fifty_steps_are_those_of_the_recipe(
    make: MakeRunner,
    toy: type[Toy],
    data: MakeData,
    optimizer: str,
    dtype: Literal["float16", "bfloat16"],
) -> None:
    torch.manual_seed(0)
    model = toy()
    logged, steps = [], []
    plugins: list[Any] = [Amp(dtype=dtype, init_scale=2.0**10, growth_interval=7)]
    if dtype == "float16":
        plugins.append(Overflow())
    runner = make(
        model=model,
        optim_wrapper=OPTIMIZERS[optimizer](model.parameters()),
        plugins=plugins,
        train_cfg=dict(max_iters=50),
    )
    runner.on("log")(lambda values: logged.append(values["loss_scale"].item()))
    runner.on("after_optim_step")(lambda optim_wrapper: steps.append(optim_wrapper.steps))
    runner.train()
    net, by_torch, scales = by_hand(toy, data, optimizer, getattr(torch, dtype), 50)
    assert torch.equal(runner.bare_model.net.weight, net.weight)
    assert torch.equal(runner.bare_model.net.bias, net.bias)
    mine = runner.optim_wrapper.optimizer.state_dict()["state"]
    for index, state in by_torch.state_dict()["state"].items():
        for key, value in state.items():
            assert torch.equal(mine[index][key], value), key
    taken = 48 if dtype == "float16" else 50
    assert runner.progress.step == taken
    assert steps == list(range(1, taken + 1))
    assert logged == (scales if dtype == "float16" else [])
    if dtype == "float16":
        changes = [after / before for before, after in pairwise(scales)]
        assert {*changes} == {0.5, 1.0, 2.0}, "it shrank and it grew"


def test_every_phase_runs_under_autocast(make: MakeRunner) -> None:
    seen = []

    class Watching(Toy):
        def forward(self, inputs: Any, labels: Any, mode: str = "tensor") -> Any:
            seen.append((mode, torch.is_autocast_enabled("cpu"), self.net(inputs).dtype))
            return super().forward(inputs, labels, mode)

    runner = make(model=Watching(), plugins=["amp"], validate=True, test=True)
    runner.train()
    runner.test()
    assert {*seen} == {("loss", True, torch.bfloat16), ("predict", True, torch.bfloat16)}
    assert not torch.is_autocast_enabled("cpu")
    assert runner.bare_model.net.weight.dtype == torch.float32


def test_whoever_reads_gradients_gets_them_unscaled_and_scales_the_loss_before(
    make: MakeRunner,
) -> None:
    plain, scaled = make(), make(plugins=[Amp(dtype="float16", init_scale=2.0**12)])
    norms: dict[Any, list[float]] = {plain: [], scaled: []}

    def note(runner: Any, optim_wrapper: Any) -> None:
        norms[runner] += [p.grad.float().norm().item() for p in optim_wrapper.parameters()]

    for runner in (plain, scaled):
        runner.on("before_optim_step")(note)
        runner.on("scale_loss")(lambda loss: loss * 3)
        runner.train()
    assert norms[plain] == pytest.approx(norms[scaled], rel=0.05)


@pytest.mark.parametrize("answer", [True, False])
def test_a_step_that_another_plugin_takes_or_refuses_does_no_harm(
    make: MakeRunner, answer: bool
) -> None:
    class Decides(Plugin):
        def optim_step(self, runner: Any, optim_wrapper: Any) -> bool | None:
            if runner.progress.iter != 3:
                return None
            if answer:
                optim_wrapper.optimizer.step()
            return answer

    decides = Decides()
    runner = make(plugins=[decides, Amp(dtype="float16")])
    runner.train()
    assert runner.progress.step == 9 + answer
    plain = make(plugins=[Decides()])
    plain.train()
    weights = runner.bare_model.net.weight, plain.bare_model.net.weight
    torch.testing.assert_close(*weights, rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("first", [True, False])
def test_plugins_are_asked_for_the_step_before_it_however_they_are_listed(
    make: MakeRunner, first: bool
) -> None:
    class Refuses(Plugin):
        def optim_step(self, runner: Any) -> bool | None:
            return False if runner.progress.iter % 2 else None

    class Reads(Plugin):
        @hookimpl(tryfirst=True)
        def before_optim_step(self, optim_wrapper: Any) -> None:
            norms.append(next(optim_wrapper.parameters()).grad.norm().item())

    norms: list[float] = []
    plugins = [Refuses(), Reads()]
    amp = dict(type="amp", dtype="float16")
    runner = make(plugins=[*plugins, amp] if first else [amp, *plugins])
    runner.train()
    assert runner.progress.step == 5
    assert max(norms) < 10, "the loss scale is divided out"


def test_a_run_that_is_cut_after_a_refused_step_goes_on(make: MakeRunner) -> None:
    class Refuses(Plugin):
        def optim_step(self, runner: Any) -> bool | None:
            return False if runner.progress.iter == 4 else None

    def runner(epochs: int) -> Any:
        amp = Amp(dtype="float16", init_scale=2.0**10, growth_interval=5)
        return make(plugins=[amp, Refuses()], train_cfg=dict(max_epochs=epochs))

    straight, first, second = runner(3), runner(1), runner(3)
    straight.train()
    first.train()
    second.load_state_dict(first.state_dict())
    second.train()
    assert second.state_dict()["plugins"] == straight.state_dict()["plugins"]
    assert torch.equal(second.bare_model.net.weight, straight.bare_model.net.weight)


def test_gradients_that_were_made_by_hand_are_left_as_they_are(
    make: MakeRunner,
) -> None:
    class ByHand(Toy):
        def train_step(self, data: Any, optim_wrapper: Any) -> Any:
            self(*data, mode="loss")["loss"].backward()
            optim_wrapper.step()
            return {}

    runner, plain = make(model=ByHand(), plugins=[Amp(dtype="float16")]), make(model=ByHand())
    runner.train()
    plain.train()
    assert runner.progress.step == 10
    assert torch.equal(runner.bare_model.net.weight, plain.bare_model.net.weight)


def test_a_run_that_is_cut_goes_on_with_its_scale(make: MakeRunner) -> None:
    options: dict[str, Any] = dict(dtype="float16", init_scale=2.0**10, growth_interval=3)
    straight = make(plugins=[Amp(**options), Overflow(at=(1, 7))])
    straight.train()
    first = make(plugins=[Amp(**options), Overflow(at=(1, 7))], train_cfg=dict(max_epochs=1))
    first.train()
    second = make(plugins=[Amp(**options), Overflow(at=(1, 7))])
    second.load_state_dict(first.state_dict())
    second.train()
    assert torch.equal(second.bare_model.net.weight, straight.bare_model.net.weight)
    assert second.state_dict()["plugins"] == straight.state_dict()["plugins"]
    assert second.progress.step == 8
    other = make(plugins=[Amp(**{**options, "growth_interval": 50})])
    other.load_state_dict(first.state_dict())
    state = other.state_dict()["plugins"]["amp"]["optimizer"]
    assert (state["growth_interval"], state["scale"]) == (50, 2.0**10), "options are this run's"


def test_steps_that_are_all_skipped_are_told_once(
    make: MakeRunner, caplog: pytest.LogCaptureFixture
) -> None:
    runner = make(
        plugins=[Amp(dtype="float16"), Overflow(at=tuple(range(100)))],
        train_cfg=dict(max_iters=SKIPS_BEFORE_A_WARNING + 5),
    )
    before = runner.bare_model.net.weight.clone()
    runner.train()
    assert torch.equal(runner.bare_model.net.weight, before)
    assert runner.progress.step == 0
    assert [r.message for r in caplog.records if "20 steps in a row were skipped" in r.message]


def test_the_optimizer_is_left_as_it_was(make: MakeRunner, toy: type[Toy]) -> None:
    model = toy()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    hooks = len(optimizer._optimizer_step_post_hooks)
    make(model=model, optim_wrapper=optimizer, plugins=[Amp(dtype="float16")]).close()
    assert len(optimizer._optimizer_step_post_hooks) == hooks


def test_what_cannot_be_is_refused_before_training(make: MakeRunner, toy: type[Toy]) -> None:
    for dtype in ("float16", "bfloat16"):
        with pytest.raises(ValueError, match=rf"device meta does not support {dtype}: torch has"):
            make(plugins=[Amp(dtype=dtype)], device="meta")
    with pytest.raises(ValueError, match=r"are float16 themselves.*drop \.half\(\)"):
        make(model=toy().half(), plugins=[Amp(dtype="float16")])
    with pytest.raises(TypeError, match="growth_factor=1"):
        Amp(growth_factor=1)
    with pytest.raises(TypeError, match="dtype='fp8'"):
        Amp(dtype="fp8")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="init_scale=inf"):
        Amp(init_scale=float("inf"))
    assert Amp(dtype=torch.float16).dtype == "float16"  # type: ignore[arg-type]
    with pytest.raises(KeyError, match=r"unknown optimizer 'critic'"):
        make(plugins=[Amp(optimizer="critic")])


def test_a_model_in_bfloat16_needs_no_scale(make: MakeRunner) -> None:
    class Cast(Toy):
        def forward(self, inputs: Any, labels: Any, mode: str = "tensor") -> Any:
            return super().forward(inputs.bfloat16(), labels, mode=mode)

    runner = make(model=Cast().bfloat16(), plugins=["amp"])
    runner.train()
    assert runner.progress.step == 10
    assert runner.state_dict()["plugins"] == {}


# -- Runner.repeat --------------------------------------------------------------------------------


class Again(Plugin):
    """Repeats each step; some of its passes have infinite gradients, while they are scaled."""

    first: tuple[int, ...] = ()
    """Iterations whose first pass overflows."""
    second: tuple[int, ...] = ()
    """Iterations whose repeated pass overflows."""

    def before_train(self) -> None:
        self.finite: list[tuple[bool, bool]] = []

    def before_train_iter(self, data_batch: Any) -> None:
        self.batch = data_batch

    def backward(self, runner: Any, optim_wrapper: Any, loss: Any) -> bool:
        loss.backward()
        if runner.progress.iter in (self.second if optim_wrapper.stepping else self.first):
            weight = runner.bare_model.net.weight
            weight.grad = weight.grad * float("inf")
        return True

    def before_optim_step(self, runner: Any, optim_wrapper: Any) -> None:
        seen = [next(optim_wrapper.parameters()).grad.clone()]
        runner.repeat(self.batch)
        seen.append(next(optim_wrapper.parameters()).grad.clone())
        if all(each.isfinite().all() for each in seen):
            assert torch.equal(*seen)
            assert seen[0].norm() < 10, "unscaled"
        self.finite.append((bool(seen[0].isfinite().all()), bool(seen[1].isfinite().all())))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_repeated_step_is_skipped_and_the_scale_changes_as_without_the_repeat(
    make: MakeRunner, toy: type[Toy], optimizer: str, dtype: Literal["float16", "bfloat16"]
) -> None:
    """With unchanged weights; what counts is whether the last gradients are finite."""

    def train(*plugins: Any) -> Any:
        torch.manual_seed(0)
        model = toy()
        amp = Amp(dtype=dtype, init_scale=2.0**10, growth_interval=4)
        runner = make(
            model=model,
            optim_wrapper=OPTIMIZERS[optimizer](model.parameters()),
            plugins=[*plugins, amp],
            train_cfg=dict(max_iters=30),
        )
        scales: list[float] = []
        runner.on("log")(lambda values: scales.append(values["loss_scale"].item()))
        runner.train()
        return runner, scales

    again = Again(first=(3, 9, 10, 21), second=(9, 17, 21))
    (repeated, scales), (plain, expected) = train(again), train(Overflow(at=(9, 17, 21)))
    cases = [(again.finite[index]) for index in (0, 3, 9, 10, 17, 21)]
    t, f = True, False
    assert cases == [(t, t), (f, t), (f, f), (f, t), (t, f), (f, f)] or dtype == "bfloat16"
    if dtype == "bfloat16":  # which has no loss scale: infinite weights, in both
        assert scales == expected == []
        assert repeated.progress.step == plain.progress.step == 30
        return
    assert scales == expected
    assert {after / before for before, after in pairwise(scales)} == {0.5, 1.0, 2.0}
    assert repeated.progress.step == plain.progress.step == 27
    assert torch.equal(repeated.bare_model.net.weight, plain.bare_model.net.weight)
    state, expected_state = repeated.state_dict(), plain.state_dict()
    assert state["plugins"]["amp"] == expected_state["plugins"]["amp"]


@pytest.mark.parametrize("within", [True, False])
def test_a_repeated_pass_uses_the_current_weights_also_within_autocast(
    make: MakeRunner, within: bool
) -> None:
    """Autocast caches the weights that it has cast, until its context ends."""

    class Within(Toy):
        def train_step(self, data: Any, optim_wrapper: Any) -> Any:
            with optim_wrapper.optim_context(self):
                loss = self(*data, mode="loss")["loss"]
                if within:
                    optim_wrapper.update_params(loss)
            if not within:
                optim_wrapper.update_params(loss)
            return {"loss": loss.detach()}

    class Moves(Plugin):
        def before_train_iter(self, data_batch: Any) -> None:
            self.batch = data_batch

        @torch.no_grad()
        def before_optim_step(self, runner: Any) -> None:
            weight = runner.bare_model.net.weight
            weight.add_(1)
            (outputs,) = runner.repeat(self.batch)
            with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
                expected = runner.bare_model(*self.batch, mode="loss")["loss"]
            assert torch.equal(outputs["loss"], expected)
            weight.sub_(1)

    make(model=Within(), plugins=[Moves(), "amp"]).train()


def test_a_loss_by_hand_after_unscaling_is_refused(make: MakeRunner) -> None:
    class Adds(Plugin):
        def before_optim_step(self, runner: Any, optim_wrapper: Any) -> None:
            loss = runner.bare_model(*batch, mode="loss")["loss"]
            runner.hooks.scale_loss(runner, optim_wrapper, loss).backward()

    (batch, *_) = make().dataloaders["train"]  # type: ignore[misc]
    runner = make(plugins=[Adds(), Amp(dtype="float16")])
    with pytest.raises(RuntimeError, match=r"already divided by the loss scale.*runner\.repeat"):
        runner.train()
    runner.plugins.remove("adds")
    runner.train()
    assert runner.progress.step == 10
    make(plugins=[Adds(), Amp(dtype="bfloat16")]).train()


def test_gradients_that_are_finished_twice_are_unscaled_once(make: MakeRunner) -> None:
    class Twice(Plugin):
        def before_optim_step(self, runner: Any, optim_wrapper: Any) -> None:
            runner.hooks.finish_gradients(runner, optim_wrapper)

    runners = [
        make(plugins=[*plugins, Amp(dtype="float16", init_scale=2.0**10, growth_interval=3)])
        for plugins in ([], [Twice()], [Again(), Twice()])
    ]
    for runner in runners:
        runner.train()
        assert torch.equal(runner.bare_model.net.weight, runners[0].bare_model.net.weight)
        assert runner.state_dict()["plugins"]["amp"] == runners[0].state_dict()["plugins"]["amp"]


def test_an_error_in_a_repeated_pass_leaves_the_scale_usable(make: MakeRunner) -> None:
    runner = make(plugins=[Again(), Amp(dtype="float16")])

    @runner.on("after_forward")
    def fail(runner: Any) -> None:
        if runner.optim_wrapper.stepping:
            runner.plugins.remove("after_forward:fail")
            raise LookupError

    with pytest.raises(LookupError):
        runner.train()
    runner.train()
    plain = make(plugins=[Amp(dtype="float16")])
    plain.train()
    assert torch.equal(runner.bare_model.net.weight, plain.bare_model.net.weight)
    assert runner.state_dict()["plugins"]["amp"] == plain.state_dict()["plugins"]["amp"]


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_on_a_gpu_it_is_the_recipe_too(
    make: MakeRunner, toy: type[Toy], data: MakeData, optimizer: str
) -> None:
    device = torch.accelerator.current_accelerator()
    assert device is not None
    torch.manual_seed(0)
    model = toy().to(device)
    runner = make(
        model=model,
        optim_wrapper=OPTIMIZERS[optimizer](model.parameters()),
        plugins=[Amp(dtype="float16", init_scale=2.0**10, growth_interval=7), Overflow()],
        train_cfg=dict(max_iters=50),
    )
    runner.train()
    torch.manual_seed(0)
    net: Any = toy().net.to(device)
    by_torch = OPTIMIZERS[optimizer](net.parameters())
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10, growth_interval=7)
    for done in range(50):
        inputs, labels = [*DataLoader(data(), batch_size=4)][done % 5]
        with torch.autocast(device.type, torch.float16):
            loss = F.cross_entropy(net(inputs.to(device)), labels.to(device))
        scaler.scale(loss).backward()
        if done in (17, 18):
            net.weight.grad = net.weight.grad * float("inf")
        scaler.step(by_torch)
        scaler.update()
        by_torch.zero_grad()
    assert torch.equal(runner.bare_model.net.weight, net.weight)
    assert runner.progress.step == 48

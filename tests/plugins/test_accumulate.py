"""Accumulated gradients are those of the one big batch."""

from __future__ import annotations

import math
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import pytest
import torch
import torch.distributed as torch_dist
import torch.nn.functional as F
from hookengine_accumulate import Accumulate
from hookengine_accumulate.count import count_tokens
from hookengine_amp import Amp
from hookengine_clip import Clip
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hookengine import BaseModel, BatchSizeError, Plugin, Runner, hookimpl
from tests.fixtures import MakeRunner, Toy
from tests.ranks import spawn

IGNORED = -100


class Tagger(BaseModel):
    """Tags each token of a sentence; the loss is a mean over the valid tokens."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)

    def forward(self, inputs: Tensor, labels: Tensor, mode: str = "loss", **_: Any) -> Any:
        scores = self.net(inputs)
        return {"loss": F.cross_entropy(scores.flatten(0, 1), labels.flatten())}


def sentences(sizes: list[int], valid: list[int] | None = None, seed: int = 0) -> list[Any]:
    """Batches of that many sentences of four tokens, the first ``valid`` of all of them valid."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for index, size in enumerate(sizes):
        inputs = torch.randn(size, 4, 5, generator=generator, dtype=torch.float64)
        labels = torch.randint(3, (size, 4), generator=generator)
        if valid is not None:
            labels.view(-1)[valid[index] :] = IGNORED
        mask = labels != IGNORED
        batches.append(
            dict(
                inputs=inputs, labels=labels, mask=mask, lengths=mask.sum(1), count=int(mask.sum())
            )
        )
    return batches


class Gradients(Plugin):
    """Keeps the gradients of each step."""

    def before_train(self) -> None:
        self.steps: list[list[Tensor]] = []

    def before_optim_step(self, optim_wrapper: Any) -> None:
        self.steps.append([p.grad.clone() for p in optim_wrapper.parameters()])


def accumulated(
    batches: Any, accumulate: Accumulate, plugins: Any = (), **options: Any
) -> list[list[Tensor]]:
    """The gradients of each step, at weights that do not move."""
    gradients = Gradients()
    model = options.pop("model", None) or Tagger()
    options.setdefault("train_cfg", dict(max_epochs=1))
    with Runner(
        model,
        tempfile.mkdtemp(),
        train_dataloader=batches,
        optim_wrapper=torch.optim.SGD(model.parameters(), lr=0.0),
        plugins=[accumulate, *plugins, gradients],
        defaults=("preprocess",),
        **options,
    ) as runner:
        runner.train()
    return gradients.steps


def big_batch(batches: list[Any]) -> list[Tensor]:
    """The gradients of all batches as one."""
    model = Tagger()
    whole = {key: torch.cat([batch[key] for batch in batches]) for key in ("inputs", "labels")}
    model(**whole)["loss"].backward()
    return [cast(Tensor, parameter.grad) for parameter in model.parameters()]


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    for mine, theirs in zip(actual, expected, strict=True):
        scale = theirs.abs().max().clamp(min=1e-300)
        assert ((mine - theirs).abs().max() / scale).item() < 1e-10


SIZES = st.lists(st.integers(1, 5), min_size=1, max_size=9)


@given(sizes=SIZES, steps=st.integers(1, 5), known=st.booleans())
@settings(max_examples=60, deadline=None)
def test_samples(sizes: list[int], steps: int, known: bool) -> None:
    batches = sentences(sizes)
    loader = batches if known else Unsized(batches)
    taken = accumulated(loader, Accumulate(steps=steps))
    windows = [batches[start : start + steps] for start in range(0, len(batches), steps)]
    assert len(taken) == len(windows) == math.ceil(len(sizes) / steps)
    for mine, window in zip(taken, windows, strict=True):
        assert_same(mine, big_batch(window))


COUNTS: dict[str, Callable[[], Accumulate]] = {
    "mask": lambda: Accumulate(steps=3, weight="token", tokens="mask"),
    "lengths": lambda: Accumulate(steps=3, weight="token", tokens="lengths"),
    "number": lambda: Accumulate(steps=3, weight="token", tokens="count"),
    "labels": lambda: Accumulate(steps=3, weight="token", tokens="labels", ignore_index=IGNORED),
    "function": lambda: Accumulate(
        steps=3, weight="token", tokens=lambda batch: (batch["labels"] != IGNORED).sum()
    ),
}


@given(counts=st.lists(st.tuples(st.integers(1, 4), st.integers(0, 16)), min_size=1, max_size=7))
@settings(max_examples=40, deadline=None)
def test_tokens(counts: list[tuple[int, int]]) -> None:
    batches = sentences([size for size, _ in counts], [min(n, 4 * size) for size, n in counts])
    for accumulate in COUNTS.values():
        taken = accumulated(batches, accumulate())
        for start, mine in zip(range(0, len(batches), 3), taken, strict=True):
            assert_same(mine, big_batch(batches[start : start + 3]))


class Masked(Tagger):
    """The mean over the valid tokens, written by hand: 0 / 0 where there are none."""

    def forward(self, inputs: Tensor, labels: Tensor, mode: str = "loss", **_: Any) -> Any:
        mask = labels != IGNORED
        scores = self.net(inputs).flatten(0, 1)
        losses = F.cross_entropy(scores, labels.clamp(min=0).flatten(), reduction="none")
        return {"loss": (losses * mask.flatten()).sum() / mask.sum()}


class Listed(Masked):
    """Gives its losses in a list."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return {"loss": [super().forward(*args, **kwargs)["loss"]]}


@pytest.mark.parametrize("model", [Tagger, Masked, Listed])
@pytest.mark.parametrize("amp", [False, True])
def test_a_micro_batch_without_a_valid_token_counts_for_nothing(
    model: Any, amp: bool, tmp_path: Path
) -> None:
    batches = sentences([2, 2, 1, 1, 1, 2], [0, 5, 3, 2, 0, 0])
    plugins: list[Any] = [Exact(dtype="float16", init_scale=2.0**4)] if amp else []
    logging = dict(type="logging", interval=1)  # which stops where a loss is NaN
    taken = accumulated(batches, COUNTS["mask"](), [*plugins, logging], model=model())
    assert_same(taken[0], big_batch(batches[:3]))
    assert_same(taken[1], big_batch(batches[3:]))
    (nothing,) = accumulated(batches[-2:], COUNTS["mask"](), [*plugins, logging], model=model())
    assert all(bool((gradient == 0).all()) for gradient in nothing)


def test_a_nan_in_a_loss_that_counts_is_not_hidden(make: MakeRunner) -> None:
    class Broken(Tagger):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return {"loss": super().forward(*args, **kwargs)["loss"] * torch.nan}

    for accumulate in (Accumulate(steps=2), COUNTS["mask"](), COUNTS["number"]()):
        with pytest.raises(FloatingPointError, match="iteration 1"):
            accumulated(
                sentences([2, 1], [3, 0]), accumulate, [dict(type="logging")], model=Broken()
            )
    one = Accumulate(steps=1, weight="token", tokens="mask")  # nothing is left out then
    with pytest.raises(FloatingPointError, match="iteration 2"):
        accumulated(sentences([2, 1], [3, 0]), one, [dict(type="logging")])


def test_an_empty_micro_batch_first_does_not_blow_up_a_loss_in_float16() -> None:
    batches = sentences([64, 64, 64, 64] * 2, [0, 200, 200, 200] * 2)
    for batch in batches:
        batch["inputs"] = batch["inputs"].float()
    taken = accumulated(
        batches,
        Accumulate(steps=4, weight="token", tokens="mask"),
        [Amp(dtype="float16", init_scale=2.0**14)],
        model=Tagger(torch.float32),
    )
    assert len(taken) == 2
    assert bool(
        torch.stack([torch.cat([g.flatten() for g in each]) for each in taken]).isfinite().all()
    )


def test_a_first_micro_batch_of_few_tokens_does_not_blow_the_others_up() -> None:
    batches = sentences([64] * 8, [200, 200, 200, 200, 1, 200, 200, 200])
    factors = []

    class Factors(Plugin):
        def backward(self, loss: Tensor) -> None:
            factors.append(loss.item())

    taken = accumulated(batches, Accumulate(steps=4, weight="token", tokens="mask"), [Factors()])
    assert max(factors) < 1
    assert_same(taken[1], big_batch(batches[4:]))


def test_a_run_that_is_cut_expects_the_same_weights(make: MakeRunner) -> None:
    batches = sentences([2, 2, 1, 1, 2, 3, 1, 2], [0, 5, 3, 2, 0, 7, 3, 1])

    def runner(epochs: int) -> Any:
        torch.manual_seed(0)
        return make(
            model=Tagger(torch.float32),
            train_dataloader=[dict(b, inputs=b["inputs"].float()) for b in batches],
            train_cfg=dict(max_epochs=epochs),
            plugins=[COUNTS["mask"]()],
            defaults=("preprocess",),
        )

    straight, first, second = runner(2), runner(1), runner(2)
    straight.train()
    first.train()
    second.load_state_dict(first.state_dict())
    second.train()
    for mine, theirs in zip(
        second.bare_model.parameters(), straight.bare_model.parameters(), strict=True
    ):
        assert torch.equal(mine, theirs)


def test_batches_count_alike_where_that_is_asked_for() -> None:
    batches = sentences([4, 1, 2])
    taken = accumulated(batches, Accumulate(steps=2, weight="batch"))
    first, second, third = (big_batch([batch]) for batch in batches)
    assert_same(taken[0], [(a + b) / 2 for a, b in zip(first, second, strict=True)])
    assert_same(taken[1], third)


def test_with_clipping_it_is_the_clipped_gradient_of_the_big_batch() -> None:
    batches = sentences([3, 1, 2])
    (mine,) = accumulated(batches, Accumulate(steps=3), [AfterClip(), Clip(max_norm=0.01)])
    assert_same(mine, big_batch(batches))
    expected = big_batch(batches)
    norm = torch.linalg.vector_norm(torch.cat([g.flatten() for g in expected]))
    assert_same(AfterClip.seen, [gradient * 0.01 / (norm + 1e-6) for gradient in expected])


class AfterClip(Plugin):
    """Sees what the optimizer gets."""

    seen: ClassVar[list[Tensor]] = []

    def optim_step(self, optim_wrapper: Any) -> None:
        type(self).seen = [p.grad.clone() for p in optim_wrapper.parameters()]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_with_amp_it_is_as_close_to_the_big_batch_as_that_is_to_itself_in_float64(
    dtype: Literal["bfloat16", "float16"],
) -> None:
    """Within three roundings of the dtype, relative to the largest gradient."""
    batches = sentences([3, 1, 2, 2, 1])
    taken = accumulated(batches, Accumulate(steps=3), [Amp(dtype=dtype)])
    epsilon = torch.finfo(getattr(torch, dtype)).eps
    for mine, window in zip(taken, (batches[:3], batches[3:]), strict=True):
        for a, b in zip(mine, big_batch(window), strict=True):
            assert ((a - b).abs().max() / b.abs().max()).item() < 3 * epsilon


class Exact(Amp, name="amp"):
    """The loss scale of amp in float64: what remains of mixed precision that can be exact."""

    def forward_context(self) -> None:  # type: ignore[override]
        return None


def test_with_a_loss_scale_it_is_exact() -> None:
    batches = sentences([3, 1, 2, 2, 1])
    taken = accumulated(batches, Accumulate(steps=3), [Exact(dtype="float16", init_scale=2.0**8)])
    for mine, window in zip(taken, (batches[:3], batches[3:]), strict=True):
        assert_same(mine, big_batch(window))


class Unsized:
    """Batches without a length."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Any:
        return iter(self.batches)


def test_nothing_is_looked_ahead_in_the_dataloader() -> None:
    fetched, steps = [], []

    class Counting(Unsized):
        def __iter__(self) -> Any:
            for index, batch in enumerate(self.batches):
                fetched.append(index)
                yield batch

    class Steps(Plugin):
        def after_train_iter(self, runner: Any) -> None:
            steps.append((len(fetched), runner.progress.iter, runner.progress.step))

    accumulated(Counting(sentences([2, 1, 2, 1, 2])), Accumulate(steps=2), [Steps()])
    assert steps == [(1, 1, 0), (2, 2, 1), (3, 3, 1), (4, 4, 2), (5, 5, 2)]


@pytest.mark.parametrize("known", [True, False])
def test_windows_end_with_the_epoch_and_with_the_run(known: bool) -> None:
    batches = sentences([1, 2, 3, 1, 2])
    loader = batches if known else Unsized(batches)
    taken = accumulated(loader, Accumulate(steps=3), train_cfg=dict(max_iters=9))
    windows = [batches[:3], batches[3:], batches[:3], batches[3:4]]
    for mine, window in zip(taken, windows, strict=True):
        assert_same(mine, big_batch(window))


def test_a_stop_and_a_save_wait_for_the_end_of_the_window() -> None:
    points, stopped = [], []

    class Stops(Plugin):
        def after_train_iter(self, runner: Any) -> None:
            if runner.progress.iter == 4:
                runner.stop("enough")

        def safe_point(self, runner: Any) -> None:
            points.append(runner.progress.iter)

        def after_train(self, runner: Any) -> None:
            stopped.append((runner.progress.iter, runner.progress.stopped))

    taken = accumulated(sentences([1] * 9), Accumulate(steps=3), [Stops()])
    assert stopped == [(6, "enough")]
    assert points == [3, 6]
    assert len(taken) == 2


def test_a_window_that_an_error_left_open_is_forgotten(make: MakeRunner) -> None:
    class Breaks(Plugin):
        def after_train_iter(self, runner: Any) -> None:
            if runner.progress.iter == 4 and not self.broken:
                self.broken = True
                raise LookupError("once")

        broken = False

    batches, gradients = sentences([1, 2, 3, 1, 2, 1]), Gradients()
    model = Tagger()
    runner = make(
        model=model,
        train_dataloader=batches,
        train_cfg=dict(max_epochs=1),
        optim_wrapper=torch.optim.SGD(model.parameters(), lr=0.0),
        plugins=[Breaks(), Accumulate(steps=3), gradients],
        defaults=("preprocess",),
    )
    with pytest.raises(LookupError):
        runner.train()
    runner.train()  # batch 4 was trained on, and its gradient is lost with the error
    assert_same(gradients.steps[0], big_batch(batches[4:]))


class Sometimes(Tagger):
    """Uses its optimizer in some iterations only, as a WGAN its generator's."""

    seen = 0

    def train_step(self, data: Any, optim_wrapper: Any) -> dict[str, Tensor]:
        self.seen += 1
        if self.seen % 3 == 1:
            optim_wrapper.update_params(self(**data)["loss"])
        return {}


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("cfg", [dict(max_epochs=1), dict(max_iters=8), dict(max_iters=9)])
def test_a_window_that_the_last_iteration_does_not_use_is_closed_too(
    known: bool, cfg: dict[str, int]
) -> None:
    points = []

    class Points(Plugin):
        def safe_point(self, runner: Any) -> None:
            points.append(runner.progress.iter)

    batches = sentences([1, 2, 3, 1, 2, 1, 3, 2, 1])
    loader = batches if known else Unsized(batches)
    taken = accumulated(loader, Accumulate(steps=2), [Points()], model=Sometimes(), train_cfg=cfg)
    assert_same(taken[0], big_batch([batches[0], batches[3]]))
    assert_same(taken[1], big_batch([batches[6]]))
    assert points[-1] == cfg.get("max_iters", 9)


def test_a_plugin_that_refuses_a_step_is_heard_also_at_the_end_of_an_epoch() -> None:
    class Refuses(Plugin):
        def should_step(self) -> bool:
            return False

    batches = sentences([1, 2, 3])
    for loader in (batches, Unsized(batches)):
        assert accumulated(loader, Accumulate(steps=2), [Refuses()]) == []


def test_samples_that_cannot_be_counted_are_said_so() -> None:
    class Graphs:
        num_graphs = 3

    model = Tagger()
    model.train_step = lambda data, optim_wrapper: {}  # type: ignore[method-assign]
    with pytest.raises(TypeError, match=r"samples of a Graphs cannot be counted.*batch.num_graphs"):
        accumulated([Graphs()], Accumulate(steps=2), model=model)
    assert accumulated([Graphs()], Accumulate(steps=1), model=model) == []  # no weight is needed


class TimeFirst(Tagger):
    """Takes inputs of shape (T, N, F) in a dict, beside labels of shape (N, T)."""

    def forward(self, inputs: Any, labels: Tensor, mode: str = "loss", **_: Any) -> Any:
        return super().forward(inputs["a"].transpose(0, 1), labels, mode)


def test_the_samples_of_several_inputs_are_those_of_all_of_them() -> None:
    class Two(Tagger):
        def forward(self, inputs: Any, labels: Tensor, mode: str = "loss", **_: Any) -> Any:
            return super().forward((inputs["a"] + inputs["b"]) / 2, labels, mode)

    batches = sentences([5, 1, 3])
    nested = [dict(inputs=dict(a=b["inputs"], b=b["inputs"]), labels=b["labels"]) for b in batches]
    (mine,) = accumulated(nested, Accumulate(steps=3), model=Two())
    assert_same(mine, big_batch(batches))


def test_samples_that_the_tensors_do_not_tell_are_counted_by_the_model_or_the_dataloader() -> None:
    class Counts(TimeFirst):
        def count_samples(self, batch: Any) -> int:
            return len(batch["labels"])

    class Loader(Unsized):
        def count_samples(self, batch: Any) -> int:
            return len(batch["labels"])

    batches = sentences([5, 1, 3])
    turned = [
        dict(inputs=dict(a=batch["inputs"].transpose(0, 1)), labels=batch["labels"])
        for batch in batches
    ]
    with pytest.raises(
        BatchSizeError, match=r"\['a'\]: \(4, 5, 5\).*count_samples.*weight='batch'"
    ):
        accumulated(turned, Accumulate(steps=3), model=TimeFirst())
    for loader, model in ((turned, Counts()), (Loader(turned), TimeFirst())):
        (mine,) = accumulated(loader, Accumulate(steps=3), model=model)
        assert_same(mine, big_batch(batches))


def test_several_losses_of_one_iteration_are_one_micro_batch() -> None:
    class TwoLosses(Tagger):
        def train_step(self, data: Any, optim_wrapper: Any) -> dict[str, Tensor]:
            with optim_wrapper.optim_context(self):
                one, two = (self(**data)["loss"] for _ in range(2))
            optim_wrapper.backward(one)
            optim_wrapper.update_params(2 * two)
            return {}

    batches = sentences([2, 1, 3])
    taken = accumulated(batches, Accumulate(steps=2), model=TwoLosses())
    for mine, window in zip(taken, (batches[:2], batches[2:]), strict=True):
        assert_same(mine, [3 * gradient for gradient in big_batch(window)])


def test_a_step_by_hand_closes_the_window_early() -> None:
    class Impatient(Tagger):
        def train_step(self, data: Any, optim_wrapper: Any) -> dict[str, Tensor]:
            optim_wrapper.backward(self(**data)["loss"])
            if len(data["inputs"]) == 3:
                optim_wrapper.step()
            return {}

    batches = sentences([2, 1, 3, 3, 1, 3])
    taken = accumulated(batches, Accumulate(steps=5), model=Impatient())
    for mine, window in zip(taken, (batches[:3], batches[3:4], batches[4:]), strict=True):
        assert_same(mine, big_batch(window))


def test_each_optimizer_has_windows_of_its_own(make: MakeRunner) -> None:
    class Pair(BaseModel):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = Tagger(), Tagger()

        def forward(self, *args: Any, **kwargs: Any) -> Any: ...

        def train_step(self, data: Any, optim_wrapper: Any) -> dict[str, Tensor]:
            for name in ("a", "b"):
                optim_wrapper[name].update_params(getattr(self, name)(**data)["loss"])
            return {}

    runner = make(
        model=Pair(),
        train_dataloader=sentences([1, 2, 3, 1, 2]),
        train_cfg=dict(max_epochs=1),
        optim_wrapper={name: dict(optimizer=dict(type="SGD", lr=0.1)) for name in ("a", "b")},
        plugins=[
            dict(type="accumulate", steps=2, optimizer="a"),
            dict(type="accumulate", plugin_name="for b", steps=3, optimizer="b"),
        ],
        defaults=("preprocess",),
    )
    assert {n: w.window_length for n, w in runner.optim_wrapper.items()} == {"a": 2, "b": 3}
    runner.train()
    assert {n: w.steps for n, w in runner.optim_wrapper.items()} == {"a": 3, "b": 2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(steps=0), "steps=0: Input should be greater than or equal to 1"),
        (dict(), "steps=... is required"),
        (dict(steps=2, weight="tokens"), "'sample', 'batch' or 'token'"),
        (dict(steps=2, weight="token"), "goes together with tokens="),
        (dict(steps=2, tokens="mask"), "goes together with tokens="),
        (
            dict(steps=2, weight="token", tokens=len, ignore_index=0),
            "ignore_index needs tokens=KEY",
        ),
    ],
)
def test_bad_options_are_refused(options: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        Accumulate(**options)


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        ("masc", KeyError, r"the batch has no 'masc'. Did you mean 'mask'\? It has inputs, labels"),
        (lambda batch: "many", TypeError, "gave 'many'; expected a number or a tensor"),
        ("labels", ValueError, r"values from -100 to 2.*pass the label to ignore"),
        (lambda batch: -1, ValueError, "gave -1.0; expected 0 or more"),
        (lambda batch: float("nan"), ValueError, "gave nan; expected 0 or more"),
        (lambda batch: batch["labels"].clamp(min=0), ValueError, "neither a mask nor lengths"),
        ("sentence", TypeError, "ignore_index needs labels in a tensor"),
    ],
)
def test_a_count_that_cannot_be_is_named(tokens: Any, error: Any, message: str) -> None:
    ignored = IGNORED if tokens == "sentence" else None
    accumulate = Accumulate(steps=2, weight="token", tokens=tokens, ignore_index=ignored)
    (batch,) = sentences([2], [5])
    batch["sentence"] = batch["labels"].tolist()
    with pytest.raises(error, match=message):
        accumulated([batch], accumulate)


def test_a_tuple_takes_an_index(make: MakeRunner) -> None:
    class Masked(Plugin):
        def before_train_iter(self, data_batch: Any) -> Any:
            return [*data_batch, torch.ones(len(data_batch[1]), dtype=torch.bool)]

    class Rest(Toy):
        def forward(self, inputs: Any, labels: Any, mask: Any, mode: str = "tensor") -> Any:  # type: ignore[override]
            return super().forward(inputs, labels, mode)

    accumulate = Accumulate(steps=2, weight="token", tokens=2)
    runner = make(model=Rest(), plugins=[Masked(), accumulate])
    runner.train()
    assert runner.progress.step == 6
    assert accumulate._weight == 4.0
    with pytest.raises(
        KeyError, match="tokens='mask' cannot be looked up in the batch, a list of 2"
    ):
        make(plugins=[Accumulate(steps=2, weight="token", tokens="mask")]).train()


def test_two_for_one_optimizer_are_refused_and_a_second_runner_starts_anew(
    make: MakeRunner,
) -> None:
    model = Tagger()
    wrapper = torch.optim.SGD(model.parameters(), lr=0.1)
    options: Any = dict(model=model, optim_wrapper=wrapper, train_dataloader=sentences([1]))
    with pytest.raises(ValueError, match="accumulated over 2 steps by another plugin"):
        make(plugins=[Accumulate(steps=2), Accumulate(steps=3, plugin_name="b")], **options)
    assert make(**options).optim_wrapper.window_length == 1
    with pytest.raises(KeyError, match="unknown optimizer 'critic'"):
        make(plugins=[Accumulate(steps=2, optimizer="critic")], **options)


# -- Runner.repeat --------------------------------------------------------------------------------


class Again(Plugin):
    """Computes the gradients of each window again, and keeps those of both times."""

    optimizer: str | None = None

    def before_train(self) -> None:
        self.window: list[Any] = []
        self.first: list[list[Tensor]] = []
        self.second: list[list[Tensor]] = []
        self.losses: list[float] = []

    @hookimpl(trylast=True)
    def before_train_iter(self, data_batch: Any) -> None:
        self.window.append(data_batch)

    def backward(self, loss: Tensor) -> None:
        self.losses.append(loss.item())

    def before_optim_step(self, runner: Any, optim_wrapper: Any) -> None:
        if self.optimizer not in (None, optim_wrapper.name):
            return
        window, self.window = self.window, []
        self.first.append([p.grad.clone() for p in optim_wrapper.parameters()])
        runner.repeat(*window)
        self.second.append([p.grad.clone() for p in optim_wrapper.parameters()])


WEIGHTS: dict[str, Callable[[], Accumulate]] = {
    "sample": lambda: Accumulate(steps=3),
    "batch": lambda: Accumulate(steps=3, weight="batch"),
    **COUNTS,
}
REPEATED: Any = ([3, 1, 2, 4, 1, 2, 2, 1], [7, 0, 3, 0, 2, 8, 5, 0])


def assert_equal(actual: list[Tensor], expected: list[Tensor]) -> None:
    """To the last bits of float64."""
    for mine, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("weight", WEIGHTS)
def test_a_repeated_window_has_the_gradient_of_the_big_batch(weight: str, known: bool) -> None:
    """Unequal micro-batches, of which some have no valid token; the last window is shorter."""
    sizes, valid = REPEATED
    batches = sentences(sizes, None if weight in ("sample", "batch") else valid)
    again = Again()
    loader = batches if known else Unsized(batches)
    taken = accumulated(loader, WEIGHTS[weight](), [again])
    plain = accumulated(loader, WEIGHTS[weight]())
    windows = batches[:3], batches[3:6], batches[6:]
    assert len(again.first) == len(again.second) == len(taken) == 3
    for index, window in enumerate(windows):
        assert_equal(taken[index], again.second[index])
        assert_equal(again.second[index], again.first[index])
        assert_equal(again.first[index], plain[index])
        if weight == "batch":
            parts = [big_batch([batch]) for batch in window]
            expected = [torch.stack(each).mean(0) for each in zip(*parts, strict=True)]
        else:
            expected = big_batch(window)
        assert_equal(taken[index], expected)


def test_a_repeated_window_backpropagates_losses_as_small_as_before() -> None:
    """A loss of k times the size would overflow float16 with a loss scale."""
    again = Again()
    accumulated(sentences([3, 1, 2, 4, 1]), Accumulate(steps=3), [again])
    assert again.losses[:3] == again.losses[3:6]
    assert again.losses[6:8] == again.losses[8:]


def test_with_a_loss_scale_a_repeated_window_is_exact() -> None:
    batches = sentences([3, 1, 2, 2, 1])
    again = Again()
    plugins = [again, Exact(dtype="float16", init_scale=2.0**8)]
    taken = accumulated(batches, Accumulate(steps=3), plugins)
    for mine, first, window in zip(taken, again.first, (batches[:3], batches[3:]), strict=True):
        assert_equal(mine, first)
        assert_equal(mine, big_batch(window))


def test_other_batches_may_be_repeated_but_not_another_number() -> None:
    """In another order, or others altogether, also without valid tokens."""
    batches = sentences([3, 1, 2], [7, 0, 3])
    others = sentences([2, 5, 1], [8, 4, 2], seed=3)
    for other in (batches[::-1], others, [batches[1], others[0], batches[1]]):
        again = Replaces(other)
        accumulated([*batches, *batches], COUNTS["mask"](), [again])
        for mine in again.seen:
            assert_equal(mine, big_batch(other))
    for other in (batches[2:], [*batches, batches[0]]):
        with pytest.raises(ValueError, match="micro-batches"):
            accumulated(batches, COUNTS["mask"](), [Replaces(other)])


def test_after_a_repeat_nothing_is_left_over() -> None:
    """The weights of the next window, and the state that is saved, are as without a repeat."""
    sizes, valid = REPEATED
    batches = sentences(sizes, valid)
    for other in (None, sentences([5, 2, 1], [17, 3, 1])):
        states: list[Any] = []
        losses = []
        for repeats in (True, False):
            accumulate = COUNTS["number"]()
            losses.append(seen := Again(optimizer="none", plugin_name="seen"))
            plugins = [*[Replaces(other, at=0) if other else Again()] * repeats, seen]
            taken = accumulated(batches, accumulate, plugins)
            states.append((accumulate.state_dict(), accumulate._weight, taken[1:]))
        assert states[0][:2] == states[1][:2]
        for mine, theirs in zip(states[0][2], states[1][2], strict=True):
            assert_equal(mine, theirs)
        if other:
            assert losses[0].losses[6:] == losses[1].losses[3:]


class Replaces(Plugin, name="replaces"):
    """Repeats each step with other batches."""

    def __init__(self, batches: list[Any], at: int | None = None) -> None:
        self.batches, self.at = batches, at
        self.seen: list[list[Tensor]] = []

    def before_optim_step(self, runner: Any, optim_wrapper: Any) -> None:
        if self.at in (None, optim_wrapper.steps):
            runner.repeat(*self.batches)
            self.seen.append([p.grad.clone() for p in optim_wrapper.parameters()])


def test_gradients_that_are_finished_twice_are_right() -> None:
    """Whoever emits ``finish_gradients`` again, for the same gradients, changes nothing."""

    class Twice(Plugin):
        def before_optim_step(self, runner: Any, optim_wrapper: Any) -> None:
            runner.hooks.finish_gradients(runner, optim_wrapper)

    batches = sentences([3, 1, 2])
    for plugins in ([Twice()], [Again(), Twice()]):
        (taken,) = accumulated(batches, Accumulate(steps=3), plugins)
        assert_equal(taken, big_batch(batches))


def test_a_window_that_is_closed_by_hand_or_after_the_epoch_is_repeated_too() -> None:
    class Impatient(Tagger):
        def train_step(self, data: Any, optim_wrapper: Any) -> dict[str, Tensor]:
            optim_wrapper.backward(self(**data)["loss"])
            if len(data["inputs"]) == 3:
                optim_wrapper.step()
            return {}

    batches = sentences([2, 1, 3, 2, 1])
    again = Again()
    taken = accumulated(batches, Accumulate(steps=5), [again], model=Impatient())
    assert_equal(taken[0], big_batch(batches[:3]))
    assert_equal(taken[1], big_batch(batches[3:]))
    assert len(again.second) == 2


@pytest.mark.parametrize("repeated", ["a", "b", None])
def test_repeats_with_two_optimizers_that_accumulate_differently(
    make: MakeRunner, repeated: str | None
) -> None:
    class Pair(BaseModel):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = Tagger(), Tagger()

        def forward(self, *args: Any, **kwargs: Any) -> Any: ...

        def train_step(self, data: Any, optim_wrapper: Any) -> dict[str, Tensor]:
            for name in ("a", "b"):
                with optim_wrapper[name].optim_context(self):
                    loss = getattr(self, name)(**data)["loss"]
                optim_wrapper[name].update_params(loss)
            return {}

    class Windows(Plugin):
        """Repeats the windows of one optimizer or both, and keeps the gradients of both."""

        def before_train(self) -> None:
            self.windows: dict[str, list[Any]] = {"a": [], "b": []}
            self.steps: dict[str, list[Any]] = {"a": [], "b": []}

        def before_train_iter(self, data_batch: Any) -> None:
            for window in self.windows.values():
                window.append(data_batch)

        def before_optim_step(self, runner: Any, optim_wrapper: Any) -> None:
            name = optim_wrapper.name
            if repeated in (None, name):
                runner.repeat(*self.windows[name])
            self.steps[name].append([p.grad.clone() for p in optim_wrapper.parameters()])
            self.windows[name] = []

    windows = Windows()
    batches = sentences([1, 2, 3, 1, 2])
    runner = make(
        model=Pair(),
        train_dataloader=batches,
        train_cfg=dict(max_epochs=1),
        optim_wrapper={name: dict(optimizer=dict(type="SGD", lr=0.0)) for name in ("a", "b")},
        plugins=[
            dict(type="accumulate", steps=2, optimizer="a"),
            dict(type="accumulate", plugin_name="for b", steps=3, optimizer="b"),
            windows,
        ],
        defaults=("preprocess",),
    )
    runner.train()
    for name, length in (("a", 2), ("b", 3)):
        assert len(windows.steps[name]) == math.ceil(5 / length)
        for index, taken in enumerate(windows.steps[name]):
            assert_equal(taken, big_batch(batches[index * length : (index + 1) * length]))


# -- over ranks -----------------------------------------------------------------------------------


class Synchronise(Plugin):
    """What a plugin for DDP does: gradients are exchanged where the window ends."""

    def __post_init__(self) -> None:
        self.reductions = 0

    def wrap_model(self, model: nn.Module) -> None:
        self.ddp = model.net = DistributedDataParallel(model.net)

        def count(state, bucket):  # DDP reads annotations
            self.reductions += 1
            tensor = bucket.buffer().div_(torch_dist.get_world_size())
            return (
                torch_dist.all_reduce(tensor, async_op=True)
                .get_future()
                .then(lambda future: future.value()[0])
            )

        self.ddp.register_comm_hook(None, count)

    def forward_context(self, optim_wrapper: Any) -> None:
        self.ddp.require_backward_grad_sync = optim_wrapper.will_step

    @hookimpl(tryfirst=True)
    def finish_gradients(self, optim_wrapper: Any) -> None:
        if not optim_wrapper.will_step:  # a window that nobody knew to end here
            self.reductions += 1
            for parameter in optim_wrapper.parameters():
                torch_dist.all_reduce(parameter.grad.div_(torch_dist.get_world_size()))


def on_rank(rank: int, port: int) -> None:
    """Run by each rank; an assertion that fails there fails the test."""
    torch.set_num_threads(1)
    torch_dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    everyone = [
        sentences([3, 1, 2, 4, 1], [7, 4, 1, 16, 2], seed=1),
        sentences([1, 1, 5, 2, 2], [3, 0, 9, 6, 8], seed=2),
    ]
    windows = (slice(0, 3), slice(3, 5))
    for known in (True, False):
        for name, model in (("mask", Tagger), ("number", Tagger), ("mask", Masked)):
            synchronise = Synchronise()
            mine = everyone[rank] if known else Unsized(everyone[rank])
            plugins = [synchronise, Clip(max_norm=1e9)]
            taken = accumulated(mine, COUNTS[name](), plugins, model=model())
            assert synchronise.reductions == len(taken) == 2, "one exchange per window"
            for gradients, window in zip(taken, windows, strict=True):
                assert_same(gradients, big_batch([b for part in everyone for b in part[window]]))
        again = Again()
        taken = accumulated(mine, COUNTS["number"](), [Synchronise(), again])
        for index, window in enumerate(windows):
            assert_same(taken[index], big_batch([b for part in everyone for b in part[window]]))
            assert_equal(again.second[index], again.first[index])
        whole = [[_all_valid(batch) for batch in part] for part in everyone]
        for weight in ("sample", "batch"):
            mine = whole[rank] if known else Unsized(whole[rank])
            taken = accumulated(mine, Accumulate(steps=3, weight=weight), [Synchronise()])
            for gradients, window in zip(taken, windows, strict=True):
                batches = [batch for part in whole for batch in part[window]]
                if weight == "sample":
                    assert_same(gradients, big_batch(batches))
                else:
                    parts = [big_batch([batch]) for batch in batches]
                    mean = [torch.stack(each).mean(0) for each in zip(*parts, strict=True)]
                    assert_same(gradients, mean)
            again = Again()
            repeated = accumulated(mine, Accumulate(steps=3, weight=weight), [Synchronise(), again])
            for gradients, before in zip(repeated, taken, strict=True):
                assert_equal(gradients, before)
            assert len(again.second) == 2
    sys.stdout.flush()
    os._exit(0)


def _all_valid(batch: dict[str, Any]) -> dict[str, Any]:
    return {"inputs": batch["inputs"], "labels": batch["labels"].clamp(min=0)}


@pytest.mark.ranks
def test_over_unequal_ranks_it_is_the_gradient_of_all_their_batches(tmp_path: Path) -> None:
    spawn(2, on_rank, tmp_path)


# -- low precision ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", [[4] * 600, [1, 7, 4] * 200])
def test_in_a_low_precision_many_micro_batches_give_the_gradient_of_one(
    dtype: torch.dtype, sizes: list[int]
) -> None:
    def model(of: torch.dtype) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)).to(dtype).to(of)

    torch.manual_seed(1)
    micro = [(torch.randn(n, 8).add(1).to(dtype), torch.randint(3, (n,))) for n in sizes]
    big = [tuple(torch.cat(parts) for parts in zip(*micro, strict=True))]
    precise = model(torch.float64)
    F.cross_entropy(precise(big[0][0].double()), big[0][1]).backward()
    expected = torch.cat([cast(Tensor, p.grad).flatten() for p in precise.parameters()])
    errors = []
    for batches in (micro, big):
        low = model(dtype)
        (found,) = accumulated(
            batches, Accumulate(steps=len(sizes)), model=low, loss=F.cross_entropy
        )
        gradient = torch.cat([part.flatten() for part in found])
        assert gradient.dtype == dtype
        errors.append(((gradient.double() - expected).norm() / expected.norm()).item())
    assert errors[0] < 2 * errors[1]


def test_a_count_in_a_low_precision_is_not_rounded() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        mask = torch.ones(3, 50_001, dtype=dtype)
        assert count_tokens({"mask": mask}, "mask", None) == 150_003

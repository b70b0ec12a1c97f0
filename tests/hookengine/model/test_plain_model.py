"""Plain modules in a Runner: what they get of a batch, where their loss is, what metrics get."""

from __future__ import annotations

from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from hookengine import BaseMetric
from tests.fixtures import MakeRunner

X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(8) % 3


class Output(OrderedDict):
    """Like the outputs of transformers: a dict with attributes, and without what is None."""

    def __init__(self, **items: Any) -> None:
        super().__init__({name: value for name, value in items.items() if value is not None})

    def __getattr__(self, name: str) -> Any:
        return self.get(name)


@dataclass
class Fields:
    loss: Any
    logits: Any


class Encoder(nn.Module):
    """Like a model of transformers, with outputs of any kind."""

    def __init__(self, kind: Any = Output) -> None:
        super().__init__()
        self.body = nn.Linear(4, 3)
        self.kind = kind

    def forward(self, input_ids: Tensor, attention_mask: Any = None, labels: Any = None) -> Any:
        logits = self.body(input_ids if attention_mask is None else input_ids * attention_mask)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return self.kind(loss=loss, logits=logits)


class Pair(nn.Module):
    """Takes two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 3)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.body(left - right)


class Kept(BaseMetric):
    """Keeps what it got last."""

    def process(self, data_batch: Any, data_samples: Any) -> None:
        self.kept = data_samples
        self.results.append(1)

    def compute_metrics(self, results: list[Any]) -> dict[str, Any]:
        return {"count": len(results)}


def run(make: MakeRunner, model: nn.Module, batch: Any, **options: Any) -> Any:
    """Train on a batch twice and validate on it; return the Runner and what metrics got."""
    metric = Kept()
    runner = make(
        model=model,
        train_dataloader=[batch, batch],
        train_cfg=dict(max_epochs=1),
        val_dataloader=[batch],
        val_evaluator=metric,
        **options,
    )
    runner.train()
    return runner, metric.kept


def trained(model: nn.Module, loss: Any) -> nn.Module:
    """Train twice by hand."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    return model


def same(a: nn.Module, b: nn.Module) -> bool:
    mine, theirs = a.state_dict(), b.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[n], theirs[n]) for n in mine)


def fresh(model: nn.Module, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        nn.init.normal_(parameter, generator=generator)
    return model


# -- the loss of the module itself --------------------------------------------------------------


KINDS: dict[str, Any] = {
    "like transformers": Output,
    "dict": dict,
    "mapping": lambda **items: MappingProxyType(items),
    "dataclass": Fields,
    "namespace": SimpleNamespace,
    "namedtuple": namedtuple("Named", ("logits", "loss")),
    "tuple": lambda loss, logits: (loss, logits),
    "list": lambda loss, logits: [loss, logits],
    "scalar": lambda loss, logits: logits if loss is None else loss,
    "losses by name": lambda loss, logits: {"loss_a": loss / 2, "loss_b": loss / 2, "x": logits},
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_part_of_what_the_module_returns(make: MakeRunner, kind: str) -> None:
    model, by_hand = fresh(Encoder(KINDS[kind])), fresh(Encoder())
    runner, predicted = run(make, model, {"input_ids": X, "labels": Y}, val_cfg=dict(loss=True))
    trained(by_hand, lambda model: model(X, labels=Y).loss)
    assert same(runner.bare_model, by_hand)
    assert [*runner.state_dict()["state_dict"]] == ["body.weight", "body.bias"]
    assert runner.val_loop.metrics["loss"] == pytest.approx(by_hand(X, labels=Y).loss.item())
    assert type(predicted) is type(model(X, labels=Y))


@pytest.mark.parametrize(
    "kind", [dict, UserDict, OrderedDict, lambda items: MappingProxyType(items)]
)
def test_any_mapping_becomes_keyword_arguments(make: MakeRunner, kind: Any) -> None:
    mask = torch.tensor([1.0, 0, 1, 0])
    batch = kind({"labels": Y, "attention_mask": mask, "input_ids": X})
    by_hand = trained(fresh(Encoder()), lambda model: model(X, mask, Y).loss)
    assert same(run(make, fresh(Encoder()), batch)[0].bare_model, by_hand)


def test_without_a_loss_a_tuple_is_passed_as_it_is(make: MakeRunner) -> None:
    class Losses(nn.Module):
        """Like a detector of torchvision: losses in training, else predictions."""

        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(4, 3)

        def forward(self, images: Any, targets: Any = None) -> Any:
            scores = self.body(torch.stack(images))
            if not self.training:
                return [{"scores": row} for row in scores]
            loss = F.cross_entropy(scores, torch.stack([target["label"] for target in targets]))
            return {"loss_classifier": loss, "loss_box_reg": loss * 2}

    batch = ([*X], [{"label": y} for y in Y])
    by_hand = trained(fresh(Losses()), lambda model: sum(model(*batch).values()))
    runner, predicted = run(make, fresh(Losses()), batch)
    assert same(runner.bare_model, by_hand)
    assert len(predicted) == 8
    assert {*predicted[0]} == {"scores"}
    with pytest.raises(TypeError, match="Losses returned no loss in evaluation mode, but a list"):
        run(make, Losses(), batch, val_cfg=dict(loss=True))


def test_evaluation_alone_needs_no_loss(make: MakeRunner) -> None:
    nothing: dict[str, Any] = dict(train_dataloader=None, train_cfg=None, optim_wrapper=None)
    for batch, kind in (((X, Y), tuple), ({"input": X}, Tensor), (X, Tensor), ([X], Tensor)):
        metric = Kept()
        runner = make(
            model=nn.Linear(4, 3), val_dataloader=[batch], val_evaluator=metric, **nothing
        )
        runner.val()
        assert isinstance(metric.kept, kind)


# -- loss= --------------------------------------------------------------------------------------


def test_a_dict_with_a_loss(make: MakeRunner) -> None:
    """The module gets what its forward takes, the loss gets the whole batch."""

    def loss(output: Any, batch: Any) -> Tensor:
        return F.cross_entropy(output.logits, batch["y"], label_smoothing=0.1)

    batch = {"input_ids": X, "y": Y, "weights": None}
    by_hand = trained(fresh(Encoder()), lambda model: loss(model(X), batch))
    runner, predicted = run(make, fresh(Encoder()), batch, loss=loss)
    assert same(runner.bare_model, by_hand)
    assert {*predicted} == {"logits"}


def test_inputs_alone(make: MakeRunner) -> None:
    """An autoencoder: what goes in is what should come out."""
    by_hand = trained(fresh(nn.Linear(4, 4)), lambda model: F.mse_loss(model(X), X))
    for batch in (X, [X], (X,)):
        runner, predicted = run(make, fresh(nn.Linear(4, 4)), batch, loss=F.mse_loss)
        assert same(runner.bare_model, by_hand)
        assert torch.equal(predicted[1], X)


@pytest.mark.parametrize("kind", [tuple, list, lambda items: namedtuple("Item", "a b c")(*items)])
def test_several_inputs_and_a_target(make: MakeRunner, kind: Any) -> None:
    by_hand = trained(fresh(Pair()), lambda model: F.cross_entropy(model(X, X + 1), Y))
    runner, predicted = run(make, fresh(Pair()), kind([X, X + 1, Y]), loss=F.cross_entropy)
    assert same(runner.bare_model, by_hand)
    assert torch.equal(predicted[1], Y)


def test_inputs_without_a_target(make: MakeRunner) -> None:
    def loss(output: Tensor, batch: Any) -> Tensor:
        return output.square().mean() * len(batch)

    by_hand = trained(fresh(Pair()), lambda model: loss(model(X, X + 1), (1, 2)))
    runner, predicted = run(make, fresh(Pair()), (X, X + 1), loss=loss)
    assert same(runner.bare_model, by_hand)
    assert isinstance(predicted, Tensor)


def test_one_argument_gets_the_whole_batch(make: MakeRunner) -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(4, 3)

        def forward(self, data: Any) -> Tensor:
            return self.body(data["x"] if isinstance(data, dict) else data.x)

    def loss(output: Tensor, data: Any) -> Tensor:
        return F.cross_entropy(output, data["y"] if isinstance(data, dict) else data.y)

    by_hand = trained(fresh(Whole()), lambda model: F.cross_entropy(model({"x": X}), Y))
    for batch in ({"x": X, "y": Y}, SimpleNamespace(x=X, y=Y)):
        assert same(run(make, fresh(Whole()), batch, loss=loss)[0].bare_model, by_hand)


def test_what_worked_before_works_as_before(make: MakeRunner) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(4, 3)

        def forward(self, x: Tensor, mask: Any = None) -> Tensor:
            assert mask is None
            return self.body(x["a"] if isinstance(x, dict) else x)

    by_hand = trained(fresh(Masked()), lambda model: F.cross_entropy(model(X), Y))
    for batch in ((X, Y), [X, Y], ({"a": X}, Y), {"inputs": X, "target": Y}):
        runner, predicted = run(make, fresh(Masked()), batch, loss=F.cross_entropy)
        assert same(runner.bare_model, by_hand)
        assert torch.equal(predicted[1], Y)


def test_wrappers_of_torch_and_compiled_modules(make: MakeRunner) -> None:
    by_hand = trained(fresh(Pair()), lambda model: F.cross_entropy(model(X, X), Y))
    runner, _ = run(make, nn.DataParallel(fresh(Pair())), (X, X, Y), loss=F.cross_entropy)
    assert same(runner.bare_model.module, by_hand)


def test_averages_are_evaluated_like_the_module(make: MakeRunner) -> None:
    runner, predicted = run(make, Encoder(), {"input_ids": X, "labels": Y}, plugins=["ema"])
    assert {*predicted} == {"loss", "logits"}
    averaged = runner.plugins["ema"].averaged.module
    assert torch.equal(predicted["logits"], averaged(X).logits)


def test_a_dataloader_of_dicts(make: MakeRunner) -> None:
    samples: Any = [{"input_ids": x, "labels": y} for x, y in zip(X, Y, strict=True)]
    runner = make(
        model=Encoder(),
        train_dataloader=DataLoader(samples, batch_size=4),
        defaults=("seed", "preprocess", "logging"),
    )
    runner.train()
    assert runner.progress.step == 4


# -- what does not fit --------------------------------------------------------------------------


FITS_NOT: dict[str, tuple[Any, Any, Any, str]] = {
    "no labels": (
        Encoder(),
        None,
        {"input_ids": X},
        r"Encoder returned no loss in training mode, but an Output with 'logits': Tensor\[8, 3\]",
    ),
    "a forgotten loss": (
        Pair(),
        None,
        (X, X),
        r"Pair returned no loss in training mode, but a Tensor\[8, 3\]\. Pass a loss to the Runner",
    ),
    "unknown item": (
        Encoder(),
        None,
        {"input_ids": X, "label": Y},
        r"forward takes no 'label'\. Did you mean 'labels'\?.* a dict with 'input_ids': Tensor"
        r"\[8, 4\], 'label': Tensor\[8\]; Encoder.forward takes input_ids, attention_mask=\.\.\., ",
    ),
    "misspelled item": (
        Encoder(),
        F.cross_entropy,
        {"input_ids": X, "attention_masks": X},
        r"forward takes no 'attention_masks'\. Did you mean 'attention_mask'\?",
    ),
    "missing item": (
        Encoder(),
        F.cross_entropy,
        {"input_id": X, "labels": Y},
        r"it has no 'input_ids'\. Did you mean 'input_id'\?",
    ),
    "which is the target": (
        nn.Linear(4, 3),
        F.cross_entropy,
        (X, Y, torch.arange(8)),
        r"not clear which of its 3 items are the inputs.* a tuple of 3 \(Tensor\[8, 4\], Tensor",
    ),
    "an optional argument or a target": (
        Encoder(),
        F.cross_entropy,
        (X, X, Y),
        r"not clear which of its 3 items are the inputs.*Encoder.forward takes input_ids, atten",
    ),
    "nothing": (nn.Linear(4, 3), F.cross_entropy, (), "it is empty"),
    "too few": (Pair(), F.cross_entropy, [X], "forward requires 2 arguments, but it has 1"),
}


@pytest.mark.parametrize("what", FITS_NOT)
def test_what_does_not_fit_is_one_error_with_the_batch_and_the_ways(
    make: MakeRunner, what: str
) -> None:
    model, loss, batch, message = FITS_NOT[what]
    with pytest.raises(TypeError, match=message) as caught:
        run(make, model, batch, loss=loss)
    text = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", ())])
    assert "PlainModel" not in text
    if "returned no loss" not in text and "missing" not in text:
        for way in ("(inputs, target)", "a dict with the names", "loss(output, batch)", "BaseMod"):
            assert way in text


def test_an_error_within_forward_or_loss_has_the_batch(make: MakeRunner) -> None:
    class Fails(Encoder):
        def forward(self, input_ids: Tensor, labels: Any = None) -> Any:  # type: ignore[override]
            return input_ids + "a"

    with pytest.raises(TypeError) as caught:
        run(make, Fails(), {"input_ids": X, "labels": Y})
    (note,) = [note for note in caught.value.__notes__ if "batch" in note]
    assert note.startswith("the batch was a dict with 'input_ids': Tensor[8, 4], 'labels'")


def test_a_module_that_cannot_return_a_loss_is_refused_at_construction(make: MakeRunner) -> None:
    for model in (nn.Linear(4, 3), nn.Sequential(nn.Linear(4, 3))):
        name = type(model).__name__
        with pytest.raises(TypeError, match=f"{name} has no train_step. Derive .*loss=lambda"):
            make(model=model)

    class Alone(nn.Linear):
        def forward(self, inputs: Tensor) -> Tensor:
            return super().forward(inputs).square().mean()

    runner, _ = run(make, Alone(4, 3), X, loss=lambda loss, batch: loss)
    assert runner.progress.step == 2

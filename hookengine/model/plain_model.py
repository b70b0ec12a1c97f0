"""The adapter around a plain module: which part of a batch it gets, and what its loss is."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from hookengine.model.base_model import BaseModel
from hookengine.registry import did_you_mean

STEPS = ("train_step", "val_step", "test_step")
MANY = 10**6
NEAR = 0.92
"""How similar an item's name must be to an argument's to be taken for a misspelled one."""


def is_plain(model: nn.Module, loss: Any) -> bool:
    """Return whether the Runner makes a model a BaseModel, together with ``loss`` or without."""
    if isinstance(model, BaseModel):
        return False
    return loss is not None or not any(hasattr(model, step) for step in STEPS)


class PlainModel(BaseModel):
    """Make a plain module, with a loss or without, a BaseModel.

    A batch becomes the arguments of the module's ``forward``:

    - Of a pair, (inputs, target), the module receives the inputs.
    - Of a longer tuple or list, it receives all items but the last, the target, if ``forward``
      takes exactly that many; or all items, if it requires that many.
    - The items of a dict or any other mapping become keyword arguments. Items that ``forward`` has
      no parameter for are for the loss alone. A dict of ``inputs`` and ``target`` is a pair.
    - Anything else, such as a tensor, is passed as it is. So is a mapping if ``forward`` takes one
      argument of another name.

    The loss is called as ``loss(output, target)``. If the batch is a tensor, it is also the target.
    If there is no target apart from the inputs, as in a mapping, ``loss(output, batch)`` receives
    the whole batch.

    Without a loss, the module receives all items of a tuple, list or mapping, and its loss is part
    of what it returns: the item or attribute ``loss``; the items of a dict whose names contain
    ``loss``; the first item of a tuple, if it is a scalar; or the output itself, if it is one.

    Metrics receive (output, target), or only the output if there is no target.

    Args:
        module: The module.
        loss: Returns a scalar tensor, or a dict of them.
    """

    def __init__(self, module: nn.Module, loss: Callable[..., Any] | None = None) -> None:
        super().__init__()
        self.module = module
        self.loss = loss
        self._takes: Parameters | None = None

    def forward(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], target: Any, mode: str = "tensor"
    ) -> Any:
        """Return the losses, (output, target) or the output: mode "loss", "predict" or "tensor".

        Args:
            args: The positional arguments of the module.
            kwargs: Its keyword arguments.
            target: The second argument of the loss.
            mode: What to return.
        """
        output = self.module(*args, **kwargs)
        if mode == "loss":
            if self.loss is None:
                return losses_in(output, self.module)
            loss = self.loss(output, target)
            return loss if isinstance(loss, dict) else {"loss": loss}
        return (output, target) if mode == "predict" else output

    def _run_forward(self, data: Any, mode: str) -> Any:
        if self._takes is None:
            self._takes = parameters_of(self.module)
        call = arguments(data, self._takes, self.loss is not None)
        if isinstance(call, str):
            raise TypeError(self._misfit(data, call))
        try:
            outputs = self(call.args, call.kwargs, call.target, mode=mode)
        except TypeError as error:
            error.add_note(
                f"the batch was {_describe(data)}; {self._takes.describe()}, and got "
                f"{_describe(call.kwargs or call.args)}"
            )
            raise
        if mode == "predict":
            return outputs if call.has_target else outputs[0]
        if mode == "loss" and outputs.get("loss", 0) is None:
            name = getattr(self.loss, "__name__", type(self.loss).__name__)
            raise TypeError(
                f"the loss {name} returned None. Check that every branch returns a value"
            )
        return outputs

    def _misfit(self, data: Any, why: str) -> str:
        takes = "" if self._takes is None else self._takes.describe()
        return (
            f"{type(self.module).__name__} cannot be called with this batch: {why} The batch is "
            f"{_describe(data)}; {takes}.\nReturn from the dataset (inputs, target), or a dict "
            "with the names of these arguments, for which a loss is called as loss(output, batch). "
            "For anything else, write a hookengine.BaseModel"
        )


class Parameters(NamedTuple):
    """What the ``forward`` of a module takes."""

    owner: str
    """The class of the module."""
    required: int
    """The number of positional arguments without a default."""
    positional: int
    """The number of positional arguments that it takes at most."""
    names: dict[str, bool]
    """The names of its arguments, and whether they are required."""
    any_name: bool
    """Whether it takes any keyword argument."""

    def describe(self) -> str:
        """Return the arguments in words."""
        shown = [name if required else f"{name}=..." for name, required in self.names.items()]
        more = ["*args"] * (self.positional >= MANY) + ["**kwargs"] * self.any_name
        return f"{self.owner}.forward takes {', '.join([*shown, *more]) or 'nothing'}"


def parameters_of(module: nn.Module) -> Parameters:
    """Return what the ``forward`` of a module takes, or of the module in torch's wrappers."""
    owner = type(module).__name__
    try:
        parameters = [*inspect.signature(module.forward).parameters.values()]
    except (TypeError, ValueError):  # of a scripted module, for example
        return Parameters(owner, 0, MANY, {}, True)
    kinds = {parameter.kind for parameter in parameters}
    inner = getattr(module, "module", None)
    if isinstance(inner, nn.Module) and kinds <= {_ARGS, _KWARGS}:
        return parameters_of(inner)
    own = [p for p in parameters if p.kind not in (_ARGS, _KWARGS)]
    placed = [p for p in own if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    return Parameters(
        owner,
        sum(p.default is p.empty for p in placed),
        MANY if _ARGS in kinds else len(placed),
        {
            p.name: p.default is p.empty
            for p in own
            if p.kind is not inspect.Parameter.POSITIONAL_ONLY
        },
        _KWARGS in kinds,
    )


_ARGS = inspect.Parameter.VAR_POSITIONAL
_KWARGS = inspect.Parameter.VAR_KEYWORD


class Call(NamedTuple):
    """The arguments of a module and of the loss."""

    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    target: Any
    has_target: bool
    """Whether the target is something else than the whole batch, for metrics."""


def arguments(batch: Any, takes: Parameters, has_loss: bool) -> Call | str:
    """Return which part of a batch a module and the loss receive, or why that cannot be told."""
    if isinstance(batch, (tuple, list)):
        return _of_items(batch, takes, has_loss)
    if isinstance(batch, Mapping):
        return _of_mapping(batch, takes, has_loss)
    return Call((batch,), {}, batch, has_loss and isinstance(batch, Tensor))


def _of_items(batch: Sequence[Any], takes: Parameters, has_loss: bool) -> Call | str:
    count, most = len(batch), takes.positional
    if has_loss and count == 2 and takes.required < 2:
        return Call(batch[:1], {}, batch[1], True)
    if has_loss and count == 1 and takes.required < 2:
        return Call(batch, {}, batch[0], True)
    if takes.required == count or (not has_loss and takes.required <= count <= most):
        return Call(batch, {}, batch, False)
    if count == most + 1 == takes.required + 1 > 1:
        return Call(batch[:-1], {}, batch[-1], True)
    if not count:
        return "it is empty."
    if takes.required > count:
        return f"forward requires {takes.required} arguments, but it has {count}."
    return f"it is not clear which of its {count} items are the inputs."


def _of_mapping(batch: Mapping[Any, Any], takes: Parameters, has_loss: bool) -> Call | str:
    names = takes.names
    if has_loss and batch.keys() == {"inputs", "target"} and "target" not in names:
        return Call((batch["inputs"],), {}, batch["target"], True)
    known = [name for name in batch if name in names]
    if takes.required == 1 and not known:
        return Call((batch,), {}, batch, False)
    others = [] if takes.any_name else [name for name in batch if name not in names]
    absent = [name for name, required in names.items() if required and name not in batch]
    if absent:
        hint = did_you_mean(absent[0], map(str, others))
        return f"it has no {', '.join(map(repr, absent))}.{hint}"
    free = [name for name in names if name not in batch]
    for name in others:
        if not has_loss or did_you_mean(name, free, cutoff=NEAR):
            return f"forward takes no {name!r}.{did_you_mean(name, free)}"
    kwargs = {name: batch[name] for name in known} if others else batch
    return Call((), kwargs, batch, False)


def losses_in(output: Any, module: nn.Module) -> Mapping[str, Any]:
    """Return the losses in what a module returned, by name.

    Raises:
        TypeError: There is none.
    """
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(output, (tuple, list)) and output and not isinstance(loss, Tensor):
        loss = output[0]
        loss = loss if isinstance(loss, Tensor) and not loss.dim() else None
    if isinstance(output, Tensor):
        loss = output if not output.dim() else None
    if loss is not None:
        return {"loss": loss}
    if isinstance(output, Mapping):
        named = {k: v for k, v in output.items() if "loss" in str(k) and v is not None}
        if named:
            return named
    where = "training" if module.training else "evaluation"
    owner = type(module).__name__
    raise TypeError(
        f"{owner} returned no loss in {where} mode, but {_describe(output)}. Pass a loss to the "
        f"Runner, as in loss=F.cross_entropy, or make {owner} return one: a scalar, or an output "
        "with a 'loss'. Does the batch have its target, such as labels?"
    )


def _describe(data: Any) -> str:
    """Describe a batch, the arguments of a module, or its output in a few words."""
    if isinstance(data, Mapping):
        items = [f"{key!r}: {_kind(value)}" for key, value in data.items()]
        text = f"{type(data).__name__} with {', '.join(items) or 'nothing'}"
    elif isinstance(data, (list, tuple)):
        items = [_kind(value) for value in data[:8]] + ["..."] * (len(data) > 8)
        text = f"{type(data).__name__} of {len(data)} ({', '.join(items)})"
    else:
        text = _kind(data)
    return f"{'an' if text[0] in 'AEIOUaeiou' else 'a'} {text}"


def _kind(value: Any) -> str:
    return f"{type(value).__name__}{[*value.shape] if isinstance(value, Tensor) else ''}"

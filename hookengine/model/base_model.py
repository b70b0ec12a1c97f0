"""The base class of models that the Runner trains."""

from __future__ import annotations

import weakref
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from hookengine.events.dispatch import SILENT
from hookengine.events.hookspecs import HookSpecs
from hookengine.model.modules import BaseModule
from hookengine.registry import MODELS


class HooksReference(weakref.ref[HookSpecs]):
    """A weak reference to hooks; like the hooks, it is silent once it is copied or unpickled."""

    def __deepcopy__(self, memo: dict[int, Any]) -> HooksReference:
        return HooksReference(SILENT)

    def __reduce__(self) -> tuple[type[HooksReference], tuple[HookSpecs]]:
        return HooksReference, (SILENT,)


class BaseModel(BaseModule):
    """Base class for models that the Runner trains. Subclasses implement ``forward``.

    Args:
        data_preprocessor: A module, or ``dict(type=NAME or class, ...)``. The default is
            ``BaseDataPreprocessor``, which moves batches to the model's device.
        init_cfg: See ``BaseModule``.
    """

    def __init__(
        self,
        data_preprocessor: dict[str, Any] | nn.Module | None = None,
        init_cfg: dict[str, Any] | list[dict[str, Any]] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        self._hooks = HooksReference(SILENT)
        if data_preprocessor is None or isinstance(data_preprocessor, Mapping):
            default = MODELS.own_name("BaseDataPreprocessor")
            cfg = {"type": default, **(data_preprocessor or {})}
            data_preprocessor = MODELS.build(cfg)
        if not isinstance(data_preprocessor, nn.Module):
            raise TypeError(
                "data_preprocessor must be a dict or an nn.Module, got "
                f"{type(data_preprocessor).__name__}; pass an init_cfg by name: init_cfg=[...]"
            )
        self.data_preprocessor = data_preprocessor

    @abstractmethod
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return losses, predictions or tensors, depending on ``mode``.

        The Runner calls it as ``forward(*batch, mode=...)`` or ``forward(**batch, mode=...)``.

        Args:
            mode: With ``"loss"``, return a dict of scalar tensors (or lists of them) by name. With
                ``"predict"``, return what the ``process`` method of your metrics expects. With
                ``"tensor"``, return tensors for your own use.
        """

    def train_step(self, data: Any, optim_wrapper: Any) -> dict[str, Tensor]:
        """Train on one batch: preprocess, forward, backward, step.

        Args:
            data: A batch: a dict or another mapping, a tuple or a list.
            optim_wrapper: The ``OptimWrapper`` that updates the parameters. An override for several
                optimizers receives an ``OptimWrapperDict``.

        Returns:
            The losses by name, as detached scalar tensors on the device; ``loss`` is their sum.
        """
        # Same as self.data_preprocessor, without the lookup of nn.Module.__getattr__ in each call.
        preprocess = self._modules.get("data_preprocessor") or self.data_preprocessor
        with optim_wrapper.optim_context(self):
            data = preprocess(data, True)
            losses = self._run_forward(data, "loss")
        loss, log_vars = self.parse_losses(losses)
        optim_wrapper.update_params(loss)
        return log_vars

    def val_step(self, data: Any) -> Any:
        """Return the predictions for a batch, which the Runner passes to the metrics."""
        data = self.data_preprocessor(data, False)
        return self._run_forward(data, "predict")

    def test_step(self, data: Any) -> Any:
        """Return the predictions for a batch; the default calls ``val_step``."""
        return self.val_step(data)

    def loss_step(self, data: Any) -> dict[str, Tensor]:
        """Return the losses of a batch without an update, for ``val_cfg=dict(loss=True)``."""
        data = self.data_preprocessor(data, False)
        return _sum_losses(self._run_forward(data, "loss"))[1]

    def parse_losses(
        self, losses: Mapping[str, Tensor | Sequence[Tensor]]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Let plugins replace the losses through ``after_forward``, then sum them.

        Args:
            losses: Tensors or lists of tensors by name. A tensor counts with its mean, a list with
                the sum of the means. The sum includes every entry whose name contains ``loss``.

        Returns:
            The scalar to backpropagate, and a dict of detached tensors to log: every entry, and
            the sum as ``loss``.

        Raises:
            TypeError: If ``losses`` is not a mapping, or an entry is neither a tensor nor a list of
                tensors.
            ValueError: If no name contains "loss".
        """
        hooks = self._hooks() or SILENT
        losses = hooks.after_forward(hooks.runner, losses)
        if isinstance(losses, dict) and len(losses) == 1:  # fast path for the most common case
            loss = losses.get("loss")
            if isinstance(loss, Tensor) and not loss.dim():
                return loss, {"loss": loss.detach()}
        return _sum_losses(losses)

    def _run_forward(self, data: Any, mode: str) -> Any:
        try:
            if isinstance(data, dict):
                outputs = self(**data, mode=mode)
            elif isinstance(data, (list, tuple)):
                outputs = self(*data, mode=mode)
            elif isinstance(data, Mapping):  # after the tests that are faster
                outputs = self(**data, mode=mode)
            else:
                raise TypeError(
                    "a batch must be a dict, tuple or list to become the arguments of forward(), "
                    f"got {type(data).__name__}; return one from the dataset, the "
                    "data_preprocessor or before_train_iter"
                )
        except TypeError as error:
            error.add_note(f"{type(self).__name__}.forward got {_describe(data)}, mode={mode!r}")
            raise
        if outputs is None:
            raise TypeError(
                f"{type(self).__name__}.forward(mode={mode!r}) returned None. Check that every "
                "branch returns a value"
            )
        return outputs

    def npu(self, device: int | str | torch.device | None = None) -> Self:
        """Move the model and its data preprocessor to an Ascend NPU (requires torch_npu)."""
        return self._move("npu", device)

    def mlu(self, device: int | str | torch.device | None = None) -> Self:
        """Move the model and its data preprocessor to a Cambricon MLU (requires torch_mlu)."""
        return self._move("mlu", device)

    def musa(self, device: int | str | torch.device | None = None) -> Self:
        """Move the model and its data preprocessor to a Moore Threads GPU (requires torch_musa)."""
        return self._move("musa", device)

    def _move(self, backend: str, device: int | str | torch.device | None) -> Self:
        if isinstance(device, (str, torch.device)):
            return self.to(device)
        try:
            target = torch.device(backend) if device is None else torch.device(backend, device)
        except RuntimeError as error:
            raise RuntimeError(
                f"torch does not know the device {backend!r}. Import torch_{backend} first"
            ) from error
        return self.to(target)


def connect(model: nn.Module, hooks: HookSpecs) -> None:
    """Make a BaseModel emit ``after_forward``; in another model, every BaseModel in it.

    A model does not keep the Runner alive: the script may use the model after the Runner.
    """
    reference = HooksReference(hooks)
    parts = [model] if isinstance(model, BaseModel) else model.modules()
    for part in parts:
        if isinstance(part, BaseModel):
            part._hooks = reference


def _describe(data: Any) -> str:
    """Describe a batch in a few words, for a note on an error."""
    if isinstance(data, Mapping):
        return f"a dict with {', '.join(map(repr, data))}"
    if isinstance(data, (list, tuple)):
        shaped = [isinstance(x, Tensor) and not x.is_nested for x in data]  # others have no shape
        shapes = [[*x.shape] if has else "" for x, has in zip(data, shaped, strict=True)]
        kinds = (f"{type(x).__name__}{shape}" for x, shape in zip(data, shapes, strict=True))
        return f"a batch of {len(data)} ({', '.join(kinds)})"
    return type(data).__name__


def _sum_losses(losses: Any) -> tuple[Tensor, dict[str, Tensor]]:
    if not isinstance(losses, (dict, Mapping)):  # a dict is recognized faster
        raise TypeError(
            "forward(mode='loss') must return a dict of losses by name, as in dict(loss=loss); got "
            f"{type(losses).__name__}"
        )
    total: Tensor | None = None
    log_vars: dict[str, Tensor] = {}
    for name, value in losses.items():
        if isinstance(value, Tensor):
            mean = value.mean() if value.dim() else value  # a scalar needs no extra autograd node
        elif isinstance(value, (list, tuple)) and value and isinstance(value[0], Tensor):
            mean = sum(item.mean() for item in value[1:]) + value[0].mean()
        else:
            raise TypeError(
                f"the loss {name!r} must be a tensor or a list of tensors, got "
                f"{type(value).__name__}"
            )
        if "loss" in name:  # start from the first loss, not from 0, to save an autograd node
            total = mean if total is None else total + mean
        log_vars[name] = mean.detach()
    if total is None:
        raise ValueError(
            "forward(mode='loss') returned no loss: at least one name must contain 'loss', got "
            f"{sorted(losses)}"
        )
    if "loss" not in log_vars or len(log_vars) > 1:
        log_vars = {"loss": total.detach(), **{k: v for k, v in log_vars.items() if k != "loss"}}
    return total, log_vars

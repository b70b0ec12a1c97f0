"""Evaluation of shares: the buffers of rank 0, and passes that only sharded ranks need."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from hookengine import dist
from hookengine_distributed.fsdp import is_sharded, reshard


class Evaluation:
    """What ranks do together while each evaluates its share; nothing on one process."""

    def __init__(self) -> None:
        self._own_buffers: list[tuple[Tensor, Tensor]] = []
        self._sharded = False
        self._kept: Any = None

    def begin(self, models: Iterable[nn.Module]) -> None:
        """Give the models of all ranks the buffers of rank 0."""
        models = [*models]
        self._sharded = any(is_sharded(model) for model in models)
        buffers = [buffer for model in models for buffer in model.buffers()]
        self._own_buffers = [(buffer, buffer.clone()) for buffer in buffers]
        dist.broadcast_tensors(buffers)

    def end(self) -> None:
        """Give the rank its own buffers back."""
        with torch.no_grad():
            for buffer, own in self._own_buffers:
                buffer.copy_(own)
        self._own_buffers = []

    # A forward pass of a sharded model needs all ranks, and one of them may have fewer batches.

    def keep(self, batch: Any, is_first: bool, numbers: Sequence[int | None]) -> None:
        """Keep a batch for passes that are not counted; give the first one to ranks that have none.

        Args:
            batch: As it goes into the model.
            is_first: Of the pass.
            numbers: The batches of each rank.
        """
        if self._sharded:
            self._kept = batch
            if is_first:
                self._give(numbers)

    def _give(self, numbers: Sequence[int | None]) -> None:
        having = [rank for rank, number in enumerate(numbers) if number]
        if 0 in numbers and having:
            self._kept = dist.broadcast_object(self._kept, src=having[0])

    def catch_up(
        self, runner: Any, model: nn.Module, phase: str, numbers: Sequence[int | None]
    ) -> None:
        """Run the passes of ranks with more batches along, and forget what comes of them.

        Raises:
            ValueError: the number of batches is not known.
        """
        if not (self._sharded and is_sharded(model)):
            return
        counts = [number for number in numbers if number is not None]
        if len(counts) < len(numbers):
            raise ValueError(
                f"{phase}_dataloader has no length, and each forward pass of a sharded model needs "
                "all ranks: give one with a length, or evaluate with strategy='ddp'"
            )
        own = counts[dist.get_rank()]
        if own == 0:
            self._give(numbers)
        kept, self._kept = self._kept, None
        cfg = runner.val_cfg if phase == "val" else runner.test_cfg
        step = getattr(model, f"{phase}_step")
        for _ in range(max(counts) - own):
            with ExitStack() as stack:
                for context in runner.hooks.forward_context(runner, model, None, phase):
                    stack.enter_context(context)
                step(kept)
                if cfg.loss:
                    model.loss_step(kept)  # type: ignore[operator]
        reshard(model)  # what stays whole for a backward pass, which does not come

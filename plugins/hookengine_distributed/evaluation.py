"""Evaluation on shares of the data: rank 0's buffers, and extra passes of sharded models."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from hookengine import Phase, Runner, dist
from hookengine_distributed.fsdp import is_sharded, reshard


class Evaluation:
    """Coordinates ranks while each evaluates its share; does nothing in a single process."""

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
        """Restore this rank's own buffers."""
        with torch.no_grad():
            for buffer, own in self._own_buffers:
                buffer.copy_(own)
        self._own_buffers = []

    # A forward pass of a sharded model needs all ranks, but some may have fewer batches.

    def keep(self, batch: Any, is_first: bool, numbers: Sequence[int | None]) -> None:
        """Keep a batch for extra passes, and give the first one to ranks that have no batches.

        Args:
            batch: The batch that the model receives.
            is_first: Whether it is the first batch of the pass.
            numbers: The number of batches of each rank.
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
        self, runner: Runner, model: nn.Module, phase: Phase, numbers: Sequence[int | None]
    ) -> None:
        """Join the passes of ranks with more batches, and discard the results.

        Raises:
            ValueError: The number of batches is unknown.
        """
        if not (self._sharded and is_sharded(model)):
            return
        counts = [number for number in numbers if number is not None]
        if len(counts) < len(numbers):
            raise ValueError(
                f"{phase}_dataloader has no length, but each forward pass of a sharded model needs "
                "all ranks. Use a dataloader with a length, or evaluate with strategy='ddp'"
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
                if cfg is not None and cfg.loss:
                    model.loss_step(kept)  # type: ignore[operator]
        reshard(model)  # free what was gathered for a backward pass that never comes

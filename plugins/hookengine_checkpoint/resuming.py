"""Resuming a run from a checkpoint, and starting one with the weights of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from hookengine import MODELS, Runner, dist
from hookengine_checkpoint.files import read_state
from hookengine_checkpoint.find import Found, find


def find_on_all_ranks(runner: Runner, log: Callable[[str], None]) -> Found | None:
    """Find the checkpoint to resume from on rank 0; all ranks continue the same run.

    Args:
        runner: The Runner; its run gets the name of the run that it continues.
        log: Called with texts for the log, on rank 0.

    Raises:
        FileNotFoundError: There is no checkpoint at the path.
        DamagedError: The checkpoint is damaged, or all are.
    """
    found = find(runner, log) if dist.is_main_process() else None
    found, name, named = dist.broadcast_object((found, runner.name, runner.named))
    if named:
        runner.continue_run(name)
    return found


def load_run(
    runner: Runner, found: Found, allow: Iterable[str], log: Callable[[str], None]
) -> None:
    """Load the state of a checkpoint into a Runner; all ranks call it together.

    Args:
        runner: The Runner.
        found: The checkpoint.
        allow: Names of what may differ between the Runner and the checkpoint.
        log: Called with texts for the log.

    Raises:
        ValueError: The state does not fit the Runner; the message names all differences.
        DamagedError: The checkpoint cannot be read.
    """
    state = read_state(found.state)
    ranks = state.pop("ranks", [])
    try:
        runner.load_state_dict(state, allow=allow)
        _load_rank_state(runner, ranks, found.path.name, log)
    except ValueError as error:
        error.add_note(
            f"while resuming from {found.path}. Names to allow go into dict(type='checkpoint', "
            "allow=[...]); to start a new run instead, give it another name: Runner(name=...)"
        )
        raise


def shard(runner: Runner, found: Found, state: dict[str, Any]) -> None:
    """Read the sharded tensors of a state, or shard the tensors, as the Runner's are.

    Args:
        runner: The Runner.
        found: The checkpoint.
        state: The state in its file, which is changed in place.
    """
    if not found.is_sharded and not dist.is_distributed():
        return
    from hookengine_checkpoint import sharded  # slow to import, and rarely needed

    if found.is_sharded:
        state.update(sharded.load(found.path, state, runner))
    elif sharded.is_sharded(runner):
        state.update(sharded.spread(state, runner))


def _load_rank_state(
    runner: Runner, ranks: list[dict[str, Any]], name: str, log: Callable[[str], None]
) -> None:
    rank = dist.get_rank()
    state = ranks[rank]["plugins"] if rank < len(ranks) else {}
    runner.plugins.load_rank_state_dict(state)
    if not state:
        log(f"{name} has no random states of rank {rank}: random numbers are not repeated exactly")


def load_initial_weights(
    model: nn.Module,
    load_from: str | Path | Mapping[str, Any],
    log: Callable[[str], None],
) -> None:
    """Load the weights of ``Runner(load_from=...)`` into a model.

    Args:
        model: The model.
        load_from: What ``load_weights`` takes: a checkpoint, a run, a file, a URL; or a dict of its
            options.
        log: Called with texts for the log.

    Raises:
        FileNotFoundError: There is no checkpoint or file.
        ValueError: The weights do not fit the model, or the checkpoint is damaged.
    """
    options = dict(load_from) if isinstance(load_from, Mapping) else {"checkpoint": load_from}
    MODELS.own("load_weights")(model, **options)
    log(f"starting with the weights of {options.get('checkpoint')}")

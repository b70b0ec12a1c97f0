"""Options of an optimizer that differ between the script and the checkpoint it resumes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import isclose
from typing import Any

from hookengine.loop.optim import OptimWrapper
from hookengine.setup.description import given_options, group_options

Options = dict[str, Any]
"""The options of a parameter group: learning rate, weight decay and others, without its tensors."""


def load_optimizer(
    wrapper: OptimWrapper, state: Mapping[str, Any], given_then: Sequence[Options], path: str
) -> str:
    """Load the state of an optimizer, and describe the options of the script that this replaces.

    A value counts as replaced if the script has changed it since the checkpoint was saved; not if
    only a schedule, or other code, has changed it during training.

    Args:
        wrapper: The wrapper of the optimizer. Its ``given`` becomes that of the checkpoint, so that
            the next resume compares with it too.
        state: The saved state of the optimizer.
        given_then: ``wrapper.given`` when the state was saved; empty if that is unknown.
        path: How a script reaches the wrapper.

    Returns:
        The text of a warning, or "".
    """
    if "param_groups" not in state:  # a wrapper that defines its own state
        wrapper.load_state_dict(dict(state))
        return ""
    groups = wrapper.param_groups
    given = given_options(wrapper)[: len(groups)]  # the script may have removed some
    own = [dict(group) for group in groups]
    saved = group_options(state["param_groups"])
    given_then = [*given_then[: len(saved)], *map(_initial, saved[len(given_then) :])]
    pairs = zip(given, given_then, saved, own, strict=True)
    replaced = [[*_replaced(*pair)] for pair in pairs]
    wrapper.load_state_dict(dict(state))
    for group, before in zip(wrapper.param_groups, own, strict=True):
        for name, value in before.items():
            group.setdefault(name, value)  # an option that the checkpoint does not have
    wrapper.given = [{**now, **then} for now, then in zip(given, given_then, strict=True)]
    return _describe(replaced, wrapper.param_groups, path)


def _replaced(
    now: Options, then: Options, saved: Options, own: Options
) -> Iterator[tuple[str, Any, Any]]:
    """Yield each option that the script has changed: name, its value, the saved one."""
    ends, starts = _initial(saved), _initial(group_options([own])[0])
    for name, value in now.items():
        if name not in then or name not in ends or not _same(value, starts.get(name)):
            continue  # or a plugin replaces it at the start, as OneCycleLR does
        if not _same(value, then[name]) and not _same(value, ends[name]):
            yield name, value, ends[name]


def _same(one: Any, other: Any) -> bool:
    """Compare two options; a number may come from a tensor, with less precision."""
    if isinstance(one, float) and isinstance(other, float):
        return isclose(one, other, rel_tol=1e-6)
    return bool(one == other)


def _initial(options: Options) -> Options:
    """Return options with the learning rate that a schedule of torch's starts with."""
    return {**options, "lr": options["initial_lr"]} if "initial_lr" in options else options


def _describe(replaced: list[list[tuple[str, Any, Any]]], own: list[Options], path: str) -> str:
    found = [(index, *option) for index, group in enumerate(replaced) for option in group]
    if not found:
        return ""
    alike = len(replaced) > 1 and all(group == replaced[0] for group in replaced)
    lines, changes = [], []
    for index, name, value, saved in found[: len(replaced[0])] if alike else found:
        where = "in all groups: " if alike else f"in group {index}: " if len(replaced) > 1 else ""
        lines.append(f"\n  {where}{name} {saved} from the checkpoint, instead of {value}")
        key = "initial_lr" if name == "lr" and "initial_lr" in own[index] else name
        groups = f"{path}.param_groups"
        changes.append(
            f"\n    for group in {groups}: group[{key!r}] = {value!r}"
            if alike
            else f"\n    {groups}[{index}][{key!r}] = {value!r}"
        )
    return (
        "the run continues with other options of the optimizer than those in the script:"
        f"{''.join(lines)}\nTo use the values of the script, set them once the Runner is created:"
        f"{''.join(changes)}"
    )

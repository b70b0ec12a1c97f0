"""The schedule of one optimizer: torch's scheduler, with a warm-up."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from hookengine import OptimWrapper
from hookengine_schedule.build import LENGTHS, Built, options_replaced
from hookengine_schedule.groups import join, rescale, set_rate, with_own_groups
from hookengine_schedule.warmup import Warmup


class Track:
    """The schedule of one optimizer.

    Args:
        optim_wrapper: The wrapper of the optimizer.
        built: torch's scheduler, and where it ends.
        by_epoch: Whether it steps per epoch instead of per optimizer step.
        build: Builds the scheduler again, for a length of the run and an optimizer; None if
            the user passed an instance.

    Attributes:
        replaced: Descriptions of the options that the state of a checkpoint has replaced.
    """

    def __init__(
        self,
        optim_wrapper: OptimWrapper,
        built: Built,
        by_epoch: bool,
        build: Callable[[int | None, Optimizer], LRScheduler] | None,
    ) -> None:
        self.optim_wrapper = optim_wrapper
        self._build = build
        self.scheduler, self.kind, self.length, self.end = built
        self.by_epoch: bool | None = by_epoch
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.by_epoch = None  # per validation
        self.warmup: Warmup | None = None
        self._steps = optim_wrapper.steps  # at the end of the last epoch
        self._take_in()
        self.replaced: list[str] = []
        # torch knows only the steps of this process, and would warn where a resume took none yet.
        optim_wrapper.optimizer._opt_called = True  # type: ignore[attr-defined]

    @property
    def warmup_steps(self) -> int:
        """The number of optimizer steps of the warm-up."""
        return 0 if self.warmup is None else self.warmup.steps

    @property
    def planned(self) -> int | None:
        """The epochs or optimizer steps that it was made for; None if no length was filled in."""
        if self.length is None:
            return None
        return self.length + (0 if self.by_epoch else self.warmup_steps)

    @property
    def ended(self) -> bool:
        """Whether it has reached the length that was filled in."""
        return self.end is not None and self.scheduler.last_epoch >= self.end

    @property
    def how(self) -> str:
        """The scheduler's class, and when it steps."""
        how = {None: "per validation", True: "per epoch", False: "per optimizer step"}
        return f"{self.kind} {how[self.by_epoch]}"

    def describe(self) -> str:
        """Return a description for the log."""
        text = self.how
        if self.planned is not None:
            text += f", made for {self.planned}"
        return f"{text}, warm-up over {self.warmup_steps} steps" if self.warmup_steps else text

    def fit(self) -> list[int]:
        """Let parameter groups that were added to the optimizer follow; return their places.

        Raises:
            ValueError: Groups were removed or replaced, or the scheduler cannot be extended.
        """
        groups, known = self.optim_wrapper.param_groups, self._parameters
        if len(groups) == len(known) and groups[-1]["params"] is known[-1]:
            return []
        now = [group["params"] for group in groups]
        if len(now) < len(known) or any(a is not b for a, b in zip(known, now, strict=False)):
            raise ValueError(
                f"schedule: a parameter group was removed from the optimizer "
                f"{self.optim_wrapper.name!r}. Keep the groups, in their order; to stop training "
                "some parameters, use requires_grad_(False)"
            )
        places = [*range(len(known), len(groups))]
        self._join(places)
        return places

    def follow_initial_rates(self) -> None:
        """Compute the learning rates of the groups whose ``initial_lr`` was changed."""
        pairs = zip(self._initial, self._initial_rates(), strict=True)
        changed = [(i, known, now) for i, (known, now) in enumerate(pairs) if known != now]
        if self._build is None:
            for index, known, now in changed:
                if known and now:
                    rescale(self.scheduler, index, now / known)
        self._join([index for index, *_ in changed])

    def _join(self, places: Iterable[int], adopt: bool = True) -> None:
        """Let the parameter groups at these places follow as if they had from the start."""
        build, groups = self._build, self.optim_wrapper.param_groups
        again = None if build is None else partial(build, self.length)
        for index in places:
            join(self.scheduler, index, again, adopt)
            if self.warmup is not None and adopt:
                self.warmup.set_base(index, float(groups[index]["lr"]))
        self._take_in()
        if self.warmup is not None and adopt:
            self.warmup.apply()

    def _take_in(self) -> None:
        self._initial = self._initial_rates()
        self._parameters = [group["params"] for group in self.optim_wrapper.param_groups]

    def _initial_rates(self) -> list[float | None]:
        rates = [group.get("initial_lr") for group in self.optim_wrapper.param_groups]
        return [None if rate is None else float(rate) for rate in rates]

    def after_step(self) -> None:
        """Step the warm-up; once it is over, step a scheduler that steps per optimizer step."""
        self.fit()
        if self.warmup is not None and not self.warmup.over:
            self.warmup.step()
        elif self.by_epoch is False and not self.ended:
            self.scheduler.step()

    def after_epoch(self) -> None:
        """Step a scheduler that steps per epoch, unless the epoch had no optimizer step."""
        moved = self.optim_wrapper.steps > self._steps
        if self.by_epoch and moved and not self.ended:
            self.step()
        self._steps = self.optim_wrapper.steps

    def step(self, *metric: float) -> None:
        """Step the scheduler, which does not see the factor of a warm-up in progress."""
        self.fit()
        step: Callable[..., None] = self.scheduler.step
        going_on = self.warmup is not None and not self.warmup.over
        lifted = self.warmup.lifted() if self.warmup is not None and going_on else nullcontext()
        with lifted:
            step(*metric)

    def match_rates(self, saved: Sequence[Mapping[str, Any]]) -> None:
        """Compute the learning rates of groups whose saved ones were not loaded.

        Args:
            saved: The groups in the checkpoint.
        """
        groups = self.optim_wrapper.param_groups
        for index, group in enumerate(groups):
            old = saved[index] if index < len(saved) else {}
            if old.get("lr") == group["lr"]:
                continue  # it was loaded
            if self._build is not None:
                self._join([index])
            elif first := old.get("initial_lr"):
                set_rate(group, group["initial_lr"] * (old["lr"] / first))

    def state_dict(self) -> dict[str, Any]:
        """Return the state in plain containers."""
        self.fit()
        return {
            "how": self.how,
            "scheduler": self.scheduler.state_dict(),
            "length": self.length,
            "end": self.end,
            "warmup": {} if self.warmup is None else self.warmup.state_dict(),
            "steps": self._steps,
        }

    @property
    def direction(self) -> str | None:
        """The ``mode`` of ReduceLROnPlateau, ``"min"`` or ``"max"``; None for other schedulers."""
        return getattr(self.scheduler, "mode", None) if self.by_epoch is None else None

    def load_state_dict(self, state: Mapping[str, Any], start_over: bool = False) -> None:
        """Restore the schedule as it was made, whatever the length of this run.

        The learning rates themselves are part of the optimizer's state.

        Args:
            state: What ``state_dict`` returned.
            start_over: Whether the scheduler keeps its own options and state, because it compares
                something else now; only the warm-up is restored.

        Raises:
            ValueError: The state belongs to another scheduler.
        """
        if state["how"] != self.how:
            raise ValueError(
                f"schedule: the saved state is of {state['how']}, but this run has {self.how}. "
                "Resume with the same scheduler. To start a new schedule, delete 'schedule' from "
                "checkpoint['plugins'] and set allow=['schedule']"
            )
        if start_over:
            state = {**state, "scheduler": self.scheduler.state_dict()}
        self.replaced = [*self._replaced(state, self.scheduler.state_dict())]
        known = len(self._initial)
        self._join(range(known, len(self.optim_wrapper.param_groups)), adopt=False)
        self.length, self.end = state["length"], state["end"]
        self.scheduler.load_state_dict(
            with_own_groups(state["scheduler"], self.scheduler.state_dict(), len(self._initial))
        )
        self.warmup = None
        if state["warmup"]:
            # A resume may start the optimizer over, with other groups.
            saved, rates = state["warmup"], self.optim_wrapper.get_lr()
            base = [*saved["base"][: len(rates)], *rates[len(saved["base"]) :]]
            self.warmup = Warmup.from_state_dict(
                self.optim_wrapper.optimizer, {**saved, "base": base}
            )
        self._steps = state["steps"]

    def _replaced(self, saved: Mapping[str, Any], fresh: Mapping[str, Any]) -> Iterator[str]:
        """Describe the options of the script that a saved state replaces."""
        filled_in = {option for option, _ in LENGTHS.values()} if self.length is not None else set()
        yield from options_replaced(self.scheduler, fresh, saved["scheduler"], filled_in)
        warmup = {} if self.warmup is None else self.warmup.state_dict()
        for name, option in (("steps", "warmup"), ("start", "warmup_factor")):
            now, then = warmup.get(name), saved["warmup"].get(name)
            if now != then:
                yield f"{option} {then} instead of {now}"

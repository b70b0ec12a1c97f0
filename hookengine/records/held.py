"""What a sink holds of a run's records, compared with the history that the run continues."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Literal

from hookengine.records.record import MEASURED, Record, RecordHistory

_LARGEST_SINGLE = 3.4028235e38


class Held:
    """The last record of each phase that a sink holds, and which of them the run has left.

    A run that resumes from a checkpoint continues the records before the checkpoint. It has left
    the later ones: it may repeat them, and it may write others.

    Attributes:
        iterations: The last iteration of each phase that the sink holds.
        values: Numbers of that record by name, per phase, as far as the sink knows them.
        kept: The last iteration of each phase in the history that the run continues.
    """

    def __init__(self) -> None:
        self.iterations: dict[str, int] = {}
        self.values: dict[str, Mapping[str, float]] = {}
        self.kept: dict[str, int] = {}
        self._later: deque[Record] = deque()
        self._repeatable: deque[Record] = deque()
        self._resumed_at = -1
        self._written: dict[str, Record] = {}

    def note(self, record: Record) -> None:
        """Remember a record that the sink is about to write."""
        self._written[record.phase] = record

    def include_written(self) -> None:
        """Count the records written so far as held, since they may come again."""
        for phase, record in self._written.items():
            if record.iter > self.iterations.get(phase, -1):
                self.iterations[phase] = record.iter
                self.values[phase] = record.scalars

    def compare(self, history: RecordHistory, resumed_at: int) -> bool:
        """Compare with the history that the run continues.

        Args:
            history: The records before the checkpoint, and the later ones.
            resumed_at: The iteration at which the run resumes.

        Returns:
            Whether the sink holds records of this history. If not, they are of another attempt,
            and it is unknown where that one has left this history.
        """
        self.kept, found = {}, dict[str, bool]()
        for later, records in enumerate((history.kept, history.later)):
            for record in records:
                phase = record.phase
                if not later:
                    self.kept[phase] = max(record.iter, self.kept.get(phase, -1))
                if self.iterations.get(phase) == record.iter:
                    found[phase] = found.get(phase, False) or self._has_values_of(record)
        self._later, self._repeatable = deque(history.later), deque()
        self._resumed_at = resumed_at
        return all(
            found.get(phase, iteration == resumed_at or phase not in self.values)
            for phase, iteration in self.iterations.items()
        )

    def _has_values_of(self, record: Record) -> bool:
        known = self.values.get(record.phase, {})
        names = (known.keys() & record.scalars.keys()) - MEASURED
        return all(_same_single(known[name], record.scalars[name]) for name in names)

    def is_beyond(self) -> bool:
        """Return whether the sink holds records that are later than the history."""
        return _beyond(self.iterations, self.kept)

    def expect_repetition(self) -> bool:
        """Expect that the run repeats the later records that the sink holds.

        Returns:
            Whether they are all known; a run that was interrupted twice may have left others.
        """
        known = {phase: max(self._resumed_at, last) for phase, last in self.kept.items()}
        for record in self._later:
            known[record.phase] = max(record.iter, known.get(record.phase, -1))
        for phase in self.iterations:
            known.setdefault(phase, self._resumed_at)
        held = self.iterations
        self._repeatable = deque(r for r in self._later if r.iter <= held.get(r.phase, -1))
        return not _beyond(held, known)

    @property
    def is_repeating(self) -> bool:
        """Whether the sink holds later records that the run has not repeated yet."""
        return any(record.iter > self._resumed_at for record in self._repeatable)

    def meet(self, record: Record) -> Literal["new", "held", "different"]:
        """Return what a record is to the sink: new, one that it holds, or different from it."""
        held = self.iterations.get(record.phase, -1)
        if record.iter <= min(held, self.kept.get(record.phase, -1)):
            return "held"
        while self._repeatable:
            expected = self._repeatable[0]
            if record.repeats(expected):
                self._repeatable.popleft()
                self.kept[record.phase] = max(record.iter, self.kept.get(record.phase, -1))
                return "held"
            same_place = (record.phase, record.iter) == (expected.phase, expected.iter)
            if same_place or expected.iter > self._resumed_at:
                return "different"
            # One of an interval that the stop has cut short. It is no error that the sink has it.
            self._repeatable.popleft()
        return "new" if record.iter > held else "held"

    def lacks(self, kept: Mapping[str, int]) -> bool:
        """Return whether the sink does not hold all records up to ``kept``."""
        return _beyond(kept, self.iterations)

    def cut(self, kept: Mapping[str, int]) -> None:
        """Forget all records after ``kept``, the last iteration of each phase."""
        self.include_written()
        self._written.clear()
        self._repeatable.clear()
        for phase, iteration in [*self.iterations.items()]:
            if phase not in kept:
                del self.iterations[phase]
            elif iteration > kept[phase]:
                self.iterations[phase] = kept[phase]
                self.values.pop(phase, None)
        self.values = {p: values for p, values in self.values.items() if p in self.iterations}


def _beyond(iterations: Mapping[str, int], last: Mapping[str, int]) -> bool:
    return any(iteration > last.get(phase, -1) for phase, iteration in iterations.items())


def _same_single(one: float, other: float) -> bool:
    """Compare two numbers, of which one may have been rounded to single precision."""
    if math.isclose(one, other, rel_tol=1e-6, abs_tol=1e-37):
        return True
    both = sorted((one, other), key=abs)
    overflown = math.isinf(both[1]) and abs(both[0]) > _LARGEST_SINGLE
    return (math.isnan(one) and math.isnan(other)) or (overflown and one * other > 0)

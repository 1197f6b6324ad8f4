"""Decides when a step is due to be saved. Pure, apart from the user's function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Every:
    """Save every so many steps, or minutes, or when a function says so; with several rules, when the first of them is due.

    steps: due when a multiple of it was reached since the last call of `Checkpointer.step`; this gives the same steps on every rank and
    after every restart. minutes: counted from the beginning of the last save. when: a function, called with the step and its metrics on
    each call; returns True to save.
    """

    steps: int | None = None
    minutes: float | None = None
    when: Callable[[int, Mapping[str, float]], bool] | None = None

    def __post_init__(self) -> None:
        problems = []
        if self.steps is None and self.minutes is None and self.when is None:
            problems.append("give at least one of steps, minutes, when")
        if self.steps is not None and (type(self.steps) is not int or self.steps < 1):
            problems.append(f"steps is {self.steps!r}: expected a number of steps ≥ 1")
        if self.minutes is not None and not (
            isinstance(self.minutes, (int, float))
            and not isinstance(self.minutes, bool)
            and 0 < self.minutes < float("inf")
        ):
            problems.append(f"minutes is {self.minutes!r}: expected a number > 0")
        if not (self.when is None or callable(self.when)):
            problems.append(f"when is {self.when!r}: expected a function of step and metrics")  # type: ignore[unreachable]
        if problems:
            raise ValueError("Every: " + "; ".join(problems))

    def due(self, before: int | None, step: int, seconds_since_save: float, metrics: Mapping[str, float]) -> bool:
        """Whether `step` is to be saved. before: the step of the previous call; None: this is the first call."""
        by_steps = (
            self.steps is not None and step // self.steps > (step - 1 if before is None else before) // self.steps
        )
        by_time = self.minutes is not None and seconds_since_save >= 60 * self.minutes
        # Call the function every time, due or not: it may count its calls.
        by_function = self.when is not None and bool(self.when(step, metrics))
        return by_steps or by_time or by_function


class Due:
    """Decides which trigger a call of `step` saves for. Pure, apart from `Every.when`."""

    def __init__(self, every: Every | None) -> None:
        self._every = every
        self._early_seen = False
        self.trigger: str | None = None
        """The trigger of a save that is due and has not begun, because it may have to wait for an earlier one."""

    def look(
        self, before: int | None, step: int, seconds_since_save: float, metrics: Mapping[str, float], *, early: bool
    ) -> None:
        """Set `trigger` if this step is to be saved.

        Args:
            before: the step of the previous call; None: this is the first call.
            early: whether the machine may have to go sooner than others (a rebalance recommendation). It makes one save.
        """
        if self._every is not None and self._every.due(before, step, seconds_since_save, metrics):
            self.trigger = self.trigger or "interval"
        if early and not self._early_seen:
            self._early_seen, self.trigger = True, "rebalance"

    def repeat(self, trigger: str | None) -> None:
        """Make the save of this trigger again, because it was torn. None: nothing to repeat."""
        self.trigger = self.trigger or trigger

    def done(self) -> None:
        """The save that was due has begun."""
        self.trigger = None

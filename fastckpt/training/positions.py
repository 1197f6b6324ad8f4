"""Counts a run's optimizer steps in its samplers, so that a saved step and the position of the data belong together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastckpt.errors import SaveError
from fastckpt.events import logger
from fastckpt.training.elastic_sampler import ElasticSampler


class Positions:
    """See the module. Used by the thread that trains.

    Steps are counted by the numbers that the loop gives, not by calls: a number that comes again, or whose call has failed, counts once.
    What a loader has drawn ahead is not counted; it only shows that a number cannot be right.
    """

    def __init__(self, targets: Mapping[str, Any]) -> None:
        """targets: names → objects of the state, of which samplers are counted."""
        found = {name: one for name, one in targets.items() if isinstance(one, ElasticSampler)}
        self.shared = [f"{name}: {one!r}" for name, one in found.items() if one.place().size > 1]
        """Samplers that deal to several ranks, in words: the same on all of them, or samples would come twice or be lost."""
        self._samplers = {name: one for name, one in found.items() if one.automatic}
        self._begin: int | None = None
        """The number of steps done at which `_counted` was noted; None: not known yet."""
        self._counted = self._now()

    def _now(self) -> dict[str, int]:
        return {name: one.steps_counted for name, one in self._samplers.items()}

    def restored(self, step: int) -> None:
        """The objects are those of this step."""
        self._begin, self._counted = step, self._now()

    def reached(self, step: int) -> None:
        """This many steps of the run are done: count those that are not counted yet.

        SaveError: a sampler has not dealt out so many, or more are counted already. Nothing is counted then.
        """
        if not self._samplers:
            return
        begin = self._begin if self._begin is not None else self._first(step)
        missing = {name: step - begin - (n - self._counted[name]) for name, n in self._now().items()}
        problems = [
            f"{name!r} has dealt out {self._samplers[name].steps_ahead} steps that are not counted yet, and {n} are to be counted"
            for name, n in missing.items()
            if not 0 <= n <= self._samplers[name].steps_ahead
        ]
        if problems:
            raise SaveError(
                f"step {step} does not agree with the position of the data: {'; '.join(problems)}. Nothing was counted or saved. Have the "
                "loader take its batches from this sampler, begin a new iter(loader) after each restore, number the optimizer steps one by "
                "one, and leave advance() to step(). For a sampler that does not take part in every step: automatic=False, and advance() "
                "before step()"
            )
        self._begin = begin
        for name, n in missing.items():
            self._samplers[name].advance(n)

    def _first(self, step: int) -> int:
        """The number of steps done when the run began, which no restore has told."""
        done = max(one.steps_ahead + one.steps_counted - self._counted[name] for name, one in self._samplers.items())
        if step <= done or not done:
            return 0
        logger.warning(
            "step %d is the first number that is told, and samplers have dealt out %d steps so far: it is taken for one step done. Call "
            "restore() before the loop, and number the steps of a new run from 1",
            step,
            done,
        )
        return step - 1

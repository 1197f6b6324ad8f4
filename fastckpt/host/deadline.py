"""A moment that somebody waits for at most, and what set it."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

LONGEST_S = 1e9
"""Thirty years. The system's waits take no infinity."""


def bounded(seconds: float) -> float:
    """A time-out that can be waited for: infinity, and what is as good, becomes `LONGEST_S`."""
    return min(seconds, LONGEST_S)


@dataclass(frozen=True)
class Deadline:
    """A moment by time.monotonic(), and what set it: for the words of an error."""

    at_s: float
    """math.inf: never."""
    why: str

    @classmethod
    def after(cls, seconds: float | None, why: str) -> Deadline:
        """So many seconds from now; None: never."""
        return cls(math.inf if seconds is None else time.monotonic() + seconds, why)

    def left_s(self) -> float | None:
        """Seconds from now on, at least 0; None: there is no limit. What the waiting functions of `threading` take."""
        return None if self.at_s == math.inf else bounded(max(0.0, self.at_s - time.monotonic()))

    def expired(self) -> bool:
        """Whether the moment has come."""
        return time.monotonic() >= self.at_s

    def sooner(self, other: Deadline) -> Deadline:
        """The earlier of both, with its own reason."""
        return other if other.at_s < self.at_s else self


NEVER = Deadline(math.inf, "nothing")

"""A moment by which something has to be done, together with what set it."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

LONGEST_S = 1e9
"""About thirty years. The system's waits do not accept infinity."""


def bounded(seconds: float) -> float:
    """A time-out that can be waited for: infinity and larger numbers become `LONGEST_S`."""
    return min(seconds, LONGEST_S)


@dataclass(frozen=True)
class Deadline:
    """A moment by `time.monotonic()`, and what set it: an error that tells of an expired deadline says whose limit that was.

    Carried whole from the caller to whoever waits: seconds that are left shrink on the way, a moment does not.
    """

    at_s: float
    """The moment by `time.monotonic()`; `math.inf`: never."""
    why: str
    """The limit that set it, as part of a sentence: "max_stall_s", "the notice", "close_timeout_s"."""

    @classmethod
    def after(cls, seconds: float | None, why: str) -> Deadline:
        """The moment this many seconds from now. None: never."""
        return cls(math.inf if seconds is None else time.monotonic() + seconds, why)

    def left_s(self) -> float | None:
        """Seconds until the moment, at least 0. None: never, in the sense of the waits of `threading`."""
        return None if self.at_s == math.inf else bounded(max(0.0, self.at_s - time.monotonic()))

    def expired(self) -> bool:
        """Whether the moment has come."""
        return time.monotonic() >= self.at_s

    def sooner(self, other: Deadline) -> Deadline:
        """The earlier one of the two; this one if they are equal."""
        return other if other.at_s < self.at_s else self


NEVER = Deadline(math.inf, "never")
"""Never expires; no deadline is later."""

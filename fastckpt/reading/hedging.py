"""When a read is so slow that it is made a second time. Pure."""

from __future__ import annotations

import statistics
from typing import NamedTuple


class Hedging(NamedTuple):
    """The rule. S3's advice is to repeat the slowest 5 % of large requests on a new connection."""

    times: float = 4.0
    """So many times as long as the typical read."""
    least_s: float = 0.5
    """Never before: a second request costs the link as much as the first."""
    samples: int = 8
    """Reads that must have ended before anything is called typical."""
    unknown_s: float = 30.0
    """The age from which a read is slow while nothing is typical yet. More than a store's own time-out for silence."""
    share: float = 0.05
    """Second reads, as a share of all; one is always allowed."""

    def slow_after_s(self, ended_s: list[float]) -> float:
        """The age from which a read is slow. ended_s: how long each read took that has ended."""
        if len(ended_s) < self.samples:
            return self.unknown_s
        return max(self.least_s, self.times * statistics.median(ended_s))

    def allows(self, hedges: int, reads: int) -> bool:
        """Whether one more second read may begin. reads: those that have begun, without second ones."""
        return hedges < max(1.0, self.share * reads)

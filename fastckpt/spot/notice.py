"""A message from a source: the machine will go."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastckpt.host.deadline import Deadline

FINAL = ("terminate", "stop", "hibernate", "lifecycle", "signal", "file")
EARLY = ("rebalance",)


@dataclass(frozen=True)
class Notice:
    """The machine will go; "rebalance": it may go, sooner than others."""

    kind: str
    """terminate, stop, hibernate, lifecycle, signal, file, or rebalance."""
    source: str
    deadline_s: float | None
    """time.monotonic() at which the machine is expected to be gone; None: not known."""
    detail: str = ""

    def __post_init__(self) -> None:
        if self.kind not in (*FINAL, *EARLY):
            raise ValueError(f"kind is {self.kind!r}: expected one of {', '.join((*FINAL, *EARLY))}")

    @property
    def final(self) -> bool:
        """Whether this ends the run; a rebalance recommendation only asks for a checkpoint soon."""
        return self.kind in FINAL

    def seconds_left(self, now_s: float) -> float | None:
        """Seconds from now_s (time.monotonic()) to the deadline, at least 0; None: not known."""
        return None if self.deadline_s is None else max(0.0, self.deadline_s - now_s)

    @property
    def deadline(self) -> Deadline:
        """When the machine is expected to be gone."""
        return Deadline(math.inf if self.deadline_s is None else self.deadline_s, "the time that the notice gave")

"""Settings shared by all snapshots of one owner."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StagerSettings:
    """Settings of a Stager's snapshots. max_stall_s, verify and spill_dir: see Options."""

    target: str
    """Name of the save's target, for events and errors."""
    threads: int
    """Number of threads that copy host memory."""
    max_stall_s: float
    verify: str = "off"
    spill_dir: str = ""
    """Empty: no slabs are spilled."""

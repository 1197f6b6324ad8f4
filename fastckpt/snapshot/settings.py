"""What is the same for all snapshots of one owner."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StagerSettings:
    """How a Stager's snapshots are made. max_stall_s, verify and spill_dir: see Options."""

    target: str
    """Named in events and errors."""
    threads: int
    """That copy host memory."""
    max_stall_s: float
    verify: str = "off"
    spill_dir: str = ""
    """Empty: nothing is spilled."""

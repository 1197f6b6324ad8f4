"""What saving has cost a run."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from fastckpt.format.repository_records import Commit


@dataclass(frozen=True)
class Stats:
    """What saving has cost so far."""

    saves: int
    """Saves that have begun."""
    durable_step: int | None
    deferred: int
    """Calls of `step` at which a save was due and had to wait for an earlier one: back-pressure."""
    stall_s: float
    """Seconds for which `step` and the optimizers' hooks kept the training thread waiting, without final saves."""
    snapshot_bytes: int
    """Host memory that snapshots hold now, in bytes."""


@dataclass
class Counts:
    """What a `Saver` counts."""

    saves: int = 0
    """Saves that have begun."""
    deferred: int = 0
    """Calls of `step` at which a save was due and had to wait."""
    begun_s: float = field(default_factory=time.monotonic)
    """time.monotonic() at which the last save was asked for, or the state was restored."""

    def stats(self, durable: Commit | None, stall_s: float, snapshot_bytes: int) -> Stats:
        """What these come to, with what others know. durable: the newest checkpoint."""
        step = None if durable is None else durable.save.step
        return Stats(self.saves, step, self.deferred, stall_s, snapshot_bytes)

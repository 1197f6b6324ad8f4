"""What `fastckpt compact` has done, for people and for `--json`."""

from __future__ import annotations

from dataclasses import dataclass, field

from fastckpt.format.keys import CheckpointId
from fastckpt.format.repository_records import Commit


@dataclass
class CompactReport:
    """See the module."""

    source: str
    target: str
    checkpoint: CheckpointId
    """The one that was read."""
    compacted: CheckpointId
    """The one that is full now; where nothing had to be written, that which was full already."""
    world: int
    raw_bytes: int
    stored_bytes: int
    """Of the full one."""
    written: bool = False
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, source: str, target: str, commit: Commit) -> CompactReport:
        """Before anything was written."""
        checkpoint = commit.checkpoint
        return cls(source, target, checkpoint, checkpoint, commit.world, commit.raw_bytes, commit.stored_bytes)

    def enter(self, done: Commit) -> None:
        """It was written, as this checkpoint."""
        self.compacted, self.written, self.stored_bytes = done.checkpoint, True, done.stored_bytes


__all__ = ["CompactReport"]

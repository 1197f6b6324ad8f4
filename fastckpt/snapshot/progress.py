"""How far one snapshot has come: each of its copies, and the whole. Its parts share this, under one lock."""

from __future__ import annotations

import enum
import threading
import time
from dataclasses import dataclass

import torch

from fastckpt import events
from fastckpt.state import Captured
from fastckpt.state.chunking import Chunk


class Stage(enum.IntEnum):
    """How far the copy of a chunk has come: from one of these to the next. Most copies are never TORN."""

    WAITING = 0
    """Nobody has begun with it."""
    GIVEN_OUT = 1
    """A side stream or a thread has it; its end cannot be waited for yet."""
    TORN = 2
    """It is made, and not what the state was at the call of save: it waits to be made once more. Of host memory only."""
    MARKED = 3
    """Its end can be waited for: behind a copy from a device there is an event, one of host memory has ended."""
    THERE = 4
    """Somebody has seen the end of it."""


@dataclass(eq=False)
class Copy:
    """The copy of one chunk."""

    number: int
    chunk: Chunk
    n_bytes: int
    device: torch.device | None
    """Where the chunk lies; None: in host memory."""
    stage: Stage = Stage.WAITING
    event: torch.Event | None = None
    """Behind the copy, once a device's is marked."""


class Progress:
    """The outcome of one snapshot, its lock, and the events that tell of it. Any thread.

    changed: guards what the parts of the snapshot share; notified when a copy or the whole gets further.
    """

    def __init__(self, captured: Captured, target: str, step: int | None) -> None:
        self.changed = threading.Condition(threading.RLock())
        self.target, self.step = target, step
        self.error: BaseException | None = None
        """What has gone wrong first."""
        self.fenced = False
        """Nothing reads the state any more that the caller's streams would not wait for."""
        self.confirmed = False
        """All chunks have been read, and nothing was wrong with them."""
        self.closed = False
        self._captured = captured
        self._to_copy_bytes = captured.own_bytes
        self._there_bytes = 0
        self._began_s = 0.0

    def begin(self) -> None:
        """Tell that the copying begins."""
        self._began_s = time.perf_counter()
        events.emit(
            events.SnapshotStarted(
                target=self.target,
                step=self.step,
                raw_bytes=self._to_copy_bytes,
                storages=len(self._captured.storages),
            )
        )

    @property
    def is_over(self) -> bool:
        """Whether nothing more is to be copied, for an error or because the snapshot was closed."""
        return self.error is not None or self.closed

    def fail(self, error: BaseException) -> None:
        """Drop the snapshot, unless that was done."""
        with self.changed:
            if not self.is_over:
                self.error = error
                events.emit(events.SnapshotDropped(target=self.target, step=self.step, error=error))
            self.changed.notify_all()

    def staged(self, copy: Copy, started_s: float) -> None:
        """Tell of a copy that has ended. started_s: when it or the wait for it began, by `time.perf_counter`."""
        if events.enabled():
            first = copy.chunk.pieces[0]
            events.emit(
                events.PieceStaged(
                    target=self.target,
                    step=self.step,
                    storage=first.storage,
                    offset=first.offset,
                    raw_bytes=copy.n_bytes,
                    seconds=time.perf_counter() - started_s,
                    device="cpu" if copy.device is None else str(copy.device),
                )
            )

    def there(self, copy: Copy) -> None:
        """Somebody has seen the end of a copy. After the last one the state is let go of."""
        with self.changed:
            if copy.stage is Stage.THERE:
                return
            copy.stage = Stage.THERE
            self._there_bytes += copy.n_bytes
            if self._there_bytes < self._to_copy_bytes:
                return
            self._captured.release()
        events.emit(
            events.SnapshotStaged(
                target=self.target,
                step=self.step,
                raw_bytes=self._there_bytes,
                seconds=time.perf_counter() - self._began_s,
            )
        )

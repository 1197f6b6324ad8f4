"""Progress of one snapshot: of each copy, and of the whole. The parts of a snapshot share this object, under one lock."""

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
    """Progress of one chunk's copy, in this order. Most copies never become TORN."""

    WAITING = 0
    """Not begun."""
    GIVEN_OUT = 1
    """A side stream or a thread has it; its end cannot be waited for yet."""
    TORN = 2
    """Made, but not equal to the state at the call of save: it has to be made once more. Host memory only."""
    MARKED = 3
    """Its end can be waited for: a device's copy has an event after it; a copy of host memory has ended."""
    THERE = 4
    """Its end was observed."""


@dataclass(eq=False)
class Copy:
    """The copy of one chunk."""

    number: int
    chunk: Chunk
    n_bytes: int
    device: torch.device | None
    """The device that the chunk lies on; None: host memory."""
    stage: Stage = Stage.WAITING
    event: torch.Event | None = None
    """The event after the copy, once a device's copy is marked."""
    spared: bool = False
    """It was never made: the chunk has the base's bytes (unchanged.py). THERE from then on."""


class Progress:
    """The outcome of one snapshot, its lock, and the events that report it. Any thread.

    changed: guards the data that the parts of the snapshot share; notified at each progress of a copy or of the whole.
    """

    def __init__(self, captured: Captured, target: str, step: int | None) -> None:
        self.changed = threading.Condition(threading.RLock())
        self.target, self.step = target, step
        self.error: BaseException | None = None
        """The first error."""
        self.fenced = False
        """Nothing reads the state any more, except copies that the caller's streams wait for."""
        self.confirmed = False
        """All chunks have been read, and none was wrong."""
        self.closed = False
        self._captured = captured
        self._to_copy_bytes = captured.own_bytes
        self._there_bytes = self._spared_bytes = 0
        self._began_s = 0.0

    def begin(self) -> None:
        """Report that copying begins."""
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
        """Whether nothing more will be copied, because of an error or because the snapshot was closed."""
        return self.error is not None or self.closed

    def fail(self, error: BaseException) -> None:
        """Drop the snapshot with this error, unless it was dropped before."""
        with self.changed:
            if not self.is_over:
                self.error = error
                events.emit(events.SnapshotDropped(target=self.target, step=self.step, error=error))
            self.changed.notify_all()

    def staged(self, copy: Copy, started_s: float) -> None:
        """Report a copy that has ended. started_s: `time.perf_counter` when the copy, or the wait for it, began."""
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
        """The end of a copy was observed. After the last one the references to the state are dropped."""
        with self.changed:
            if copy.stage is Stage.THERE:
                return
            copy.stage = Stage.THERE
            self._there_bytes += copy.n_bytes
            self._spared_bytes += copy.n_bytes if copy.spared else 0
            if self._there_bytes < self._to_copy_bytes:
                return
            self._captured.release()
        events.emit(
            events.SnapshotStaged(
                target=self.target,
                step=self.step,
                raw_bytes=self._there_bytes,
                spared_bytes=self._spared_bytes,
                seconds=time.perf_counter() - self._began_s,
            )
        )

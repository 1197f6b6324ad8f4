"""Saves that were torn: what has changed the state while it was copied, without an optimizer's step, has made them fail."""

from __future__ import annotations

from collections.abc import Callable

from fastckpt.errors import TornSnapshotError
from fastckpt.repository.incarnation import Incarnation
from fastckpt.training.save_queue import SaveQueue, Torn


class TornSaves:
    """The newest of them, until a newer step is durable or another state is restored: until then it is made good by another save. Used by
    the thread that trains.
    """

    def __init__(self, queue: SaveQueue, incarnation: Incarnation, distrust: Callable[[], None]) -> None:
        """distrust: called when one has come."""
        self._queue, self._incarnation, self._distrust = queue, incarnation, distrust
        self._newest: Torn | None = None

    def look(self) -> None:
        """Learn of saves that were torn, and forget one after which a newer step is durable."""
        for torn in self._queue.take_torn():
            self._newest = torn
            self._distrust()
        last = self._incarnation.last
        if self._newest is not None and last is not None and last.checkpoint.step > self._newest.step:
            self._newest = None

    def forget(self) -> None:
        """Another state has been restored."""
        self._queue.take_torn()
        self._newest = None

    def is_lost(self, step: int) -> bool:
        """Whether the state that a torn save of this step should have held is gone: what is there now is not that step's."""
        return self._newest is not None and step <= self._newest.step

    def trigger_for(self, step: int) -> str | None:
        """The trigger of a torn save that this step makes good."""
        return self._newest.trigger if self._newest is not None and step > self._newest.step else None

    def take_error(self) -> TornSnapshotError | None:
        """What was torn and has not been made good. It is told once."""
        newest, self._newest = self._newest, None
        return None if newest is None else newest.error

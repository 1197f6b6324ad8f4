"""Torn saves: saves that failed because something changed the state during the copy, without an optimizer's step."""

from __future__ import annotations

from collections.abc import Callable

from fastckpt.errors import TornSnapshotError
from fastckpt.repository.incarnation import Incarnation
from fastckpt.training.save_queue import SaveQueue, Torn


class TornSaves:
    """Remembers the newest torn save until a newer step is durable or another state is restored; until then another save replaces it. Used
    by the thread that trains.
    """

    def __init__(self, queue: SaveQueue, incarnation: Incarnation, distrust: Callable[[], None]) -> None:
        """distrust: called when a save was torn."""
        self._queue, self._incarnation, self._distrust = queue, incarnation, distrust
        self._newest: Torn | None = None

    def look(self) -> None:
        """Take new torn saves from the queue, and forget one after which a newer step is durable."""
        for torn in self._queue.take_torn():
            self._newest = torn
            self._distrust()
        last = self._incarnation.last
        if self._newest is not None and last is not None and last.checkpoint.step > self._newest.step:
            self._newest = None

    def forget(self) -> None:
        """Forget the torn save: another state was restored."""
        self._queue.take_torn()
        self._newest = None

    def is_lost(self, step: int) -> bool:
        """Whether the state of this step, whose save was torn, no longer exists: the objects have the state of another step now."""
        return self._newest is not None and step <= self._newest.step

    def trigger_for(self, step: int) -> str | None:
        """The trigger of the torn save that a save of this step replaces; None if there is none."""
        return self._newest.trigger if self._newest is not None and step > self._newest.step else None

    def take_error(self) -> TornSnapshotError | None:
        """The error of a torn save that no newer save has replaced. Returned once."""
        newest, self._newest = self._newest, None
        return None if newest is None else newest.error

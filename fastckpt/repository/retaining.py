"""Runs passes of retention after saves, on a thread of their own: nobody waits for them (docs/guarantees.md, section 3)."""

from __future__ import annotations

import threading
from collections.abc import Callable

from fastckpt.errors import CheckpointError
from fastckpt.events import logger
from fastckpt.host.threads import start_thread
from fastckpt.repository.collector import PassInterrupted
from fastckpt.repository.incarnation import Incarnation
from fastckpt.repository.retention import Keep

_MOST_PUT_OFF = 3
"""How many passes in a row may be interrupted for a save. Otherwise a job that always has a save queued would never retire anything."""


class Retaining:
    """See the module. A failure of retention is no failure of a save: it is logged, and the pass is tried again after the next save.

    busy: whether a save is queued or under way. stopped: whether there is no time left for anything but saves.
    """

    def __init__(
        self,
        incarnation: Incarnation,
        keep: Keep | None,
        grace_s: float,
        busy: Callable[[], bool],
        stopped: Callable[[], bool],
    ) -> None:
        self._incarnation = incarnation
        self._keep, self._grace_s = keep, grace_s
        self._busy, self._stopped = busy, stopped
        self._changed = threading.Condition()
        self._due = False
        """A checkpoint was committed after the last complete pass began."""
        self._running = False
        self._halted = False
        self._put_off = 0
        self._told: set[str] = set()
        self._failure = ""

    def wake(self, committed: bool) -> None:
        """A save has ended. committed: it may have left something to retire. Returns at once."""
        if self._keep is None:
            return
        with self._changed:
            self._due = self._due or committed
            if not self._due or self._running or self._halted or self._stopped():
                return
            if self._gives_way():
                self._put_off += 1
                return
            self._running = True
            try:
                thread = start_thread(self._work, "fastckpt-retention")
            except RuntimeError as error:  # no thread can be started: try again after the next save
                self._running = False
                self._tell("thread", "old checkpoints could not be removed: %s", error)
                return
        if thread is None:  # the interpreter is ending: saves, too, get no thread of their own then
            self._work()

    def wait_idle(self, timeout_s: float | None = None) -> bool:
        """Wait until no pass is running. False after the time-out."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._running, timeout_s)

    def halt(self, timeout_s: float | None = None) -> bool:
        """End the running pass before its next request, and begin none until `go_on`. False if it has not ended after the time-out."""
        self._halted = True
        return self.wait_idle(timeout_s)

    def go_on(self) -> None:
        """Undo `halt`."""
        self._halted = False

    def _gives_way(self) -> bool:
        return self._put_off < _MOST_PUT_OFF and self._busy()

    def _interrupted(self) -> bool:
        return self._halted or self._stopped() or self._gives_way()

    def _work(self) -> None:
        try:
            while self._take():
                if not self._pass():
                    with self._changed:
                        self._due, self._put_off = True, self._put_off + 1
        except BaseException:
            with self._changed:
                self._running = False
                self._changed.notify_all()
            raise

    def _take(self) -> bool:
        """Whether to begin a pass. False: this thread ends; the end of the queued save starts another one."""
        with self._changed:
            if not self._due or self._interrupted():
                self._running = False
                self._changed.notify_all()
                return False
            self._due = False
            return True

    def _pass(self) -> bool:
        """Run one pass. False if it was interrupted."""
        try:
            done = self._incarnation.retain(self._keep, self._grace_s, self._interrupted)
        except PassInterrupted:
            return False
        except Exception as error:
            if str(error) != self._failure:
                logger.warning("old checkpoints could not be removed: %s", error)
            self._failure = str(error)
            return True
        self._failure, self._put_off = "", 0
        for words in done.warnings:
            self._tell(words, "%s", words)
        for refused in done.refused:
            self._tell_refused(refused)
        return True

    def _tell_refused(self, error: CheckpointError) -> None:
        self._tell(
            type(error).__name__,
            "an old object could not be removed; the others are, and this is said once: %s. Without the right to delete "
            "(docs/policies/writer.json), `fastckpt prune` by somebody who has it removes them",
            error,
        )

    def _tell(self, once: str, words: str, *values: object) -> None:
        if once not in self._told:
            self._told.add(once)
            logger.warning(words, *values)

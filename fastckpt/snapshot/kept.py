"""The memory that `save_async` copies states into: one pool for the process, kept from call to call.

Fresh pages cost twice the copy into them (476 MB, two cores: 0.12 s the first time, 0.04 s from then on). What is kept is what the saves
that were under way at once have needed, within the budget of the newest call; `release` gives back what no save holds.
"""

from __future__ import annotations

import os
import threading
import time

from fastckpt.events import logger
from fastckpt.host.deadline import Deadline
from fastckpt.options import Options
from fastckpt.snapshot.copy_plan import DoesNotFit
from fastckpt.snapshot.pool import SlabPool
from fastckpt.snapshot.snapshot import Snapshot
from fastckpt.snapshot.stager import Stager
from fastckpt.state import Captured
from fastckpt.state.chunking import Cuts
from fastckpt.state.chunks import LiveChunks, cuts_of

_POLL_S = 0.01  # another save's end wakes nobody here: it may be any thread's, and there may be many


class KeptMemory:
    """Any thread."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a signal's handler may save while its thread is in here
        self._pool: SlabPool | None = None

    def begin(
        self, captured: Captured, cuts: Cuts, target: str, *, budget_bytes: int, threads: int, max_stall_s: float
    ) -> Snapshot | None:
        """Copy a state, which may change on return.

        budget_bytes: for the copies of all saves under way. None: they still hold the memory for this one after `max_stall_s` seconds.
        Raises DoesNotFit for a state that the budget will never hold, and what Stager.begin raises.
        """
        deadline = Deadline.after(max_stall_s, "max_stall_s")
        while True:
            with self._lock:  # a pool whose device fails forgets all that was taken since
                if self._pool is None:
                    self._pool = SlabPool(budget_bytes)
                self._pool.set_budget(budget_bytes)
                stager = Stager(budget_bytes, threads, target, max_stall_s, pool=self._pool)
                snapshot = stager.begin(captured, cuts, None, None, ring=False)
            if snapshot is not None:
                snapshot.fence("save")
                return snapshot
            if deadline.expired():
                return None
            time.sleep(_POLL_S)

    @property
    def free_bytes(self) -> int:
        """Bytes that wait for the next save."""
        pool = self._pool
        return 0 if pool is None else pool.free_bytes

    def release(self) -> int:
        """Give back what no save holds now. Returns its bytes."""
        with self._lock:
            n_bytes = self.free_bytes
            if self._pool is not None:
                self._pool.drop_free()
            return n_bytes


kept = KeptMemory()


def stage(captured: Captured, target: str, options: Options) -> Snapshot | LiveChunks:
    """A copy of the state, if it fits the budget: the state may change on return. Else the state itself, and a warning."""
    try:
        snapshot = kept.begin(
            captured,
            cuts_of(captured),
            target,
            budget_bytes=options.host_budget_bytes - options.encoder_bytes,
            threads=options.threads,
            max_stall_s=options.max_stall_s,
        )
    except DoesNotFit:
        snapshot = None
    if snapshot is not None:
        return snapshot
    logger.warning(
        "the copy of %d bytes does not fit the budget of %d, or what earlier saves leave of it: %s is written before save_async returns",
        captured.own_bytes,
        options.host_budget_bytes,
        target,
    )
    return LiveChunks(captured)


def _in_forked_child() -> None:
    """Saves under way stayed in the parent, and locks may be held by its threads. Its memory would only be copied here."""
    kept.__init__()  # type: ignore[misc] # others hold this very object


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_forked_child)

"""The memory that `save_async` copies states into: one pool for the process, kept from call to call.

Allocating fresh pages costs twice as much as the copy into them (476 MB, two cores: 0.12 s the first time, 0.04 s from then on). The pool
keeps as much memory as simultaneous saves have needed, within the budget of the newest call; `release` frees what no save holds.
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

_POLL_S = 0.01  # the end of another save does not wake this thread: it may be any thread's save, and there may be many


class KeptMemory:
    """See the module. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # reentrant: a signal handler may save while its thread holds it
        self._pool: SlabPool | None = None

    def begin(
        self, captured: Captured, cuts: Cuts, target: str, *, budget_bytes: int, threads: int, max_stall_s: float
    ) -> Snapshot | None:
        """Copy a state. When this returns, the state may change.

        budget_bytes: for the copies of all saves under way. Returns None if these still hold the memory after `max_stall_s` seconds. Raises
        DoesNotFit for a state that the budget will never hold, and the errors of Stager.begin.
        """
        deadline = Deadline.after(max_stall_s, "max_stall_s")
        while True:
            with self._lock:  # a pool whose device fails forgets all slabs that were taken within the block
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
        """Free the memory that no save holds now. Returns the number of bytes."""
        with self._lock:
            n_bytes = self.free_bytes
            if self._pool is not None:
                self._pool.drop_free()
            return n_bytes


kept = KeptMemory()


def stage(captured: Captured, target: str, options: Options) -> Snapshot | LiveChunks:
    """Copy the state, if it fits the budget; then it may change on return. Otherwise returns the state itself, with a warning."""
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
    """Saves under way stay in the parent, whose threads may hold the locks. Keeping the memory would only copy it into the child."""
    kept.__init__()  # type: ignore[misc] # others hold this very object


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_forked_child)

"""Keeps the steps of optimizers and the copies of snapshots apart, and decides which copies may rely on an optimizer's hook.

A snapshot may be copied while forward and backward run, until an optimizer's step. That is safe only if each optimizer calls its hook, and
if nothing else changes the state. Both are watched; once trust is lost, it does not come back.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence

import torch

from fastckpt.events import logger
from fastckpt.host.deadline import NEVER, Deadline
from fastckpt.snapshot import FencedTensors, FenceHooks, Probation, Snapshot
from fastckpt.training.live_state import Taken
from fastckpt.training.save_queue import SaveQueue


class Permit:
    """What the next snapshot may leave to the fence, which comes later."""

    def __init__(self, fenced: FencedTensors | None, probation: Probation | None) -> None:
        self.fenced, self.probation = fenced, probation
        self.eager = fenced is None
        """True: the fence has to come before the save returns."""


class Fence:
    """See the module. Used by the thread that trains, and by the hooks of its optimizers; several threads may come to the fence."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer], queue: SaveQueue, *, proven: bool) -> None:
        """proven: True if trust needs no observed quiet interval (from a save to its fence) first."""
        self._optimizers = optimizers
        self._queue = queue
        self._proven = proven
        self._pid = os.getpid()
        self._snapshot: Snapshot | None = None
        """The newest snapshot."""
        self._thread: int | None = None
        """The thread that asked for the snapshot."""
        self._probation: Probation | None = None
        self._told = False
        self.stall_s = 0.0
        """Seconds for which hooks have kept the training thread."""
        self.updated = False
        """Whether an optimizer has updated the state since `forget_updates`."""
        # Weakly: an optimizer must not keep alive a Checkpointer that was dropped without being closed.
        self.hooks = FenceHooks(optimizers, _weakly(self._before_update))

    # -- what a save does with it --------------------------------------------------------------------------------------

    def permit(self, taken: Taken) -> Permit:
        """Decide what a snapshot that begins now may leave to the fence."""
        if not self.hooks.can_be_trusted:
            return Permit(None, None)
        fenced = FencedTensors(self._optimizers)
        if taken.samples is not None and not self._proven:
            if all(storage.device is None for storage in taken.captured.storages):
                return Permit(None, Probation(taken.captured, taken.cuts, fenced, taken.samples))
            self._proven = True
        return Permit(fenced, None)

    def begun(self, snapshot: Snapshot, permit: Permit) -> None:
        """Note that this snapshot has begun: from now on hooks wait for it."""
        self._snapshot, self._thread = snapshot, threading.get_ident()
        permit.eager = permit.eager or snapshot.must_fence

    def watch(self, permit: Permit) -> None:
        """The save has returned to training: tensors on probation are compared at the next fence."""
        self._probation = permit.probation

    def fenced(self) -> FencedTensors:
        """The tensors that only optimizers change, as they are now."""
        return FencedTensors(self._optimizers)

    # -- waiting -------------------------------------------------------------------------------------------------------

    def wait(self, why: str, deadline: Deadline = NEVER) -> None:
        """Wait until the state has been copied, for `max_stall_s` at most and until the deadline at most. May be called again after an
        interrupt: the snapshot is kept until the next one begins. First wait, without a limit, for what a restore has left to come.
        """
        self._let_arrive()
        probation, self._probation = self._probation, None
        if probation is not None:
            self._proven = probation.passed()
            if not self._proven:
                self._distrust_and_tell("after the last save", "The save is whole")
        snapshot = self._snapshot
        if snapshot is None:
            return
        snapshot.fence(why, deadline)
        self._look_at(snapshot)

    @contextlib.contextmanager
    def attended(self) -> Iterator[None]:
        """Context around a wait for a save. If the training thread waits, the state does not change meanwhile and nobody reaches the fence:
        so torn copies must be dealt with now.
        """
        snapshot = self._snapshot
        if snapshot is None or threading.get_ident() != self._thread or os.getpid() != self._pid:
            yield
            return
        with snapshot.attended():
            self._look_at(snapshot)
            yield
        self._look_at(snapshot)

    def attending(self) -> Callable[[], contextlib.AbstractContextManager[None]]:
        """`attended` for the handles of saves, which must not keep this object alive. While a save is under way, its job does."""
        reference = weakref.ref(self)

        def attended() -> contextlib.AbstractContextManager[None]:
            living = reference()
            return contextlib.nullcontext() if living is None else living.attended()

        return attended

    # -- trust ---------------------------------------------------------------------------------------------------------

    def distrust(self) -> None:
        """From now on leave nothing to a hook."""
        self.hooks.distrust()

    def forget_updates(self) -> None:
        """Another state was put into the objects: forget the updates seen so far."""
        self.updated = False

    def _look_at(self, snapshot: Snapshot) -> None:
        """Report what is wrong with a snapshot. After one torn copy nothing is left to a hook any more."""
        error = snapshot.error
        if error is not None:
            self._queue.fail_now(snapshot, error)
        if snapshot.torn_name is None:
            return
        if error is None:
            self._distrust_and_tell(f"while {snapshot.torn_name} was copied", "It was put back, and copied again")
        else:
            self.distrust()

    def _distrust_and_tell(self, when: str, outcome: str) -> None:
        """Stop trusting hooks; reported once."""
        self.distrust()
        if not self._told:
            self._told = True
            logger.warning(
                "parameters or optimizer state were overwritten %s, before the optimizer's step and without it (.data, a NumPy view, a "
                "kernel of its own). %s. From now on the state is copied before a save returns. Call ckpt.fence() before such writes",
                when,
                outcome,
            )

    def _let_arrive(self) -> None:
        arriving = self.hooks.arriving
        if arriving is not None:
            arriving()

    def _before_update(self) -> None:
        started = time.monotonic()
        self._let_arrive()  # also in a forked child, which would train with states that never come
        if os.getpid() != self._pid:
            return  # a forked child trains a copy; the snapshot and the threads that would end this wait belong to the parent
        self.updated = True
        self.wait("optimizer step")
        self.stall_s += time.monotonic() - started


def _weakly(method: Callable[[], None]) -> Callable[[], None]:
    """Make a function that calls the method while its object exists, and does not keep the object alive."""
    reference = weakref.WeakMethod(method)

    def call() -> None:
        living = reference()
        if living is not None:
            living()

    return call

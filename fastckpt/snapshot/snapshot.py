"""A state on its way into host memory, while training goes on.

    Snapshot(…)  ─ gives copies to streams and threads ─→  training: forward, backward ─→ fence() before the optimizer's step
         └─ raw(0), raw(1), … ─→ encoder, release(0), release(1), … ─→ confirm() ─→ vote ─→ close()

Each chunk is copied into a slot of a slab. Tensors that only an optimizer's step changes are *fenced*: their copies may run until `fence`.
For device memory `fence` makes the device's compute stream wait, not the host; for host memory it waits for the copying threads. All other
chunks are *copied first*: cloned on the device where they are small, otherwise the compute stream waits for them before the constructor
returns.

A state larger than the budget uses its slabs as a *ring*: slabs are used again once their chunks are encoded. Then some copies may not have
been given out when the optimizer's step comes, and `fence` blocks the host until the last one is, for `max_stall_s` at most. After that the
snapshot is dropped, and training goes on. With a spill file, slabs that the encoder needs last are written to a disk, so the ring advances
at the speed of the disk.

A copy of host memory that differs from the state at the call is *torn*: something wrote to the state unseen by torch; mostly weights were
swapped for an evaluation. Such a chunk is copied once more when the training thread reaches the fence, or waits for the save. If the state
is that of the call again, the snapshot is whole; otherwise it fails.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence

import torch

from fastckpt import events
from fastckpt._types import U8
from fastckpt.errors import BaseLostError, SaveError, SnapshotStalledError
from fastckpt.events import logger
from fastckpt.host.deadline import Deadline
from fastckpt.snapshot import cuda
from fastckpt.snapshot.base_slabs import BaseSlabs
from fastckpt.snapshot.copier import Copier
from fastckpt.snapshot.copy_plan import CopyPlan
from fastckpt.snapshot.fenced import FencedTensors
from fastckpt.snapshot.fingerprints import SaveFingerprints
from fastckpt.snapshot.pool import Slab, SlabPool
from fastckpt.snapshot.progress import Copy, Progress, Stage
from fastckpt.snapshot.ring import Ring
from fastckpt.snapshot.settings import StagerSettings
from fastckpt.snapshot.side_stream import SideStream
from fastckpt.snapshot.spill import SpillFile
from fastckpt.snapshot.spiller import Spiller
from fastckpt.snapshot.tearing import TearWatch
from fastckpt.snapshot.unchanged import ChunkPrints, Unchanged
from fastckpt.state import Captured
from fastckpt.state.chunking import Cuts


class Snapshot:
    """See the module. Made and fenced by the training thread; the other methods are for the saving threads, any thread.

    Keeps the captured storages until all are copied, and its slabs until `close`.
    """

    def __init__(
        self,
        captured: Captured,
        cuts: Cuts,
        pool: SlabPool,
        plan: CopyPlan,
        slabs: Sequence[Slab],
        fenced: FencedTensors | None,
        side_of: Callable[[torch.device], SideStream],
        settings: StagerSettings,
        *,
        step: int | None,
        fingerprints: SaveFingerprints | None = None,
        spill: SpillFile | None = None,
        keeps: bool = False,
        unchanged: Unchanged | None = None,
    ) -> None:
        """On return everything that is not fenced may change; but nothing may change if `must_fence` is True.

        plan: for this state. slabs: those that must exist at the beginning. side_of: gives the same side stream for one device every time.
        fingerprints: taken now from chunks that are copied later, and compared with their copies; None: nothing is compared. spill: takes
        slabs that hold up the ring; closed with this object. keeps: whether slabs go to `base` when the encoder has finished with them.
        unchanged: finds chunks that the save's base has; None: all are copied. Raises the error that prevented the first copies; then the
        pool has its slabs back.
        """
        fingerprints = fingerprints or SaveFingerprints()
        self.cuts = cuts
        self._captured, self._pool, self._max_stall_s = captured, pool, settings.max_stall_s
        self._copies = [
            Copy(number, chunk, chunk.n_bytes, captured.storages[chunk.pieces[0].storage].device)
            for number, chunk in enumerate(cuts.chunks)
        ]
        self.base: BaseSlabs | None = None
        """What is kept of this snapshot for the next save. Whoever saves drops it if the save fails, or when a newer one is durable."""
        if keeps and not plan.is_ring:
            self.base = BaseSlabs(pool.bases, dict(zip(plan.order, plan.layout.slots, strict=True)), cuts.chunks)
        self._ring = Ring(pool, plan, slabs, self.base)
        self.any_order = self._ring.is_whole  # see `ChunkSource`
        self._watch = TearWatch(captured, fenced, fingerprints, step, unchanged)
        self._progress = progress = Progress(captured, settings.target, step)
        order = [self._copies[number] for number in plan.order]
        self.unchanged = unchanged
        """Finds chunks that need no copy; None: all are copied."""
        self._copier = Copier(
            captured,
            order,
            self._ring,
            self._watch,
            progress,
            side_of,
            settings.threads,
            unchanged,
            in_order=plan.is_ring,
        )
        self._spiller = None if spill is None else Spiller(spill, self._copies, self._copier, self._ring, progress)
        self.must_fence = False
        """True if chunks that are copied later could not be fingerprinted: the caller has to fence at once."""
        progress.begin()
        self._start(plan.n_first, fingerprints)

    def _start(self, n_first: int, fingerprints: SaveFingerprints) -> None:
        try:
            self.must_fence = not self._copier.start(n_first, fingerprints)
            if self._spiller is not None:
                self._spiller.start()
        except BaseException as error:
            self._progress.fail(error)
            self.close()
            raise

    # -- the training thread -------------------------------------------------------------------------------------------

    def fence(self, why: str = "fence()", by: Deadline | float | None = None) -> None:
        """Wait until the state may change: later work of the caller's current streams waits for the copies. Torn chunks are copied once
        more before that.

        Each stream that changes the state needs this, so it may be called again, by any thread. The host waits only for copies of host
        memory, and in ring mode until the last copy is given out: for max_stall_s at most, and not beyond `by` (a number means seconds from
        now). Errors of the snapshot are not raised here: see `error`.
        """
        limit = _limit(by, self._max_stall_s)
        started_s = time.perf_counter()
        with self._progress.changed:
            if self._progress.fenced:
                self._hold_back()
                return
            self._look_at_state()
            with self.attended():
                if not self._progress.changed.wait_for(lambda: self._copier.is_settled, limit.left_s()):
                    self._progress.fail(self._stalled(limit))
                # Also after a failure: copies in flight still read the state.
                self._progress.changed.wait_for(lambda: self._copier.host.are_idle)
                self._hold_back()
                self._look_at_state()
                self._progress.fenced = True
        self._copier.host.end_threads()
        if events.enabled():
            seconds = time.perf_counter() - started_s
            events.emit(
                events.FenceWaited(target=self._progress.target, step=self._progress.step, seconds=seconds, why=why)
            )

    def stop(self, error: BaseException) -> None:
        """Make the save fail with an error. On return nobody reads host memory any more, and the caller's streams wait for the other
        copies.
        """
        self._progress.fail(error)
        self.fence("stop")

    @contextlib.contextmanager
    def attended(self) -> Iterator[None]:
        """While this context is open, the training thread waits for the save: torn copies are repeated at once, or the snapshot fails."""
        with self._copier.host.attended():
            yield

    def _stalled(self, limit: Deadline) -> SnapshotStalledError:
        return SnapshotStalledError(
            f"the snapshot of step {self._progress.step} was dropped: after {limit.why} "
            f"{self._copier.n_waiting} of {len(self._copies)} chunks were still to be copied: those before them have not been "
            "uploaded. Nothing was committed, and training goes on. Look at the store, or raise host_budget_bytes"
        )

    def _hold_back(self) -> None:
        """A device that accepts no more work is not the fence's problem: training's own next call there raises the error."""
        try:
            self._copier.devices.hold_back_once()
        except Exception as error:
            if not self._progress.confirmed:  # otherwise all copies have ended successfully
                self._progress.fail(error)

    def _look_at_state(self) -> None:
        """Fail if the state has changed. Under the lock, so that no optimizer's step can begin between the check and the reaction to it."""
        if self._progress.is_over or self._progress.fenced or self._progress.confirmed:
            return
        error = self._watch.changed_state()
        if error is not None:
            self._progress.fail(error)

    # -- those that save -----------------------------------------------------------------------------------------------

    @property
    def error(self) -> BaseException | None:
        """The first error of the snapshot; None so far."""
        return self._progress.error

    @property
    def torn_name(self) -> str | None:
        """The first tensor that was seen to be torn, whether or not its copy could be repeated."""
        return self._watch.torn_name

    def known(self, number: int) -> bytes | None:
        """See `ChunkSource`."""
        copy, unchanged = self._copies[number], self.unchanged
        if unchanged is None:
            return None
        with self._progress.changed:
            self._progress.changed.wait_for(lambda: self._progress.error is not None or not self._copier.is_open(copy))
            if self._progress.error is not None:
                raise self._progress.error
            return unchanged.digest(number)

    def prints(self) -> ChunkPrints | None:
        """The fingerprints of this snapshot's chunks, for the one that has its checkpoint as base. None: there are none. Asked once all
        chunks have been read.
        """
        try:
            return None if self.unchanged is None else self.unchanged.prints()
        except Exception as error:  # of the device; the checkpoint is whole
            logger.warning(
                "the fingerprints of step %s are lost: %s: %s", self._progress.step, type(error).__name__, error
            )
            return None

    def raw(self, number: int, scratch: U8) -> U8:
        """A chunk's bytes, once they are there; they stay until `release`. Raises the snapshot's error."""
        copy = self._copies[number]
        with self._progress.changed:
            self._wait_for_copy(copy)
            if self._progress.error is not None:
                raise self._progress.error
            if copy.spared:
                raise BaseLostError(
                    f"step {self._progress.step} was not saved: a part of it was not copied, because the checkpoint before it had it. "
                    "That one is gone, or was given up, meanwhile. Nothing was committed; the next save is a whole one"
                )
            spiller = self._spiller if self._spiller is not None and copy in self._spiller else None
            if spiller is None:
                self._ring.begin_reading(copy)
        try:
            content = self._content(copy) if spiller is None else spiller.read(copy, scratch)
        except BaseException as error:
            self._progress.fail(error)
            raise
        self._progress.there(copy)
        return content

    @contextlib.contextmanager
    def peek(self, number: int, scratch: U8) -> Iterator[U8 | None]:
        """Context with any chunk's bytes, before `raw` or after `release`. None: memory does not hold all chunks, or not any more."""
        copy = self._copies[number]
        with self._progress.changed:
            held = self._spiller is None and self._ring.hold(copy)
            if held:
                self._wait_for_copy(copy)
        if not held:
            with contextlib.nullcontext() if self.base is None else self.base.lend(number) as content:
                yield content
            return
        try:
            if self._progress.error is not None:
                raise self._progress.error
            yield None if copy.spared else self._content(copy)
        finally:
            self.release(number)

    def _wait_for_copy(self, copy: Copy) -> None:
        """Wait until a copy can be waited for, or an error has occurred. The caller holds the lock."""
        progress, slab = self._progress, self._ring.slab_of(copy)
        progress.changed.wait_for(
            lambda: progress.error is not None or (copy.stage >= Stage.TORN and self._ring.leaving != slab)
        )
        if copy.stage is Stage.TORN and not progress.changed.wait_for(
            lambda: progress.error is not None or copy.stage > Stage.TORN, self._max_stall_s
        ):
            progress.fail(self._watch.torn_copy(copy))  # nobody has reached the fence, who could tell what the state is

    def _content(self, copy: Copy) -> U8:
        """The bytes of a chunk in memory; waits for the device. TornSnapshotError; the device's error."""
        content = self._ring.content(copy)
        if copy.device is not None:
            if copy.stage is not Stage.THERE:
                started_s = time.perf_counter()
                self._copier.devices.wait(copy)
                self._progress.staged(copy, started_s)
            if self._watch.is_torn(copy, content):
                raise self._watch.torn_copy(copy)
        return content

    def release(self, number: int) -> None:
        """A chunk's bytes are not needed any more. In ring mode their memory is used again."""
        with self._progress.changed, cuda.while_others_capture(self._copier.devices.one):
            if self._ring.release(self._copies[number]):
                try:
                    self._copier.give_out()
                except BaseException as error:  # first, because its consequences are reported later
                    self._progress.fail(error)
                    raise

    def fail(self, error: BaseException) -> None:
        """The save has failed: the training thread, if it waits for copies, is to learn of this error and of no consequence of it."""
        self._progress.fail(error)

    def confirm(self) -> None:
        """To be called after all chunks have been read, before the commit. Raises the snapshot's error."""
        with self._progress.changed:
            self._look_at_state()
            if self._progress.error is not None:
                raise self._progress.error
            self._progress.confirmed = True

    def close(self) -> None:
        """Release everything, once copies in flight have ended. May be called twice."""
        progress = self._progress
        with progress.changed:
            if progress.closed:
                return
            if not progress.confirmed:
                progress.fail(SaveError(f"the snapshot of step {progress.step} was given up. Nothing was committed"))
            progress.closed = True
            progress.changed.notify_all()
            progress.changed.wait_for(lambda: self._copier.host.are_idle and self._ring.leaving is None)
            slabs = self._ring.take_out()
        if self.base is not None and not progress.confirmed:
            self.base.drop()
        self._copier.host.end_threads()
        if self._spiller is not None:
            self._spiller.close()
        try:
            self._copier.devices.wait_for_all()
        except BaseException:
            self._pool.forget(slabs)  # the device has failed, and may still write to them
            raise
        finally:
            with progress.changed:  # a Checkpointer keeps its last snapshot, which must not keep a state alive
                self._captured.release()
                self._watch.forget_tensors()
                self._copier.devices.forget_sources()
        self._pool.give_back(slabs)


def _limit(by: Deadline | float | None, max_stall_s: float) -> Deadline:
    """The deadline of the training thread's wait. Its `why` appears in the error."""
    limit = Deadline.after(max_stall_s, f"max_stall_s = {max_stall_s:g} s")
    deadline = by if isinstance(by, Deadline) else Deadline.after(by, "as the caller of the fence says")
    left_s = deadline.left_s()
    if left_s is None:
        return limit
    return limit.sooner(Deadline(deadline.at_s, f"the {left_s:.1f} s that were left ({deadline.why})"))

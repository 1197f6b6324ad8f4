"""A state on its way into host memory, while training goes on.

    Snapshot(…)  ─ gives copies to streams and threads ─→  training: forward, backward ─→ fence() before the optimizer's step
         └─ raw(0), raw(1), … ─→ encoder, release(0), release(1), … ─→ confirm() ─→ vote ─→ close()

Each chunk is copied into a slot of a slab. What only an optimizer's step changes is *fenced*: its copies may run until `fence`, which makes
the device's compute stream wait, not the host; for host memory it joins the copying threads. All other chunks are *copied first*: cloned
on the device where they are small, otherwise the compute stream waits for them before the constructor returns.

A state larger than the budget goes through it as through a *ring*: slabs are used again once their chunks are encoded. Then copies may
still have to be given out when the step comes, and `fence` keeps the host until the last one is, at most `max_stall_s`: after that the
snapshot is dropped, and training goes on. With a spill file, slabs that the encoder is far from go to a disk, and the ring turns as fast as
that writes.

A copy of host memory that is not what the state was at the call is *torn*: something has written to the state behind torch's back, most of
the time weights that were swapped for an evaluation. Such a chunk is copied once more when the training thread comes to the fence, or
waits for the save: if the state is that of the call again, the snapshot is whole; if not, it fails.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from fastckpt import events
from fastckpt.errors import SaveError, SnapshotStalledError, TornSnapshotError
from fastckpt.events import logger
from fastckpt.format.tensor_names import dotted
from fastckpt.host.threads import WorkerPool, start_thread
from fastckpt.snapshot import cuda
from fastckpt.snapshot.copy_plan import CopyPlan
from fastckpt.snapshot.fenced import Fenced
from fastckpt.snapshot.fingerprints import SaveFingerprints
from fastckpt.snapshot.pool import U8, Slab, SlabPool
from fastckpt.snapshot.side_stream import SideStream, joined, wait_for
from fastckpt.snapshot.spill import SpillFile
from fastckpt.state import Captured
from fastckpt.state.chunking import Chunk, Cuts

MAX_CLONED_BYTES = 64 << 20
"""Of a device's memory, for what may change at any time: statistics, averages, generators, learning rates."""
_BATCH_BYTES = 16 << 20  # one event for so many bytes: the encoder begins early, and 80 GB need some 5,000 events
_INLINE_BYTES = 256 << 10  # below this, handing a copy to another thread takes longer than the copy


@dataclass
class _Copy:
    """One chunk's, and what is known of it."""

    chunk: Chunk
    device: torch.device | None
    """None: from host memory."""
    n_bytes: int
    sources: list[torch.Tensor] | None = None
    """Of the bytes on their device, until the copy is given out."""
    is_clone: bool = False
    """`sources` is memory of our own, which nobody else changes."""
    given_out: bool = False
    event: torch.Event | None = None
    """Behind the copy, once it is given out to a device."""
    in_thread: bool = False
    """A thread is to make it, or is making it."""
    there: bool = False
    """Somebody has seen the end of it."""


class Snapshot:
    """See the module. Made, and fenced, by the thread that trains; the rest is for those that save, any thread.

    Holds the captured storages until all are copied, and its slabs of the pool until `close`.
    """

    def __init__(
        self,
        captured: Captured,
        cuts: Cuts,
        pool: SlabPool,
        plan: CopyPlan,
        slabs: Sequence[Slab],
        fenced: Fenced | None,
        side_of: Callable[[torch.device], SideStream],
        threads: int,
        *,
        target: str,
        step: int | None,
        max_stall_s: float,
        at_save: SaveFingerprints | None = None,
        spill: SpillFile | None = None,
    ) -> None:
        """plan, slabs: of the same state; the slabs that must be there at the beginning. On return all that is not fenced may change, and
        nothing may if `must_fence`.
        at_save: looks at what is copied later now, and compares; None: nothing does.

        spill: where slabs go that hold up the ring; closed with this.
        side_of: the same side stream for the same device every time. Raises what keeps the first copies from being made; the pool has its
        slabs back then.
        """
        self.cuts = cuts
        self._captured, self._pool, self._threads = captured, pool, threads
        self._target, self._step, self._max_stall_s = target, step, max_stall_s
        self._order, self._layout, self._for_device = plan.order, plan.layout, plan.for_device
        self._slot_of = dict(zip(plan.order, plan.layout.slots, strict=True))
        self._slabs: dict[int, Slab] = dict(enumerate(slabs))
        self._chunks_left = [0] * len(plan.layout.slab_bytes)
        for slot in plan.layout.slots:
            self._chunks_left[slot.slab] += 1
        self._copies = [
            _Copy(chunk, captured.storages[chunk.pieces[0].storage].device, chunk.n_bytes) for chunk in cuts.chunks
        ]
        self._sides = {copy.device: side_of(copy.device) for copy in self._copies if copy.device is not None}
        self._fenced_state = fenced or Fenced()
        self._fenced_state.keep_only(captured.addresses)
        self._changed = threading.Condition(threading.RLock())
        self._next = 0
        """How many chunks of `order` have been given out."""
        self._unmarked: list[_Copy] = []
        self._unmarked_bytes = 0
        self._there_bytes = 0
        self._in_threads = 0
        self._error: BaseException | None = None
        self._started = self._fenced = self._confirmed = self._closed = False
        self._held_back: set[tuple[torch.device, int]] = set()
        self._copiers: WorkerPool | None = None
        self._at_save = at_save or SaveFingerprints()
        self.must_fence = False
        """What is copied later could not be looked at: the caller fences at once."""
        self._torn: list[int] = []
        """Chunks whose copies wait to be made once more."""
        self.torn_name: str | None = None
        """The first thing that was seen to be torn, whether or not that could be mended."""
        self._attended = 0
        """More than 0: the training thread does nothing to the state until we are done with what is torn."""
        self._spill = spill
        self._spilling: int | None = None
        """The slab that is on its way to the disk."""
        self._handed: set[int] = set()
        """Slabs that the encoder has begun with: they stay."""
        self._started_s = time.perf_counter()
        events.emit(
            events.SnapshotStarted(
                target=target, step=step, raw_bytes=captured.n_bytes, storages=len(captured.storages)
            )
        )
        try:
            self._start(plan.n_first)
        except BaseException as error:
            self._fail(error)
            self.close()
            raise

    # -- giving out copies ---------------------------------------------------------------------------------------------

    def _start(self, n_first: int) -> None:
        first = self._order[:n_first]
        with self._changed:
            for copy in self._copies:
                if copy.device is not None:
                    copy.sources = self._sources(copy)
            cloned = self._clone(first)
            if self._at_save.looks:
                self._look(self._order[n_first:], cloned)
            for side in self._sides.values():
                side.begin()
            self._at_save.fetch()
            self._give_out(n_first)
            if n_first and not cloned:
                self._hold_back()
            self._give_out(len(self._order))
            self._changed.wait_for(lambda: not any(self._copies[number].in_thread for number in first))
            if self._error is not None:
                raise self._error
            self._started = True
        if self._spill is not None and not self._is_settled():
            start_thread(functools.partial(self._spill_slabs, self._spill), "fastckpt-spill")

    def _clone(self, first: Iterable[int]) -> bool:
        """Copy what is copied first on its device, if that is little. False: it is not, or the device has no room."""
        copies = [self._copies[number] for number in first if self._copies[number].device is not None]
        if sum(copy.n_bytes for copy in copies) > MAX_CLONED_BYTES:
            return False
        clones = []
        try:
            for copy in copies:
                assert copy.sources is not None
                clones.append(joined(copy.sources))
        except torch.OutOfMemoryError:
            return False
        for copy, clone in zip(copies, clones, strict=True):
            copy.sources, copy.is_clone = [clone], True
        return True

    def _look(self, later: Sequence[int], may_clone: bool) -> None:
        """Take down what the chunks that are copied later hold now.

        Many small storages are joined on their device instead, as their copy would do it: that takes no longer than looking at them, and
        nothing reaches them any more.
        """
        left = MAX_CLONED_BYTES - sum(copy.n_bytes for copy in self._copies if copy.is_clone)
        on_device: dict[torch.device, dict[int, list[torch.Tensor]]] = {device: {} for device in self._sides}
        for number in later:
            copy = self._copies[number]
            if copy.device is None:
                self._at_save.take_host(number)
                continue
            assert copy.sources is not None
            if may_clone and len(copy.sources) > 1 and copy.n_bytes <= left and self._clone([number]):
                left -= copy.n_bytes
            else:
                on_device[copy.device][number] = copy.sources
        looked = [self._at_save.take_device(self._sides[device], chunks) for device, chunks in on_device.items()]
        self.must_fence = not all(looked)

    def _sources(self, copy: _Copy) -> list[torch.Tensor]:
        """The pieces of a chunk on their device: contiguous tensors of one element type.

        Made before any stream reads the state: making one may count as a write to its storage.
        """
        pieces = copy.chunk.pieces
        if len(pieces) > 1:  # whole storages
            found = [self._captured.whole(piece.storage) for piece in pieces]
            tensors = [tensor for tensor in found if tensor is not None]
            if len(tensors) == len(pieces) and len({tensor.dtype for tensor in tensors}) == 1:
                return tensors
        return [self._captured.device_bytes(piece.storage, piece.offset, piece.n_bytes) for piece in pieces]

    def _hold_back(self) -> None:
        """The caller's current streams wait for what has been given to the side streams."""
        for side in self._sides.values():
            side.hold_back(side.mark())

    def _hold_back_once(self) -> None:
        """As `_hold_back`, after the last copy was given out, for streams that do not wait yet. Even if a thread has seen the end of all
        copies: that tells the device nothing.
        """
        for side in self._sides.values():
            stream = torch.accelerator.current_stream(side.device)
            if (side.device, stream.stream_id) not in self._held_back:
                side.hold_back(side.mark())
                self._held_back.add((side.device, stream.stream_id))

    def _hold_back_or_fail(self) -> None:
        """A device that takes no more work is training's own misfortune, and raised by its next call there: not by a fence."""
        try:
            self._hold_back_once()
        except Exception as error:
            if not self._confirmed:  # else all copies have ended well
                self._fail(error)

    def _give_out(self, end: int) -> None:
        """Give chunks to streams and threads, in order, as far as there are slabs. The caller holds the lock."""
        while self._next < end and self._error is None and not self._closed:
            number = self._order[self._next]
            slab = self._slot_of[number].slab
            if slab not in self._slabs:
                taken = self._pool.take(self._layout.slab_bytes[slab], self._for_device)
                if taken is None:
                    break
                self._slabs[slab] = taken
            self._copy(number)
            self._next += 1
        self._mark()

    def _copy(self, number: int) -> None:
        copy, slot = self._copies[number], self._slot_of[number]
        slab, stop = self._slabs[slot.slab], slot.offset + copy.n_bytes
        if copy.device is not None:
            if self._started and not copy.is_clone:  # a ring: storages may have been resized, tensors given other ones
                copy.sources = self._sources(copy)
            assert copy.sources is not None
            self._sides[copy.device].copy(slab.tensor[slot.offset : stop], copy.sources, pinned=slab.pinned)
            copy.sources = None
        elif copy.n_bytes < _INLINE_BYTES:
            self._copy_host(number)
        else:
            if self._copiers is None:
                self._copiers = WorkerPool(self._threads, "fastckpt-stage")
            call = functools.partial(self._copy_in_thread, number)
            copy.in_thread = True
            self._in_threads += 1
            try:
                self._copiers.submit(call)
            except BaseException:  # nobody will make it
                copy.in_thread = False
                self._in_threads -= 1
                raise
        self._unmarked.append(copy)
        self._unmarked_bytes += copy.n_bytes
        if self._unmarked_bytes >= _BATCH_BYTES:
            self._mark()

    def _mark(self) -> None:
        """Chunks given out since the last mark get an event behind them, and may be waited for."""
        batch, self._unmarked, self._unmarked_bytes = self._unmarked, [], 0
        for device, side in self._sides.items():
            copies = [copy for copy in batch if copy.device == device]
            if copies:
                event = side.mark()
                for copy in copies:
                    copy.event = event
        for copy in batch:
            copy.given_out = True
        self._changed.notify_all()

    def _copy_host(self, number: int) -> None:
        copy, started = self._copies[number], time.perf_counter()
        self._read(number)
        if not self._at_save.is_host_copy(number, self._content(number)):
            with self._changed:
                self.torn_name = self.torn_name or self._names(number)
                self._torn.append(number)
                if self._attended:
                    self._mend()
                self._changed.notify_all()
        self._tell_staged(copy, started)

    def _read(self, number: int) -> None:
        self._captured.read(self._copies[number].chunk.pieces, self._content(number))

    def _mend(self) -> None:
        """Copy once more what is torn: the state may be that of the call again. The caller holds the lock; nobody changes the state."""
        torn, self._torn = self._torn, []
        for number in torn:
            if self._error is not None:
                break
            try:
                self._read(number)
            except Exception as error:
                self._fail(error)
                break
            if not self._at_save.is_host_copy(number, self._content(number)):
                self._fail(self._torn_error(number))
        self._changed.notify_all()

    @contextlib.contextmanager
    def attended(self) -> Iterator[None]:
        """The training thread waits for the save: until the context ends, what is torn is mended at once, or the snapshot fails."""
        with self._changed:
            self._attended += 1
            if not self._fenced and not self._closed:
                self._mend()
        try:
            yield
        finally:
            with self._changed:
                self._attended -= 1

    def _tell_staged(self, copy: _Copy, started: float) -> None:
        if events.enabled():
            first = copy.chunk.pieces[0]
            events.emit(
                events.PieceStaged(
                    target=self._target,
                    step=self._step,
                    storage=first.storage,
                    offset=first.offset,
                    raw_bytes=copy.n_bytes,
                    seconds=time.perf_counter() - started,
                    device="cpu" if copy.device is None else str(copy.device),
                )
            )

    def _copy_in_thread(self, number: int) -> None:
        try:
            if self._error is None:
                self._copy_host(number)
        except BaseException as error:
            self._fail(error)
        with self._changed:
            self._copies[number].in_thread = False
            self._in_threads -= 1
            self._changed.notify_all()

    # -- the disk ------------------------------------------------------------------------------------------------------

    def _spill_slabs(self, spill: SpillFile) -> None:
        """Until all copies are given out. A disk that fails is told, and the ring goes on without it."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_settled() or self._farthest() is not None)
                slab = self._farthest()
                if self._is_settled() or slab is None:
                    return
                self._spilling = slab
            numbers = [number for number in self._order if self._slot_of[number].slab == slab]
            try:
                for number in numbers:
                    event = self._copies[number].event
                    if event is not None:
                        wait_for(event)
                spill.write({number: self._content(number) for number in numbers})
            except OSError as error:
                logger.warning("spill_dir cannot take more: %s. Training waits for the store instead", error)
                with self._changed:
                    self._spilling = None
                    self._changed.notify_all()
                return
            except BaseException as error:  # the device's
                self._spilling = None
                self._fail(error)
                return
            for number in numbers:
                self._note(self._copies[number])
            with self._changed:
                self._spilling = None
                self._pool.give_back([self._slabs.pop(slab)])
                try:
                    if not self._closed:
                        self._give_out(len(self._order))
                except BaseException as error:
                    self._fail(error)
                    return
                self._changed.notify_all()

    def _farthest(self) -> int | None:
        """The full slab that the encoder will need last. The caller holds the lock."""
        filling = self._slot_of[self._order[self._next]].slab if self._next < len(self._order) else 0
        full = [slab for slab in self._slabs if slab < filling and slab not in self._handed]
        slab = max(full, default=None)
        if slab is None or any(
            copy.in_thread or not copy.given_out or number in self._torn
            for number, copy in enumerate(self._copies)
            if self._slot_of[number].slab == slab
        ):
            return None
        return slab

    def _content(self, number: int) -> U8:
        slot = self._slot_of[number]
        return self._slabs[slot.slab].array[slot.offset : slot.offset + self._copies[number].n_bytes]

    # -- the training thread -------------------------------------------------------------------------------------------

    def fence(self, why: str = "fence()", limit_s: float | None = None) -> None:
        """From here on the state may change: what the caller's current streams are given from now on waits for the copies. What is torn is
        copied once more, first.

        Each stream that changes it needs this, so it may be called again, by any thread. The host waits only for copies of host memory, and
        in ring mode until the last copy is given out: for max_stall_s at most, or `limit_s` if that is less. What is wrong with the
        snapshot is not raised here: see `error`.
        """
        limit_s = self._max_stall_s if limit_s is None else min(limit_s, self._max_stall_s)
        started = time.perf_counter()
        with self._changed:
            if self._fenced:
                self._hold_back_or_fail()
                return
            self._check_versions()
            with self.attended():
                if not self._changed.wait_for(self._is_settled, limit_s):
                    self._fail(self._stalled(limit_s))
                # After a failure too: copies under way read the state.
                self._changed.wait_for(lambda: not self._in_threads)
                self._hold_back_or_fail()
                self._check_versions()
                self._fenced = True
            copiers, self._copiers = self._copiers, None
        if copiers is not None:
            copiers.close()
        if events.enabled():
            seconds = time.perf_counter() - started
            events.emit(events.FenceWaited(target=self._target, step=self._step, seconds=seconds, why=why))

    def stop(self, error: BaseException) -> None:
        """Let the save fail with an error. On return nobody reads host memory any more, and the caller's streams wait for the rest."""
        self._fail(error)
        self.fence("stop")

    def _is_settled(self) -> bool:
        return self._next == len(self._order) or self._error is not None or self._closed

    def _stalled(self, limit_s: float) -> SnapshotStalledError:
        limit = (
            f"max_stall_s = {limit_s:g} s" if limit_s == self._max_stall_s else f"the {limit_s:.1f} s that were left"
        )
        return SnapshotStalledError(
            f"the snapshot of step {self._step} was dropped: after {limit} "
            f"{len(self._order) - self._next} of {len(self._order)} chunks were still to be copied: those before them have not been "
            "uploaded. Nothing was committed, and training goes on. Look at the store, or raise host_budget_bytes"
        )

    def _check_versions(self) -> None:
        """The caller holds the lock: between this and what is done about it no optimizer's step can begin."""
        if self._error is not None or self._fenced or self._confirmed or self._closed:
            return
        address = self._fenced_state.changed()
        if address is not None:
            name = self._name(self._captured.addresses.index(address))
            self.torn_name = self.torn_name or name
            self._fail(
                TornSnapshotError(
                    f"{name} changed while it was copied, outside of an optimizer's step(). Nothing was committed. "
                    "Call ckpt.fence() before changing parameters or optimizer state by other means"
                )
            )

    def _name(self, number: int) -> str:
        return next((dotted(t.name) for t in self._captured.tensors if t.storage == number), f"storage {number}")

    # -- those that save -----------------------------------------------------------------------------------------------

    @property
    def error(self) -> BaseException | None:
        """What has gone wrong so far."""
        return self._error

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            if self._error is None and not self._closed:
                self._error = error
                events.emit(events.SnapshotDropped(target=self._target, step=self._step, error=error))
            self._changed.notify_all()

    def raw(self, number: int, scratch: U8) -> U8:
        """A chunk's bytes, once they are there; they stay until `release`. Raises what went wrong with the snapshot."""
        copy, slab = self._copies[number], self._slot_of[number].slab
        with self._changed:
            self._changed.wait_for(
                lambda: self._error is not None or (copy.given_out and not copy.in_thread and self._spilling != slab)
            )
            if number in self._torn and not self._changed.wait_for(
                lambda: self._error is not None or number not in self._torn, self._max_stall_s
            ):
                self._fail(self._torn_error(number))  # nobody has come to the fence, who could say what the state is
            if self._error is not None:
                raise self._error
            spilled = self._spill if self._spill is not None and number in self._spill else None
            if spilled is None:
                self._handed.add(slab)
        if spilled is not None:
            content = scratch[: copy.n_bytes]
            try:
                spilled.read(number, content)
            except BaseException as error:
                self._fail(error)
                raise
        else:
            content = self._content(number)
            if copy.event is not None and not copy.there:
                self._wait_for_device(copy, copy.event)
            if copy.device is not None and not self._at_save.is_device_copy(number, content):
                torn = self._torn_error(number)
                self.torn_name = self.torn_name or self._names(number)
                self._fail(torn)
                raise torn
        self._note(copy)
        return content

    def _names(self, number: int) -> str:
        """What a chunk holds, in a few words."""
        return ", ".join(sorted({self._name(piece.storage) for piece in self._copies[number].chunk.pieces})[:3])

    def _torn_error(self, number: int) -> TornSnapshotError:
        return TornSnapshotError(
            f"{self._names(number)}: the bytes that were copied are not those of the call of save. Something has written to them without "
            f"torch's knowledge (.data, a NumPy view, a kernel of its own) before the optimizer's step. Nothing of step {self._step} was "
            "committed. Call ckpt.fence() before such writes"
        )

    def _wait_for_device(self, copy: _Copy, event: torch.Event) -> None:
        started = time.perf_counter()
        try:
            wait_for(event)
        except BaseException as error:
            self._fail(error)
            raise
        self._tell_staged(copy, started)

    def _note(self, copy: _Copy) -> None:
        with self._changed:
            if copy.there:
                return
            copy.there = True
            self._there_bytes += copy.n_bytes
            if self._there_bytes < self._captured.n_bytes:
                return
            self._captured.let_go()
        events.emit(
            events.SnapshotStaged(
                target=self._target,
                step=self._step,
                raw_bytes=self._there_bytes,
                seconds=time.perf_counter() - self._started_s,
            )
        )

    def release(self, number: int) -> None:
        """A chunk's bytes are not needed any more: in ring mode others take their place."""
        slab = self._slot_of[number].slab
        with self._changed, cuda.while_others_capture(next(iter(self._sides), None)):
            self._chunks_left[slab] -= 1
            if not self._chunks_left[slab] and slab in self._slabs:
                self._pool.give_back([self._slabs.pop(slab)])
                try:
                    self._give_out(len(self._order))
                except BaseException as error:  # first: what comes of it is told later
                    self._fail(error)
                    raise

    def confirm(self) -> None:
        """To be called when all chunks have been read, before anything is committed. Raises what is wrong with the snapshot."""
        with self._changed:
            self._check_versions()
            if self._error is not None:
                raise self._error
            self._confirmed = True

    def close(self) -> None:
        """Let go of everything, once copies under way have ended. May be called twice."""
        with self._changed:
            if self._closed:
                return
            if not self._confirmed:
                self._fail(SaveError(f"the snapshot of step {self._step} was given up. Nothing was committed"))
            self._closed = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._in_threads and self._spilling is None)
            slabs, self._slabs = list(self._slabs.values()), {}
            copiers, self._copiers = self._copiers, None
        if copiers is not None:
            copiers.close()
        if self._spill is not None:
            self._spill.close()
        try:
            for side in self._sides.values():
                wait_for(side.mark())
        except BaseException:
            self._pool.forget(slabs)  # the device has failed, and may still write
            raise
        finally:
            with self._changed:  # a Checkpointer keeps its last snapshot, which must not keep a state
                self._captured.let_go()
                self._fenced_state = Fenced()
                for copy in self._copies:
                    copy.sources = None
        self._pool.give_back(slabs)

"""The chunks of a rank, encoded in the memory of its packs by several threads.

    next chunk ─→ raw ─→ encode into the pack's rest ─→ keep, unless an equal one is stored ─→ release ─→ … ─→ seal the pack
              └─→ known to equal the base's: nothing to do

Each thread takes the next chunk and puts it behind the others in a pack of its own: chunks of one pack are in the order of the state, and
which pack a chunk is in depends on which thread was faster. The index has each chunk's place, so nothing else depends on it.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Sequence
from typing import NamedTuple

from fastckpt import codec, events
from fastckpt._types import U8
from fastckpt.format import records
from fastckpt.format.sealed_state import SealedState
from fastckpt.host.pages import fresh_pages
from fastckpt.host.threads import WorkerPool
from fastckpt.kernels.transform import MAX_RAW_BYTES, Transform, transform_name
from fastckpt.writing.chunk_coder import Cast, ChunkCoder, Coded
from fastckpt.writing.chunk_writer import ChunkWriter
from fastckpt.writing.deltas import Against, Kept
from fastckpt.writing.packs import Pack, PackWriter
from fastckpt.writing.uplink import Uplink


class _Took(NamedTuple):
    """What a chunk has taken."""

    effort: codec.Effort
    raw_s: float
    """Until its bytes were there."""
    encode_s: float
    waited_s: float
    """For memory of a pack."""


class _Upcoming:
    """The chunks that no encoder has taken yet, in the order in which they are encoded. Any thread."""

    def __init__(self, sealed: SealedState, order: Sequence[int], expected_bytes: Sequence[int] | None) -> None:
        """expected_bytes: of each chunk what it is likely to store; None: its raw bytes."""
        self._chunks, self._order = sealed.chunks, order
        self._expected = expected_bytes or [chunk.n_bytes for chunk in sealed.chunks]
        self._lock = threading.Lock()
        self._next, self.left_bytes = 0, sum(self._expected)

    def __bool__(self) -> bool:
        return self._next < len(self._order)

    def take(self, pack: Pack) -> int | None:
        """The number of the next chunk, if there is one and it fits the pack."""
        with self._lock:
            if self._next == len(self._order):
                return None
            number = self._order[self._next]
            if self._chunks[number].n_bytes > pack.room:
                return None
            self._next += 1
            self.left_bytes -= self._expected[number]
            return number


class PackingWriter(ChunkWriter):
    """See the module. `run` is for one thread; the pool's threads do the work."""

    def __init__(
        self,
        sealed: SealedState,
        packs: PackWriter,
        target: str,
        pool: WorkerPool | None,
        uplink: Uplink,
        encoders: int,
        coder: ChunkCoder,
    ) -> None:
        """pool: None: `run` encodes itself. encoders: the largest number of packs that are filled at once. coder: encodes."""
        super().__init__(sealed, target)
        self._coder = coder
        self._packs, self._pool, self._uplink = packs, pool, uplink
        self._encoders = min(encoders, max(1, len(self.chunks))) if pool is not None else 1
        self._upcoming = _Upcoming(sealed, coder.order, coder.expected_bytes)
        self._ended = threading.Semaphore(0)
        """One for each encoder that has ended."""

    def tell_efforts(self, step: int) -> None:
        """Emit EffortUsed for each effort of this save."""
        for effort, used in sorted(self._uplink.efforts.used.items()):
            events.emit(
                events.EffortUsed(
                    target=self._target,
                    step=step,
                    effort=effort.name.lower(),
                    chunks=used.chunks,
                    raw_bytes=int(used.raw_bytes),
                    stored_bytes=int(used.stored_bytes),
                    encode_s=used.seconds,
                    why=self._uplink.efforts.why,
                )
            )

    def run(self) -> None:
        """Encode all chunks and seal their packs. Afterwards `records` is complete and the source has confirmed its bytes. The first error
        ends the rest and is raised.
        """
        try:
            for _ in range(self._encoders):
                self._go_on(fresh_pages(MAX_RAW_BYTES))
            for _ in range(self._encoders):
                self._ended.acquire()
        except BaseException as error:  # an interrupt: nobody may write to a pack's memory any more when this ends
            self._packs.fail(error)
            if self._pool is not None:
                self._pool.close()
            raise
        self._packs.refuse()
        self._source.confirm()

    def _go_on(self, scratch: U8) -> None:
        """Have an encoder fill its next pack: a job for each pack, so that threads which join the pool later get some, too."""
        if self._pool is not None:
            self._pool.submit(functools.partial(self._fill_one, scratch))
            return
        while self._fill(scratch):
            pass
        self._ended.release()

    def _fill_one(self, scratch: U8) -> None:
        more = False
        try:
            more = self._fill(scratch)
        except BaseException as error:
            self._packs.fail(error)
        if more:
            self._go_on(scratch)
        else:
            self._ended.release()

    def _fill(self, scratch: U8) -> bool:
        """Fill one pack and seal it. Returns whether chunks are left."""
        if not self._upcoming:
            return False
        began = time.perf_counter()
        pack = self._packs.begin(self._upcoming.left_bytes)
        waited_s = time.perf_counter() - began
        try:
            while (number := self._upcoming.take(pack)) is not None:
                self._packs.refuse()
                self._add(number, pack, scratch, waited_s)
                waited_s = 0.0
        except BaseException as error:
            self._packs.fail(error)
            raise
        finally:
            self._packs.seal(pack)
        self._packs.more = more = bool(self._upcoming)
        return more

    def _add(self, number: int, pack: Pack, scratch: U8, waited_s: float) -> None:
        started, effort = time.perf_counter(), self._uplink.efforts.level
        found: Coded | None = self._coder.known(number)
        raw = None if found is not None else self._source.raw(number, scratch)
        encode_from = time.perf_counter()
        if found is None:
            assert raw is not None
            found = self._coder.encode(number, raw, pack.rest, effort)
        took = _Took(effort, encode_from - started, time.perf_counter() - encode_from, waited_s)
        with self._packs.lock:
            stored_bytes = self._enter(number, found, pack, took)
        if raw is not None:
            self._source.release(number)
        if events.enabled():
            self._tell(number, found, stored_bytes, took)

    def _enter(self, number: int, found: Coded, pack: Pack, took: _Took) -> int:
        """Complete the record of a chunk. Returns the bytes that are kept in the pack. The caller holds the lock."""
        if isinstance(found, Kept):
            self.keep(number, *found)
            return 0
        if isinstance(found, Cast):
            self.cast(number, found.rows)
            return 0
        encoded, base = found
        stored_bytes = len(encoded.stored)
        self._uplink.efforts.encoded(took.effort, self.chunks[number].n_bytes, stored_bytes, took.encode_s, took.raw_s)
        if self.is_stored(number, encoded):
            return 0
        place = self._packs.keep(pack, stored_bytes, encoded.crc64nvme) if stored_bytes else (0, 0)
        self.enter(number, encoded, *place, base)
        return stored_bytes

    def _tell(self, number: int, found: Coded, stored_bytes: int, took: _Took) -> None:
        target, n_bytes = self._target, self.chunks[number].n_bytes
        encoded = found.encoded if isinstance(found, Against) else None
        nothing = transform_name(Transform.REF if isinstance(found, Kept) else Transform.CAST)
        events.emit(
            events.ChunkEncoded(
                target=target,
                record=number,
                transform=nothing if encoded is None else transform_name(encoded.transform),
                raw_bytes=n_bytes,
                stored_bytes=0 if encoded is None else len(encoded.stored),
                seconds=took.encode_s,
                effort=took.effort.name.lower(),
                raw_s=took.raw_s,
            )
        )
        events.emit(
            events.ChunkStored(
                target=target,
                record=number,
                transform=nothing if encoded is None else records.transform_of(self.records[number]),
                raw_bytes=n_bytes,
                stored_bytes=stored_bytes,
                encode_s=took.raw_s + took.encode_s,
                write_s=took.waited_s,
            )
        )

"""Sealed state → container: gather, digest and encode on several threads, write in order on one.

    chunks ─→ [gather → digest → encode → crc] × threads ─→ sink, in the order of the records ─→ index ─→ footer ─→ commit

At most `chunks_in_flight` chunks are between the state and the sink, each with a scratch buffer of its own. The first
error cancels the rest, abandons the sink and reaches the caller.
"""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

from fastckpt import codec, events
from fastckpt._types import U8
from fastckpt.format import container, directory, records
from fastckpt.format.container import HEADER_BYTES, PartEntry
from fastckpt.format.digest import digest
from fastckpt.format.sealed_state import SealedChunk, SealedState
from fastckpt.host import cycle_collector
from fastckpt.host.pages import fresh_pages
from fastckpt.host.sink import Sink, committing
from fastckpt.host.threads import WorkerPool
from fastckpt.kernels.transform import MAX_RAW_BYTES, transform_name
from fastckpt.options import Options
from fastckpt.writing.chunk_writer import ChunkWriter
from fastckpt.writing.effort import fixed_effort

_INLINE_BYTES = 4 << 20  # below this, starting threads takes longer than the work


class Payload(Protocol):
    """A place for stored bytes."""

    def add(self, stored: Any) -> tuple[int, int]:
        """Take a chunk's stored bytes; returns its file number and offset. On return the caller may reuse the buffer."""


class _ContainerPayload:
    """The payload of a self-contained container: stored bytes are written through to the sink."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self.n_bytes = 0

    def add(self, stored: Any) -> tuple[int, int]:
        offset = HEADER_BYTES + self.n_bytes
        self._sink.write(stored)
        self.n_bytes += len(stored)
        return 0, offset


class _Scratch(NamedTuple):
    """Buffers for one chunk in flight: one for its raw bytes (unused if the source has them in memory), one for its stored bytes."""

    raw: U8
    out: U8

    @classmethod
    def of(cls, n_bytes: int) -> _Scratch:
        """Allocate pages straight from the kernel. Memory that short-lived threads allocate by malloc stays in arenas of the C library: 630
        MB after sixty saves.
        """
        return cls(fresh_pages(n_bytes), fresh_pages(n_bytes))


class _Encoded(NamedTuple):
    encoded: codec.Encoded
    scratch: _Scratch
    seconds: float


def start_workers(raw_bytes: int, options: Options, *, background: bool = False) -> WorkerPool | None:
    """Start the threads for `write`. None if the state is too small to need threads, or if the interpreter is ending and allows none.
    raw_bytes: all that is to be written. background: nobody waits for these threads, so they run at low priority.
    """
    if raw_bytes <= _INLINE_BYTES or options.threads == 1:
        return None
    pool = WorkerPool(options.threads, "fastckpt-save", nice=options.background_nice if background else 0)
    # Do not submit to a pool that runs inline: a job submitted ahead may wait for memory that only the submitting thread gives back.
    return None if pool.inline else pool


def write(
    sealed: SealedState,
    sink: Sink,
    target: str,
    options: Options,
    pool: WorkerPool | None,
    skeleton_s: float,
    step: int | None = None,
) -> int:
    """Write a container to the sink and commit it. Returns its bytes.

    step: what the container says that it is of. On any error, KeyboardInterrupt included, the sink is abandoned and the error raised.
    Closes the pool and the source of the chunks.
    """
    started = time.perf_counter()
    try:
        with committing(sink), closing(sealed.source), closing(pool) if pool is not None else nullcontext():
            payload = _ContainerPayload(sink)
            writer = OrderedWriter(sealed, payload, target, options, pool)
            writer.tell_start(skeleton_s)
            n_bytes = _write_parts(writer, payload, sink, sealed.skeleton, step)
            commit_from = time.perf_counter()
    except BaseException as error:
        events.emit(events.SaveFailed(target=target, error=error))
        raise
    now = time.perf_counter()
    events.emit(
        events.SaveFinished(
            target=target,
            raw_bytes=sealed.n_bytes,
            file_bytes=n_bytes,
            seconds=now - started + skeleton_s,
            durable_s=now - commit_from,
        )
    )
    return n_bytes


def _write_parts(
    writer: OrderedWriter, payload: _ContainerPayload, sink: Sink, skeleton: bytes, step: int | None
) -> int:
    """Write header, payload, index and footer to the sink, which is not committed. Returns their bytes."""
    header = container.build_header()
    sink.write(header)
    writer.run()
    with cycle_collector.held_off():
        listed = directory.build(replace(writer.directory(), step=step))
    parts = [listed, b"[]", writer.records.tobytes(), skeleton]
    rest = index_and_footer(header, payload.n_bytes, parts)
    for part in rest:
        sink.write(part)
    return HEADER_BYTES + payload.n_bytes + sum(map(len, rest))


class OrderedWriter(ChunkWriter):
    """Encodes the chunks of a state and hands them, in order, to a payload. Used once, by one thread."""

    def __init__(
        self, sealed: SealedState, payload: Payload, target: str, options: Options, pool: WorkerPool | None
    ) -> None:
        super().__init__(sealed, target)
        self._payload, self._options, self._pool = payload, options, pool
        fixed = fixed_effort(options)
        self._effort = codec.Effort.NORMAL if fixed is None else fixed

    def run(self) -> None:
        """Encode and store all chunks. Afterwards `records` is complete and the source has confirmed its bytes. The first error cancels the
        rest and is raised.
        """
        for number, (chunk, result) in enumerate(zip(self.chunks, self._encode_all(), strict=True)):
            self._write_chunk(number, chunk, result)
        self._source.confirm()

    def _encode_all(self) -> Iterator[_Encoded]:
        """Yield results in the order of the chunks. The scratch buffers of a result are used again once the consumer asks for the next
        result.
        """
        if self._pool is None:
            scratch = _Scratch.of(max((chunk.n_bytes for chunk in self.chunks), default=0))
            for number, chunk in enumerate(self.chunks):
                yield self._encode(number, chunk, scratch)
            return
        free = [_Scratch.of(MAX_RAW_BYTES) for _ in range(self._options.chunks_in_flight)]
        pending: deque[Future[_Encoded]] = deque()
        waiting = iter(enumerate(self.chunks))
        more = True
        while more or pending:
            while free and more:
                upcoming = next(waiting, None)
                if upcoming is None:
                    more = False
                else:
                    pending.append(self._pool.submit(functools.partial(self._encode, *upcoming, free.pop())))
            if pending:
                result = pending.popleft().result()
                yield result
                free.append(result.scratch)

    def _encode(self, number: int, chunk: SealedChunk, scratch: _Scratch) -> _Encoded:
        started = time.perf_counter()
        effort = self._effort
        element = chunk.element
        raw = self._source.raw(number, scratch.raw)
        encode_from = time.perf_counter()
        encoded = codec.encode(
            raw, element.const_lane_bytes, element.float_lane_bytes, effort=effort, out=scratch.out[: raw.size]
        )
        now = time.perf_counter()
        if events.enabled():
            events.emit(
                events.ChunkEncoded(
                    target=self._target,
                    record=number,
                    transform=transform_name(encoded.transform),
                    raw_bytes=chunk.n_bytes,
                    stored_bytes=len(encoded.stored),
                    seconds=now - encode_from,
                    effort=effort.name.lower(),
                    raw_s=encode_from - started,
                )
            )
        return _Encoded(encoded, scratch, now - started)

    def _write_chunk(self, number: int, chunk: SealedChunk, result: _Encoded) -> None:
        started = time.perf_counter()
        encoded, stored_bytes = result.encoded, 0
        if not self.is_stored(number, encoded):
            stored_bytes = len(encoded.stored)
            self.enter(number, encoded, *(self._payload.add(encoded.stored) if stored_bytes else (0, 0)))
        self._source.release(number)
        if events.enabled():
            events.emit(
                events.ChunkStored(
                    target=self._target,
                    record=number,
                    transform=records.transform_of(self.records[number]),
                    raw_bytes=chunk.n_bytes,
                    stored_bytes=stored_bytes,
                    encode_s=result.seconds,
                    write_s=time.perf_counter() - started,
                )
            )


def index_and_footer(header: bytes, payload_bytes: int, parts: Sequence[bytes]) -> list[bytes]:
    """The bytes that follow the payload: index parts first, footer last. parts: in the order of INDEX_PARTS."""
    position = HEADER_BYTES + payload_bytes
    entries = []
    for part in parts:
        entries.append(PartEntry(position, len(part), digest(part)))
        position += len(part)
    return [*parts, container.build_footer(entries, payload_bytes, header)]

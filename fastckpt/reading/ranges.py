"""Wanted chunks → few ranges of files, under limits. Pure.

    wanted, in order:   a0 a1 b0 a2 b1 …          (a, b: files)
    ranges:             [a0 a1 a2] [b0 b1] …      one read each, in the order of what each has first

A request to a store costs as much time as some hundred KiB, so chunks that lie side by side are read together, and small gaps between them
are read for nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from fastckpt.format.records import Records

_KIB, _MIB = 1 << 10, 1 << 20
_NO_LIMIT = 1 << 62
_RANGES_A_THREAD = 8  # so that no thread has much more to do than another
_LEAST_RAW_BYTES = 4 * _MIB


class Limits(NamedTuple):
    """What a range may be. A single chunk is a range, whatever its length."""

    range_bytes: int = 8 * _MIB
    """Most bytes from the first to the last. S3's advice is 8 to 16 MB; fewer let more reads be under way in the same memory."""
    gap_bytes: int = 256 * _KIB
    """Most bytes between two wanted chunks that are read for nothing."""
    over_read: float = 0.125
    """Most bytes that are read for nothing, as a share of the range."""
    raw_bytes: int = 16 * _MIB
    """Most raw bytes of a range's chunks: a range is decoded by one thread."""
    reach_bytes: int = 64 * _MIB
    """Most raw bytes of wanted chunks from a range's first to its last, those of other ranges among them: memory of storages that are
    begun long before they are needed.
    """


class Part(NamedTuple):
    """Stored bytes that chains need."""

    row: int
    takers: tuple[tuple[int, int], ...]
    """Number of a chain, and the row that these bytes are there: equal bytes may have several rows."""


class Range(NamedTuple):
    """Bytes of one file, and the wanted chunks in them."""

    file: int
    """0: that of the index itself; else its number in the file table."""
    start: int
    """Offset of the first byte, as records count."""
    stop: int
    chunks: tuple[int, ...]
    """Those that are decoded by themselves, in the order in which they are wanted."""
    parts: tuple[Part, ...] = ()
    """What chains need (`reading.chains`)."""


@dataclass
class _Open:
    """A range that may still grow."""

    start: int
    stop: int
    stored: int
    """Bytes that are wanted."""
    raw: int
    begun_at: int
    """How many raw bytes were wanted before it."""
    chunks: list[int] = field(default_factory=list)


def limits_for(stored_bytes: int, at_once: int, buffer_bytes: int = Limits().range_bytes) -> Limits:
    """Limits for so many wanted bytes and reads at once: small states are cut finer, so that all connections have something to do.

    buffer_bytes: room for a range.
    """
    default = Limits()
    fair = max(_MIB, stored_bytes // max(1, at_once))
    return default._replace(range_bytes=max(1, min(default.range_bytes, buffer_bytes, fair)))


def whole_files(raw_bytes: int, threads: int) -> Limits:
    """Limits for files whose chunks are read one by one, so that nothing lies between them: a range is what a thread does at a time.

    raw_bytes: of all wanted chunks.
    """
    fair = raw_bytes // (_RANGES_A_THREAD * threads)
    return Limits(_NO_LIMIT, _NO_LIMIT, 1.0, min(Limits().raw_bytes, max(_LEAST_RAW_BYTES, fair)), Limits().reach_bytes)


def plan(wanted: Iterable[int], records: Records, limits: Limits) -> list[Range]:
    """The ranges that hold some chunks, each chunk in one of them.

    Args:
        wanted: numbers of chunks, each once, in the order in which they are needed.
        records: of all chunks.
        limits: of each range.

    Returns:
        Ranges in the order in which the first chunk of each is needed. A range whose chunks store nothing has no bytes.
    """
    fields = [records[name].tolist() for name in ("file", "offset", "stored_bytes", "raw_bytes")]
    files, offsets, stored, raw = fields
    ranges: list[tuple[int, _Open]] = []
    growing: dict[int, _Open] = {}
    seen = 0
    for chunk in wanted:
        file = files[chunk]
        one = growing.get(file)
        if one is None or not _takes(one, offsets[chunk], stored[chunk], raw[chunk], seen, limits):
            one = growing[file] = _Open(offsets[chunk], offsets[chunk], 0, 0, seen)
            ranges.append((file, one))
        _add(one, chunk, offsets[chunk], stored[chunk], raw[chunk])
        seen += raw[chunk]
    return [Range(file, one.start, one.stop, tuple(one.chunks)) for file, one in ranges]


def _takes(one: _Open, offset: int, stored: int, raw: int, seen: int, limits: Limits) -> bool:
    """Whether a chunk may join a range."""
    if one.raw + raw > limits.raw_bytes or seen + raw - one.begun_at > limits.reach_bytes:
        return False
    if (
        not stored or not one.stored
    ):  # what stores nothing has no place; a range of nothing takes the place of the first that has one
        return True
    start, stop = min(one.start, offset), max(one.stop, offset + stored)
    gap = max(offset - one.stop, one.start - (offset + stored), 0)
    # Chunks that are wanted twice, or that overlap in a hostile index, may be more than the range; then nothing is read for nothing.
    over = stop - start - one.stored - stored
    return stop - start <= limits.range_bytes and gap <= limits.gap_bytes and over <= limits.over_read * (stop - start)


def _add(one: _Open, chunk: int, offset: int, stored: int, raw: int) -> None:
    one.chunks.append(chunk)
    one.raw += raw
    if not stored:
        return
    one.start = min(one.start, offset) if one.stored else offset
    one.stop = max(one.stop, offset + stored) if one.stored else offset + stored
    one.stored += stored

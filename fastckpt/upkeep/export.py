"""Exports a committed rank as one self-contained container. Stored bytes are copied unchanged: nothing is decoded or encoded.

    vote ─→ lay_out: where each chunk goes ─→ ranged reads × connections ─→ crc64nvme ─→ sink, in order ─→ index ─→ footer

The result is a container as `fastckpt.save` could have written it (docs/format.md, section 1); it can be loaded, shown and checked like any
other.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from fastckpt._types import U8, Progress
from fastckpt.errors import CorruptCheckpointError, Damage, NoCheckpointError, ObjectNotFoundError
from fastckpt.format import container, directory
from fastckpt.format.container import HEADER_BYTES
from fastckpt.format.digest import crc64nvme
from fastckpt.format.keys import vote_key
from fastckpt.format.records import Records
from fastckpt.format.repository_records import Commit
from fastckpt.host.sink import Sink, committing
from fastckpt.host.threads import WorkerPool
from fastckpt.options import Options
from fastckpt.reading.chunk_reader import Reader
from fastckpt.repository.rank_reader import open_rank
from fastckpt.repository.repository import Repository
from fastckpt.store.base import Store
from fastckpt.writing.container import index_and_footer
from fastckpt.writing.sinks import open_sink

# A quarter of a second of one S3 connection: longer reads gain nothing, shorter ones cost more requests.
_READ_BYTES = 16 << 20


class RangeRead(NamedTuple):
    """One ranged read: chunks that are adjacent in a pack, and will be adjacent in the container."""

    file: int
    offset: int
    n_bytes: int
    chunks: tuple[int, ...]
    """Numbers of the chunks, in their order in the pack."""


@dataclass(frozen=True)
class Layout:
    """The place of every stored chunk in the container."""

    records: Records
    runs: tuple[RangeRead, ...]
    """The reads in the order of the payload; together they cover all of it, without gaps."""
    payload_bytes: int


def lay_out(old: Records) -> Layout:
    """Lay out a self-contained container from the records of a vote. Chunks that differ only in their place are stored once. Pure."""
    new, bare = old.copy(), old.copy()
    new["file"] = bare["file"] = bare["offset"] = 0
    placed: dict[bytes, int] = {}
    runs: list[RangeRead] = []
    position = HEADER_BYTES
    for chunk in np.flatnonzero(old["stored_bytes"]).tolist():
        content = bare[chunk].tobytes()
        offset = placed.get(content)
        if offset is None:
            offset = placed[content] = position
            n_bytes = int(old["stored_bytes"][chunk])
            position += n_bytes
            _append(runs, RangeRead(int(old["file"][chunk]), int(old["offset"][chunk]), n_bytes, (chunk,)))
        new["offset"][chunk] = offset
    return Layout(new, tuple(runs), position - HEADER_BYTES)


def _append(runs: list[RangeRead], run: RangeRead) -> None:
    """Add a read; joins it to the last one if it continues that."""
    if runs:
        last = runs[-1]
        n_bytes = last.n_bytes + run.n_bytes
        if (last.file, last.offset + last.n_bytes) == (run.file, run.offset) and n_bytes <= _READ_BYTES:
            runs[-1] = RangeRead(last.file, last.offset, n_bytes, last.chunks + run.chunks)
            return
    runs.append(run)


def export_to(
    path: str,
    repository: Repository,
    commit: Commit,
    rank: int,
    options: Options | None = None,
    progress: Progress = lambda done, total: None,
) -> int:
    """Write a rank's state to a path, which is replaced. As `export`."""
    return export(repository, commit, rank, open_sink(path), options, progress)


def export(
    repository: Repository,
    commit: Commit,
    rank: int,
    sink: Sink,
    options: Options | None = None,
    progress: Progress = lambda done, total: None,
) -> int:
    """Write a rank's state as a self-contained container to the sink and commit it. Returns the container's length in bytes.

    Takes 16 MiB for each of `options.connections`, within half of `options.host_budget_bytes`, and the index. Reads on that many threads,
    writes on this one. On any error, and on KeyboardInterrupt, the sink is abandoned.

    Args:
        sink: where the container goes; this function commits it.
        options: None for the defaults.
        progress: called on this thread with bytes done and bytes in all.

    Raises:
        NoCheckpointError: the checkpoint has no such rank.
        CorruptCheckpointError: lists all damage of the rank.
        UnsupportedFormatError: only a newer version reads it.
        StoreError, OSError: the store or the sink failed.
    """
    options = options or Options()
    with committing(sink):
        if not 0 <= rank < commit.world:
            raise NoCheckpointError(
                f"{repository.location(commit.checkpoint)} has ranks 0 to {commit.world - 1}: there is no rank {rank}"
            )
        return _write(_open(repository.store, commit, rank), repository.store, sink, options, progress)


def _open(store: Store, commit: Commit, rank: int) -> Reader:
    name = commit.vote(rank)
    try:
        reader = open_rank(store, commit, rank)
    except ObjectNotFoundError as error:
        damage = Damage("vote", vote_key(name), f"{name.n_bytes} bytes", "no such object")
        raise CorruptCheckpointError(f"{store.url}/{vote_key(name)}", [damage], ADVICE) from error
    except CorruptCheckpointError as error:
        raise CorruptCheckpointError(error.source, error.damage, ADVICE) from error
    reader.require_readable()
    return reader


ADVICE = "Take another step (`fastckpt ls` lists them), or get out what can be read with `fastckpt salvage`"


def _write(reader: Reader, store: Store, sink: Sink, options: Options, progress: Progress) -> int:
    layout = lay_out(reader.records)
    header = container.build_header()
    sink.write(header)
    damage: list[Damage] = []
    done = 0
    for run, data in _read_ahead(reader, store, layout.runs, options):
        found = _verify(reader, layout, store, run, data)
        damage += found
        if not damage:  # after the first finding, reading goes on only to list further ones
            sink.write(data)
        done += run.n_bytes
        progress(done, layout.payload_bytes)
    if damage:
        raise CorruptCheckpointError(reader.source.name, damage, ADVICE)
    listed = replace(reader.directory, save=None)
    parts = [directory.build(listed), b"[]", layout.records.tobytes(), reader.skeleton]
    rest = index_and_footer(header, layout.payload_bytes, parts)
    for part in rest:
        sink.write(part)
    return HEADER_BYTES + layout.payload_bytes + sum(map(len, rest))


def _read_ahead(
    reader: Reader, store: Store, runs: tuple[RangeRead, ...], options: Options
) -> Iterator[tuple[RangeRead, U8 | None]]:
    """Read ahead. Yields the bytes of each run, in order; None if the pack is missing or too short."""
    buffers = max(1, min(options.connections, options.host_budget_bytes // (2 * _READ_BYTES), len(runs)))
    pool = WorkerPool(buffers, "fastckpt-export")
    try:
        pending: deque[tuple[RangeRead, Future[U8 | None]]] = deque()
        for run in runs:
            if len(pending) == buffers:
                first, future = pending.popleft()
                yield first, future.result()
                del future  # free its bytes before the next are read
            read = functools.partial(_read, store, reader.files[run.file - 1].key, run.offset, run.n_bytes)
            pending.append((run, pool.submit(read)))
        while pending:
            first, future = pending.popleft()
            yield first, future.result()
    finally:
        pool.close()


def _read(store: Store, key: str, offset: int, n_bytes: int) -> U8 | None:
    out = np.empty(n_bytes, np.uint8)
    try:
        store.get_into(key, offset, out)
    except (EOFError, ObjectNotFoundError):
        return None
    return out


def _verify(reader: Reader, layout: Layout, store: Store, run: RangeRead, data: U8 | None) -> list[Damage]:
    """Verify the chunks of a read. If it failed as a whole, read each chunk by itself. Returns all damage."""
    key = reader.files[run.file - 1].key
    found, position = [], 0
    for chunk in run.chunks:
        n_bytes, offset = int(reader.records["stored_bytes"][chunk]), run.offset + position
        stored = _read(store, key, offset, n_bytes) if data is None else data[position : position + n_bytes]
        position += n_bytes
        place = f"{reader.chunk_name(chunk)}, bytes {offset}–{offset + n_bytes} of {key}"
        if stored is None:
            names = _users(reader, layout, chunk)
            found.append(Damage("payload", place, f"{n_bytes} stored bytes", "none", names, (key, offset)))
            continue
        expected, actual = int(reader.records["crc64nvme"][chunk]), crc64nvme(stored)
        if actual != expected:
            names = _users(reader, layout, chunk)
            where, wrong = f"{place}, crc64nvme", f"{actual:016x}"
            found.append(Damage("payload", where, f"{expected:016x}", wrong, names, (key, offset)))
    return found


def _users(reader: Reader, layout: Layout, chunk: int) -> tuple[str, ...]:
    """Names of the tensors that need a chunk, or another chunk that shares its bytes."""
    same = layout.records["offset"] == layout.records["offset"][chunk]
    chunks = np.flatnonzero(same & (layout.records["stored_bytes"] > 0)).tolist()
    return tuple(dict.fromkeys(name for other in chunks for name in reader.tensors_of(other)))


__all__ = ["ADVICE", "Layout", "RangeRead", "export", "lay_out"]

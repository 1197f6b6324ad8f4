"""Copies one file or object between paths and stores. Of a container every stored byte is verified on the way; nothing is decoded.

header ─→ chunks, in blocks × connections ─→ crc64nvme ─→ sink, in order ─→ index, by its digests ─→ footer
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from fastckpt._types import U8, Progress
from fastckpt.errors import CorruptCheckpointError, Damage
from fastckpt.format.container import INDEX_PARTS
from fastckpt.format.digest import crc64nvme, digest
from fastckpt.host.sink import Sink, committing
from fastckpt.options import Options
from fastckpt.reading.chunk_reader import Reader, is_container
from fastckpt.reading.sources import Source
from fastckpt.store.base import Store
from fastckpt.upkeep.mirror.transfer import in_parallel
from fastckpt.writing.object_sink import ObjectSink
from fastckpt.writing.sinks import open_sink

_BLOCK_BYTES = 16 << 20


class Copied(NamedTuple):
    """What was written."""

    n_bytes: int
    verified: bool
    """False: no container, so there was nothing to compare the bytes with."""


class Block(NamedTuple):
    """One read: bytes of the source, and the chunks in them."""

    offset: int
    n_bytes: int
    chunks: tuple[int, ...] = ()
    """Their numbers; each begins and ends in the block."""


def copy_to_path(
    source: Source, path: str, options: Options | None = None, progress: Progress = lambda done, total: None
) -> Copied:
    """Copy to a path, which is replaced whole. As `copy_to`."""
    return copy_to(source, open_sink(path), options, progress)


def copy_to_object(
    source: Source,
    store: Store,
    key: str,
    options: Options | None = None,
    progress: Progress = lambda done, total: None,
) -> Copied:
    """Copy to an object of a store, which is replaced; the caller closes the store. As `copy_to`."""
    return copy_to(source, ObjectSink(store, key, owns_store=False), options, progress)


def copy_to(
    source: Source, sink: Sink, options: Options | None = None, progress: Progress = lambda done, total: None
) -> Copied:
    """Copy all bytes of a source to a sink and commit it. On any error the sink is abandoned.

    Takes 32 MiB for each of `options.connections`, within half of `options.host_budget_bytes`, and the index.

    Args:
        source: any file or object; the caller closes it.
        sink: where it goes; this function commits it.
        options: None for the defaults.
        progress: called on this thread with bytes done and bytes in all.

    Raises:
        CorruptCheckpointError: a container is damaged; all its damage is listed.
        UnsupportedFormatError: a container that only a newer version reads.
        StoreError, OSError: a store or a file failed.
    """
    options = options or Options()
    with committing(sink):
        reader = Reader.open(source, alone=True) if is_container(source) else None
        end = source.n_bytes if reader is None else reader.footer.payload_end
        blocks = blocks_of(end) if reader is None else blocks_of(end, reader.records)
        damage: list[Damage] = []
        for block, data in _read_ahead(source, blocks, options):
            if reader is not None:
                damage += _verify(reader, block, data)
            if not damage:  # after the first finding, reading goes on only to list further ones
                sink.write(data)
            progress(block.offset + block.n_bytes, source.n_bytes)
        if damage:
            raise CorruptCheckpointError(source.name, damage)
        if reader is not None:
            sink.write(_index(source, reader))
        progress(1, 1)
    return Copied(source.n_bytes, reader is not None)


def blocks_of(end: int, records: np.ndarray | None = None) -> list[Block]:
    """Blocks that cover the bytes from 0 to `end`, none of which cuts a chunk. Pure. records: None for bytes without chunks."""
    stored = [] if records is None else np.flatnonzero(records["stored_bytes"]).tolist()
    spans = sorted((int(records["offset"][n]), int(records["stored_bytes"][n]), n) for n in stored) if stored else []  # type: ignore[index]
    blocks: list[Block] = []
    start = position = 0
    chunks: list[int] = []
    for offset, n_bytes, number in spans:
        if offset < position:  # its bytes were read with another chunk's
            continue
        if offset + n_bytes - start > _BLOCK_BYTES and offset > start:
            blocks.append(Block(start, offset - start, tuple(chunks)))
            start, chunks = offset, []
        chunks.append(number)
        position = offset + n_bytes
    if chunks:
        blocks.append(Block(start, position - start, tuple(chunks)))
        start = position
    return [*blocks, *(Block(at, min(_BLOCK_BYTES, end - at)) for at in range(start, end, _BLOCK_BYTES))]


def _read_ahead(source: Source, blocks: list[Block], options: Options) -> Iterator[tuple[Block, U8]]:
    threads = max(1, min(options.connections, options.host_budget_bytes // (4 * _BLOCK_BYTES), len(blocks)))
    calls = (functools.partial(_read, source, block.offset, block.n_bytes) for block in blocks)
    return zip(blocks, in_parallel(calls, threads, "fastckpt-cp"), strict=True)


def _read(source: Source, offset: int, n_bytes: int) -> U8:
    out = np.empty(n_bytes, np.uint8)
    try:
        source.read_into(offset, out)
    except EOFError as error:
        raise CorruptCheckpointError(
            source.name, [Damage("file", "length", f"{offset + n_bytes} bytes", str(error))]
        ) from error
    return out


def _verify(reader: Reader, block: Block, data: U8) -> list[Damage]:
    found = []
    for number in block.chunks:
        first, n_bytes = int(reader.records["offset"][number]), int(reader.records["stored_bytes"][number])
        expected = int(reader.records["crc64nvme"][number])
        actual = crc64nvme(data[first - block.offset : first - block.offset + n_bytes])
        if actual != expected:
            place = f"{reader.chunk_name(number)}, bytes {first}–{first + n_bytes}, crc64nvme"
            names = reader.tensors_of(number)
            found.append(Damage("payload", place, f"{expected:016x}", f"{actual:016x}", names))
    return found


def _index(source: Source, reader: Reader) -> U8:
    """Index and footer, which the reader has verified, read again as they lie, and verified again."""
    first = reader.footer.payload_end
    data = _read(source, first, source.n_bytes - first)
    damage = []
    for name in INDEX_PARTS:
        part = reader.footer.parts[name]
        found = digest(data[part.offset - first : part.offset - first + part.n_bytes])
        if found != part.digest:
            place = f"bytes {part.offset}–{part.offset + part.n_bytes}, digest"
            damage.append(Damage(name, place, part.digest.hex(), found.hex()))
    if damage:
        raise CorruptCheckpointError(source.name, damage)
    return data


__all__ = ["Block", "Copied", "blocks_of", "copy_to", "copy_to_object", "copy_to_path"]

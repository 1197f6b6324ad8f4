"""An open container: its index, checked completely, and its chunks, verified one by one.

The one place where stored bytes become raw bytes: crc before the decoder sees a frame, digest after it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from fastckpt import codec
from fastckpt._types import U8
from fastckpt.errors import (
    CorruptCheckpointError,
    Damage,
    ObjectNotFoundError,
    TooLargeError,
    UnsupportedFormatError,
)
from fastckpt.format import container, directory, directory_reader, records
from fastckpt.format.container import (
    FOOTER_BYTES,
    HEADER_BYTES,
    INDEX_PARTS,
    MAGIC,
    MIN_BYTES,
    READ_SELF_CONTAINED,
    READ_SHARED,
)
from fastckpt.format.digest import crc64nvme, digest
from fastckpt.format.directory import FileEntry
from fastckpt.format.element_types import NUMPY_PREFIX
from fastckpt.format.shares import shared_numbers, stretch_of
from fastckpt.format.tensor_names import dotted
from fastckpt.host import cycle_collector
from fastckpt.kernels.transform import HAS_BASE, Transform, transform_name
from fastckpt.reading.chain_rooms import ChainRooms
from fastckpt.reading.chains import Chain, bases_of, plan_chain
from fastckpt.reading.sources import Source


class StoredPiece(NamedTuple):
    """A piece of a storage, and its place in a chunk."""

    chunk: int
    offset: int
    """Offset in the chunk's raw bytes."""
    position: int
    """Offset in the storage."""
    n_bytes: int


class Reader:
    """A container whose header, footer and index have been read and checked.

    `read_chunk` may be called from several threads at once. Does not own the source.
    """

    def __init__(
        self,
        source: Source,
        start: int,
        footer: container.Footer,
        open_file: Callable[[FileEntry], Source] | None = None,
    ) -> None:
        """open_file: makes the sources of a vote's packs; None: the container is self-contained."""
        self.source = source
        self.start = start
        """The container's first byte in the source; offsets in the index are relative to it."""
        self.footer = footer
        self._self_contained = open_file is None
        parts = self._read_index()
        self.skeleton = parts["skeleton"]
        self.records = records.unpack(parts["records"])
        self.files = directory.parse_file_table(parts["file table"], open_file is None, source.name)
        """Other files that hold chunks."""
        self.sources = [source, *(open_file(file) for file in self.files)] if open_file else [source]
        """Where stored bytes are read: that of the index itself, then one for each of `files`."""
        self._check_records()
        with cycle_collector.held_off():
            self.directory = directory_reader.parse(parts["directory"], self.records["raw_bytes"], source.name)
        _check_shares(self)
        self._scratch = threading.local()

    @classmethod
    def open(cls, source: Source, *, alone: bool) -> Reader:
        """Read and check the index.

        alone: the source must be exactly one container, from its first byte to its last. Otherwise it may hold several containers in a row,
        and the first is opened. CorruptCheckpointError (all findings) or UnsupportedFormatError.
        """
        start, footer = _find_footer(source, alone)
        if not footer.header.read_features & READ_SELF_CONTAINED:
            raise UnsupportedFormatError(
                f"{source.name} refers to other files: it is part of a repository, not a file to load"
            )
        head = _read(source, start, HEADER_BYTES, "header")
        if head != footer.header_bytes:
            container.parse_header(head, source.name)  # raises the error for a damaged header, if it is damaged
            damage = Damage("header", "bytes 0–64", "the copy in the footer", "another header")
            raise CorruptCheckpointError(source.name, [damage])
        return cls(source, start, footer)

    @classmethod
    def open_vote(cls, source: Source, open_file: Callable[[FileEntry], Source]) -> Reader:
        """Read and check a vote: an index whose chunks are in packs. Errors as those of `open`."""
        start, footer = _find_footer(source, alone=True)
        if footer.header.read_features & READ_SELF_CONTAINED:
            damage = Damage("header", "read features", "not SELF_CONTAINED (a vote)", "SELF_CONTAINED")
            raise CorruptCheckpointError(source.name, [damage])
        if _read(source, start, HEADER_BYTES, "header") != footer.header_bytes:
            damage = Damage("header", "bytes 0–64", "the copy in the footer", "another header")
            raise CorruptCheckpointError(source.name, [damage])
        return cls(source, start, footer, open_file)

    def _read_index(self) -> dict[str, bytes]:
        first = self.footer.payload_end
        data = _read(self.source, self.start + first, self.footer.container_bytes - FOOTER_BYTES - first, "directory")
        view = memoryview(data)
        parts, damage = {}, []
        for name in INDEX_PARTS:
            entry = self.footer.parts[name]
            part = view[entry.offset - first : entry.offset - first + entry.n_bytes]
            found = digest(part)
            if found != entry.digest:
                place = f"bytes {entry.offset}–{entry.offset + entry.n_bytes}, digest"
                damage.append(Damage(name, place, entry.digest.hex(), found.hex()))
            parts[name] = bytes(part)
        if damage:
            raise CorruptCheckpointError(self.source.name, damage)
        return parts

    def _check_records(self) -> None:
        lengths = None if self._self_contained else [file.n_bytes for file in self.files]
        damage = records.check(self.records, self.footer.payload_end, lengths)
        if damage:
            raise CorruptCheckpointError(self.source.name, damage)

    @property
    def holds_arrays(self) -> bool:
        """Whether some storages are NumPy arrays."""
        return any(storage.dtype.startswith(NUMPY_PREFIX) for storage in self.directory.storages)

    def require_readable(self) -> None:
        """UnsupportedFormatError if any chunk has a transform that this version does not read; names chunks and tensors."""
        numbers = records.unsupported(self.records)
        if numbers:
            names = sorted({transform_name(int(self.records["transform"][n])) for n in numbers})
            affected = [name for n in numbers for name in self.tensors_of(n)]
            raise UnsupportedFormatError(
                f"{self.source.name} needs a newer fastckpt: {len(numbers)} chunks use the transform {', '.join(names)}"
                + (f" (for {', '.join(affected[:3])}{' …' if len(affected) > 3 else ''})" if affected else "")
                + ". Upgrade with `pip install -U fastckpt-engine`"
            )

    def pieces(self, storage: int) -> Iterator[StoredPiece]:
        """What a storage is made of, in order; of one with shares, what this rank has of it."""
        raw, entry = self.records["raw_bytes"], self.directory.storages[storage]
        start, own_bytes = stretch_of(entry.shares, self.directory.rank, entry.n_bytes)
        position = start
        for extent in entry.extents or ():
            chunk, offset, left = extent
            while left:
                n_bytes = min(left, int(raw[chunk]) - offset)
                yield StoredPiece(chunk, offset, position, n_bytes)
                chunk, offset, left, position = chunk + 1, 0, left - n_bytes, position + n_bytes
        assert position in (start, start + own_bytes), storage

    @cached_property
    def storages_of_chunk(self) -> list[list[int]]:
        """Numbers of the storages that need each chunk: for their own bytes, or for those of chunks that are relative to it."""
        found: list[list[int]] = [[] for _ in range(len(self.records))]
        for storage in range(len(self.directory.storages)):
            for piece in self.pieces(storage):
                found[piece.chunk].append(storage)
        for row, bases in reversed(bases_of(self.records).items()):
            for base in bases:
                found[base] = sorted({*found[base], *found[row]})
        return found

    @cached_property
    def names_of_storage(self) -> list[list[str]]:
        """Dotted names of each storage's tensors; "storage 7" for one without a name."""
        found: list[list[str]] = [[] for _ in self.directory.storages]
        for tensor in self.directory.tensors:
            found[tensor.storage].append(dotted(tensor.name))
        return [names or [f"storage {number}"] for number, names in enumerate(found)]

    def tensors_of(self, chunk: int) -> tuple[str, ...]:
        """Dotted names of the tensors that need a chunk; storages without a name as "storage 7"."""
        storages = sorted(set(self.storages_of_chunk[chunk]))
        return tuple(name for n in storages for name in self.names_of_storage[n])

    def chunk_name(self, number: int) -> str:
        """What people call a chunk."""
        return f"chunk {number}"

    def tensors_of_file(self, file: int) -> tuple[str, ...]:
        """Names of the tensors that need a file of the file table. file: its number; the first is 1."""
        found = (name for n in np.flatnonzero(self.records["file"] == file) for name in self.tensors_of(int(n)))
        return tuple(dict.fromkeys(found))

    def read_chunk(self, chunk: int, out: U8, stored: U8 | None = None) -> Damage | None:
        """Read, verify and decode one chunk into `out` (as long as its raw bytes). Returns the damage, if there is any.

        stored: its stored bytes, if they have been read already. Any thread. During the call it needs at most twice the chunk's bytes
        besides `out`, and what its chain needs.
        """
        if Transform(int(self.records["transform"][chunk])) not in HAS_BASE:
            return self._read_row(chunk, out, stored, None)
        try:
            chain = plan_chain(chunk, self.records)
        except TooLargeError as error:
            return self._damage(chunk, f"{self.chunk_name(chunk)}, base", "bases that a writer makes", str(error))
        return self.read_chain(chain, {chunk: out}, {} if stored is None else {chunk: stored})

    def read_chain(self, chain: Chain, places: Mapping[int, U8], stored: Mapping[int, U8]) -> Damage | None:
        """Read, verify and decode a chain, one row after another. Returns the damage of the first row that has any.

        Args:
            chain: of this index.
            places: where its wanted chunks belong; nothing else is there yet.
            stored: stored bytes of rows that have been read already.
        """
        rooms = ChainRooms(chain, self.records, places)
        for link in chain.links:
            damage = self._read_row(link.row, rooms.out(link), stored.get(link.row), rooms.base(link))
            if damage is not None:
                return damage
            rooms.free(link)
        return None

    def _read_row(self, row: int, out: U8, stored: U8 | None, base: U8 | None) -> Damage | None:
        damage = self._try_row(row, out, stored, base)
        if damage is None or stored is not None or not self.sources[int(self.records["file"][row])].doubt():
            return damage
        return self._try_row(row, out, None, base)  # the damage may have been that of a copy

    def _try_row(self, row: int, out: U8, stored: U8 | None, base: U8 | None) -> Damage | None:
        record = self.records[row]
        place = self.chunk_name(row)
        n_stored = int(record["stored_bytes"])
        if n_stored:
            first, file = int(record["offset"]), int(record["file"])
            place += f", bytes {first}–{first + n_stored}" + (f" of {self.files[file - 1].key}" if file else "")
        if stored is None:
            try:
                stored = out if record["transform"] == Transform.RAW else self._scratch_of(n_stored)
                if n_stored:
                    self.sources[int(record["file"])].read_into(position_of(self, record), stored)
            except (EOFError, ObjectNotFoundError) as error:
                return self._damage(row, place, f"{n_stored} stored bytes", str(error))
        return self._decode_row(row, place, stored, out, base)

    def _decode_row(self, row: int, place: str, stored: U8, out: U8, base: U8 | None) -> Damage | None:
        record = self.records[row]
        # Checked before decoding, so only a deliberately wrong frame reaches the decoder, never damage.
        if stored.size and crc64nvme(stored) != int(record["crc64nvme"]):
            found = f"{crc64nvme(stored):016x}"
            return self._damage(row, f"{place}, crc64nvme", f"{int(record['crc64nvme']):016x}", found)
        lane_bytes, pack_bits = int(record["lane_bytes"]), int(record["pack_bits"])
        transform = Transform(int(record["transform"]))
        try:
            found_digest = codec.decode(
                transform, lane_bytes, pack_bits, record["parameter"].tobytes(), stored, out, base
            )
        except codec.CodecError as error:
            return self._damage(row, place, error.expected, error.found)
        if found_digest != record["digest"].tobytes():
            return self._damage(row, f"{place}, digest", record["digest"].tobytes().hex(), found_digest.hex())
        return None

    def _damage(self, chunk: int, place: str, expected: str, found: str) -> Damage:
        record = self.records[chunk]
        file = int(record["file"])
        stored = (self.files[file - 1].key, int(record["offset"])) if file else None
        return Damage("payload", place, expected, found, self.tensors_of(chunk), stored)

    def _scratch_of(self, n_bytes: int) -> U8:
        """This thread's buffer for stored bytes: allocating fresh pages for every chunk would cost as much as reading it."""
        buffer: U8 | None = getattr(self._scratch, "buffer", None)
        if buffer is None or buffer.size < n_bytes:
            buffer = self._scratch.buffer = np.empty(n_bytes, np.uint8)
        return buffer[:n_bytes]


def position_of(reader: Reader, record: Any) -> int:
    """Where the stored bytes of a record begin in their source."""
    return int(record["offset"]) + (0 if record["file"] else reader.start)


def _check_shares(reader: Reader) -> None:
    shared, features = shared_numbers(reader.directory.storages), reader.footer.header.read_features
    if bool(shared) != bool(features & READ_SHARED):
        expected = f"{'' if shared else 'not '}SHARED (storages with shares: {len(shared)})"
        raise CorruptCheckpointError(
            reader.source.name, [Damage("header", "read features", expected, f"{features:#x}")]
        )


def is_container(source: Source) -> bool:
    """Whether the source is a container, or was one before it was damaged: there is a magic number at its beginning or end."""
    ends = bytearray(min(len(MAGIC), source.n_bytes)), bytearray(min(len(MAGIC), source.n_bytes))
    source.read_into(0, ends[0])
    source.read_into(source.n_bytes - len(ends[1]), ends[1])
    return MAGIC in map(bytes, ends)


def _read(source: Source, offset: int, n_bytes: int, part: str) -> bytes:
    data = bytearray(n_bytes)
    try:
        source.read_into(offset, data)
    except EOFError as error:
        raise CorruptCheckpointError(source.name, [Damage(part, "end", f"{n_bytes} bytes", str(error))]) from error
    return bytes(data)


def _find_footer(source: Source, alone: bool) -> tuple[int, container.Footer]:
    """The start of the first container in the source, and its footer."""
    end = source.n_bytes
    while True:
        if end < MIN_BYTES:
            damage = Damage(
                "footer",
                "whole file" if end == source.n_bytes else f"byte {end}",
                f"at least {MIN_BYTES} bytes",
                str(end),
            )
            raise CorruptCheckpointError(source.name, [damage])
        footer = container.parse_footer(_read(source, end - FOOTER_BYTES, FOOTER_BYTES, "footer"), end, source.name)
        start = end - footer.container_bytes
        if start == 0:
            return 0, footer
        if alone:
            expected = f"{footer.container_bytes} bytes, as the footer says"
            damage = Damage("footer", "container length", expected, f"a file of {source.n_bytes} bytes")
            raise CorruptCheckpointError(source.name, [damage])
        end = start


def affected(damage: Sequence[Damage]) -> tuple[str, ...]:
    """All tensors that the damage affects, each once."""
    return tuple(dict.fromkeys(name for item in damage for name in item.tensors))


def storage_bytes(reader: Reader) -> int:
    """Host memory that the storages of a container need when it is loaded."""
    return sum(s.n_bytes for s in reader.directory.storages if s.extents is not None)


def summary(reader: Reader) -> dict[str, Any]:
    """Sizes of a container, for `ls` and `show`."""
    return {
        "container_bytes": reader.footer.container_bytes,
        "raw_bytes": storage_bytes(reader),
        "chunks": len(reader.records),
        "tensors": len(reader.directory.tensors),
        "storages": len(reader.directory.storages),
    }

"""Cuts storages into chunks (docs/format.md, section 8). Pure: from sizes and names to pieces.

large storage  ──cut──→  chunk chunk chunk
small storages ──pack─→  bundle (same element type, role, requires_grad, device)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from fastckpt.format.directory import Extent
from fastckpt.format.element_types import ElementType
from fastckpt.format.tensor_names import Name, canonical
from fastckpt.kernels.transform import MAX_CHUNK_ELEMENTS, MAX_RAW_BYTES

BUNDLE_BYTES = 1 << 20


class StorageShape(NamedTuple):
    """Everything that decides where a storage is cut. `number` is its place in the directory."""

    number: int
    n_bytes: int
    element: ElementType
    name: Name | None = None
    """Its first name in canonical order; None if it has no name."""
    role: str = ""
    """What an optimizer keeps it for, such as exp_avg; "" of all other storages."""
    requires_grad: bool = False
    location: str = ""
    """Its location. A bundle never mixes devices, so that its copy is one transfer."""
    first_element: int = 0
    """Where it starts in the flat order of its global tensor, if it is a contiguous part of one."""
    own: tuple[int, int] | None = None
    """First byte and length of what is cut of it: this rank's share. None: all of it."""

    @property
    def stretch(self) -> tuple[int, int]:
        """First byte and length of what is cut."""
        return (0, self.n_bytes) if self.own is None else self.own


class Piece(NamedTuple):
    """A stretch of one storage's bytes."""

    storage: int
    offset: int
    n_bytes: int


class Chunk(NamedTuple):
    """The pieces whose bytes, joined, form one chunk; all have one element type."""

    pieces: tuple[Piece, ...]
    element: ElementType
    role: str = ""
    """That of its storages: see `StorageShape`."""

    @property
    def n_bytes(self) -> int:
        """Raw bytes of the chunk."""
        return sum(piece.n_bytes for piece in self.pieces)


class Cuts(NamedTuple):
    """Chunks in the order of their records, and by its number the extents of each storage, or of this rank's share of it."""

    chunks: list[Chunk]
    extents: dict[int, tuple[Extent, ...]]


def chunk_bytes(element: ElementType) -> int:
    """Raw bytes of a full chunk: 1 Mi elements, at most 4 MiB, and whole elements."""
    return min(MAX_CHUNK_ELEMENTS, MAX_RAW_BYTES // element.n_bytes) * element.n_bytes


def cut(storages: Iterable[StorageShape]) -> Cuts:
    """Cut large storages and bundle small ones, in canonical order of names; nameless storages come last, ordered by number."""
    ordered = sorted(storages, key=_order)
    groups: list[tuple[Chunk, ...]] = []
    first_of_group: list[tuple[bool, bool, object, int]] = []
    bundles: dict[tuple[str, str, bool, str, bool], list[StorageShape]] = defaultdict(list)
    for storage in ordered:
        _, own_bytes = storage.stretch
        if not own_bytes:
            continue
        if storage.n_bytes >= BUNDLE_BYTES or own_bytes < storage.n_bytes:
            groups.append(tuple(_cut_one(storage)))
            first_of_group.append(_order(storage))
        else:
            alike = storage.element.name, storage.role, storage.requires_grad, storage.location
            bundles[(*alike, storage.own is not None)].append(storage)  # others need not read what is this rank's alone
    for members in bundles.values():
        for bundle in _fill(members):
            pieces = tuple(Piece(storage.number, 0, storage.n_bytes) for storage in bundle)
            groups.append((Chunk(pieces, bundle[0].element, bundle[0].role),))
            first_of_group.append(_order(bundle[0]))
    chunks = [chunk for _, group in sorted(zip(first_of_group, groups, strict=True)) for chunk in group]
    return Cuts(chunks, _extents(ordered, chunks))


def _order(storage: StorageShape) -> tuple[bool, bool, object, int]:
    """State of optimizers comes after all other tensors with names: a restore may let it come last."""
    return (storage.name is None, bool(storage.role), canonical(storage.name or ()), storage.number)


def _cut_one(storage: StorageShape) -> Iterator[Chunk]:
    step = chunk_bytes(storage.element)
    start, own_bytes = storage.stretch
    end = start + own_bytes
    # Multiples of the step in the global order: another number of ranks then cuts at the same places.
    stop = start + step - (storage.first_element * storage.element.n_bytes + start) % step
    while start < end:
        stop = min(stop, end)
        yield Chunk((Piece(storage.number, start, stop - start),), storage.element, storage.role)
        start, stop = stop, stop + step


def _fill(members: Sequence[StorageShape]) -> Iterator[list[StorageShape]]:
    bundle: list[StorageShape] = []
    size = 0
    for storage in members:
        if bundle and size + storage.n_bytes > BUNDLE_BYTES:
            yield bundle
            bundle, size = [], 0
        bundle.append(storage)
        size += storage.n_bytes
    if bundle:
        yield bundle


def _extents(storages: Iterable[StorageShape], chunks: Sequence[Chunk]) -> dict[int, tuple[Extent, ...]]:
    extents: dict[int, tuple[Extent, ...]] = {storage.number: () for storage in storages}
    for record, chunk in enumerate(chunks):
        offset = 0
        for piece in chunk.pieces:
            if not extents[piece.storage]:
                extents[piece.storage] = (Extent(record, offset, piece.n_bytes),)
            else:  # the next chunk of a large storage: its record follows the previous one, so the extent just grows
                (extent,) = extents[piece.storage]
                extents[piece.storage] = (extent._replace(n_bytes=extent.n_bytes + piece.n_bytes),)
            offset += piece.n_bytes
    return extents

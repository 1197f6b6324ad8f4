"""Tensors put together from stretches of what several ranks have saved: of all chunks only those are read that a stretch lies in.

    targets ─→ moves (strided views of saved storages) ─→ storages of a reader that exists in memory only ─→ StorageLoader ─→ tensors

A target whose moves are contiguous, there and here, is read straight into its memory; for any other, the stretch around each move is read
first, and copied from there.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.storage import UntypedStorage

from fastckpt.errors import CorruptCheckpointError, Damage
from fastckpt.format.directory import Directory, Extent, StorageEntry, TensorEntry
from fastckpt.format.element_types import element_type
from fastckpt.format.shares import Claim, claims_of
from fastckpt.format.tensor_names import Name, dotted
from fastckpt.format.wholes import Block, Box, is_covered, overlaps
from fastckpt.host.pages import fresh_pages
from fastckpt.options import Options
from fastckpt.reading.chunk_reader import Reader
from fastckpt.reading.gathered import Gathered
from fastckpt.reading.merged_reader import MergedReader
from fastckpt.reading.reads import Reads
from fastckpt.reading.storage_loader import StorageLoader, check_size

_MAPPED_BYTES = 1 << 20
_BY_WIDTH = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}
"""Types that torch copies exactly, by their bytes: it has no copy for some of its newer ones."""


class Source(NamedTuple):
    """A strided view of a storage that a rank's vote lists. All numbers are elements."""

    rank: int
    storage: int
    offset: int
    stride: tuple[int, ...]
    shape: tuple[int, ...]


class Move(NamedTuple):
    """A source, and the place in the target of its first element."""

    source: Source
    to: tuple[int, ...]


class Target(NamedTuple):
    """A tensor that is put together. The moves cover it, each element once."""

    dtype: str
    shape: tuple[int, ...]
    moves: tuple[Move, ...]
    name: Name = ()
    """For errors."""


class _Stretch(NamedTuple):
    """Bytes of a storage that a rank's vote lists."""

    rank: int
    storage: int
    start: int
    stop: int


def moves_of(blocks: Sequence[Block], boxes: Iterable[tuple[Box, tuple[int, ...]]]) -> Iterator[Move]:
    """Where wanted blocks of a whole come from. Nothing for a block that the saved ones do not make up.

    Args:
        blocks: what was saved of the whole.
        boxes: what is wanted of it, and where in the target each block begins.
    """
    for box, to in boxes:
        found = list(overlaps(blocks, box))
        if not is_covered(found, box):
            continue
        for one in found:
            start = one.block.offset + sum(at * step for at, step in zip(one.within, one.block.stride, strict=True))
            source = Source(one.block.rank, one.block.storage, start, one.block.stride, one.shape)
            yield Move(source, tuple(a + b for a, b in zip(to, one.to, strict=True)))


def is_whole(target: Target) -> bool:
    """Whether the moves of a target make up all of it."""
    return sum(math.prod(move.source.shape) for move in target.moves) == math.prod(target.shape)


def as_computed(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The values of a tensor whose bytes were saved before torch had computed them: conjugates and negatives are lazy, as `like` is."""
    if like.is_conj():
        tensor = tensor.conj().resolve_conj()
    return -tensor if like.is_neg() else tensor


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a contiguous tensor."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def assemble(
    readers: Mapping[int, Reader],
    targets: Sequence[Target],
    options: Options,
    threads: int,
    *,
    stay: bool = True,
) -> Iterator[torch.Tensor]:
    """Read and verify what the targets need. Yields their tensors, contiguous, in host memory, in order.

    Args:
        readers: the vote of each rank that a source names, and of the owners of shares in these storages (`ranks_needed`); or one
            container, whatever its rank is called.
        targets: what to put together.
        options: `max_load_bytes` is for all targets together.
        threads: number of threads that read and decode.
        stay: whether all tensors stay in host memory. If not, few of them are read before they are asked for.

    Raises:
        CorruptCheckpointError: lists all damage, with the names of the targets; before anything is yielded where a share is missing.
        TooLargeError, UnsupportedFormatError: before anything is read.
    """
    layout = _Layout(readers)
    plans = [layout.plan(target) for target in targets]
    if not any(plan.storages for plan in plans):
        yield from (torch.empty(target.shape, dtype=getattr(torch, target.dtype), device="cpu") for target in targets)
        return
    reader = layout.reader()
    check_size(reader, sum(storage.n_bytes for storage in reader.directory.storages), options.max_load_bytes)
    reader.require_readable()
    # What is read on the way to a target is needed for a moment only.
    reads = Reads.of(options)
    window = None if stay and all(plan.is_direct for plan in plans) else reads.window_bytes
    with StorageLoader(reader, min(threads, options.load_threads), window, reads=reads) as loader:
        for target, plan in zip(targets, plans, strict=True):
            yield _made(target, plan, loader)


def ranks_needed(directories: Mapping[int, Directory], targets: Sequence[Target]) -> set[int]:
    """The ranks whose votes `assemble` has to have. directories: at least of those that a source names."""
    found = set()
    for target in targets:
        for source, _ in target.moves:
            shares = directories[source.rank].storages[source.storage].shares
            found |= {share.rank for share in shares} if shares else {source.rank}
    return found | {source.rank for target in targets for source, _ in target.moves}


class _Plan(NamedTuple):
    """Where the loader has what a target needs."""

    is_direct: bool
    """One storage is the target."""
    storages: tuple[int, ...]
    """One for each move that has elements, unless it is direct."""


class _Layout:
    """Lists the storages of a reader that exists in memory only. Used by one thread."""

    def __init__(self, readers: Mapping[int, Reader]) -> None:
        self._readers = readers
        self._claims: dict[int, dict[Claim, int]] = {}
        """What each rank's vote says of its storages with shares."""
        self._claimed: dict[int, dict[int, Claim]] = {}
        """The other way."""
        self._ends = {rank: np.cumsum(reader.records["raw_bytes"], dtype=np.int64) for rank, reader in readers.items()}
        self._entries: list[tuple[Target, int, list[_Stretch]]] = []
        """Of each storage: for what it is read, its bytes, and what it is made of."""
        self._damage: list[Damage] = []

    def plan(self, target: Target) -> _Plan:
        element = element_type(target.dtype)
        assert element is not None, target.dtype
        width = element.n_bytes
        moves = [move for move in target.moves if 0 not in move.source.shape]
        if not moves:
            return _Plan(False, ())
        runs = [_run(move, target.shape) for move in moves]
        if all(run is not None for run in runs):
            ordered = sorted((run, move.source) for run, move in zip(runs, moves, strict=True) if run is not None)
            at = 0
            for (start, length), _ in ordered:
                if start != at:
                    break
                at += length
            if at == math.prod(target.shape):
                stretches = [
                    _Stretch(source.rank, source.storage, source.offset * width, (source.offset + length) * width)
                    for (_, length), source in ordered
                ]
                return _Plan(True, (self._add(target, stretches),))
        return _Plan(False, tuple(self._add(target, [_hull(move.source, width)]) for move in moves))

    def _add(self, target: Target, stretches: list[_Stretch]) -> int:
        resolved = [part for stretch in stretches for part in self._owned(target, stretch)]
        self._entries.append((target, sum(part.stop - part.start for part in stretches), resolved))
        return len(self._entries) - 1

    def _owned(self, target: Target, stretch: _Stretch) -> Iterator[_Stretch]:
        """The same bytes as those have them who wrote them."""
        listed = self._readers[stretch.rank].directory
        shares = listed.storages[stretch.storage].shares
        if not shares:
            yield stretch
            return
        self._claims_of(stretch.rank)
        claim = self._claimed[stretch.rank][stretch.storage]
        at = 0
        for share in shares:
            start, stop = max(stretch.start, at), min(stretch.stop, at + share.n_bytes)
            at += share.n_bytes
            if start >= stop:
                continue
            there = self._claims_of(share.rank).get(claim) if share.rank in self._readers else None
            if there is None:
                place = f"{dotted(claim.name)}, the share of rank {share.rank}"
                found = "no such storage, or another" if share.rank in self._readers else "no vote of that rank"
                self._damage.append(Damage("vote", place, str(claim), found, (dotted(target.name),)))
            else:
                yield _Stretch(share.rank, there, start, stop)

    def _claims_of(self, rank: int) -> dict[Claim, int]:
        if rank not in self._claims:
            found = self._claims[rank] = claims_of(self._readers[rank].directory)
            self._claimed[rank] = {number: claim for claim, number in found.items()}
        return self._claims[rank]

    def reader(self) -> Reader:
        """The reader of all storages that were planned. CorruptCheckpointError: shares that are missing."""
        own = self._readers[min(self._readers)]
        if self._damage:
            raise CorruptCheckpointError(own.source.name, self._damage)
        by_rank: dict[int, list[Extent]] = defaultdict(list)
        pieces = []
        for _, _, stretches in self._entries:
            own_pieces = []
            for stretch in stretches:
                extents = list(self._extents(stretch))
                own_pieces.append((stretch.rank, len(by_rank[stretch.rank]), len(extents)))
                by_rank[stretch.rank] += extents
            pieces.append(own_pieces)
        gathered = Gathered(own, whole=False)
        moved = {rank: gathered.take(rank, self._readers[rank], extents) for rank, extents in by_rank.items()}
        storages, tensors = [], []
        for number, ((target, n_bytes, _), parts) in enumerate(zip(self._entries, pieces, strict=True)):
            extents = [extent for rank, first, count in parts for extent in moved[rank][first : first + count]]
            if (
                sum(extent.n_bytes for extent in extents) != n_bytes
            ):  # what it lacks would be whatever lay in fresh memory
                raise ValueError(
                    f"{own.source.name} has no data of {dotted(target.name)}: it was saved as a meta tensor"
                )
            storages.append(StorageEntry("uint8", n_bytes, "cpu", tuple(extents)))
            tensors.append(TensorEntry(target.name, "uint8", (n_bytes,), (1,), 0, number, "tensor", False))
        listed = Directory(tuple(storages), tuple(tensors), None, 0, 1, {}, {}, None)
        return MergedReader(own, listed, gathered, 0)

    def _extents(self, stretch: _Stretch) -> Iterator[Extent]:
        """The same bytes by records."""
        reader, ends = self._readers[stretch.rank], self._ends[stretch.rank]
        raw = reader.records["raw_bytes"]
        entry = reader.directory.storages[stretch.storage]
        at = _first_byte(reader, stretch.storage)
        for record, offset, n_bytes in entry.extents or ():
            start, stop = max(stretch.start, at), min(stretch.stop, at + n_bytes)
            if start < stop:
                absolute = int(ends[record]) - int(raw[record]) + offset + start - at
                first = int(np.searchsorted(ends, absolute, "right"))
                yield Extent(first, absolute - (int(ends[first]) - int(raw[first])), stop - start)
            at += n_bytes


def _first_byte(reader: Reader, storage: int) -> int:
    """Where what a rank has of a storage begins in it."""
    at = 0
    for share in reader.directory.storages[storage].shares:
        if share.rank == reader.directory.rank:
            return at
        at += share.n_bytes
    return 0


def _run(move: Move, shape: tuple[int, ...]) -> tuple[int, int] | None:
    """First element and length in the target, if a move is one contiguous run there and in its source."""
    block = move.source.shape
    step = 1
    for size, stride in zip(reversed(block), reversed(move.source.stride), strict=True):
        if size != 1 and stride != step:
            return None
        step *= size
    is_cut = False
    for size, whole in zip(reversed(block), reversed(shape), strict=True):
        if is_cut and size != 1:
            return None
        is_cut = is_cut or size != whole
    at = 0
    for start, whole in zip(move.to, shape, strict=True):
        at = at * whole + start
    return at, math.prod(block)


def _hull(source: Source, width: int) -> _Stretch:
    """All bytes from the first element of a view to its last."""
    return _Stretch(source.rank, source.storage, source.offset * width, (source.offset + _span(source)) * width)


def _span(source: Source) -> int:
    return 1 + sum((size - 1) * stride for size, stride in zip(source.shape, source.stride, strict=True))


def _made(target: Target, plan: _Plan, loader: StorageLoader) -> torch.Tensor:
    dtype = getattr(torch, target.dtype)
    if plan.is_direct:
        return _over(loader.take(plan.storages[0]), dtype, target.shape, contiguous(target.shape))
    whole = _new(target.shape, dtype)
    bits = _BY_WIDTH[dtype.itemsize]
    moves = [move for move in target.moves if 0 not in move.source.shape]
    for (source, to), number in zip(moves, plan.storages, strict=True):
        block = _over(loader.take(number), bits, source.shape, source.stride)
        place = tuple(slice(start, start + size) for start, size in zip(to, source.shape, strict=True))
        whole.view(bits)[place].copy_(block)
    return whole


def _new(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Memory straight from the kernel, where it is much: what threads take from malloc may never be given back. All zeros: blocks of
    hostile votes may overlap, and leave something out.
    """
    n_bytes = math.prod(shape) * dtype.itemsize
    if n_bytes < _MAPPED_BYTES:
        return torch.zeros(shape, dtype=_BY_WIDTH[dtype.itemsize], device="cpu").view(dtype)
    return _over(torch.from_numpy(fresh_pages(n_bytes)).untyped_storage(), dtype, shape, contiguous(shape))


def _over(storage: UntypedStorage, dtype: torch.dtype, shape: tuple[int, ...], stride: tuple[int, ...]) -> torch.Tensor:
    return torch.empty(0, dtype=dtype, device="cpu").set_(storage, 0, shape, stride)


__all__ = ["Move", "Source", "Target", "as_computed", "assemble", "contiguous", "is_whole", "moves_of", "ranks_needed"]

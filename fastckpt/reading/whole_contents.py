"""The checkpoint of many ranks as one: every tensor whole, read by whoever wants it, without any rank of the job.

What each rank had for itself (generators, positions in data) is no tensor of the whole: it is known by name, and by the ranks that had it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch.storage import UntypedStorage

from fastckpt.errors import NoCheckpointError, RestoreError, TooLargeError
from fastckpt.format.directory import Directory, StorageEntry, TensorEntry
from fastckpt.format.element_types import element_type
from fastckpt.format.tensor_names import Name, dotted
from fastckpt.format.wholes import Whole, Wholes
from fastckpt.options import Options
from fastckpt.reading.alike import unlike
from fastckpt.reading.assembly import Move, Source, Target, contiguous, is_whole, moves_of
from fastckpt.reading.contents import Contents, OfContainer
from fastckpt.reading.lazy_views import lazy_views
from fastckpt.reading.ranks import Ranks, assemble_from

_NOTHING = StorageEntry("uint8", 0, "cpu", None)


class WholeContents:
    """See the module; a `reading.contents.Contents`. Used by one thread. Errors: UnreadableError, StoreError."""

    def __init__(self, ranks: Ranks, options: Options, name: str) -> None:
        """Reads the directories of all votes. name: where the checkpoint is, for errors."""
        self.ranks, self.options, self.name = ranks, options, name
        self.threads = options.load_threads
        wholes = Wholes()
        firsts: dict[tuple[int, int], StorageEntry] = {}
        """Storages of what was no DTensor, as the first rank lists them."""
        for rank, listed in ranks.directories():
            wholes.add(rank, listed)
            for entry in listed.tensors:
                whole = wholes.found.get(entry.name)
                if whole is not None and not whole.was_spread and whole.blocks[0].rank == rank:
                    firsts[rank, entry.storage] = listed.storages[entry.storage]
        self.wholes: Mapping[Name, Whole] = wholes.found
        self.directory, self._targets = _listed(wholes.found, firsts)
        self._has_lazy_views: dict[int, bool] = {}
        """By rank."""

    @property
    def summary(self) -> dict[str, Any]:
        storages = self.directory.storages
        self.ranks.open_votes(range(self.ranks.world))
        return {
            "container_bytes": self.ranks.stored_bytes,
            "raw_bytes": sum(storage.n_bytes for storage in storages if storage.extents is not None),
            "chunks": sum(len(self.ranks.vote(rank).records) for rank in range(self.ranks.world)),
            "tensors": len(self.directory.tensors),
            "storages": len(storages),
        }

    def ranks_of(self, name: Name) -> tuple[int, ...]:
        whole = self.wholes.get(name)
        if whole is None or not (whole.is_contradicted or whole.doubtful or _overlap(whole)):
            return ()
        is_common = not whole.is_contradicted and not _overlap(whole) and name not in self._unlike
        return () if is_common else tuple(whole.ranks)

    @cached_property
    def _unlike(self) -> set[Name]:
        """Of what several ranks have, and do not say that they have alike: the names of what is not."""
        doubtful = {n: whole for n, whole in self.wholes.items() if whole.doubtful and not _overlap(whole)}
        return unlike(self.ranks, doubtful, self.options, self.threads)

    def lazy_kinds_of(self, entry: TensorEntry) -> frozenset[str] | None:
        """None where one of the ranks that it is read from has any: opens their votes, which are needed anyway."""
        whole = self.wholes.get(entry.name)
        for rank in {block.rank for block in whole.blocks} if whole is not None else ():
            if rank not in self._has_lazy_views:
                self._has_lazy_views[rank] = lazy_views(self.ranks.vote(rank).skeleton) != {}
            if self._has_lazy_views[rank]:
                return None
        return frozenset()

    def require_fetchable(self, n_bytes: int) -> None:
        if n_bytes > self.options.max_load_bytes:
            raise TooLargeError(
                f"{self.name} says that it takes {n_bytes} bytes of memory; at most {self.options.max_load_bytes} may be allocated here. "
                "If you trust it, set FASTCKPT_MAX_LOAD_BYTES, or fetch single tensors with fastckpt.open"
            )

    def storages(self, numbers: Sequence[int], *, stay: bool = False) -> _Assembled:
        """Read some storages. stay: see `reading.assembly.assemble`."""
        with_data = [number for number in numbers if self.directory.storages[number].extents is not None]
        return _Assembled(self, with_data, stay)

    def target(self, number: int) -> Target:
        """What the bytes of a storage are put together from. RestoreError if no rank has saved some of them."""
        found = self._targets[number]
        if not is_whole(found):
            raise RestoreError(
                f"{self.name}: {dotted(found.name)} is not whole: its ranks have saved only some of {found.dtype} {list(found.shape)}"
            )
        return found

    def assemble(self, targets: Sequence[Target], *, stay: bool = False) -> Iterator[torch.Tensor]:
        return assemble_from(self.ranks, targets, self.options, self.threads, stay=stay)

    def close(self) -> None:
        """Does nothing: whoever opened the store closes it."""


def contents_of(ranks: Ranks, where: str, rank: int | None, options: Options) -> Contents:
    """What one rank had or, for None, all of them together. NoCheckpointError if there is no such rank."""
    world = ranks.world
    if rank is None and world > 1:
        return WholeContents(ranks, options, where)
    if not 0 <= (rank or 0) < world:
        raise NoCheckpointError(f"{where} has ranks 0 to {world - 1}: there is no rank {rank}")
    return OfContainer(ranks.whole(rank or 0), options)


class _Assembled:
    """Some storages of a whole checkpoint, taken in this order."""

    def __init__(self, contents: WholeContents, numbers: Sequence[int], stay: bool) -> None:
        self._contents, self._numbers = contents, iter(numbers)
        self._made = contents.assemble([contents.target(number) for number in numbers], stay=stay)

    def __enter__(self) -> _Assembled:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        close: Callable[[], None] = getattr(self._made, "close", lambda: None)
        close()

    def has_data(self, number: int) -> bool:
        return self._contents.directory.storages[number].extents is not None

    def take(self, number: int) -> UntypedStorage:
        assert next(self._numbers) == number
        return next(self._made).untyped_storage()


class _Key(NamedTuple):
    """Equal for two names of one storage."""

    of: Any
    shape: tuple[int, ...] = ()


def _listed(
    wholes: Mapping[Name, Whole], firsts: Mapping[tuple[int, int], StorageEntry]
) -> tuple[Directory, list[Target]]:
    """What a directory would list if one rank had saved all; and of each storage how it is put together."""
    numbers: dict[_Key, int] = {}
    storages: list[StorageEntry] = []
    targets: list[Target] = []
    tensors: list[TensorEntry] = []
    for name, whole in wholes.items():
        if whole.is_contradicted:
            shape = whole.shape
            entry = TensorEntry(name, whole.dtype, shape, contiguous(shape), 0, 0, whole.kind, whole.requires_grad)
            key, storage, target = _Key(name), _NOTHING, Target("uint8", (0,), (), name)
        elif whole.entry is not None:
            first, entry = whole.blocks[0], whole.entry
            storage = firsts[first.rank, first.storage]
            move = Move(Source(first.rank, first.storage, 0, (1,), (storage.n_bytes,)), (0,))
            key, target = _Key((first.rank, first.storage)), Target("uint8", (storage.n_bytes,), (move,), name)
        else:
            shape = whole.shape
            entry = TensorEntry(name, whole.dtype, shape, contiguous(shape), 0, 0, whole.kind, whole.requires_grad)
            moves = tuple(moves_of(whole.blocks, [((((0,) * len(shape)), shape), (0,) * len(shape))]))
            element = element_type(whole.dtype)
            assert element is not None, whole.dtype
            key = _Key(tuple(whole.blocks) or name, shape)
            target = Target(whole.dtype, shape, moves, name)
            storage = StorageEntry(whole.dtype, math.prod(shape) * element.n_bytes, whole.location, ())
        if key not in numbers:
            numbers[key] = len(storages)
            storages.append(storage if storage.extents is None else storage._replace(extents=(), shares=(), print=""))
            targets.append(target)
        tensors.append(entry._replace(storage=numbers[key], place=None))
    return Directory(tuple(storages), tuple(tensors)), targets


def _overlap(whole: Whole) -> bool:
    """Whether ranks have blocks of a DTensor that cannot be of one: they were cut in several ways."""
    return whole.was_spread and sum(math.prod(block.shape) for block in whole.blocks) > math.prod(whole.shape)


__all__ = ["WholeContents", "contents_of"]

"""One checkpoint that is being read: its commit, the votes of all ranks, and what lies where."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem

from fastckpt.errors import (
    CheckpointError,
    CorruptCheckpointError,
    Damage,
    NoCheckpointError,
    RestoreError,
    RetiredError,
    TooLargeError,
    UnreadableError,
)
from fastckpt.format.element_types import element_type
from fastckpt.format.repository_records import Commit
from fastckpt.format.tensor_names import dotted
from fastckpt.host.threads import WorkerPool
from fastckpt.integrations.dcp.layout import Layout, SavedTensor, dtype_of, layout_of
from fastckpt.options import Options
from fastckpt.reading.assembly import Move, Source, Target, assemble
from fastckpt.reading.chunk_reader import Reader
from fastckpt.repository.cached_store import cached
from fastckpt.repository.catalog import Catalog
from fastckpt.repository.commit import open_vote
from fastckpt.repository.repository import Repository
from fastckpt.store.base import Store
from fastckpt.store.open import open_store

_READS_AT_ONCE = 64
_BATCH_BYTES = 256 << 20
"""What is in host memory at a time on its way to the planner's tensors."""


class Opened:
    """See the module. Used by one thread."""

    def __init__(self, store: Store, catalog: Catalog, commit: Commit, readers: dict[int, Reader]) -> None:
        """store: closed by `close`."""
        self._store, self._catalog, self._commit, self._readers = store, catalog, commit, readers
        self.url = store.url
        self.layout = layout_of({rank: reader.directory for rank, reader in readers.items()}, store.url)

    def assemble(self, targets: Sequence[Target], options: Options) -> Iterator[torch.Tensor]:
        """Read and verify what targets need. Errors as those of `reading.assembly.assemble`."""
        return assemble(self._readers, targets, options, options.threads)

    def blame(self, error: CheckpointError) -> CheckpointError:
        """RetiredError if another checkpoint has replaced this one while it was read, else the error itself."""
        return self._catalog.blame(self._commit.checkpoint, error) if isinstance(error, UnreadableError) else error

    def close(self) -> None:
        """Let go of the store."""
        self._store.close()


def open_checkpoint(url: str, step: Any, cache_dir: str = "") -> Opened:
    """Open the checkpoint of a step, or "latest". NoCheckpointError, CorruptCheckpointError, StoreError."""
    store = cached(open_store(url), cache_dir)
    try:
        try:
            return _open(store, step)
        except RetiredError:  # replaced meanwhile: the newer one is there
            if not isinstance(step, str):
                raise
            return _open(store, step)
    except BaseException:
        store.close()
        raise


def _open(store: Store, step: Any) -> Opened:
    catalog = Catalog(Repository(store), checks_votes=False)
    choice = catalog.choose(step)
    if choice is None:
        raise NoCheckpointError(f"{store.url} has no checkpoint of fastckpt: nothing was ever committed there")
    commit = choice.commit
    try:
        return Opened(store, catalog, commit, _readers(store, commit))
    except UnreadableError as error:
        raise catalog.blame(commit.checkpoint, error) from error


def _readers(store: Store, commit: Commit) -> dict[int, Reader]:
    with contextlib.closing(WorkerPool(min(_READS_AT_ONCE, commit.world), "fastckpt-votes")) as pool:
        calls = [pool.submit(functools.partial(open_vote, store, commit.vote(rank))) for rank in range(commit.world)]
        return {rank: call.result() for rank, call in enumerate(calls)}


def block_of(layout: Layout, item: ReadItem, url: str) -> Target:
    """What an item of torch's load plan asks for. RestoreError if the checkpoint has nothing of the kind."""
    index = item.storage_index
    if item.type == LoadItemType.BYTE_IO:
        saved = layout.objects.get(index.fqn)
        if saved is None:
            raise _unknown(index.fqn, "object", url)
        return _bytes_of(saved.source, index.fqn)
    tensor = layout.tensors.get(index.fqn)
    whole = None if tensor is None or index.offset is None else tensor.blocks.get(tuple(index.offset))
    if tensor is None or whole is None:
        raise _unknown(index.fqn, f"block at {None if index.offset is None else list(index.offset)}", url)
    start, size = tuple(item.storage_offsets), tuple(item.lengths)
    fits = len(start) == len(size) == len(whole.shape)
    if not fits or any(a < 0 or n < 0 or a + n > m for a, n, m in zip(start, size, whole.shape, strict=True)):
        raise RestoreError(f"{index.fqn} of {url}: {list(size)} at {list(start)} of a block of {list(whole.shape)}")
    offset = whole.offset + sum(a * step for a, step in zip(start, whole.stride, strict=True))
    source = whole._replace(offset=offset, shape=size)
    return Target(tensor.dtype, size, (Move(source, (0,) * len(size)),), tensor.name)


def _bytes_of(source: Source, fqn: str) -> Target:
    return Target("uint8", source.shape, (Move(source, (0,)),), (fqn,))


def _unknown(fqn: str, what: str, url: str) -> RestoreError:
    return RestoreError(f"{url} has no {what} of {fqn!r}: the plan was not made from its metadata")


def batches(targets: Sequence[Target]) -> Iterator[Sequence[Target]]:
    """The targets in order, so many at a time as host memory should hold."""
    first, held = 0, 0
    for number, target in enumerate(targets):
        n_bytes = _bytes(target)
        if number > first and held + n_bytes > _BATCH_BYTES:
            yield targets[first:number]
            first, held = number, 0
        held += n_bytes
    if first < len(targets):
        yield targets[first:]


def _bytes(target: Target) -> int:
    element = element_type(target.dtype)
    assert element is not None, target.dtype
    return math.prod(target.shape) * element.n_bytes


def wholes_of(
    opened: Opened, options: Options, keys: Sequence[str] | None
) -> tuple[list[tuple[str, Target]], list[tuple[str, Target]]]:
    """Objects and whole tensors to read. TooLargeError; CorruptCheckpointError for tensors that their blocks do not cover."""

    def wanted(fqn: str) -> bool:
        return keys is None or any(fqn == key or fqn.startswith(f"{key}.") for key in keys)

    layout, damage = opened.layout, []
    objects = [(fqn, _bytes_of(saved.source, fqn)) for fqn, saved in layout.objects.items() if wanted(fqn)]
    tensors = []
    for fqn, saved in layout.tensors.items():
        if not wanted(fqn):
            continue
        dtype_of(saved.dtype, opened.url)
        if not _covers(saved):
            damage.append(
                Damage("directory", f"tensor {dotted(saved.name)!r}", "blocks that make up all of it", "others")
            )
        moves = tuple(Move(source, at) for at, source in saved.blocks.items())
        tensors.append((fqn, Target(saved.dtype, saved.shape, moves, saved.name)))
    if damage:
        raise CorruptCheckpointError(opened.url, damage)
    n_bytes = sum(_bytes(target) for _, target in [*objects, *tensors])
    if n_bytes > options.max_load_bytes:
        raise TooLargeError(
            f"{opened.url} needs {n_bytes} bytes; at most {options.max_load_bytes} may be allocated here. If you trust it, set "
            "FASTCKPT_MAX_LOAD_BYTES, or read some keys only"
        )
    return objects, tensors


def _covers(saved: SavedTensor) -> bool:
    """Whether the blocks make up the whole, each element once."""
    if sum(math.prod(source.shape) for source in saved.blocks.values()) != math.prod(saved.shape):
        return False
    first = np.array(list(saved.blocks), np.int64).reshape(len(saved.blocks), len(saved.shape))
    end = first + np.array([source.shape for source in saved.blocks.values()], np.int64).reshape(first.shape)
    return not any(
        bool(np.any(np.all((first[n] < end[n + 1 :]) & (first[n + 1 :] < end[n]), axis=1))) for n in range(len(first))
    )

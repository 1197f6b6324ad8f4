"""What several saved ranks hold alike, and what each of them had for itself.

Tensors are alike if they have the same bytes under the same name. Most are found alike by the digests of their chunks, and not read.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch

from fastckpt.format.element_types import NUMPY_PREFIX
from fastckpt.format.tensor_names import Name, key_of
from fastckpt.format.wholes import Block, Whole
from fastckpt.options import Options
from fastckpt.reading.assembly import Move, Source, Target
from fastckpt.reading.chunk_reader import Reader
from fastckpt.reading.object_loader import load_object
from fastckpt.reading.ranks import Ranks, assemble_from

Joins: TypeAlias = Callable[[Name, Mapping[Any, Any], Mapping[Any, Any]], bool]


def unlike(ranks: Ranks, wholes: Mapping[Name, Whole], options: Options, threads: int) -> set[Name]:
    """Names of wholes of which two ranks hold the same place with other bytes.

    Raises:
        As `assemble_from`.
    """
    by_ranks: dict[tuple[int, int], list[_Pair]] = defaultdict(list)
    for name, whole in wholes.items():
        for first, other in [] if whole.is_contradicted else whole.doubtful:
            by_ranks[first.rank, other.rank].append(_Pair(name, whole.dtype, first, other))
    ranks.open_votes({rank for both in by_ranks for rank in both})
    found: set[Name] = set()
    for (one, other_rank), pairs in sorted(by_ranks.items()):
        votes = ranks.vote(one), ranks.vote(other_rank)
        unsure = [pair for pair in pairs if pair.name not in found and not _same_chunks(*votes, pair)]
        firsts = [_target(pair, pair.first) for pair in unsure]
        others = [_target(pair, pair.other) for pair in unsure]
        both = (assemble_from(ranks, targets, options, threads, stay=False) for targets in (firsts, others))
        found |= {
            pair.name for pair, a, b in zip(unsure, *both, strict=True) if not np.array_equal(_bytes(a), _bytes(b))
        }
    return found


class _Pair(NamedTuple):
    """The same place of a whole on two ranks."""

    name: Name
    dtype: str
    first: Block
    other: Block


def _same_chunks(one: Reader, other: Reader, pair: _Pair) -> bool:
    if (pair.first.offset, pair.first.stride) != (pair.other.offset, pair.other.stride):
        return False
    a, b = _chunks(one, pair.first.storage), _chunks(other, pair.other.storage)
    return a is not None and a == b


def _chunks(reader: Reader, number: int) -> list[tuple[bytes, int, int]] | None:
    """Digests of what a storage is made of; None if other ranks have shares of it, or nobody has anything."""
    storage = reader.directory.storages[number]
    if storage.shares or storage.extents is None:
        return None
    digests = reader.records["digest"]
    return [(digests[p.chunk].tobytes(), p.offset, p.n_bytes) for p in reader.pieces(number)]


def _target(pair: _Pair, block: Block) -> Target:
    if pair.dtype.startswith(NUMPY_PREFIX):  # as bytes, whatever the element is
        n_bytes = math.prod(block.shape) * np.dtype(pair.dtype.removeprefix(NUMPY_PREFIX)).itemsize
        move = Move(Source(block.rank, block.storage, 0, (1,), (n_bytes,)), (0,))
        return Target("uint8", (n_bytes,), (move,), pair.name)
    source = Source(block.rank, block.storage, block.offset, block.stride, block.shape)
    return Target(pair.dtype, block.shape, (Move(source, (0,) * len(block.shape)),), pair.name)


def _bytes(tensor: torch.Tensor) -> Any:
    return tensor.reshape(-1).view(torch.uint8).numpy()


def values_of(ranks: Ranks, rank: int, options: Options, threads: int, **how: Any) -> Any:
    """A rank's objects; for tensors there are meta tensors. how: further arguments of `load_object`."""
    reader = ranks.vote(rank)
    arrays = [n for n, one in enumerate(reader.directory.storages) if one.dtype.startswith(NUMPY_PREFIX)]
    reader = ranks.whole(rank) if any(reader.directory.storages[n].shares for n in arrays) else reader
    return load_object(reader, options, threads, wanted=arrays, **how)


def joins_with_tensors(name: Name, one: Mapping[Any, Any], other: Mapping[Any, Any]) -> bool:
    """Whether what only one rank has in these dictionaries is somebody else's business: layers of a pipeline."""
    return len(name) < 2 or _has_tensors(one)


def values_unlike(one: Any, other: Any, name: Name, joins: Joins = joins_with_tensors) -> Iterator[Name]:
    """Names of what is no tensor, or none on one of both, and differs. joins: of dictionaries with other keys, which are no difference."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return
    if isinstance(one, dict) and isinstance(other, dict):
        for key in one:
            if key in other:
                yield from values_unlike(one[key], other[key], (*name, key_of(key)), joins)
        if one.keys() != other.keys() and not joins(name, one, other):
            yield name
    elif isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        if len(one) != len(other):
            yield name
        for number, (a, b) in enumerate(zip(one, other, strict=False)):
            yield from values_unlike(a, b, (*name, number), joins)
    elif not _equal(one, other):
        yield name


def _has_tensors(value: Mapping[Any, Any]) -> bool:
    return any(
        isinstance(child, torch.Tensor) or (isinstance(child, Mapping) and _has_tensors(child))
        for child in value.values()
    )


def _equal(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, np.ndarray):
        return (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())
    try:
        return bool(one == other) or bool(one != one and other != other)  # noqa: PLR0124 - NaN
    except Exception:  # some objects cannot be compared
        return False


__all__ = ["unlike", "values_of", "values_unlike"]

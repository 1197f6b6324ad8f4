"""Which objects each saved rank had for itself: what belongs to one rank has no place where there are others.

Alike is what all ranks have with the same bytes, whoever has written it: parameters in DistributedDataParallel, learning rates, counters of
optimizers. Most of it is found alike by the digests of its chunks, and not read.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from fastckpt.format.directory import TensorEntry
from fastckpt.format.element_types import NUMPY_PREFIX
from fastckpt.format.shares import Claim, claims_of
from fastckpt.format.tensor_names import Name, dotted, key_of
from fastckpt.options import Options
from fastckpt.reading.assembly import Move, Source, Target, assemble
from fastckpt.reading.chunk_reader import Reader
from fastckpt.repository.saved_ranks import SavedRanks
from fastckpt.training.partly import load_partly
from fastckpt.training.replicas import is_in
from fastckpt.training.rng import RNGState

_KEPT = 8  # votes, which are needed again when parts are put together; one may take 10 MB


class Differing:
    """Compares saved ranks with rank 0. Used by the thread that trains."""

    def __init__(
        self,
        targets: Mapping[str, Any],
        declared: Sequence[str],
        ranks: SavedRanks,
        options: Options,
        *,
        weights_only: bool,
    ) -> None:
        """declared: names, and beginnings of names up to a dot, of what is the same on all ranks: it is not compared."""
        self._declared = declared
        self._targets, self._ranks, self._options, self._weights_only = targets, ranks, options, weights_only
        self._threads = max(options.threads, options.connections)

    def find(self, numbers: Iterable[int]) -> dict[str, str]:
        """Names of objects that are not the same on some of these ranks → what is not, in words. Errors as those of a restore."""
        found = {key: "random generators" for key, target in self._targets.items() if isinstance(target, RNGState)}
        others = [number for number in numbers if number]
        if not others:
            return found
        first: Any = None
        for number in others:
            unlike = [*self._tensors_unlike(number)]
            if not self._has_same_values(number):
                first = self._values(0) if first is None else first
                unlike += _values_unlike(first, self._values(number), ())
            for name in unlike:
                key = str(name[0]) if name else ""
                if key in self._targets and not any(is_in(dotted(name), one) for one in self._declared):
                    found.setdefault(key, f"{dotted(name)} of rank {number} is not that of rank 0")
            if len(others) > _KEPT:
                self._ranks.forget(number)
        return found

    def _has_same_values(self, rank: int) -> bool:
        """Whether a look at the pickle is enough: unpickling takes longer than all else here, and most ranks have rank 0's to the byte.
        The bytes of arrays lie outside of it.
        """
        one, other = self._ranks.vote(0), self._ranks.vote(rank)
        return one.skeleton == other.skeleton and not one.holds_arrays and not other.holds_arrays

    def _values(self, rank: int) -> Any:
        """A rank's objects without tensors."""
        reader = self._ranks.vote(rank)
        arrays = [n for n, one in enumerate(reader.directory.storages) if one.dtype.startswith(NUMPY_PREFIX)]
        reader = self._ranks.whole(rank) if any(reader.directory.storages[n].shares for n in arrays) else reader
        return load_partly(
            reader,
            arrays,
            self._options,
            self._threads,
            places=None,
            map_location="cpu",
            weights_only=self._weights_only,
        )

    def _tensors_unlike(self, rank: int) -> Iterator[Name]:
        one, other = self._ranks.vote(0), self._ranks.vote(rank)
        there = {entry.name: entry for entry in other.directory.tensors}
        claims, others = _by_number(one), _by_number(other)
        unsure: list[tuple[TensorEntry, TensorEntry]] = []
        for entry in one.directory.tensors:
            match = there.get(entry.name)
            if match is None or entry.place is not None or match.place is not None or entry.kind == "part":
                continue
            if (entry.dtype, entry.shape) != (match.dtype, match.shape):
                yield entry.name
            elif entry.storage in claims or match.storage in others:
                if claims.get(entry.storage) != others.get(match.storage):
                    yield entry.name
            elif 0 not in entry.shape and not _same_chunks(one, entry, other, match):
                unsure.append((entry, match))
        readers = {0: one, rank: other}
        of_first = assemble(readers, [_target(0, entry) for entry, _ in unsure], self._options, self._threads)
        of_other = assemble(readers, [_target(rank, match) for _, match in unsure], self._options, self._threads)
        for (entry, _), a, b in zip(unsure, of_first, of_other, strict=True):
            if not np.array_equal(_bytes(a), _bytes(b)):
                yield entry.name


def _by_number(reader: Reader) -> dict[int, Claim]:
    return {number: claim for claim, number in claims_of(reader.directory).items()}


def _same_chunks(one: Reader, entry: TensorEntry, other: Reader, match: TensorEntry) -> bool:
    if (entry.offset, entry.stride) != (match.offset, match.stride):
        return False
    a, b = (
        [(r.records["digest"][p.chunk].tobytes(), p.offset, p.n_bytes) for p in r.pieces(number)]
        for r, number in ((one, entry.storage), (other, match.storage))
    )
    return a == b


def _target(rank: int, entry: TensorEntry) -> Target:
    if entry.dtype.startswith(NUMPY_PREFIX):  # as bytes, whatever the element is
        itemsize = np.dtype(entry.dtype.removeprefix(NUMPY_PREFIX)).itemsize
        n_bytes = math.prod(entry.shape) * itemsize
        return Target("uint8", (n_bytes,), (Move(Source(rank, entry.storage, 0, (1,), (n_bytes,)), (0,)),), entry.name)
    source = Source(rank, entry.storage, entry.offset, entry.stride, entry.shape)
    return Target(entry.dtype, entry.shape, (Move(source, (0,) * len(entry.shape)),), entry.name)


def _bytes(tensor: torch.Tensor) -> Any:
    return tensor.reshape(-1).view(torch.uint8).numpy()


def _values_unlike(one: Any, other: Any, name: Name) -> Iterator[Name]:
    """Names of what is no tensor and differs. What only one has is somebody else's business: layers of a pipeline."""
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        return
    if isinstance(one, dict) and isinstance(other, dict):
        for key in one:
            if key in other:
                yield from _values_unlike(one[key], other[key], (*name, key_of(key)))
        if len(name) > 1 and one.keys() != other.keys() and not _has_tensors(one):
            yield name
    elif isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        if len(one) != len(other):
            yield name
        for number, (a, b) in enumerate(zip(one, other, strict=False)):
            yield from _values_unlike(a, b, (*name, number))
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


class SavedStates(Sequence[Any]):
    """One object's state as each saved rank had it. An element is read when it is asked for."""

    def __init__(self, key: str, ranks: SavedRanks, options: Options, *, weights_only: bool) -> None:
        self._key, self._ranks, self._options, self._weights_only = key, ranks, options, weights_only

    def __len__(self) -> int:
        return self._ranks.commit.world

    def __getitem__(self, rank: Any) -> Any:
        if not isinstance(rank, int):
            return [self[number] for number in range(len(self))[rank]]
        number = range(len(self))[rank]
        reader = self._ranks.whole(number)
        wanted = sorted({entry.storage for entry in reader.directory.tensors if entry.name[:1] == (self._key,)})
        threads = max(self._options.threads, self._options.connections)
        state = load_partly(
            reader,
            [n for n in wanted if reader.directory.storages[n].extents is not None],
            self._options,
            threads,
            places=None,
            map_location="cpu",
            weights_only=self._weights_only,
        )
        return state[self._key]


__all__ = ["Differing", "SavedStates"]

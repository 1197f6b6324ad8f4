"""Which objects each saved rank had for itself: what belongs to one rank has no place where there are others.

Alike is what all ranks have with the same bytes, whoever has written it: parameters in DistributedDataParallel, learning rates, counters of
optimizers. Most of it is found alike by the digests of its chunks, and not read.
"""

from __future__ import annotations

import pickle
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from fastckpt.format.tensor_names import Name, dotted
from fastckpt.format.wholes import Wholes
from fastckpt.options import Options
from fastckpt.reading.alike import unlike, values_of, values_unlike
from fastckpt.repository.saved_ranks import SavedRanks
from fastckpt.state.naming import named_tensors
from fastckpt.training.partly import load_partly
from fastckpt.training.replicas import is_in
from fastckpt.training.rng import RNGState
from fastckpt.training.sharded import was_spread

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
        self._threads = options.load_threads

    def find(self, numbers: Iterable[int]) -> dict[str, str]:
        """Names of objects that are not the same on some of these ranks → what is not, in words. Errors as those of a restore."""
        found = {key: "random generators" for key, target in self._targets.items() if isinstance(target, RNGState)}
        others = [number for number in numbers if number]
        if not others:
            return found
        first: Any = None
        for number in others:
            names = [*self._tensors_unlike(number)]
            if not self._has_same_values(number):
                first = self._values(0) if first is None else first
                names += values_unlike(first, self._values(number), (), self._joins)
            for name in names:
                key = str(name[0]) if name else ""
                if key in self._targets and not any(is_in(dotted(name), one) for one in self._declared):
                    found.setdefault(key, f"{dotted(name)} of rank {number} is not that of rank 0")
            if len(others) > _KEPT:
                self._ranks.forget(number)
        return found

    def mixed(self, rank: int, spread: Collection[Name]) -> list[Name]:
        """Of tensors that are to be spread, those that were plain and of which this rank had other bytes than rank 0: each rank takes its
        part of its own. If all ranks look, all are compared. Errors as those of a restore.
        """
        return sorted((name for name in self._tensors_unlike(rank) if name in spread), key=dotted)

    def _joins(self, name: Name, first: Mapping[Any, Any], other: Mapping[Any, Any]) -> bool:
        """Whether dictionaries with other keys are put together from all ranks: tensors of modules are."""
        if len(name) != 1:
            return not name
        is_module = isinstance(self._targets.get(str(name[0])), torch.nn.Module)
        return is_module and all(isinstance(other[key], torch.Tensor) for key in other.keys() - first.keys())

    def _has_same_values(self, rank: int) -> bool:
        """Whether a look at the pickle is enough: unpickling takes longer than all else here, and most ranks have rank 0's to the byte.
        The bytes of arrays lie outside of it.
        """
        one, other = self._ranks.vote(0), self._ranks.vote(rank)
        return one.skeleton == other.skeleton and not one.holds_arrays and not other.holds_arrays

    def _values(self, rank: int) -> Any:
        """A rank's objects without tensors."""
        how = {"map_location": "cpu", "pickle_module": pickle, "load_args": {"encoding": "utf-8"}, "beyond_torch": True}
        return values_of(self._ranks, rank, self._options, self._threads, weights_only=self._weights_only, **how)

    def _tensors_unlike(self, rank: int) -> Iterator[Name]:
        wholes = Wholes(lambda name, box: False)
        for number in (0, rank):
            wholes.add(number, self._ranks.vote(number).directory)
        plain = {name: whole for name, whole in wholes.found.items() if not whole.was_spread}
        yield from (name for name, whole in plain.items() if whole.is_contradicted)
        yield from unlike(self._ranks, plain, self._options, self._threads)


class SavedStates(Sequence[Any]):
    """One object's state as each saved rank had it. An element is read when it is asked for."""

    def __init__(self, key: str, ranks: SavedRanks, options: Options, *, weights_only: bool) -> None:
        self._key, self._ranks, self._options, self._weights_only = key, ranks, options, weights_only
        self.parts: dict[int, torch.Tensor] = {}
        """id() → tensors of elements that stand for a rank's parts of DTensors."""

    def __len__(self) -> int:
        return self._ranks.commit.world

    def __getitem__(self, rank: Any) -> Any:
        if not isinstance(rank, int):
            return [self[number] for number in range(len(self))[rank]]
        number = range(len(self))[rank]
        reader = self._ranks.whole(number)
        wanted = sorted({entry.storage for entry in reader.directory.tensors if entry.name[:1] == (self._key,)})
        threads = self._options.load_threads
        state = load_partly(
            reader,
            [n for n in wanted if reader.directory.storages[n].extents is not None],
            self._options,
            threads,
            places=None,
            map_location="cpu",
            weights_only=self._weights_only,
        )
        entries = {entry.name: entry for entry in reader.directory.tensors}
        for named in named_tensors(state[self._key], (self._key,)):
            if named.name in entries and was_spread(named.name, entries) and isinstance(named.value, torch.Tensor):
                self.parts[id(named.value)] = named.value
        return state[self._key]


__all__ = ["Differing", "SavedStates"]

"""A rank's index made whole: the bytes that other ranks write for it, stitched in from their votes (docs/format.md, section 11.3).

    own vote ──────────────┐
    owner's vote ─ add() ──┼─→ finish() ─→ a Reader: own storages and records, then the records of others that are needed
    owner's vote ─ add() ──┘

Everything behind it (loads, fetches by name, exports) sees an ordinary index whose storages are whole. Of each vote that is added only the
records that are needed are kept, so many may be added one after another.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import replace

from fastckpt.errors import CorruptCheckpointError, Damage
from fastckpt.format.directory import Directory, Extent
from fastckpt.format.shares import Claim, claims_of, owners_needed
from fastckpt.format.tensor_names import Name, dotted
from fastckpt.reading.chunk_reader import Reader
from fastckpt.reading.gathered import Gathered


class MergedReader(Reader):
    """A Reader over the records of several votes. Made by `Merging`. Chunks are told apart by rank and number in that rank's vote."""

    def __init__(self, own: Reader, directory: Directory, gathered: Gathered, n_own: int) -> None:
        """directory: whose extents are of the gathered records. n_own: so many of these, the first, are the own vote's."""
        self.source, self.start, self.footer, self.skeleton = own.source, own.start, own.footer, own.skeleton
        self.records, self.files, self.sources = gathered.chunks, tuple(gathered.files), gathered.sources
        self.directory = directory
        self._self_contained = False
        self._scratch = threading.local()
        self._n_own = n_own
        self._origins = gathered.origins

    def chunk_name(self, number: int) -> str:
        """What people call a chunk."""
        if number < self._n_own:
            return super().chunk_name(number)
        rank, original = self._origins[number - self._n_own]
        return f"chunk {original} of rank {rank}"


class Merging:
    """Collects what a rank's index lacks. Used by one thread.

    needed: the ranks whose votes have to be added, each once, in any order.
    """

    def __init__(self, own: Reader) -> None:
        self._own = own
        self.rank = own.directory.rank
        self.needed = owners_needed(own.directory)
        self._claims = {number: claim for claim, number in claims_of(own.directory).items()}
        self._numbers: dict[int, list[int]] = {rank: [] for rank in self.needed}
        """The storages that have bytes in each of these votes."""
        for number, claim in self._claims.items():
            for share in claim.shares:
                if share.rank != self.rank:
                    self._numbers[share.rank].append(number)
        self._gathered = Gathered(own, whole=True)
        self._extents: dict[tuple[int, int], tuple[Extent, ...]] = {
            (number, self.rank): own.directory.storages[number].extents or () for number in self._claims
        }
        """Of each share that was found, by storage and rank."""
        self._lost: dict[int, list[Damage]] = {}

    def add(self, rank: int, other: Reader) -> None:
        """Take from a rank's vote what is needed of it. What does not fit this rank's own is remembered as damage."""
        said = other.directory.rank
        if said != rank:
            self.lose(rank, f"one that says it is of rank {said} ({other.source.name})")
            return
        theirs = claims_of(other.directory)
        by_name: dict[Name, Claim] = {claim.name: claim for claim in theirs}
        found: dict[int, tuple[Extent, ...]] = {}
        for number in self._numbers[rank]:
            claim = self._claims[number]
            there = theirs.get(claim)
            if there is None:
                what = by_name.get(claim.name)
                shown = "no storage with shares of that name" if what is None else str(what)
                self._lose(number, rank, f"{claim}, as in {self._own.source.name}", f"{shown} in {other.source.name}")
            else:
                found[number] = other.directory.storages[there].extents or ()
        self._take(rank, other, found)

    def lose(self, rank: int, why: CorruptCheckpointError | str) -> None:
        """Remember that a rank's vote cannot be had."""
        for number in self._numbers[rank]:
            if isinstance(why, str):
                self._lose(number, rank, "its vote", why)
            else:
                for item in why.damage:
                    self._lose(number, rank, item.expected, f"{item.found} ({item.part}, {item.place} of {why.source})")

    def _lose(self, number: int, rank: int, expected: str, found: str) -> None:
        damage = Damage("vote", f"{dotted(self._claims[number].name)}, the share of rank {rank}", expected, found)
        self._lost.setdefault(number, []).append(replace(damage, tensors=tuple(self._own.names_of_storage[number])))

    def _take(self, rank: int, other: Reader, found: Mapping[int, tuple[Extent, ...]]) -> None:
        moved = iter(self._gathered.take(rank, other, [extent for extents in found.values() for extent in extents]))
        for number, extents in found.items():
            self._extents[number, rank] = tuple(next(moved) for _ in extents)

    @property
    def lost(self) -> dict[int, list[Damage]]:
        """By the number of a storage, why it is not whole. `finish` must not be called while there is anything."""
        missing: dict[int, list[Damage]] = {number: list(found) for number, found in self._lost.items()}
        for number, claim in self._claims.items():
            for share in claim.shares:
                if (number, share.rank) not in self._extents and number not in missing:
                    place = f"{dotted(claim.name)}, the share of rank {share.rank}"
                    names = tuple(self._own.names_of_storage[number])
                    missing[number] = [Damage("vote", place, f"{share.n_bytes} bytes", "no vote of that rank", names)]
        return missing

    def finish(self) -> Reader:
        """The merged index. CorruptCheckpointError lists every share that is missing or does not fit."""
        damage = [item for found in self.lost.values() for item in found]
        if damage:
            raise CorruptCheckpointError(self._own.source.name, damage)
        return self.finish_in_part()

    def finish_in_part(self) -> Reader:
        """The index with whatever could be merged: what is `lost` has no extents, and must not be read."""
        if not self._claims:
            return self._own
        lost = self.lost
        storages = list(self._own.directory.storages)
        for number, claim in self._claims.items():
            parts = () if number in lost else (e for s in claim.shares for e in self._extents[number, s.rank])
            storages[number] = storages[number]._replace(extents=tuple(parts), shares=(), print="")
        return MergedReader(
            self._own, replace(self._own.directory, storages=tuple(storages)), self._gathered, len(self._own.records)
        )


def merge(own: Reader, others: Mapping[int, Reader]) -> Reader:
    """A rank's index with the bytes that others write for it. `own` itself where nothing is shared.

    others: the votes of all ranks in `format.shares.owners_needed`. CorruptCheckpointError names every tensor and rank that does not fit.
    """
    merging = Merging(own)
    for rank in sorted(merging.needed & others.keys()):
        merging.add(rank, others[rank])
    return merging.finish()


__all__ = ["MergedReader", "Merging", "merge", "owners_needed"]

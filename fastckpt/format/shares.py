"""Storages whose bytes several ranks hold alike (docs/format.md, section 11.3). Each lists them whole, owners have a share."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from fastckpt.format.directory import Directory, Share, StorageEntry, TensorEntry
from fastckpt.format.tensor_names import Name, canonical, dotted


def stretch_of(shares: Sequence[Share], rank: int, n_bytes: int) -> tuple[int, int]:
    """First byte and length of what a rank has of a storage of `n_bytes`: all of it where there are no shares, perhaps nothing."""
    if not shares:
        return 0, n_bytes
    start = 0
    for share in shares:
        if share.rank == rank:
            return start, share.n_bytes
        start += share.n_bytes
    return 0, 0


def first_entries(tensors: Iterable[TensorEntry], only: Collection[int] | None = None) -> dict[int, TensorEntry]:
    """The tensor whose name is a storage's first in canonical order, by the storage's number. only: the storages that are asked for."""
    found: dict[int, TensorEntry] = {}
    for tensor in tensors:
        number = tensor.storage
        if only is not None and number not in only:
            continue
        best = found.setdefault(number, tensor)
        if best is not tensor and canonical(tensor.name) < canonical(best.name):
            found[number] = tensor
    return found


def owners_needed(listed: Directory) -> set[int]:
    """The other ranks whose votes have bytes that this rank's state is made of."""
    return {share.rank for storage in listed.storages for share in storage.shares} - {listed.rank}


def shared_numbers(storages: Sequence[StorageEntry]) -> set[int]:
    """The numbers of the storages that have shares."""
    return {number for number, storage in enumerate(storages) if storage.shares}


def problems_of_names(storages: Sequence[StorageEntry], tensors: Iterable[TensorEntry]) -> Iterator[tuple[int, str]]:
    """Numbers of storages with shares that cannot be found by name in another vote, and why."""
    shared = shared_numbers(storages)
    if not shared:
        return
    firsts = first_entries(tensors, shared)
    by_name: dict[Name, int] = {}
    for number in sorted(shared):
        if number not in firsts:
            yield number, "none"
            continue
        other = by_name.setdefault(firsts[number].name, number)
        if other != number:
            yield number, f"{dotted(firsts[number].name)!r:.200}, which is the first name of storage {other}, too"


class Claim(NamedTuple):
    """What a vote says of a storage with shares. All ranks that hold it alike say the same."""

    name: Name
    """Its first."""
    dtype: str
    n_bytes: int
    shares: tuple[Share, ...]

    def __str__(self) -> str:
        shown = ", ".join(f"{share.n_bytes} of rank {share.rank}" for share in self.shares[:4])
        more = f", … of {len(self.shares)} ranks" if len(self.shares) > 4 else ""
        return f"{self.dtype}, {self.n_bytes} bytes, shares {shown}{more}"


def claims_of(listed: Directory) -> dict[Claim, int]:
    """What a directory says of each of its storages with shares, and the storage's number."""
    shared = shared_numbers(listed.storages)
    if not shared:
        return {}
    found = {}
    for number, first in first_entries(listed.tensors, shared).items():
        storage = listed.storages[number]
        found[Claim(first.name, storage.dtype, storage.n_bytes, storage.shares)] = number
    return found


class GroupClaim(NamedTuple):
    """What one rank holds alike with others, all of it: equal on each of them, or their votes do not fit together."""

    ranks: tuple[int, ...]
    """Ascending, this one among them."""
    digest: str
    """Of names, types, sizes and shares of the storages; and of their bytes, if replicas are verified."""


def group_to_json(claim: GroupClaim) -> list[Any]:
    """As short as it can be: there may be 16,384 ranks, and as many summaries."""
    ranks = claim.ranks
    step = ranks[1] - ranks[0] if len(ranks) > 1 else 1
    even = range(ranks[0], ranks[0] + step * len(ranks), step)
    return [[even.start, even.stop, even.step] if tuple(even) == ranks else [list(ranks)], claim.digest]


def group_of_json(value: list[Any]) -> GroupClaim:
    """The other way."""
    ranks, digest = value
    return GroupClaim(_even(*ranks) if len(ranks) == 3 else tuple(ranks[0]), digest)


@functools.lru_cache(maxsize=4096)
def _even(start: int, stop: int, step: int) -> tuple[int, ...]:
    """One object for all that name this group: 16,384 ranks that each name all of them would fill 10 GB."""
    return tuple(range(start, stop, step))


def groups_at_odds(groups: Sequence[Sequence[GroupClaim]]) -> tuple[int, int] | None:
    """Two ranks that do not hold alike what they should; None if all do. groups: of each rank, by rank."""
    claimed: dict[tuple[int, ...], dict[int, str]] = {}
    for rank, own in enumerate(groups):
        for claim in own:
            claimed.setdefault(claim.ranks, {})[rank] = claim.digest
    for ranks, digests in claimed.items():
        first = min(digests)
        for rank in ranks:
            if rank != first and digests.get(rank) != digests[first]:
                return first, rank
    return None


class UnmetClaim(NamedTuple):
    """A share that is in no vote, and who needs it."""

    claim: Claim
    owner: int
    needed_by: tuple[int, ...]

    def __str__(self) -> str:
        needed_by = some_ranks(self.needed_by)
        return f"{dotted(self.claim.name)} ({self.claim}) of {needed_by}: the vote of rank {self.owner} has no such storage"


class Claims:
    """What all votes of a save say of their shares, entered one by one: some 500 bytes for each storage that ranks hold alike.

    Complete if each owner that a claim names claims the same itself. That its extents cover its share is a rule for each vote alone.
    """

    def __init__(self) -> None:
        self._claimed_by: dict[Claim, int] = {}
        """Bit r: rank r claims it."""

    def add(self, rank: int, listed: Directory) -> None:
        """Enter what one rank's vote says. One that says it is another rank's claims nothing: its extents are of another share."""
        for claim in claims_of(listed) if listed.rank == rank else ():
            self._claimed_by[claim] = self._claimed_by.get(claim, 0) | 1 << rank

    def unmet(self) -> list[UnmetClaim]:
        """Shares that no vote of their owners has."""
        return [
            UnmetClaim(claim, share.rank, _ranks(ranks))
            for claim, ranks in self._claimed_by.items()
            for share in claim.shares
            if not ranks >> share.rank & 1
        ]

    def others(self, rank: int, listed: Directory) -> dict[int, tuple[int, ...]]:
        """For each of a vote's storages with shares, by number, the other ranks that hold it, and lose it with this one."""
        own = ~(1 << rank)
        return {number: _ranks(self._claimed_by.get(claim, 0) & own) for claim, number in claims_of(listed).items()}


def _ranks(bits: int) -> tuple[int, ...]:
    return tuple(rank for rank in range(bits.bit_length()) if bits >> rank & 1)


def print_conflicts(directories: Iterable[Directory]) -> list[str]:
    """Storages that ranks ought to hold alike and did not, in words, by the prints of their votes. Empty: nothing is known of any."""
    prints: dict[Claim, dict[str, list[int]]] = {}
    for listed in directories:
        for claim, number in claims_of(listed).items():
            value = listed.storages[number].print
            if value:
                prints.setdefault(claim, {}).setdefault(value, []).append(listed.rank)
    return [_conflict(claim, found) for claim, found in prints.items() if len(found) > 1]


def _conflict(claim: Claim, found: Mapping[str, Sequence[int]]) -> str:
    groups = sorted(map(sorted, found.values()))
    shown = "; ".join(some_ranks(ranks) for ranks in groups[:4]) + (f"; … of {len(groups)}" if len(groups) > 4 else "")
    return f"{dotted(claim.name)}: ranks that should hold the same bytes do not: those of {shown} are different"


def some_ranks(ranks: Sequence[int]) -> str:
    """A few ranks, in words."""
    shown = ", ".join(map(str, ranks[:8])) + (f" … ({len(ranks)})" if len(ranks) > 8 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"

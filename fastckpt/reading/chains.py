"""Wanted chunks that have bases → chains: rows of the index in the order in which they are decoded, and where each is decoded. Pure.

    wanted: a delta onto a delta onto a whole row      links: whole row → delta → delta, all in the place of the wanted chunk
    wanted: a bfloat16 copy, and its float32 master    links: master → copy, each in its own place: the master is decoded once

A row is decoded in the memory of the row that changes it, if nothing else needs it; otherwise in a room of its own, which is free again
after its last use.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from fastckpt.errors import TooLargeError
from fastckpt.format.records import Records, base_of
from fastckpt.kernels.transform import HAS_BASE, MAX_BASE_CHAIN, Transform

MOST_SCRATCH_BYTES = 512 << 20
"""Of one chain. Chains of writers take a few chunks; a hostile index can ask for any amount."""
_MOST_ROWS = (MAX_BASE_CHAIN + 1) * (MAX_BASE_CHAIN + 2)
"""Of one chunk. If each base lies in two rows side by side, the longest chain has half as many."""
_CHANGE_IN_PLACE = (Transform.SUB, Transform.SUBPACK, Transform.REF)
_ADVICE = "no writer of fastckpt makes such an index. Take another step (`fastckpt ls` lists them)"


class Base(NamedTuple):
    """Raw bytes that a row is relative to. They may end in the next row."""

    row: int
    start: int
    n_bytes: int


class Link(NamedTuple):
    """One step of a chain."""

    row: int
    base: Base | None
    room: int
    """The row in whose memory this one is decoded."""
    is_first: bool
    """Nothing was decoded there before."""
    frees: tuple[int, ...]
    """Rooms that nothing needs after this step."""


class Chain(NamedTuple):
    """See the module."""

    wanted: tuple[int, ...]
    """Chunks that have a place in the loaded state."""
    links: tuple[Link, ...]
    scratch_bytes: int
    """Most memory at a time besides the places of the wanted chunks."""


class Together(NamedTuple):
    """Which wanted chunks may be in one chain, because they need the same rows."""

    raw_bytes: int = 16 << 20
    """Most raw bytes of wanted chunks: a chain is decoded by one thread."""
    all_bytes: int = 512 << 20
    """Most raw bytes of all rows. What chains apart need is decoded once for each, so this is no tight limit: twelve MiB and 32 differences
    of each fit.
    """
    reach_bytes: int = 1 << 62
    """Most raw bytes of wanted chunks from a chain's first to its last: memory of storages that are begun long before they are needed."""


class _Rows:
    """What chains need to know of rows."""

    def __init__(self, records: Records) -> None:
        self._records = records
        self._bases: dict[int, Base | None] = {}

    def raw_bytes(self, row: int) -> int:
        """Length of a row's raw bytes."""
        return int(self._records["raw_bytes"][row])

    def base(self, row: int) -> Base | None:
        """What a row is relative to."""
        if row not in self._bases:
            record = self._records[row]
            self._bases[row] = Base(*base_of(record)) if int(record["transform"]) in HAS_BASE else None
        return self._bases[row]

    def bases(self, row: int) -> tuple[int, ...]:
        """The rows that a row is relative to."""
        base = self.base(row)
        return () if base is None else rows_of(base, self.raw_bytes(base.row))

    def is_changed_in_place(self, row: int, base: int) -> bool:
        """Whether a row can be decoded in the memory of its base."""
        n_bytes = self.raw_bytes(row)
        return (
            int(self._records["transform"][row]) in _CHANGE_IN_PLACE
            and self.base(row) == Base(base, 0, n_bytes)
            and self.raw_bytes(base) == n_bytes
        )

    def closure(self, chunk: int) -> list[int]:
        """A chunk and all rows that it is decoded from, each after its bases. TooLargeError."""
        order: list[int] = []
        seen: set[int] = set()
        waiting = [(chunk, False)]
        while waiting:
            row, has_bases = waiting.pop()
            if has_bases:
                order.append(row)
            elif row not in seen:
                seen.add(row)
                waiting.append((row, True))
                waiting += [(base, False) for base in reversed(self.bases(row))]
            if len(seen) > _MOST_ROWS:
                raise TooLargeError(f"chunk {chunk} is decoded from more than {_MOST_ROWS} others: {_ADVICE}")
        return order


class _Group:
    """Wanted chunks that share rows, while chains are planned."""

    def __init__(self, begun_at: int) -> None:
        self.begun_at = begun_at
        self.wanted: list[int] = []
        self.rows: dict[int, None] = {}
        """Each after its bases."""
        self.wanted_bytes = self.all_bytes = 0
        """Raw bytes of wanted chunks, and of all rows."""

    def takes(self, wanted_bytes: int, others: Iterable[int], begun_at: int, rows: _Rows, together: Together) -> bool:
        """Whether more rows may join.

        Args:
            wanted_bytes: raw bytes of the wanted chunks among them.
            others: all of them.
            begun_at: how many raw bytes were wanted before the chunks that need them.
            rows: of the index.
            together: limits.
        """
        all_bytes = self.all_bytes + sum(rows.raw_bytes(row) for row in others if row not in self.rows)
        return (
            self.wanted_bytes + wanted_bytes <= together.raw_bytes
            and all_bytes <= together.all_bytes
            and abs(begun_at - self.begun_at) <= together.reach_bytes
        )

    def add(self, others: Iterable[int], rows: _Rows) -> list[int]:
        """Add rows. Returns those that are new."""
        new = [row for row in others if row not in self.rows]
        self.rows |= dict.fromkeys(new)
        self.all_bytes += sum(map(rows.raw_bytes, new))
        return new


def rows_of(base: Base, raw_bytes: int) -> tuple[int, ...]:
    """The one or two rows that a base lies in. raw_bytes: of its first row."""
    return (base.row,) if base.start + base.n_bytes <= raw_bytes else (base.row, base.row + 1)


def bases_of(records: Records) -> dict[int, tuple[int, ...]]:
    """The rows that other rows are relative to, of each row that has some; ascending."""
    rows = _Rows(records)
    return {row: rows.bases(row) for row in _based(records)}


def _based(records: Records) -> list[int]:
    found: list[int] = np.flatnonzero(np.isin(records["transform"], sorted(HAS_BASE))).tolist()
    return found


def plan_chains(wanted: Sequence[int], records: Records, together: Together) -> list[Chain]:
    """The chains of all wanted chunks that have a base, or whose rows such a chunk needs.

    Args:
        wanted: numbers of chunks, each once, in the order in which they are needed.
        records: of all chunks; checked.
        together: which chunks may be in one chain.

    Returns:
        Chains in the order in which they are needed. Wanted chunks that are in none are decoded by themselves. A row is in several chains
        where `together` keeps them apart.

    Raises:
        TooLargeError: a chunk needs more rows, or more memory for them, than any writer makes necessary.
    """
    if not _based(records):
        return []
    rows = _Rows(records)
    closures = {chunk: rows.closure(chunk) for chunk in wanted if rows.base(chunk) is not None}
    needed = {row for closure in closures.values() for row in closure}
    groups: dict[_Group, None] = {}
    group_of: dict[int, _Group] = {}
    at = 0
    for chunk in wanted:
        if chunk in needed:
            _enter(chunk, closures.get(chunk, [chunk]), at, rows, together, groups, group_of)
        at += rows.raw_bytes(chunk)
    found = sorted((group for group in groups if len(group.rows) > 1), key=lambda group: group.begun_at)
    return [_chain(group.wanted, list(group.rows), rows) for group in found]


def plan_chain(chunk: int, records: Records) -> Chain:
    """The chain of one chunk. TooLargeError, as of `plan_chains`."""
    rows = _Rows(records)
    return _chain([chunk], rows.closure(chunk), rows)


def _enter(
    chunk: int,
    closure: Sequence[int],
    at: int,
    rows: _Rows,
    together: Together,
    groups: dict[_Group, None],
    group_of: dict[int, _Group],
) -> None:
    """Add a wanted chunk to the groups that have rows of it, as far as they may be one."""
    joined: _Group | None = None
    n_bytes = rows.raw_bytes(chunk)
    for other in {group_of[row]: None for row in closure if row in group_of}:
        if joined is None:
            joined = other if other.takes(n_bytes, closure, at, rows, together) else None
        elif joined.takes(
            n_bytes + other.wanted_bytes, {**other.rows, **dict.fromkeys(closure)}, other.begun_at, rows, together
        ):
            joined.begun_at = min(joined.begun_at, other.begun_at)
            joined.wanted += other.wanted
            joined.wanted_bytes += other.wanted_bytes
            group_of |= dict.fromkeys(other.rows, joined)
            joined.add(other.rows, rows)
            del groups[other]
    if joined is None:
        joined = _Group(at)
        groups[joined] = None
        group_of |= dict.fromkeys(closure, joined)  # whoever comes next is nearer to this one
    joined.wanted.append(chunk)
    joined.wanted_bytes += n_bytes
    group_of |= dict.fromkeys(joined.add(closure, rows), joined)


def _chain(wanted: Sequence[int], order: Sequence[int], rows: _Rows) -> Chain:
    """order: the rows, each after its bases."""
    users: dict[int, list[int]] = defaultdict(list)
    for row in order:
        for base in rows.bases(row):
            users[base].append(row)
    kept = frozenset(wanted)
    rooms: dict[int, int] = {}
    for row in reversed(order):  # users first
        user = users[row][0] if len(users[row]) == 1 and row not in kept else None
        rooms[row] = rooms[user] if user is not None and rows.is_changed_in_place(user, row) else row
    last_use: dict[int, int] = {}
    for at, row in enumerate(order):
        last_use |= {rooms[used]: at for used in (row, *rows.bases(row))}
    frees: dict[int, list[int]] = defaultdict(list)
    for room, at in last_use.items():
        if room not in kept:
            frees[at].append(room)
    links, begun = [], set()
    for at, row in enumerate(order):
        links.append(Link(row, rows.base(row), rooms[row], rooms[row] not in begun, tuple(frees[at])))
        begun.add(rooms[row])
    return Chain(tuple(wanted), tuple(links), _scratch_bytes(links, kept, rows))


def _scratch_bytes(links: Iterable[Link], kept: frozenset[int], rows: _Rows) -> int:
    held = most = 0
    for link in links:
        if link.is_first and link.room not in kept:
            held += rows.raw_bytes(link.room)
        joined = link.base.n_bytes if link.base is not None and len(rows.bases(link.row)) > 1 else 0
        most = max(most, held + joined)
        held -= sum(map(rows.raw_bytes, link.frees))
        if most > MOST_SCRATCH_BYTES:
            raise TooLargeError(
                f"chunk {link.row} needs more than {MOST_SCRATCH_BYTES} bytes of others at a time to be decoded: {_ADVICE}"
            )
    return most

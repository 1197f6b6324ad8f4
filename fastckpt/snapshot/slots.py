"""The places of a snapshot's chunks in slabs of host memory. Pure: from sizes to places.

Slots start at page boundaries: direct I/O needs that, and the test device protects memory by pages.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

PAGE_BYTES = 4096
MAX_SLAB_BYTES = 64 << 20
"""Large enough that a snapshot of 80 GB has only some 1,300 slabs; small enough that the last one wastes little."""


class Slot(NamedTuple):
    """The place of one chunk."""

    slab: int
    offset: int


class Layout(NamedTuple):
    """Slots in the order of the chunks, and the bytes of each slab."""

    slots: list[Slot]
    slab_bytes: list[int]


def slab_limit(budget_bytes: int, largest_chunk_bytes: int) -> int:
    """The bytes of a full slab: a power of two (pinned memory is rounded up to one), a quarter of the budget at most.

    0 if the budget is too small for two slabs of one chunk each: then nothing can be staged.
    """
    limit = MAX_SLAB_BYTES
    while limit * 4 > budget_bytes and limit > PAGE_BYTES:
        limit //= 2
    smallest = _power_of_two(largest_chunk_bytes)
    limit = max(limit, smallest)
    return limit if 2 * limit <= budget_bytes else 0


def lay_out(chunk_bytes: Sequence[int], limit_bytes: int, roles: Sequence[str] | None = None) -> Layout:
    """Fill slabs of `limit_bytes` in order; the last one is only as large as it must be. Each chunk fits a slab.

    roles: of each chunk. Each role then fills slabs of its own, so that what is worth least can be given away alone; what does not fill
    one shares the last slabs with the rests of other roles. None: chunks lie one behind the other.
    """
    rooms = [-(-n_bytes // PAGE_BYTES) * PAGE_BYTES for n_bytes in chunk_bytes]
    keys: Sequence[str | None] = [None] * len(rooms) if roles is None else _with_shared_rests(rooms, limit_bytes, roles)
    slots: list[Slot] = []
    slabs: list[int] = []
    current: dict[str | None, int] = {}
    """Of each role the slab that is being filled; None: the rests."""
    for room, key in zip(rooms, keys, strict=True):
        slab = current.get(key)
        if slab is None or slabs[slab] + room > limit_bytes:
            slab = current[key] = len(slabs)
            slabs.append(0)
        slots.append(Slot(slab, slabs[slab]))
        slabs[slab] += room
    return Layout(slots, [_power_of_two(n) for n in slabs])


def _with_shared_rests(rooms: Sequence[int], limit_bytes: int, roles: Sequence[str]) -> list[str | None]:
    """The role of each chunk; None for those that come when what is left of their role does not fill a slab."""
    left = Counter[str]()
    for room, role in zip(rooms, roles, strict=True):
        left[role] += room
    filled = Counter[str]()
    """Bytes in the current slab of each role."""
    keys: list[str | None] = []
    for room, role in zip(rooms, roles, strict=True):
        if filled[role] + room > limit_bytes:
            filled[role] = 0
        if filled[role] or left[role] >= limit_bytes:
            filled[role] += room
            keys.append(role)
        else:
            keys.append(None)
        left[role] -= room
    return keys


def _power_of_two(n: int) -> int:
    return max(PAGE_BYTES, 1 << (n - 1).bit_length())

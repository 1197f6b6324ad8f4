"""The places of a snapshot's chunks in slabs of host memory. Pure: from sizes to places.

Slots start at page boundaries: direct I/O needs that, and the test device protects memory by pages.
"""

from __future__ import annotations

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


def lay_out(chunk_bytes: Sequence[int], limit_bytes: int) -> Layout:
    """Fill slabs of `limit_bytes` in order; the last one is only as large as it must be. Each chunk fits a slab."""
    slots: list[Slot] = []
    slabs: list[int] = []
    filled = limit_bytes  # of the current slab; none exists yet
    for n_bytes in chunk_bytes:
        room = -(-n_bytes // PAGE_BYTES) * PAGE_BYTES
        if filled + room > limit_bytes:
            slabs.append(0)
            filled = 0
        slots.append(Slot(len(slabs) - 1, filled))
        filled += room
        slabs[-1] = filled
    return Layout(slots, [_power_of_two(n) for n in slabs])


def _power_of_two(n: int) -> int:
    return max(PAGE_BYTES, 1 << (n - 1).bit_length())

"""Which rank writes which bytes of what several ranks hold alike. Pure, so that all of them come to the same answer.

    storages of one group, in order of their keys:   | a      | b  | c                    | d   |
    equal shares, at ends of chunks:                 | owner 0        | owner 1   | owner 2     |

What is decided for a group depends on its storages alone: a rank may be in several groups, and knows nothing of those it is not in.
"""

from __future__ import annotations

import zlib
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fastckpt.format.directory import Share

BYTES_PER_OWNER = 4 << 20
"""At most one owner for so many: a restore reads the vote of each, and a smaller share would not fill a chunk."""
MAX_OWNERS = 32
"""Of one group. As many uploads fill the line of most stores, and whoever restores reads as many votes: 0.2 s each with 10,000 tensors."""


@dataclass(frozen=True)
class Replicated:
    """One storage that several ranks hold alike."""

    key: Any
    """Orders the storages of a group, and is another one for each: the first name in canonical order."""
    n_bytes: int
    chunk_bytes: int
    """Of its chunks: it is split between two of them only."""
    group: tuple[int, ...]
    """The ranks that hold it, ascending."""
    only_first: bool = False
    """The first rank's bytes stand for all (buffers that DistributedDataParallel broadcasts)."""
    first_byte: int = 0
    """Where it begins in the flat order of its global tensor: chunks end at multiples of `chunk_bytes` in that order."""


def share_out(storages: Sequence[Replicated]) -> list[tuple[Share, ...]]:
    """The shares of each storage, in the order of the argument; () where there is nothing to share.

    Every border lies within one chunk of where equal shares would have it; a storage of less than two chunks is not split.
    """
    found: list[tuple[Share, ...]] = [()] * len(storages)
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for number, storage in enumerate(storages):
        if storage.n_bytes and len(storage.group) > 1:
            if storage.only_first:
                found[number] = (Share(storage.group[0], storage.n_bytes),)
            else:
                groups[storage.group].append(number)
    for group, numbers in groups.items():
        numbers.sort(key=lambda number: storages[number].key)
        members = [storages[number] for number in numbers]
        for number, shares in zip(numbers, _share_group(group, members), strict=True):
            found[number] = shares
    return found


def owners_of(group: tuple[int, ...], n_bytes: int) -> tuple[int, ...]:
    """The members of a group that write its bytes, ascending: spread evenly, and not from the first one on in every group, or rank 0, which
    is the first of many, would write all that is small."""
    n_owners = max(1, min(len(group), MAX_OWNERS, n_bytes // BYTES_PER_OWNER))
    turn = zlib.crc32(",".join(map(str, group)).encode())  # known to all members, as `hash` of a text is not
    places = sorted((turn + i * len(group) // n_owners) % len(group) for i in range(n_owners))
    return tuple(group[place] for place in places)


def _share_group(group: tuple[int, ...], storages: Sequence[Replicated]) -> Iterator[tuple[Share, ...]]:
    """The shares of a group's storages, which are in order."""
    total = sum(storage.n_bytes for storage in storages)
    owners = owners_of(group, total)
    borders = _borders(storages, [total * i // len(owners) for i in range(1, len(owners))])
    start = 0
    for storage in storages:
        end, at, shares = start + storage.n_bytes, start, []
        owner = bisect_right(borders, start)
        while at < end:
            stop = min(end, borders[owner]) if owner < len(borders) else end
            if stop > at:
                shares.append(Share(owners[owner], stop - at))
            at, owner = stop, owner + 1
        yield tuple(shares)
        start = end


def _borders(storages: Sequence[Replicated], wanted: Sequence[int]) -> list[int]:
    """Where one owner's bytes end and the next one's begin: the places nearest to those wanted at which that is allowed."""
    starts = [0]
    for storage in storages:
        starts.append(starts[-1] + storage.n_bytes)
    borders = []
    for place in wanted:
        number = bisect_right(starts, place) - 1
        storage, start = storages[number], starts[number]
        borders.append(start + _nearest_end(storage, place - start))
    return borders


def _nearest_end(storage: Replicated, place: int) -> int:
    """The end of a chunk, or of the storage, that is nearest to a byte of it."""
    ends = [0, storage.n_bytes]
    if storage.n_bytes >= 2 * storage.chunk_bytes:
        before = place - (storage.first_byte + place) % storage.chunk_bytes
        ends += [end for end in (before, before + storage.chunk_bytes) if 0 < end < storage.n_bytes]
    return min(ends, key=lambda end: (abs(end - place), end))


__all__ = ["BYTES_PER_OWNER", "MAX_OWNERS", "Replicated", "owners_of", "share_out"]

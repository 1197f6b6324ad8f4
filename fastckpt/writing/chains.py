"""What it costs to read the rows of an index, all the rows that they need included. Pure, for all rows at once.

A row without a base is read alone. A row with one needs its base, and that one's base, down to rows without: a chain. Of a base that ends
in the next row, each of the two counts by the part that is needed.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fastckpt.format.records import Records
from fastckpt.kernels.transform import HAS_BASE, MAX_BASE_CHAIN, Transform

Numbers = npt.NDArray[np.int64]
Amounts = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

WORK = {
    Transform.RAW: 0.4,
    Transform.CONST: 0.2,
    Transform.ROT: 1.0,
    Transform.ROTU: 1.0,
    Transform.SUB: 0.5,
    Transform.SUBPACK: 0.4,
    Transform.CAST: 0.4,
    Transform.REF: 0.3,
}
"""What a raw byte takes in a restore, in units of what it takes as ROT, reading and fresh memory included.

Of a difference it is what comes on top of its base, in place of which it is decoded: float32 0.33 to 0.47, second moments 0.36 to 0.46,
bfloat16 weights 0.11 to 0.7 (AVX-512, chunks of 4 MiB from the page cache, where ROT takes 1.0 to 1.4 ns a byte). To memory in use ROT
takes 0.17 to 0.28 ns, and a difference 1.2 to 2.6 times that: a restore over a live state may decode up to twice as long.
"""
_OF_TWO_BYTES = 0.7
"""Differences of lanes of two bytes take so much of that."""
_CAST_RATIO = 0.67
"""Stored bytes of bfloat16 numbers for each raw byte, where they cannot be cast from others any more."""


class Bases(NamedTuple):
    """The base of each row. Only rows that have one count."""

    has: Mask
    first: Numbers
    second: Numbers
    """The row that the base ends in, if that is another than `first`; otherwise `first`."""
    start: Numbers
    """First byte in `first`."""
    of_first: Amounts
    """Which part of the raw bytes of `first` is needed."""
    of_second: Amounts


class Costs(NamedTuple):
    """Of each row, with all that it needs."""

    read_bytes: Amounts
    """Stored bytes that are read."""
    full_bytes: Amounts
    """Stored bytes that it takes alone: known where it has no base, otherwise those of the rows at the end of its chain."""
    work: Amounts
    """Decoding: raw bytes times WORK."""
    full_work: Amounts
    excess: Amounts
    """Sum of read_bytes - full_bytes over all rows of the chain: what the chain has cost so far, in bytes times saves."""
    depth: Numbers
    """The number of bases from here to a row without."""


def bases_of(records: Records) -> Bases:
    """The bases that the rows of a checked index have."""
    n = len(records)
    transform = records["transform"]
    has = np.isin(transform, sorted(HAS_BASE))
    parameter = np.ascontiguousarray(records["parameter"]).view(("<u4", 2)).astype(np.int64).reshape(n, 2)
    is_cast = transform == Transform.CAST
    raw = records["raw_bytes"].astype(np.int64)
    first = np.where(has, parameter[:, 0], np.arange(n))
    start = np.where(has, parameter[:, 1] * np.where(is_cast, 4, records["lane_bytes"].astype(np.int64)), 0)
    need = np.where(has, raw * np.where(is_cast, 2, 1), 0)
    here = np.minimum(need, raw[first] - start)
    second = np.where(need > here, first + 1, first)
    return Bases(has, first, second, start, here / raw[first], (need - here) / raw[second])


def costs_of(records: Records, bases: Bases | None = None) -> Costs:
    """The costs of all rows of a checked index."""
    bases = bases_of(records) if bases is None else bases
    stored, raw = records["stored_bytes"].astype(np.float64), records["raw_bytes"].astype(np.float64)
    work = raw * _WEIGHTS[(records["lane_bytes"] == 2).astype(np.intp), records["transform"]]
    costs = Costs(stored.copy(), stored.copy(), work.copy(), work.copy(), np.zeros(raw.size), depths(bases))
    for depth in range(1, int(costs.depth.max(initial=0)) + 1):
        rows = np.flatnonzero(costs.depth == depth)
        first, second = bases.first[rows], bases.second[rows]
        one, two = bases.of_first[rows], bases.of_second[rows]
        for of_row in costs[:5]:
            part = one * of_row[first] + two * of_row[second]
            of_row[rows] = part if of_row is costs.full_bytes or of_row is costs.full_work else of_row[rows] + part
        is_cast = records["transform"][rows] == Transform.CAST
        costs.full_bytes[rows] = np.where(is_cast, raw[rows] * _CAST_RATIO, costs.full_bytes[rows])
        costs.full_work[rows] = np.where(is_cast, raw[rows], costs.full_work[rows])
        costs.excess[rows] += np.maximum(costs.read_bytes[rows] - costs.full_bytes[rows], 0)
    return costs


def work_of(transform: Transform, lane_bytes: int, raw_bytes: float) -> float:
    """What decoding one row takes, without its base."""
    return raw_bytes * float(_WEIGHTS[int(lane_bytes == 2), transform])


def _weight_table() -> Amounts:
    table = np.zeros((2, 256))
    for one, weight in WORK.items():
        table[0, one] = weight
        table[1, one] = weight * (_OF_TWO_BYTES if one in (Transform.SUB, Transform.SUBPACK) else 1)
    return table


_WEIGHTS = _weight_table()
"""By whether lanes have two bytes, and by transform."""


def depths(bases: Bases) -> Numbers:
    """How many bases there are from each row to one without."""
    found = np.zeros(bases.has.size, np.int64)
    rows = np.flatnonzero(bases.has)
    first, second = bases.first[rows], bases.second[rows]
    for _ in range(MAX_BASE_CHAIN + 1):
        deeper = 1 + np.maximum(found[first], found[second])
        if np.array_equal(deeper, found[rows]):
            break
        found[rows] = deeper
    return found


def needed_by(bases: Bases, rows: Numbers) -> Mask:
    """Which rows the bases of `rows` are, and the bases of those, and so on; `rows` themselves only where others need them."""
    needed = np.zeros(bases.has.size, bool)
    new = np.unique(rows[bases.has[rows]])
    while new.size:
        wanted = np.unique(np.concatenate([bases.first[new], bases.second[new]]))
        wanted = wanted[~needed[wanted]]
        needed[wanted] = True
        new = wanted[bases.has[wanted]]
    return needed


def reach(bases: Bases, rows: Numbers) -> tuple[Numbers, Numbers]:
    """Pairs of (place in `rows`, row): each of the rows and everything that it needs, without doubles."""
    places, found = np.arange(rows.size), rows
    pairs = [np.stack([places, found])]
    while found.size:
        places, found = places[bases.has[found]], found[bases.has[found]]
        places = np.concatenate([places, places])
        found = np.concatenate([bases.first[found], bases.second[found]])
        unique = np.unique(places * bases.has.size + found)
        places, found = unique // bases.has.size, unique % bases.has.size
        pairs.append(np.stack([places, found]))
    every = np.concatenate(pairs, axis=1)
    unique = np.unique(every[0] * bases.has.size + every[1])
    return unique // bases.has.size, unique % bases.has.size

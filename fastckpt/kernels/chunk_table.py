"""What the native kernels' `read_chunks` takes and gives: a row for each chunk (csrc/fastckpt.h)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fastckpt.kernels.transform import Transform

CHUNK = np.dtype(
    [
        ("offset", "<u8"),
        ("stored_bytes", "<u8"),
        ("raw", "<u8"),
        ("raw_bytes", "<u8"),
        ("crc64nvme", "<u8"),
        ("digest", "V16"),
        ("parameter", "V8"),
        ("transform", "u1"),
        ("lane_bytes", "u1"),
        ("pack_bits", "u1"),
        ("is_fresh", "u1"),
        ("is_base", "u1"),
        ("zero", "V3"),
        ("base", "<u8"),
    ]
)
OUTCOME = np.dtype([("status", "<i4"), ("seconds", "<f4")])
OK, FOREIGN, DAMAGED, NO_BASE = 0, 6, 8, 9
"""Statuses. FOREIGN: another encoder's frame, or a wrong one; where it was to be decoded in place, the base is still there.
NO_BASE: the row that was to become the base has another status than OK.
"""

_OF_RECORDS = ("stored_bytes", "raw_bytes", "crc64nvme", "digest", "parameter", "transform", "lane_bytes", "pack_bits")
_MIN_BYTES = 241
"""XXH3 has other rules for shorter inputs; native kernels leave those to the xxhash package."""

Table = npt.NDArray[Any]


def can_be_read(records: Table) -> npt.NDArray[np.bool_]:
    """Which of some records `read_chunks` may be given: those that are not tiny. Bases must then be in memory, or in earlier rows."""
    return (records["transform"] <= Transform.REF) & (records["raw_bytes"] >= _MIN_BYTES)


def table_of(records: Table, offsets: Any, addresses: Any, fresh: Any, bases: Any = 0, is_base: Any = False) -> Table:
    """The rows for some records.

    Args:
        records: of the chunks.
        offsets: where the stored bytes of each begin, in the file or the memory.
        addresses: where the raw bytes of each belong.
        fresh: whether nobody has touched that memory yet.
        bases: of those that have a base: where its bytes are: raw_bytes, CAST twice as many. All but CAST may have it where their raw bytes
            belong: then they are decoded in place. Rows of one call are read in their order, so an earlier row may make the base.
        is_base: whether a chunk is nothing but a base of later rows: its crc is checked, its digest is not.
    """
    table = np.zeros(len(records), CHUNK)
    for name in _OF_RECORDS:
        table[name] = records[name]
    table["offset"], table["raw"], table["is_fresh"] = offsets, addresses, fresh
    table["base"], table["is_base"] = bases, is_base
    return table

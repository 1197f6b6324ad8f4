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
        ("zero", "<u4"),
    ]
)
OUTCOME = np.dtype([("status", "<i4"), ("seconds", "<f4")])

_OF_RECORDS = ("stored_bytes", "raw_bytes", "crc64nvme", "digest", "parameter", "transform", "lane_bytes", "pack_bits")
_MIN_BYTES = 241
"""XXH3 has other rules for shorter inputs; native kernels leave those to the xxhash package."""

Table = npt.NDArray[Any]


def can_be_read(records: Table) -> npt.NDArray[np.bool_]:
    """Which of some records `read_chunks` may be given: those without a base that are not tiny."""
    return (records["transform"] <= Transform.ROTU) & (records["raw_bytes"] >= _MIN_BYTES)


def table_of(records: Table, offsets: Any, addresses: Any, fresh: Any) -> Table:
    """The rows for some records.

    Args:
        records: of the chunks.
        offsets: where the stored bytes of each begin, in the file or the memory.
        addresses: where the raw bytes of each belong.
        fresh: whether nobody has touched that memory yet.
    """
    table = np.zeros(len(records), CHUNK)
    for name in _OF_RECORDS:
        table[name] = records[name]
    table["offset"], table["raw"], table["is_fresh"] = offsets, addresses, fresh
    return table

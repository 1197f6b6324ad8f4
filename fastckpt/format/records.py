"""The 64-byte records that describe chunks (docs/format.md, section 4), processed in bulk."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastckpt.errors import Damage
from fastckpt.kernels.transform import (
    HAS_BASE,
    HAS_FRAME,
    IMPLEMENTED,
    MAX_BASE_CHAIN,
    MAX_RAW_BYTES,
    PACK_BITS,
    STORES_NOTHING,
    Transform,
    max_frame_bytes,
    transform_name,
)

RECORD_BYTES = 64
MAX_RECORDS = 1 << 26

LAYOUT = np.dtype(
    [
        ("transform", "u1"),
        ("lane_bytes", "u1"),
        ("pack_bits", "u1"),
        ("zero", "u1"),
        ("file", "<u4"),
        ("offset", "<u8"),
        ("stored_bytes", "<u4"),
        ("raw_bytes", "<u4"),
        ("digest", "V16"),
        ("crc64nvme", "<u8"),
        ("parameter", "V8"),
        ("zeros", "<u8"),
    ]
)
assert LAYOUT.itemsize == RECORD_BYTES
_ROW = struct.Struct("<BBBxIQII16sQ8sQ")  # the same members: one call instead of eleven assignments in NumPy
assert _ROW.size == RECORD_BYTES

_STORES_NOTHING = sorted(STORES_NOTHING)
_READ_HERE = sorted(IMPLEMENTED)
_HAS_FRAME = sorted(HAS_FRAME)
_HAS_BASE = sorted(HAS_BASE)

Records = npt.NDArray[Any]


def fill(
    rows: bytearray,
    number: int,
    transform: int,
    lane_bytes: int,
    pack_bits: int,
    file: int,
    offset: int,
    stored_bytes: int,
    raw_bytes: int,
    digest: bytes,
    crc64nvme: int,
    parameter: bytes,
) -> None:
    """Write one record into the bytes of many."""
    _ROW.pack_into(
        rows,
        number * RECORD_BYTES,
        transform,
        lane_bytes,
        pack_bits,
        file,
        offset,
        stored_bytes,
        raw_bytes,
        digest,
        crc64nvme,
        parameter,
        0,
    )


def transform_of(record: Any) -> str:
    """The name of a record's transform."""
    return transform_name(int(record["transform"]))


def unpack(data: bytes) -> Records:
    """View the records part as an array; its length was checked before."""
    return np.frombuffer(data, LAYOUT)


def unsupported(records: Records) -> list[int]:
    """Numbers of the records whose transform this version does not read."""
    return [int(i) for i in np.flatnonzero(~np.isin(records["transform"], (0, *_READ_HERE)))]


def unreadable(records: Records) -> set[int]:
    """Numbers of the records that this version cannot decode: those with such a transform, and all that are made from them."""
    found = set(unsupported(records))
    for row in np.flatnonzero(np.isin(records["transform"], _HAS_BASE)).tolist() if found else ():
        first, start, n_bytes = base_of(records[row])  # it comes before the row
        if first in found or (start + n_bytes > int(records["raw_bytes"][first]) and first + 1 in found):
            found.add(row)
    return found


Mask = npt.NDArray[np.bool_]


class _Kinds(NamedTuple):
    """For each kind of transform, a mask of its records."""

    raw: Mask
    constant: Mask
    cast: Mask
    packed: Mask
    framed: Mask
    based: Mask
    stores_nothing: Mask
    known: Mask
    """Records with a transform that this version reads. Others count as unsupported, not as damage; 0 is never valid."""

    @classmethod
    def of(cls, transform: npt.NDArray[Any]) -> _Kinds:
        alone = (transform == t for t in (Transform.RAW, Transform.CONST, Transform.CAST, Transform.SUBPACK))
        groups = (np.isin(transform, group) for group in (_HAS_FRAME, _HAS_BASE, _STORES_NOTHING, _READ_HERE))
        return cls(*alone, *groups)


class _Demands:
    """Collects which records break a rule."""

    def __init__(self, records: Records) -> None:
        self._records = records
        self.found: list[Damage] = []

    def demand(self, right: Mask, field: str, expected: str, of: Mask | None = None) -> None:
        """Of the records `of` (None: all), list those for which `right` is false."""
        for i in np.flatnonzero(~right if of is None else ~right & of):
            value = self._records[field][i]
            text = value.tobytes().hex() if isinstance(value, np.void) else str(value)
            self.found.append(Damage("records", f"record {i}, {field.replace('_', ' ')}", expected, text))


def check(records: Records, payload_end: int, file_bytes: Sequence[int] | None = None) -> list[Damage]:
    """Check every *must* of section 4 that does not need the payload, for records of supported transforms.

    payload_end: offset of the first byte after the payload, which starts at 64. file_bytes: lengths of the files in the file table of
    a vote; None: the container is self-contained.
    """
    demands, kinds = _Demands(records), _Kinds.of(records["transform"])
    _check_lanes(records, kinds, demands)
    _check_stored(records, kinds, None if file_bytes is None else len(file_bytes), demands)
    _check_parameters(records, kinds, demands)
    found = demands.found
    if not found and kinds.based.any():
        found += _check_bases(records, kinds.based)
    if found or file_bytes is None:
        return found or _check_tiling(records, ~kinds.stores_nothing, payload_end)
    lengths = np.array([0, *file_bytes], np.uint64)[records["file"]]
    stored = records["stored_bytes"].astype(np.uint64)
    within = (stored <= lengths) & (records["offset"] <= lengths - np.minimum(stored, lengths))
    demands.demand(within, "offset", "within its file")
    if payload_end != 64:
        found.append(Damage("footer", "payload length", "0 (the chunks are in other files)", str(payload_end - 64)))
    return found


def _check_lanes(records: Records, kinds: _Kinds, demands: _Demands) -> None:
    demand, lane, raw = demands.demand, records["lane_bytes"], records["raw_bytes"]
    demand(records["transform"] != 0, "transform", "1 … 8")
    demand(records["zero"] == 0, "zero", "0")
    demand(records["zeros"] == 0, "zeros", "0")
    demand((raw >= 1) & (raw <= MAX_RAW_BYTES), "raw_bytes", f"1 … {MAX_RAW_BYTES}")
    demand(np.isin(lane, (1, 2, 4, 8)), "lane_bytes", "1, 2, 4 or 8", kinds.known)
    demand(lane == 1, "lane_bytes", "1 (RAW)", kinds.raw)
    demand(np.isin(lane, (2, 4, 8)), "lane_bytes", "2, 4 or 8 (a frame)", kinds.framed)
    demand(lane == 2, "lane_bytes", "2 (CAST)", kinds.cast)
    demand(raw % np.maximum(lane, 1) == 0, "raw_bytes", "a multiple of the lane bytes", kinds.known)
    demand(records["pack_bits"] == 0, "pack_bits", "0", kinds.known & ~kinds.packed)
    demand(np.isin(records["pack_bits"], PACK_BITS), "pack_bits", "1, 2, 4 or 8 (SUBPACK)", kinds.packed)


def _check_stored(records: Records, kinds: _Kinds, n_files: int | None, demands: _Demands) -> None:
    demand, file = demands.demand, records["file"]
    raw, stored = records["raw_bytes"].astype(np.int64), records["stored_bytes"].astype(np.int64)
    if n_files is None:
        demand(file == 0, "file", "0 (the container is self-contained)")
    else:
        demand(file <= n_files, "file", f"at most {n_files}, the length of the file table")
        demand((file == 0) == kinds.stores_nothing, "file", "0 exactly if the transform stores nothing")
    demand(stored == raw, "stored_bytes", "the raw bytes (RAW)", kinds.raw)
    demand((stored >= 1) & (stored <= max_frame_bytes(raw)), "stored_bytes", "1 … 2 × raw + 1024", kinds.framed)
    for field in ("offset", "stored_bytes", "crc64nvme"):
        demand(records[field] == 0, field, "0 (the transform stores nothing)", kinds.stores_nothing)


def _check_parameters(records: Records, kinds: _Kinds, demands: _Demands) -> None:
    parameters = records["parameter"].view(("u1", 8)) if records.size else np.zeros((0, 8), np.uint8)
    has_none = kinds.raw | (kinds.framed & ~kinds.based)
    demands.demand((parameters == 0).all(axis=1), "parameter", "zeros", has_none)
    tail = np.arange(8)[None, :] >= records["lane_bytes"][:, None]
    demands.demand(~((parameters != 0) & tail).any(axis=1), "parameter", "zeros after the lane", kinds.constant)


def base_of(record: Any) -> tuple[int, int, int]:
    """(first record, offset in its raw bytes, number of bytes) of a record's base."""
    first, element = np.frombuffer(record["parameter"].tobytes(), "<u4").tolist()
    is_cast = int(record["transform"]) == Transform.CAST
    width = 4 if is_cast else int(record["lane_bytes"])
    return first, element * width, int(record["raw_bytes"]) * (2 if is_cast else 1)


def _check_bases(records: Records, based: npt.NDArray[np.bool_]) -> list[Damage]:
    """Check that bases come before the chunks that need them, reach no further than into the next record, and end after MAX_BASE_CHAIN
    steps.
    """
    found = []
    rows = np.flatnonzero(based)
    parameters = np.ascontiguousarray(records["parameter"][rows]).view(("<u4", 2)).astype(np.int64)
    first, element = parameters[:, 0], parameters[:, 1]
    is_cast = records["transform"][rows] == Transform.CAST
    width = np.where(is_cast, 4, records["lane_bytes"][rows].astype(np.int64))
    need = records["raw_bytes"][rows].astype(np.int64) * np.where(is_cast, 2, 1)
    raw = np.append(records["raw_bytes"].astype(np.int64), 0)
    before = first < rows
    here = np.where(before, raw[np.where(before, first, 0)], 0)
    start = element * width
    spans = start + need > here
    second = np.where(spans & (first + 1 < rows), first + 1, raw.size - 1)
    right = before & (start < here) & (start + need <= here + raw[second])
    for i in np.flatnonzero(~right).tolist():
        text = f"record {first[i]} from element {element[i]} on, for {need[i]} bytes"
        expected = "a record before this one, and no further than the next, which is before it too"
        found.append(Damage("records", f"record {rows[i]}, base", expected, text))
    if found:
        return found
    depth = np.zeros(raw.size, np.int64)
    for _ in range(MAX_BASE_CHAIN + 1):
        deeper = 1 + np.maximum(depth[first], depth[second])
        if np.array_equal(deeper, depth[rows]):
            return []
        depth[rows] = deeper
    deepest = rows[int(np.argmax(depth[rows]))]
    return [Damage("records", f"record {deepest}, base", f"a chain of at most {MAX_BASE_CHAIN}", "a longer one")]


def _check_tiling(records: Records, stores: npt.NDArray[np.bool_], payload_end: int) -> list[Damage]:
    rows = np.flatnonzero(stores)
    rows = rows[np.lexsort((records["stored_bytes"][rows], records["offset"][rows]))]
    found = []
    position, previous = 64, -1
    for row in rows.tolist():
        record = records[row]
        offset, end = int(record["offset"]), int(record["offset"]) + int(record["stored_bytes"])
        if previous >= 0 and offset == int(records[previous]["offset"]):
            if record.tobytes() != records[previous].tobytes():
                found.append(
                    Damage(
                        "records",
                        f"record {row}",
                        f"equal to record {previous}, which shares its bytes",
                        "a difference",
                    )
                )
            continue
        if offset != position:
            what = f"the payload's next stretch at {position}"
            found.append(Damage("records", f"record {row}, offset", what, str(offset)))
        position, previous = max(position, end), row
    if position != payload_end:
        found.append(Damage("records", "end of the payload", str(payload_end), f"stored bytes that end at {position}"))
    return found

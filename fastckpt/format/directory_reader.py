"""The JSON of a directory → checked values (docs/format.md, section 5), with every finding listed at once.

The usual directory is read column by column (`directory_columns`). If that finds anything unusual, this module reads each row. Both accept
the same directories; only this one can describe what is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fastckpt.format import directory_columns
from fastckpt.format.directory import KINDS, Directory, Extent, GlobalPlace, Share, StorageEntry, TensorEntry
from fastckpt.format.element_types import element_type
from fastckpt.format.fields import HEX32, MAX_INTEGER, Findings, JsonFields
from fastckpt.format.json_text import load_json
from fastckpt.format.shares import problems_of_names, stretch_of
from fastckpt.format.tensor_names import dotted, from_json


def parse(data: bytes, raw_bytes: npt.NDArray[Any] | None, source: str) -> Directory:
    """Check and read a directory.

    raw_bytes: raw bytes of each record, already checked; None: they are not known, and extents are not checked against them.
    CorruptCheckpointError lists everything that is wrong; UnsupportedFormatError for
    a byte order, element type or kind that this version does not know.
    """
    columns = directory_columns.parse(data, raw_bytes)
    if columns is not None:
        value, storages, tensors = columns
        findings = Findings("directory", source)
        found = _top(JsonFields(value, findings, "top level"), storages, tensors)
        if not findings.damage and not findings.unsupported:
            return found
    return _parse_rows(data, raw_bytes, source)


def _parse_rows(data: bytes, raw_bytes: npt.NDArray[Any] | None, source: str) -> Directory:
    value = load_json(data, "directory", source)
    findings = Findings("directory", source)
    if not isinstance(value, dict):
        findings.add("as a whole", "an object", value)
        findings.raise_damage()
    top = JsonFields(value, findings, "top level")
    _check_byte_order(top)
    findings.raise_unsupported()  # the rest of another byte order's may mean something else
    storages = _storages(top, raw_bytes)
    tensors = _tensors(top.array("tensors"), storages, findings)
    for number, found_name in problems_of_names(storages, tensors):
        findings.add_text(f"storage {number}, first name", "one of its own (it has shares)", found_name)
    found = _top(top, storages, tensors)
    findings.raise_damage()
    findings.raise_unsupported()
    return found


def _check_byte_order(top: JsonFields) -> None:
    order = top.raw("byteorder")
    if isinstance(order, str) and order != "little":
        top.findings.unsupported.append(f"byte order {order!r:.20}")


def _top(top: JsonFields, storages: tuple[StorageEntry, ...], tensors: tuple[TensorEntry, ...]) -> Directory:
    """The members that are not rows of a table."""
    top.text("byteorder", '"little"')
    rank, world = top.integer("rank"), top.integer("world")
    if not top.findings.damage:
        top.demand(rank < world, "rank", f"below world ({world})", rank)
    step, save = top.raw("step"), top.raw("save")
    right = step is None or (type(step) is int and 0 <= step <= MAX_INTEGER)
    top.demand(right, "step", "an integer ≥ 0 or null", step)
    top.demand(save is None or isinstance(save, dict), "save", "an object", save)
    return Directory(storages, tensors, step, rank, world, top.strings("writer"), top.mapping("meta"), save)


def _element_bytes(row: JsonFields) -> tuple[str, int]:
    """The member `dtype`, and the bytes of an element."""
    name = row.text("dtype", "the name of an element type")
    known = element_type(name) if name else None
    if name and known is None:
        row.findings.unsupported.append(f"element type {name!r:.60} ({row.place})")
    return name, 1 if known is None else known.n_bytes


def _storages(top: JsonFields, raw_bytes: npt.NDArray[Any] | None) -> tuple[StorageEntry, ...]:
    findings = top.findings
    rank, world = (value if type(value) is int else 0 for value in map(top.raw, ("rank", "world")))
    ends = None if raw_bytes is None else np.cumsum(raw_bytes, dtype=np.int64)
    storages = []
    for number, value in enumerate(top.array("storages")):
        row = JsonFields(value, findings, f"storage {number}")
        if not isinstance(value, dict):
            continue
        dtype, _ = _element_bytes(row)
        n_bytes, location = row.integer("bytes"), row.text("location")
        extents = row.raw("extents")
        if extents is not None and not isinstance(extents, list):
            row.demand(False, "extents", "an array or null", extents)
            extents = None
        checked = None if extents is None else tuple(_extents(extents, row.place, raw_bytes, ends, findings))
        right = (checked is None) == (location == "meta")
        row.demand(right, "extents", 'null if the location is "meta", otherwise an array', extents)
        shares = _shares(row, value["shares"], n_bytes, world) if "shares" in value else ()
        print_text = value.get("print", "") if shares else ""
        if shares:
            row.demand(checked is not None, "extents", "an array (it has shares)", extents)
            right = "print" not in value or (isinstance(print_text, str) and HEX32.fullmatch(print_text) is not None)
            row.demand(right, "print", "32 hex digits", print_text)
        if checked is not None:
            total, (_, own) = sum(extent.n_bytes for extent in checked), stretch_of(shares, rank, n_bytes)
            whose = f" (the share of rank {rank})" if shares else ""
            row.demand(total == own, "extents", f"{own} bytes in all{whose}", total)
        storages.append(StorageEntry(dtype, n_bytes, location, checked, shares, str(print_text)))
    return tuple(storages)


def _shares(row: JsonFields, values: Any, n_bytes: int, world: int) -> tuple[Share, ...]:
    """The member `shares`, which is there; () where it is not right."""
    if not isinstance(values, list) or not values or not all(map(_is_share, values)):
        row.demand(False, "shares", "an array of [rank, bytes ≥ 1]", values)
        return ()
    shares = tuple(Share(*value) for value in values)
    ranks, total = [share.rank for share in shares], sum(share.n_bytes for share in shares)
    ascending = ranks == sorted(set(ranks)) and ranks[-1] < world
    row.demand(ascending, "shares", f"ranks in ascending order, below world ({world})", values)
    row.demand(total == n_bytes, "shares", f"{n_bytes} bytes in all", total)
    return shares if ascending and total == n_bytes else ()


def _is_share(value: Any) -> bool:
    whole = isinstance(value, list) and len(value) == 2 and all(type(item) is int for item in value)
    return whole and 0 <= value[0] <= MAX_INTEGER and 1 <= value[1] <= MAX_INTEGER


def _extents(
    values: list[Any],
    place: str,
    raw_bytes: npt.NDArray[Any] | None,
    ends: npt.NDArray[Any] | None,
    findings: Findings,
) -> Iterable[Extent]:
    for i, value in enumerate(values):
        where = f"{place}, extent {i}"
        shape_ok = isinstance(value, list) and len(value) == 3 and all(type(v) is int and v >= 0 for v in value)
        if not shape_ok:
            findings.add(where, "[record, offset, bytes]", value)
            continue
        extent = Extent(*value)
        if raw_bytes is None or ends is None:
            if extent.n_bytes >= 1:
                yield extent
            else:
                findings.add(where, "1 … bytes", extent.n_bytes)
        elif extent.record >= len(raw_bytes):
            findings.add(where, f"a record below {len(raw_bytes)}", extent.record)
        elif extent.offset >= raw_bytes[extent.record]:
            findings.add(where, f"an offset below {raw_bytes[extent.record]}", extent.offset)
        else:
            start = int(ends[extent.record]) - int(raw_bytes[extent.record]) + extent.offset
            room = int(ends[-1]) - start
            if 1 <= extent.n_bytes <= room:
                yield extent
            else:
                findings.add(where, f"1 … {room} bytes", extent.n_bytes)


def _tensors(values: list[Any], storages: Sequence[StorageEntry], findings: Findings) -> tuple[TensorEntry, ...]:
    entries = (_tensor(value, number, storages, findings) for number, value in enumerate(values))
    return tuple(entry for entry in entries if entry is not None)


def _tensor(value: Any, number: int, storages: Sequence[StorageEntry], findings: Findings) -> TensorEntry | None:
    """Read one row; None if it has no valid name."""
    if not isinstance(value, dict):
        findings.add(f"tensor {number}", "an object", value)
        return None
    try:
        name = from_json(value.get("name"))
    except ValueError as error:
        findings.add_text(f"tensor {number}, name", "an array of keys", str(error))
        return None
    row = JsonFields(value, findings, f"tensor {dotted(name)!r:.200}")
    dtype, element_bytes = _element_bytes(row)
    shape, stride = row.dimensions("shape"), row.dimensions("stride")
    offset, storage = row.integer("offset"), row.integer("storage")
    kind, requires_grad = row.text("kind") or "tensor", row.boolean("requires_grad")
    if kind not in KINDS:
        findings.unsupported.append(f"kind {kind!r:.40} ({row.place})")
    if len(shape) != len(stride):
        row.demand(False, "stride", f"{len(shape)} entries", stride)
    elif storage >= len(storages):
        row.demand(False, "storage", f"below {len(storages)}", storage)
    elif math.prod(size for size in shape if size) * element_bytes > MAX_INTEGER:
        row.demand(False, "shape", "less than 2^63 bytes", shape)
    elif kind != "quantized" and 0 not in shape:
        last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) + 1
        if last * element_bytes > storages[storage].n_bytes:
            what = f"an end within the {storages[storage].n_bytes} bytes of storage {storage}"
            findings.add(row.place, what, f"{last * element_bytes} bytes")
    place = row.optional("global")
    whole = None if place is None else GlobalPlace(place.dimensions("shape"), place.dimensions("offset"))
    return TensorEntry(name, dtype, shape, stride, offset, storage, kind, requires_grad, whole)

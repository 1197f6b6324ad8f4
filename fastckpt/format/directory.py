"""The directory and the file table: JSON in, checked values out (docs/format.md, sections 5 and 6)."""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastckpt.errors import CorruptCheckpointError, Damage, UnsupportedFormatError
from fastckpt.format.element_types import element_type
from fastckpt.format.json_text import load_json
from fastckpt.format.tensor_names import Name, canonical, dotted, from_json, to_json

MAX_DIMS = 64
_LIMIT = 1 << 63
KINDS = frozenset({"tensor", "parameter", "array", "quantized", "part"})


# A pack of this repository and nothing else: what a record names is read, and may one day be deleted.
_FILE_KEY = re.compile(r"data/[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)*")
_MAX_KEY_BYTES = 1024
_CRC = re.compile(r"[0-9a-f]{16}")


class FileEntry(NamedTuple):
    """Another file that holds chunks: its key from the repository's root."""

    key: str
    n_bytes: int
    crc64nvme: int


class Extent(NamedTuple):
    """A stretch of raw bytes: from `offset` in record `record`, running on through the next records."""

    record: int
    offset: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class StorageEntry:
    """One storage. extents None: it has no data (a meta tensor's)."""

    dtype: str
    n_bytes: int
    location: str
    extents: tuple[Extent, ...] | None


@dataclass(frozen=True, slots=True)
class GlobalPlace:
    """Where a shard lies in the whole tensor."""

    shape: tuple[int, ...]
    offset: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One name for a view of a storage. Shape, stride and offset in elements."""

    name: Name
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    storage: int
    kind: str
    requires_grad: bool
    place: GlobalPlace | None = None


@dataclass(frozen=True)
class Directory:
    """What the container holds, as far as a program can ask for it by name."""

    storages: tuple[StorageEntry, ...]
    tensors: tuple[TensorEntry, ...]
    step: int | None = None
    rank: int = 0
    world: int = 1
    writer: dict[str, str] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)
    save: dict[str, Any] | None = None
    """Of a vote: which save it belongs to. Checked by `format.vote`."""


def build(directory: Directory) -> bytes:
    """The JSON of a directory: compact, members in a fixed order, tensors in canonical order."""
    tensors = sorted(directory.tensors, key=lambda entry: canonical(entry.name))
    value = {
        "byteorder": "little",
        "writer": directory.writer,
        "step": directory.step,
        "rank": directory.rank,
        "world": directory.world,
        "meta": directory.meta,
        **({"save": directory.save} if directory.save is not None else {}),
        "storages": [
            {"dtype": s.dtype, "bytes": s.n_bytes, "location": s.location, "extents": s.extents}
            for s in directory.storages
        ],
        "tensors": [_tensor_to_json(entry) for entry in tensors],
    }
    return json.dumps(value, separators=(",", ":"), allow_nan=False, ensure_ascii=False).encode()


def _tensor_to_json(entry: TensorEntry) -> dict[str, Any]:
    value: dict[str, Any] = {
        "name": to_json(entry.name),
        "dtype": entry.dtype,
        "shape": entry.shape,
        "stride": entry.stride,
        "offset": entry.offset,
        "storage": entry.storage,
        "kind": entry.kind,
        "requires_grad": entry.requires_grad,
    }
    if entry.place is not None:
        value["global"] = {"shape": entry.place.shape, "offset": entry.place.offset}
    return value


def build_file_table(files: Sequence[FileEntry]) -> bytes:
    """The JSON of a file table."""
    rows = [{"key": f.key, "bytes": f.n_bytes, "crc64nvme": f"{f.crc64nvme:016x}"} for f in files]
    return json.dumps(rows, separators=(",", ":")).encode()


def parse_file_table(data: bytes, self_contained: bool, source: str) -> tuple[FileEntry, ...]:
    """Check and read a file table; that of a self-contained container is empty. CorruptCheckpointError."""
    value = load_json(data, "file table", source)
    if self_contained:
        if value != []:
            damage = Damage("file table", "as a whole", "[] (the container is self-contained)", reprlib.repr(value))
            raise CorruptCheckpointError(source, [damage])
        return ()
    damage_found, files = [], []
    for number, item in enumerate(value if isinstance(value, list) else [value]):
        key, n_bytes, crc = (
            (item.get(m) for m in ("key", "bytes", "crc64nvme")) if isinstance(item, dict) else [None] * 3
        )
        right = isinstance(key, str) and _FILE_KEY.fullmatch(key) and ".." not in key and len(key) <= _MAX_KEY_BYTES
        right = right and type(n_bytes) is int and 0 <= n_bytes < _LIMIT
        if right and isinstance(crc, str) and _CRC.fullmatch(crc):
            files.append(FileEntry(str(key), int(n_bytes or 0), int(crc, 16)))
        else:
            expected = "a pack's key, its bytes and 16 hex digits of crc64nvme"
            damage_found.append(Damage("file table", f"file {number}", expected, reprlib.repr(item)))
    if damage_found:
        raise CorruptCheckpointError(source, damage_found)
    return tuple(files)


class _Findings:
    """Collects what is wrong with the directory. `get` returns a value of the right type, or a harmless stand-in."""

    def __init__(self) -> None:
        self.damage: list[Damage] = []
        self.unsupported: list[str] = []

    def add(self, place: str, expected: str, found: object) -> None:
        self.damage.append(Damage("directory", place, expected, reprlib.repr(found)))

    def get(self, owner: dict[str, Any], place: str, member: str, kind: type | tuple[type, ...], words: str) -> Any:
        value = owner.get(member)
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if type(value) in kinds:
            return value
        self.add(f"{place}, {member}", words, value)
        return None

    def integers(self, owner: dict[str, Any], place: str, member: str, *, least: int = 0) -> tuple[int, ...]:
        value = owner.get(member)
        if isinstance(value, list) and all(type(item) is int and least <= item < _LIMIT for item in value):
            if len(value) <= MAX_DIMS:
                return tuple(value)
            self.add(f"{place}, {member}", f"at most {MAX_DIMS} dimensions", len(value))
        else:
            self.add(f"{place}, {member}", f"an array of integers ≥ {least}", value)
        return ()

    def integer(self, owner: dict[str, Any], place: str, member: str) -> int:
        value = owner.get(member)
        if type(value) is int and 0 <= value < _LIMIT:
            return value
        self.add(f"{place}, {member}", "an integer from 0 to 2^63 − 1", value)
        return 0

    def element_bytes(self, owner: dict[str, Any], place: str) -> tuple[str, int]:
        name = self.get(owner, place, "dtype", str, "the name of an element type")
        if name is None:
            return "uint8", 1
        known = element_type(name)
        if known is None:
            self.unsupported.append(f"element type {name!r:.60} ({place})")
            return name, 1
        return name, known.n_bytes


def parse(data: bytes, raw_bytes: npt.NDArray[Any], source: str) -> Directory:
    """Check and read a directory.

    raw_bytes: of each record, already checked. CorruptCheckpointError lists everything that is wrong; UnsupportedFormatError for a
    byte order or element type that this version does not know.
    """
    value = load_json(data, "directory", source)
    findings = _Findings()
    if not isinstance(value, dict):
        findings.add("as a whole", "an object", value)
        raise CorruptCheckpointError(source, findings.damage)
    order = findings.get(value, "top level", "byteorder", str, '"little"')
    if order is not None and order != "little":
        findings.unsupported.append(f"byte order {order!r:.20}")
    _raise_unsupported(findings, source)
    storages = _storages(findings.get(value, "top level", "storages", list, "an array") or [], raw_bytes, findings)
    tensors = _tensors(findings.get(value, "top level", "tensors", list, "an array") or [], storages, findings)
    rank, world = (findings.integer(value, "top level", member) for member in ("rank", "world"))
    if rank >= world and not findings.damage:
        findings.add("top level, rank", f"below world ({world})", rank)
    step = value.get("step")
    if step is not None and (type(step) is not int or not 0 <= step < _LIMIT):
        findings.add("top level, step", "an integer ≥ 0 or null", step)
    writer = findings.get(value, "top level", "writer", dict, "an object") or {}
    meta = findings.get(value, "top level", "meta", dict, "an object") or {}
    save = value.get("save")
    if save is not None and not isinstance(save, dict):
        findings.add("top level, save", "an object", save)
    if findings.damage:
        raise CorruptCheckpointError(source, findings.damage)
    _raise_unsupported(findings, source)
    return Directory(storages, tensors, step, rank, world, {str(k): str(v) for k, v in writer.items()}, meta, save)


def _raise_unsupported(findings: _Findings, source: str) -> None:
    if findings.unsupported:
        shown = "; ".join(findings.unsupported[:5])
        raise UnsupportedFormatError(
            f"{source} needs another fastckpt: {shown}. Upgrade with `pip install -U fastckpt-engine`"
        )


def _storages(values: list[Any], raw_bytes: npt.NDArray[Any], findings: _Findings) -> tuple[StorageEntry, ...]:
    ends = np.cumsum(raw_bytes, dtype=np.int64)
    storages = []
    for number, value in enumerate(values):
        place = f"storage {number}"
        if not isinstance(value, dict):
            findings.add(place, "an object", value)
            continue
        dtype, _ = findings.element_bytes(value, place)
        n_bytes = findings.integer(value, place, "bytes")
        location = findings.get(value, place, "location", str, "a string") or ""
        extents = value.get("extents")
        if extents is not None and not isinstance(extents, list):
            findings.add(f"{place}, extents", "an array or null", extents)
            extents = None
        checked = None if extents is None else tuple(_extents(extents, place, raw_bytes, ends, findings))
        if (checked is None) != (location == "meta"):
            findings.add(f"{place}, extents", 'null if the location is "meta", otherwise an array', extents)
        if checked is not None and sum(extent.n_bytes for extent in checked) != n_bytes:
            findings.add(f"{place}, extents", f"{n_bytes} bytes in all", sum(extent.n_bytes for extent in checked))
        storages.append(StorageEntry(dtype, n_bytes, location, checked))
    return tuple(storages)


def _extents(
    values: list[Any], place: str, raw_bytes: npt.NDArray[Any], ends: npt.NDArray[Any], findings: _Findings
) -> Iterable[Extent]:
    for i, value in enumerate(values):
        where = f"{place}, extent {i}"
        shape_ok = isinstance(value, list) and len(value) == 3 and all(type(v) is int and v >= 0 for v in value)
        if not shape_ok:
            findings.add(where, "[record, offset, bytes]", value)
            continue
        extent = Extent(*value)
        if extent.record >= len(raw_bytes):
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


def _tensors(values: list[Any], storages: Sequence[StorageEntry], findings: _Findings) -> tuple[TensorEntry, ...]:
    tensors = []
    for number, value in enumerate(values):
        place = f"tensor {number}"
        if not isinstance(value, dict):
            findings.add(place, "an object", value)
            continue
        try:
            name = from_json(value.get("name"))
        except ValueError as error:
            findings.damage.append(Damage("directory", f"{place}, name", "an array of keys", str(error)))
            continue
        place = f"tensor {dotted(name)!r:.200}"
        dtype, element_bytes = findings.element_bytes(value, place)
        shape, stride = (findings.integers(value, place, member) for member in ("shape", "stride"))
        offset = findings.integer(value, place, "offset")
        storage = findings.integer(value, place, "storage")
        kind = findings.get(value, place, "kind", str, "a string") or "tensor"
        requires_grad = findings.get(value, place, "requires_grad", bool, "true or false") or False
        if kind not in KINDS:
            findings.unsupported.append(f"kind {kind!r:.40} ({place})")
        if len(shape) != len(stride):
            findings.add(f"{place}, stride", f"{len(shape)} entries", stride)
        elif storage >= len(storages):
            findings.add(f"{place}, storage", f"below {len(storages)}", storage)
        elif math.prod(size for size in shape if size) * element_bytes >= _LIMIT:
            findings.add(f"{place}, shape", "less than 2^63 bytes", shape)
        elif kind != "quantized" and 0 not in shape:
            last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) + 1
            if last * element_bytes > storages[storage].n_bytes:
                what = f"an end within the {storages[storage].n_bytes} bytes of storage {storage}"
                findings.add(place, what, f"{last * element_bytes} bytes")
        entry_place = _global_place(value.get("global"), place, findings)
        tensors.append(TensorEntry(name, dtype, shape, stride, offset, storage, kind, requires_grad, entry_place))
    return tuple(tensors)


def _global_place(value: Any, place: str, findings: _Findings) -> GlobalPlace | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        findings.add(f"{place}, global", "an object", value)
        return None
    return GlobalPlace(*(findings.integers(value, f"{place}, global", member) for member in ("shape", "offset")))

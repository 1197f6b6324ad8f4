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
_SMALL = 1 << 40
_INT = frozenset({int})
_PLAIN_KEY = frozenset({int, str})
_STORAGE_MEMBERS = frozenset({"dtype", "bytes", "location", "extents"})
_TENSOR_MEMBERS = frozenset({"name", "dtype", "shape", "stride", "offset", "storage", "kind", "requires_grad"})
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


class StorageEntry(NamedTuple):
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


class TensorEntry(NamedTuple):
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
    }
    storages = ",".join(
        f'{{"dtype":{_text(s.dtype)},"bytes":{s.n_bytes},"location":{_text(s.location)},"extents":{_extents_text(s.extents)}}}'
        for s in directory.storages
    )
    forms: dict[Any, tuple[str, str]] = {}
    rows = ",".join([_tensor_text(entry, forms) for entry in tensors])
    return f'{_json(value)[:-1]},"storages":[{storages}],"tensors":[{rows}]}}'.encode()


# Rows are put together from their texts: 50,000 dictionaries for an encoder take three times as long.
_json = json.JSONEncoder(separators=(",", ":"), allow_nan=False, ensure_ascii=False).encode
_text = json.encoder.encode_basestring


def _extents_text(extents: tuple[Extent, ...] | None) -> str:
    if extents is None:
        return "null"
    return f"[{','.join([f'[{record},{offset},{n_bytes}]' for record, offset, n_bytes in extents])}]"


def _tensor_text(entry: TensorEntry, forms: dict[Any, tuple[str, str]]) -> str:
    """The row of a tensor. forms: the texts of what many have alike, as far as they have been made."""
    name, dtype, shape, stride, offset, storage, kind, requires_grad, place = entry
    form = forms.get((dtype, shape, stride, kind, requires_grad))
    if form is None:
        form = forms[dtype, shape, stride, kind, requires_grad] = (
            _json({"dtype": dtype, "shape": shape, "stride": stride})[1:-1],
            _json({"kind": kind, "requires_grad": requires_grad})[1:-1],
        )
    keys = ",".join([_text(key) if type(key) is str else _json(key) for key in to_json(name)])
    place_text = "" if place is None else f',"global":{_json({"shape": place.shape, "offset": place.offset})}'
    return f'{{"name":[{keys}],{form[0]},"offset":{offset},"storage":{storage},{form[1]}{place_text}}}'


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
    raw_list = raw_bytes.tolist()
    storages = []
    for number, value in enumerate(values):
        entry = _usual_storage(value, raw_list)
        if entry is not None:
            storages.append(entry)
            continue
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


def _usual_storage(value: Any, raw_bytes: list[int]) -> StorageEntry | None:
    """A storage that lies in one record, as small ones do, if all is right with it. None: look closer."""
    if type(value) is not dict or value.keys() != _STORAGE_MEMBERS:
        return None
    dtype, n_bytes, location, extents = value["dtype"], value["bytes"], value["location"], value["extents"]
    if type(dtype) is not str or element_type(dtype) is None or type(n_bytes) is not int:
        return None
    if type(location) is not str or location == "meta" or type(extents) is not list or len(extents) != 1:
        return None
    extent = extents[0]
    if type(extent) is not list or len(extent) != 3 or not _INT.issuperset(map(type, extent)):
        return None
    record, offset, size = extent
    if (
        not 0 <= record < len(raw_bytes)
        or offset < 0
        or size < 1
        or size != n_bytes
        or offset + size > raw_bytes[record]
    ):
        return None
    return StorageEntry(dtype, n_bytes, location, (Extent(record, offset, size),))


def _usual_tensor(value: Any, storages: Sequence[StorageEntry]) -> TensorEntry | None:
    """A tensor if all is right with it: what a writer writes, in a third of the time. None: look closer."""
    if type(value) is not dict or value.keys() != _TENSOR_MEMBERS:
        return None
    name, dtype, shape, stride = value["name"], value["dtype"], value["shape"], value["stride"]
    offset, storage, kind, requires_grad = value["offset"], value["storage"], value["kind"], value["requires_grad"]
    element = element_type(dtype) if type(dtype) is str else None
    if element is None or type(name) is not list or not _PLAIN_KEY.issuperset(map(type, name)):
        return None
    if type(shape) is not list or type(stride) is not list or len(shape) != len(stride) or len(shape) > MAX_DIMS:
        return None
    if not _INT.issuperset(map(type, (*shape, *stride, offset, storage))) or type(requires_grad) is not bool:
        return None
    if type(kind) is not str or kind not in KINDS or kind == "quantized" or not 0 <= storage < len(storages):
        return None
    if (
        not 0 <= offset < _SMALL
        or any(not 0 < size < _SMALL for size in shape)
        or any(not 0 <= step < _SMALL for step in stride)
    ):
        return None
    if any(type(key) is int and not -_LIMIT < key < _LIMIT for key in name):
        return None
    last, n_elements = offset + 1, 1
    for size, step in zip(shape, stride, strict=True):
        last += (size - 1) * step
        n_elements *= size
    if n_elements * element.n_bytes >= _LIMIT or last * element.n_bytes > storages[storage].n_bytes:
        return None
    return TensorEntry(tuple(name), dtype, tuple(shape), tuple(stride), offset, storage, kind, requires_grad)


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
        entry = _usual_tensor(value, storages)
        if entry is not None:
            tensors.append(entry)
            continue
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

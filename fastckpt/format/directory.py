"""The directory and the file table as values, and their JSON (docs/format.md, sections 5 and 6). `directory_reader` reads a directory."""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from fastckpt.errors import CorruptCheckpointError, Damage
from fastckpt.format.fields import MAX_INTEGER
from fastckpt.format.json_text import load_json
from fastckpt.format.tensor_names import Name, canonical, to_json

KINDS = frozenset({"tensor", "parameter", "array", "quantized", "part"})

# Only packs of this repository: a file that a record names is read, and may one day be deleted.
_FILE_KEY = re.compile(r"data/[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)*")
_MAX_KEY_BYTES = 1024
_CRC = re.compile(r"[0-9a-f]{16}")


class FileEntry(NamedTuple):
    """Another file that holds chunks. key: from the repository's root."""

    key: str
    n_bytes: int
    crc64nvme: int


class Extent(NamedTuple):
    """A stretch of raw bytes: from `offset` in record `record`, running on through the next records."""

    record: int
    offset: int
    n_bytes: int


class Share(NamedTuple):
    """A stretch of a storage's bytes, and the rank whose vote has it."""

    rank: int
    n_bytes: int


class StorageEntry(NamedTuple):
    """One storage. extents None: it has no data (storage of a meta tensor)."""

    dtype: str
    n_bytes: int
    location: str
    extents: tuple[Extent, ...] | None
    shares: tuple[Share, ...] = ()
    """Who has which stretch of the bytes, in order: `extents` are of this rank's own. (): all bytes are this index's own."""
    print: str = ""
    """Of a storage with shares: the digest of all its bytes as this rank held them, in hex digits; "" if none was taken."""


@dataclass(frozen=True, slots=True)
class GlobalPlace:
    """The place of a shard in the whole tensor."""

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
    """The container's content, as far as a program can ask for it by name."""

    storages: tuple[StorageEntry, ...]
    tensors: tuple[TensorEntry, ...]
    step: int | None = None
    rank: int = 0
    world: int = 1
    writer: dict[str, str] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)
    save: dict[str, Any] | None = None
    """Votes only: the save that the vote belongs to. Checked by `format.vote`."""


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
        f'{{"dtype":{_text(s.dtype)},"bytes":{s.n_bytes},"location":{_text(s.location)},"extents":{_extents_text(s.extents)}'
        f"{_shares_text(s) if s.shares else ''}}}"
        for s in directory.storages
    )
    forms: dict[Any, tuple[str, str]] = {}
    rows = ",".join([_tensor_text(entry, forms) for entry in tensors])
    return f'{_json(value)[:-1]},"storages":[{storages}],"tensors":[{rows}]}}'.encode()


# Rows are joined from texts: making 50,000 dictionaries for an encoder takes three times as long.
_json = json.JSONEncoder(separators=(",", ":"), allow_nan=False, ensure_ascii=False).encode
_text = json.encoder.encode_basestring


def _extents_text(extents: tuple[Extent, ...] | None) -> str:
    if extents is None:
        return "null"
    return f"[{','.join([f'[{record},{offset},{n_bytes}]' for record, offset, n_bytes in extents])}]"


def _shares_text(storage: StorageEntry) -> str:
    shares = ",".join([f"[{rank},{n_bytes}]" for rank, n_bytes in storage.shares])
    return f',"shares":[{shares}]' + (f',"print":{_text(storage.print)}' if storage.print else "")


def _tensor_text(entry: TensorEntry, forms: dict[Any, tuple[str, str]]) -> str:
    """The JSON row of a tensor. forms: a cache of texts that many tensors share."""
    name, dtype, shape, stride, offset, storage, kind, requires_grad, place = entry
    form = forms.get((dtype, shape, stride, kind, requires_grad))
    if form is None:
        form = forms[dtype, shape, stride, kind, requires_grad] = (
            _json({"dtype": dtype, "shape": shape, "stride": stride})[1:-1],
            _json({"kind": kind, "requires_grad": requires_grad})[1:-1],
        )
    keys = ",".join([_text(k) if type(k) is str else str(k) if type(k) is int else _json(k) for k in to_json(name)])
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
        right = right and type(n_bytes) is int and 0 <= n_bytes <= MAX_INTEGER
        if right and isinstance(crc, str) and _CRC.fullmatch(crc):
            files.append(FileEntry(str(key), int(n_bytes or 0), int(crc, 16)))
        else:
            expected = "a pack's key, its bytes and 16 hex digits of crc64nvme"
            damage_found.append(Damage("file table", f"file {number}", expected, reprlib.repr(item)))
    if damage_found:
        raise CorruptCheckpointError(source, damage_found)
    return tuple(files)

"""A directory as writers write it, read column by column: half the time that rows take (docs/decisions/0008-schema-of-the-directory.md).

Nothing is decided here that `directory_reader` would decide otherwise: whatever is not as usual, damage above all, is left to it.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fastckpt.format.directory import KINDS, Extent, StorageEntry, TensorEntry
from fastckpt.format.element_types import element_type
from fastckpt.format.fields import MAX_DIMS

_STORAGE_MEMBERS = ("dtype", "bytes", "location", "extents")
_TENSOR_MEMBERS = ("name", "dtype", "shape", "stride", "offset", "storage", "kind", "requires_grad")
# Far below 2^63: sums and products of them fit into 64 bits.
_SMALL = 1 << 40
_BIG = 10**18  # integers of 20 digits are refused, and keys of names end at 2^63
_SPACED_MEMBER = re.compile(rb'"[ \t\r\n]+:')

Columns = tuple[dict[str, Any], tuple[StorageEntry, ...], tuple[TensorEntry, ...]]


def parse(data: bytes, raw_bytes: npt.NDArray[Any]) -> Columns | None:
    """The whole value, its storages and its tensors, if all of these are right and as usual. None: look closer.

    raw_bytes: of each record, already checked. The other members are not checked.
    """
    if b"\\" in data or _SPACED_MEMBER.search(data):
        return None
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=_refuse)
        return _of(value, data, raw_bytes)
    except (ValueError, RecursionError):
        return None


def _of(value: Any, data: bytes, raw_bytes: npt.NDArray[Any]) -> Columns | None:
    if type(value) is not dict or value.get("byteorder") != "little":
        return None
    if type(value.get("storages")) is not list or type(value.get("tensors")) is not list:
        return None
    storages = _storages(value["storages"], raw_bytes)
    tensors = None if storages is None else _tensors(value["tensors"], storages)
    if storages is None or tensors is None:
        return None
    # `":` stands behind each member's name, and perhaps elsewhere: as many as there are members means that no member came twice.
    others = {name: member for name, member in value.items() if name not in ("storages", "tensors")}
    n_members = 2 + _members(others) + len(_STORAGE_MEMBERS) * len(storages) + len(_TENSOR_MEMBERS) * len(tensors)
    return (value, storages, tensors) if n_members == data.count(b'":') else None


def _refuse(text: str) -> float:
    raise ValueError(text)


def _members(value: Any) -> int:
    """How many members the objects in a value have, all together. ValueError for an integer that may be too big."""
    if type(value) is dict:
        return len(value) + sum(map(_members, value.values()))
    if type(value) is int and not -_BIG < value < _BIG:
        raise ValueError("a big integer")
    return sum(map(_members, value)) if type(value) is list else 0


def _columns(rows: list[Any], members: tuple[str, ...]) -> list[tuple[Any, ...]] | None:
    """One tuple a member; None unless every row is an object with these members, in this order."""
    if not set(map(type, rows)) <= {dict} or not set(map(tuple, rows)) <= {members}:
        return None
    return list(zip(*map(dict.values, rows), strict=True)) or [()] * len(members)


def _all(kind: type, values: Sequence[Any]) -> bool:
    return set(map(type, values)) <= {kind}


def _small(values: Sequence[Any]) -> npt.NDArray[np.int64] | None:
    """Integers from 0 to 2^40; None if others are among them."""
    if not _all(int, values) or (values and not 0 <= min(values) <= max(values) < _SMALL):
        return None
    return np.array(values, np.int64)


def _storages(rows: list[Any], raw_bytes: npt.NDArray[Any]) -> tuple[StorageEntry, ...] | None:
    """Each with data in one extent, as writers make them."""
    columns = _columns(rows, _STORAGE_MEMBERS)
    if columns is None:
        return None
    dtypes, lengths, locations, extents = columns
    if not _all(str, dtypes) or not _all(str, locations) or not _all(list, extents):
        return None
    if any(element_type(dtype) is None for dtype in set(dtypes)) or "meta" in locations:
        return None
    if not set(map(len, extents)) <= {1}:
        return None
    places = list(itertools.chain.from_iterable(extents))
    if not _all(list, places) or not set(map(len, places)) <= {3}:
        return None
    numbers, n_bytes = _small(tuple(itertools.chain.from_iterable(places))), _small(lengths)
    if numbers is None or n_bytes is None:
        return None
    if rows:
        record, offset, size = numbers.reshape(-1, 3).T
        if record.max(initial=0) >= len(raw_bytes):
            return None
        ends = np.cumsum(raw_bytes, dtype=np.int64)
        left = ends[-1] - (ends[record] - raw_bytes[record] + offset)
        if not ((offset < raw_bytes[record]) & (size >= 1) & (size <= left) & (size == n_bytes)).all():
            return None
    stretches = [(Extent._make(place),) for place in places]
    return tuple(map(StorageEntry._make, zip(dtypes, lengths, locations, stretches, strict=True)))


def _tensors(rows: list[Any], storages: Sequence[StorageEntry]) -> tuple[TensorEntry, ...] | None:
    """Each without a place in a whole tensor."""
    columns = _columns(rows, _TENSOR_MEMBERS)
    if columns is None:
        return None
    names, dtypes, shape_lists, stride_lists, offsets, numbers, kinds, grads = columns
    if not (_all(list, names) and _all(str, dtypes) and _all(list, shape_lists) and _all(list, stride_lists)):
        return None
    if not (_all(str, kinds) and KINDS.issuperset(kinds) and _all(bool, grads)):
        return None
    key_types = set(map(type, itertools.chain.from_iterable(names)))
    if not key_types <= {int, str}:
        return None
    if int in key_types and not all(
        -_BIG < key < _BIG for key in itertools.chain.from_iterable(names) if type(key) is int
    ):
        return None
    shapes, strides = list(map(tuple, shape_lists)), list(map(tuple, stride_lists))
    if not _all(int, [*itertools.chain.from_iterable(shapes), *itertools.chain.from_iterable(strides)]):
        return None
    offset, number = _small(offsets), _small(numbers)
    if offset is None or number is None or number.max(initial=-1) >= len(storages):
        return None
    reaches = _reaches(dtypes, shapes, strides, kinds)
    if reaches is None:
        return None
    reach, element_bytes = reaches
    ends = np.where(reach < 0, 0, (offset + reach + 1) * element_bytes)
    room = np.array([storage.n_bytes for storage in storages], np.int64)
    if rows and not (ends <= room[number]).all():
        return None
    none = itertools.repeat(None, len(rows))
    columns = [tuple(map(tuple, names)), dtypes, shapes, strides, offsets, numbers, kinds, grads, none]  # type: ignore[list-item]
    return tuple(map(TensorEntry._make, zip(*columns, strict=True)))


def _reaches(
    dtypes: Sequence[str], shapes: Sequence[tuple[int, ...]], strides: Sequence[tuple[int, ...]], kinds: Sequence[str]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]] | None:
    """How many elements behind its first one each tensor's last one lies, −1 where that is not bounded; and the bytes of an element."""
    known: dict[Any, tuple[int, int]] = {}
    forms = list(zip(dtypes, shapes, strides, kinds, strict=True))
    for form in set(forms):
        dtype, shape, stride, kind = form
        element = element_type(dtype)
        if element is None or len(shape) != len(stride) or len(shape) > MAX_DIMS:
            return None
        if any(not 0 <= size < _SMALL for size in shape) or any(not 0 <= step < _SMALL for step in stride):
            return None
        last = sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
        if max(math.prod(size for size in shape if size), last) * element.n_bytes >= 1 << 62:
            return None
        known[form] = -1 if kind == "quantized" or 0 in shape else last, element.n_bytes
    found = np.array([known[form] for form in forms], np.int64).reshape(-1, 2)
    return found[:, 0], found[:, 1]

"""Checks a directory column by column, in half the time that rows take (docs/decisions/0008-schema-of-the-directory.md).

`parse` reads the JSON, `sound` checks values before they are written; both by the same rules. This module accepts only the usual case.
Everything unusual, and all damage, is left to `directory_reader`, so the two never disagree.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fastckpt.format.directory import KINDS, Directory, Extent, GlobalPlace, Share, StorageEntry, TensorEntry
from fastckpt.format.element_types import element_type
from fastckpt.format.fields import HEX32, MAX_DIMS
from fastckpt.format.shares import problems_of_names
from fastckpt.format.tensor_names import ReprKey, from_json

_STORAGE_MEMBERS = ("dtype", "bytes", "location", "extents")
_SHARED_MEMBERS = (*_STORAGE_MEMBERS, "shares")
_PRINTED_MEMBERS = (*_SHARED_MEMBERS, "print")
_NO_SHARES: tuple[Share, ...] = ()
_TENSOR_MEMBERS = ("name", "dtype", "shape", "stride", "offset", "storage", "kind", "requires_grad")
_SHARD_MEMBERS = (*_TENSOR_MEMBERS, "global")
_SMALL = 1 << 40  # far below 2^63: sums and products of such numbers fit into 64 bits
_BIG = 10**18  # integers of 20 digits are refused, and keys of names end at 2^63
_SPACED = (b'" ', b'"\t', b'"\r', b'"\n')  # possibly a member's name that is followed by space before its colon

# Makes an Extent without a Python-level call for each.
_EXTENT = functools.partial(tuple.__new__, Extent)
_SHARE = functools.partial(tuple.__new__, Share)
_STORAGE = functools.partial(tuple.__new__, StorageEntry)
_TENSOR = functools.partial(tuple.__new__, TensorEntry)

Columns = tuple[dict[str, Any], tuple[StorageEntry, ...], tuple[TensorEntry, ...]]


def parse(data: bytes, raw_bytes: npt.NDArray[Any] | None) -> Columns | None:
    """The whole value, its storages and its tensors, if all of them are right and usual. None: `directory_reader` has to look closer.

    raw_bytes: raw bytes of each record, already checked; None: they are not known, and extents are not checked against them. The other
    members are not checked.
    """
    if b"\\" in data or any(mark in data for mark in _SPACED):
        return None
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=_refuse)
        return _of(value, data, raw_bytes)
    except (ValueError, RecursionError):
        return None


def sound(directory: Directory, raw_bytes: npt.NDArray[Any]) -> bool:
    """Whether the storages and tensors of a directory are right and usual. False: `directory_reader` has to look closer."""
    try:
        names, *columns, places = _columns(directory.tensors, 9)
        return (
            _sound_storages(_columns(directory.storages, 6), raw_bytes, directory.rank, directory.world)
            and _sound_keys(itertools.chain.from_iterable(names))
            and _sound_tensors(columns, directory.storages)
            and all(_small_array(place.shape + place.offset) is not None for place in places if place is not None)
            and not any(problems_of_names(directory.storages, directory.tensors))
        )
    except (AttributeError, TypeError, ValueError):  # values with wrong types
        return False


def _columns(rows: Iterable[Iterable[Any]], n: int) -> list[Any]:
    """One tuple for each of the n members of the rows. ValueError for rows of different lengths."""
    return list(zip(*rows, strict=True)) or [()] * n


def _refuse(text: str) -> float:
    raise ValueError(text)


def _of(value: Any, data: bytes, raw_bytes: npt.NDArray[Any] | None) -> Columns | None:
    if type(value) is not dict or value.get("byteorder") != "little":
        return None
    storage_rows, tensor_rows = value.get("storages"), value.get("tensors")
    if type(storage_rows) is not list or type(tensor_rows) is not list:
        return None
    storages = _storages(storage_rows, raw_bytes, value.get("rank"), value.get("world"))
    found = None if storages is None else _tensors(tensor_rows, storages)
    if storages is None or found is None:
        return None
    tensors, n_tensor_members = found
    if any(problems_of_names(storages, tensors)):
        return None
    # `":` stands behind each member's name, and perhaps elsewhere: as many as there are members means that no member came twice.
    others = {name: member for name, member in value.items() if name not in ("storages", "tensors")}
    n_members = 2 + _members(others) + sum(map(len, storage_rows)) + n_tensor_members
    return (value, storages, tensors) if n_members == data.count(b'":') else None


def _members(value: Any) -> int:
    """How many members the objects in a value have, all together. ValueError for an integer that may be too big."""
    if type(value) is dict:
        return len(value) + sum(map(_members, value.values()))
    if type(value) is int and not -_BIG < value < _BIG:
        raise ValueError("a big integer")
    return sum(map(_members, value)) if type(value) is list else 0


def _storages(
    rows: list[Any], raw_bytes: npt.NDArray[Any] | None, rank: object, world: object
) -> tuple[StorageEntry, ...] | None:
    if not _all(dict, rows):
        return None
    members = set(map(tuple, rows))
    if not members <= {_STORAGE_MEMBERS, _SHARED_MEMBERS, _PRINTED_MEMBERS}:
        return None
    if members <= {_STORAGE_MEMBERS}:
        columns = [*_columns(map(dict.values, rows), 4), [_NO_SHARES] * len(rows), [""] * len(rows)]
    else:
        columns = _columns(map(_with_shares, rows), 6)
    dtypes, lengths, locations, extents, shares, prints = columns
    lists = [value for value in extents if value is not None]
    if not _all(list, lists) or not _all(list, list(itertools.chain.from_iterable(lists))):
        return None
    if not _sound_storages(columns, raw_bytes, rank, world):
        return None
    if all(some is not None and len(some) == 1 for some in extents):
        values: Iterable[Any] = zip(map(_EXTENT, itertools.chain.from_iterable(lists)), strict=True)
    else:
        values = [None if some is None else tuple(map(_EXTENT, some)) for some in extents]
    return tuple(map(_STORAGE, zip(dtypes, lengths, locations, values, shares, prints, strict=True)))


def _with_shares(row: dict[str, Any]) -> Iterable[Any]:
    """All six members of a row. ValueError for shares or a print that are there and not as usual."""
    dtype, n_bytes, location, extents, *rest = row.values()
    shares: tuple[Share, ...] = _NO_SHARES
    if rest:
        if type(rest[0]) is not list or not rest[0] or not _all(list, rest[0]) or not all(rest):
            raise ValueError("no shares")
        shares = tuple(map(_SHARE, rest[0]))
    return dtype, n_bytes, location, extents, shares, rest[1] if len(rest) > 1 else ""


def _sound_storages(columns: Sequence[Any], raw_bytes: npt.NDArray[Any] | None, rank: object, world: object) -> bool:
    """columns: dtypes, lengths, locations, extents, shares and prints."""
    dtypes, lengths, locations, extents, shares, prints = columns
    n_bytes = _small_array(lengths)
    if n_bytes is None or not (_all(str, dtypes) and _all(str, locations) and _all(str, prints)):
        return False
    if not _all(tuple, shares):
        return False
    if any(element_type(dtype) is None for dtype in set(dtypes)):
        return False
    if any((some is None) != (location == "meta") for some, location in zip(extents, locations, strict=True)):
        return False
    places = [place for some in extents if some for place in some]
    flat = _small_array(list(itertools.chain.from_iterable(places)))
    if flat is None or not set(map(len, places)) <= {3}:
        return False
    record, offset, size = flat.reshape(-1, 3).T
    if raw_bytes is not None:
        ends = np.cumsum(raw_bytes, dtype=np.int64)
        if record.max(initial=-1) >= len(ends):
            return False
        left = (ends[-1] if len(ends) else 0) - (ends[record] - raw_bytes[record] + offset)
        if not ((offset < raw_bytes[record]) & (size <= left)).all():
            return False
    if not (size >= 1).all():
        return False
    # The lengths of a storage's extents must add up to its length.
    totals = np.zeros(len(lengths), np.int64)
    np.add.at(totals, np.repeat(np.arange(len(extents)), [len(some or ()) for some in extents]), size)
    has_data = np.array([some is not None for some in extents], bool)
    if any(shares) or any(prints):
        own = _own_bytes(n_bytes, shares, prints, rank, world)
        has_shares = np.array(list(map(bool, shares)), bool)
        return own is not None and bool((totals == own)[has_data].all() and has_data[has_shares].all())
    return bool((totals == n_bytes)[has_data].all())


def _own_bytes(
    lengths: npt.NDArray[np.int64], shares: Sequence[Any], prints: Sequence[Any], rank: object, world: object
) -> npt.NDArray[np.int64] | None:
    """How many bytes of each storage are in this rank's vote; None if the shares or prints are not right."""
    if type(rank) is not int or type(world) is not int or not 0 <= rank < world < _SMALL:
        return None
    if any(text and not (some and HEX32.fullmatch(text)) for text, some in zip(prints, shares, strict=True)):
        return None
    places = [place for some in shares for place in some]
    flat = _small_array(list(itertools.chain.from_iterable(places)))
    if flat is None or not set(map(len, places)) <= {2}:
        return None
    ranks, sizes = flat.reshape(-1, 2).T
    of = np.repeat(np.arange(len(shares)), list(map(len, shares)))
    ascending = (np.diff(ranks) > 0) | (np.diff(of) > 0)
    if not ((ranks < world) & (sizes >= 1)).all() or not ascending.all():
        return None
    totals, own = lengths.copy(), lengths.copy()
    totals[of] = own[of] = 0
    np.add.at(totals, of, sizes)
    np.add.at(own, of[ranks == rank], sizes[ranks == rank])
    return own if (totals == lengths).all() else None


def _tensors(rows: list[Any], storages: Sequence[StorageEntry]) -> tuple[tuple[TensorEntry, ...], int] | None:
    """The entries, and how many members their objects have, all together."""
    if not _all(dict, rows) or not set(map(tuple, rows)) <= {_TENSOR_MEMBERS, _SHARD_MEMBERS}:
        return None
    names, dtypes, shape_lists, stride_lists, *others = _columns(map(_without_place, rows), 8)
    if not (_all(list, names) and _all(list, shape_lists) and _all(list, stride_lists)):
        return None
    n_members = sum(map(len, rows))
    keys = list(itertools.chain.from_iterable(names))
    if _all_of({int, str}, keys):
        typed = list(map(tuple, names))
    else:
        typed = list(map(from_json, names))
        n_members += sum(type(key) is dict for key in keys)
    shapes, strides = list(map(tuple, shape_lists)), list(map(tuple, stride_lists))
    if not _sound_keys(itertools.chain.from_iterable(typed)):
        return None
    if not _sound_tensors([dtypes, shapes, strides, *others], storages):
        return None
    places = [_place(row.get("global")) for row in rows]
    n_members += 2 * sum(place is not None for place in places)
    made = map(_TENSOR, zip(typed, dtypes, shapes, strides, *others, places, strict=True))
    return tuple(made), n_members


def _without_place(row: dict[str, Any]) -> Iterable[Any]:
    return row.values() if len(row) == len(_TENSOR_MEMBERS) else list(row.values())[:-1]


def _place(value: Any) -> GlobalPlace | None:
    """ValueError for anything unusual."""
    if value is None:
        return None
    if type(value) is not dict or tuple(value) != ("shape", "offset"):
        raise ValueError("another object")
    shape, offset = value.values()
    if type(shape) is not list or type(offset) is not list or max(len(shape), len(offset)) > MAX_DIMS:
        raise ValueError("no places")
    if not all(
        type(n) is int and 0 <= n < _SMALL for n in (*shape, *offset)
    ):  # a NumPy array of two numbers takes ten times as long
        raise ValueError("no small numbers")
    return GlobalPlace(tuple(shape), tuple(offset))


def _sound_keys(keys: Iterable[Any]) -> bool:
    """Whether the keys of names are right."""
    kinds: dict[type, set[Any]] = {}
    for kind, some in itertools.groupby(keys, type):
        kinds.setdefault(kind, set()).update(some)
    numbers, reprs = kinds.pop(int, ()), kinds.pop(ReprKey, ())
    kinds.pop(str, None)
    return not kinds and all(-_BIG < n < _BIG for n in numbers) and all(type(key.text) is str for key in reprs)


def _sound_tensors(columns: Sequence[Any], storages: Sequence[StorageEntry]) -> bool:
    """columns: dtypes, shapes, strides, offsets, numbers of storages, kinds and whether gradients are wanted."""
    dtypes, shapes, strides, offsets, numbers, kinds, grads = columns
    if not (_all(str, dtypes) and _all(str, kinds) and KINDS.issuperset(kinds) and _all(bool, grads)):
        return False
    if not _all(int, [*itertools.chain.from_iterable(shapes), *itertools.chain.from_iterable(strides)]):
        return False
    offset, number = _small_array(offsets), _small_array(numbers)
    if offset is None or number is None or number.max(initial=-1) >= len(storages):
        return False
    reaches = _reaches(dtypes, shapes, strides, kinds)
    if reaches is None:
        return False
    reach, element_bytes = reaches
    ends = np.where(reach < 0, 0, (offset + reach + 1) * element_bytes)
    lengths = np.array([storage.n_bytes for storage in storages], np.int64)
    return bool((ends <= lengths[number]).all())


def _reaches(
    dtypes: Sequence[str], shapes: Sequence[tuple[int, ...]], strides: Sequence[tuple[int, ...]], kinds: Sequence[str]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]] | None:
    """For each tensor the offset of its last element from its first one, in elements; −1 if it is too large. Also the bytes of an
    element.
    """
    forms = list(zip(dtypes, shapes, strides, kinds, strict=True))
    numbers = {form: number for number, form in enumerate(set(forms))}
    found = np.zeros((len(numbers), 2), np.int64)
    for form, number in numbers.items():
        dtype, shape, stride, kind = form
        element = element_type(dtype)
        if element is None or len(shape) != len(stride) or len(shape) > MAX_DIMS:
            return None
        if any(not 0 <= size < _SMALL for size in shape) or any(not 0 <= step < _SMALL for step in stride):
            return None
        last = sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
        if max(math.prod(size for size in shape if size), last + _SMALL) * element.n_bytes >= 1 << 62:
            return None
        found[number] = -1 if kind == "quantized" or 0 in shape else last, element.n_bytes
    reach, element_bytes = found[np.fromiter(map(numbers.__getitem__, forms), np.int64, len(forms))].T
    return reach, element_bytes


def _all(kind: type, values: Iterable[Any]) -> bool:
    return set(map(type, values)) <= {kind}


def _all_of(kinds: set[type], values: Iterable[Any]) -> bool:
    return set(map(type, values)) <= kinds


def _small_array(values: Sequence[Any]) -> npt.NDArray[np.int64] | None:
    """Integers from 0 to 2^40 as an array; None if there are others."""
    if not _all(int, values):  # everywhere else True would count as 1
        return None
    try:
        found = np.fromiter(values, np.int64, len(values))
    except OverflowError:
        return None
    return found if found.min(initial=0) >= 0 and found.max(initial=0) < _SMALL else None

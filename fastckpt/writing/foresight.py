"""What can be said of each chunk of a save before it is encoded: from the rows of its base alone. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fastckpt.format.directory import FileEntry
from fastckpt.format.keys import parse_pack
from fastckpt.format.records import Records
from fastckpt.kernels.transform import Transform
from fastckpt.writing.bases import Base, Place
from fastckpt.writing.chains import Amounts, Mask, Numbers, bases_of, costs_of, reach, work_of
from fastckpt.writing.delta_policy import MAX_DEPTH, Known, Packs
from fastckpt.writing.matching import Form, roles

_FULL_RATIO = 0.75
"""Stored for each raw byte of numbers, where nothing is known."""
_SPARSE = 0.25
"""A difference that takes less than this for a raw byte is packed: it is decoded faster."""


class Foresight(NamedTuple):
    """See `foresee`."""

    known: Known
    packs: Packs
    is_same: Mask
    """Was named again by the base itself, so it is likely to be equal once more."""


class _Spans(NamedTuple):
    """Where the base's bytes of each chunk are: in one row, or at the end of one and the beginning of the next."""

    has: Mask
    first: Numbers
    second: Numbers
    of_first: Amounts
    of_second: Amounts

    def sum_of(self, of_row: Amounts) -> Amounts:
        """For each chunk the sum of its parts of the rows; 0 where the base has nothing."""
        return np.where(self.has, self.of_first * of_row[self.first] + self.of_second * of_row[self.second], 0.0)


def foresee(base: Base, sealed: Form, places: Sequence[Place | None], numbers: Mask, has_bytes: bool) -> Foresight:
    """What is known of each chunk of a sealed state.

    Args:
        base: what it may refer to.
        sealed: the state.
        places: where the base has the bytes of each chunk; None: nowhere.
        numbers: which chunks are floating-point numbers.
        has_bytes: whether any of the base's bytes are in memory: otherwise there are no differences.
    """
    raw = np.array([chunk.n_bytes for chunk in sealed.chunks], np.float64)
    spans = _spans(base.records, places, raw)
    rows = bases_of(base.records)
    costs = costs_of(base.records, rows)
    again = _named_again(base)
    is_same = spans.has & again[spans.first] & again[spans.second] if again.size else spans.has
    # The master of a copy is in the state, too, and is counted there.
    is_cast = spans.has & (base.records["transform"][spans.first] == Transform.CAST)
    casts = work_of(Transform.CAST, 2, 1.0) * raw
    full = np.where(
        spans.has, np.where(is_cast, 0, spans.sum_of(costs.full_bytes)), np.where(numbers, _FULL_RATIO, 1.0) * raw
    )
    kinds = [f"{role} {chunk.element.name}" for role, chunk in zip(roles(sealed), sealed.chunks, strict=True)]
    _, role = np.unique(np.array(kinds, np.str_), return_inverse=True)
    delta, is_guess = _differences(base.records, spans, role, full)
    delta[is_same] = 0
    work = _work_of_differences(sealed, delta / raw, is_guess) * raw
    depth = np.where(spans.has, np.maximum(costs.depth[spans.first], costs.depth[spans.second]), 0)
    packs = _packs(base, spans)
    known = Known(
        raw_bytes=raw,
        has_base=spans.has,
        full_bytes=full,
        read_bytes=np.where(is_cast, 0, spans.sum_of(costs.read_bytes)),
        work=np.where(is_cast, casts, spans.sum_of(costs.work)),
        full_work=np.where(is_cast, casts, np.where(spans.has, spans.sum_of(costs.full_work), raw)),
        excess=np.where(is_cast, 0, spans.sum_of(costs.excess)),
        delta_bytes=delta,
        delta_work=np.where(is_same, 0.0, work),
        may_differ=spans.has & numbers & ~is_cast & (depth < MAX_DEPTH) & has_bytes,
        is_guess=is_guess & ~is_same,
        role=role,
        pack=_oldest(packs, base.files, raw.size),
    )
    return Foresight(known, packs, is_same)


def _spans(records: Records, places: Sequence[Place | None], raw: Amounts) -> _Spans:
    rows = np.array([(-1, 0) if place is None else place for place in places], np.int64).reshape(-1, 2)
    has = rows[:, 0] >= 0
    first, start = np.maximum(rows[:, 0], 0), rows[:, 1]
    sizes = records["raw_bytes"].astype(np.float64)
    here = np.minimum(raw, sizes[first] - start)
    second = np.where(has & (raw > here), first + 1, first)
    return _Spans(has, first, second, here / sizes[first], (raw - here) / sizes[second])


def _named_again(base: Base) -> Mask:
    """The rows that the base itself has named again: an earlier save has put their bytes."""
    own = base.parent.checkpoint
    saves = (parse_pack(file.key) for file in base.files)
    earlier = np.array([False, *(save is not None and save.checkpoint != own for save in saves)])
    again: Mask = earlier[base.records["file"]] | (base.records["transform"] == Transform.REF)
    return again


def _differences(records: Records, spans: _Spans, role: Numbers, full: Amounts) -> tuple[Amounts, Mask]:
    """Of each chunk the stored bytes that a difference is likely to take: as much as the last one, or as others of its role. And where
    neither is known: those of a full chunk.
    """
    deltas = np.isin(records["transform"], (Transform.SUB, Transform.SUBPACK))
    is_delta = spans.has & deltas[spans.first]
    stored = spans.sum_of(records["stored_bytes"].astype(np.float64))
    of_deltas = np.bincount(role, np.where(is_delta, stored, 0))
    of_full = np.bincount(role, np.where(is_delta, full, 0))
    is_guess = (of_full == 0)[role]
    ratio = np.where(is_guess, 1.0, (of_deltas / np.maximum(of_full, 1))[role])
    return np.where(is_delta, stored, ratio * full), is_guess


def _work_of_differences(sealed: Form, ratio: Amounts, is_guess: Mask) -> Amounts:
    """What decoding a difference takes for each raw byte. ratio: of stored to raw bytes."""
    lanes = [chunk.element.float_lane_bytes for chunk in sealed.chunks]
    packed, plain = (
        np.array([work_of(transform, lane, 1.0) for lane in range(17)])[lanes]
        for transform in (Transform.SUBPACK, Transform.SUB)
    )
    return np.where(is_guess | (ratio < _SPARSE), packed, plain)


def _packs(base: Base, spans: _Spans) -> Packs:
    """The packs of the base, and which chunks need which."""
    chunks = np.flatnonzero(spans.has)
    at, row = reach(bases_of(base.records), np.concatenate([spans.first[chunks], spans.second[chunks]]))
    file = base.records["file"][row].astype(np.int64)
    stores, n_files = file > 0, max(len(base.files), 1)
    pairs = np.unique(np.tile(chunks, 2)[at][stores] * n_files + file[stores] - 1)
    return Packs(np.array([file.n_bytes for file in base.files], np.float64), pairs // n_files, pairs % n_files)


def _oldest(packs: Packs, files: Sequence[FileEntry], n_chunks: int) -> Numbers:
    """Of each chunk the place of the oldest pack that it needs, in the order of their keys, which is that of their saves."""
    age = np.argsort(np.argsort([file.key for file in files])) if files else np.zeros(0, np.int64)
    found = np.full(n_chunks, len(files))
    np.minimum.at(found, packs.chunk, age[packs.pack])
    return found

"""Estimates the size of a chunk for each way of storing it, from a sample."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastckpt._types import U8
from fastckpt.kernels.reference.streams import difference, lanes_of, pack_bits_of, planes_of, rotated
from fastckpt.kernels.transform import MAX_RAW_BYTES, PACK_BITS

_Counts = npt.NDArray[np.float64]
_Places = npt.NDArray[np.int64]


class Estimate(NamedTuple):
    """Estimated bits per lane for each way of storing a chunk; negative: not possible. Fields in the native kernel's order."""

    rot: float
    rotu: float
    sub: float
    subpack: tuple[float, float, float, float]
    """For 1, 2, 4 and 8 pack bits. Those of raw lanes where most lanes do not fit into these bits: packing gains nothing there."""
    rot_dominant: float
    """Share of the most frequent byte in the highest ROT plane."""
    sub_dominant: float
    lanes: int
    """Number of lanes in the sample."""


_PIECE, _EVERY = 64, 4096
_DELTA_PIECE, _DELTA_EVERY, _LINE_EVERY = 256, 8192, 1024
"""With a base: longer pieces, in which runs of zeros can be seen."""
_MANY_BYTES = 32768
_RAW_BITS, _ZERO_PIECES = 7.6, 0.08
"""As in frames of the native encoder: bits from which a plane stays raw; the share of zero pieces from which it looks for runs."""
_MIN_RUN, _MIN_ROW, _MIN_PLANE = 8, 16, 1024
_MOST_FAR = 0.75
"""Of the lanes: where more do not fit into the pack bits, packing gains nothing over SUB."""


def _symbol_bits(counts: _Counts) -> float:
    """Bits for each symbol in a block of literals. At most 8; a symbol in more than half of the places still takes one bit; 0 if all
    symbols are equal.
    """
    counts = counts[counts > 0]
    if counts.size <= 1:
        return 0.0
    total = float(counts.sum())
    entropy = (
        np.log2(total) - float((counts * np.log2(counts)).sum()) / total + (counts.size - 1) / (2 * 0.6931 * total)
    )
    most = float(counts.max()) / total
    if most > 0.5:
        entropy += 1 + most * np.log2(most) + (1 - most) * np.log2(1 - most)
    return float(min(entropy, 8.0))


def _counted(values: U8) -> _Counts:
    """Counts of all values; of many of them, of 16 in 32."""
    if values.size >= _MANY_BYTES:
        values = np.concatenate([values[i : i + 16] for i in range(0, values.size - 15, 32)])
    return np.bincount(values, minlength=256).astype(np.float64)


def _raw_if_many(bits: float) -> float:
    return 8.0 if bits > _RAW_BITS else bits


def _code_bits(counts: _Counts) -> float:
    """Bits for each symbol by codes of 1 to 11 bits: the commonest one may be worth less than a bit, and rare ones take more of the codes
    than they are worth.
    """
    some = np.sort(counts[counts > 0])
    if some.size <= 1:
        return 0.0
    total = float(some.sum())
    space, bits, n = 1.0, 0.0, some.size
    if some[-1] > total / 2:
        space, bits, some = 0.5, float(some[-1]), some[:-1]
    rare, middle = some[some < total / 2048], some[some >= total / 2048]
    space -= rare.size / 2048
    bits += 11 * float(rare.sum())
    if middle.size:
        bits += float(middle.sum()) * np.log2(float(middle.sum()) / space) - float((middle * np.log2(middle)).sum())
    return float(min(bits / total + (n - 1) / (2 * 0.6931 * total), 8.0))


def _geometric_bits(mean: float) -> float:
    return float((mean + 1) * np.log2(mean + 1) - mean * np.log2(mean)) if mean > 0 else 0.0


def _long_runs(values: U8, row: int) -> tuple[int, int]:
    """How many long runs of zeros begin within a row, and how many zeros are in all long runs. Long: 8, or 4 at an end of a row."""
    begun = zeros = 0
    for first in range(0, values.size, row):
        edges = np.flatnonzero(np.diff(np.concatenate(([1], values[first : first + row] != 0, [1]))))
        for start, stop in edges.reshape(-1, 2).tolist():
            if stop - start >= (_MIN_RUN // 2 if start == 0 or stop == row else _MIN_RUN):
                zeros += stop - start
                begun += start != 0
    return begun, zeros


def _or_runs(plain: float, counts: _Counts, values: U8, row: int) -> float:
    """Bits for each byte of a plane: `plain` as codes, or less as runs of zeros and literals. row: bytes that lie together."""
    if row < _MIN_ROW or values.size < _MIN_PLANE:
        return plain
    pieces = values[: values.size // 16 * 16].reshape(-1, 16)
    if (~pieces.any(axis=1)).sum() < _ZERO_PIECES * pieces.shape[0]:
        return plain
    begun, zeros = _long_runs(values, row)
    in_runs = zeros / values.size
    runs = begun / (values.size // row * (row - 1))
    literals = 1 - in_runs + runs
    counts = counts.copy()
    counts[0] = max(0.0, counts[0] - (in_runs - runs) * counts.sum())
    bits = literals * _raw_if_many(_code_bits(counts))
    if runs:
        bits += runs * (_geometric_bits(in_runs / runs - _MIN_RUN) + _geometric_bits(literals / runs - 2))
    return min(plain, bits)


def _plane_bits(values: U8, row: int) -> float:
    """The same for a plane of a difference."""
    if not values.size:
        return 0.0
    counts = _counted(values)
    return _or_runs(_raw_if_many(_code_bits(counts)), counts, values, row)


def _dominant(counts: _Counts) -> float:
    return float(counts.max() / counts.sum())


def _changed_lines(raw: U8, base: U8, every: int) -> float:
    """The share of lines of 64 bytes, one in `every` bytes, that are not the base's."""
    starts = np.arange(0, raw.size - _PIECE + 1, every)
    lines = starts[:, None] + np.arange(_PIECE)
    return float((raw[lines] != base[lines]).any(axis=1).mean())


def _correction(raw: U8, base: U8, sampled: tuple[U8, U8]) -> float:
    """What to multiply estimates of deltas with: where rows change or do not, a sample of few pieces may have met too many of either.
    More lines, only compared, tell.
    """
    if raw.size < 64 * _DELTA_EVERY:
        return 1.0
    changed = _changed_lines(*sampled, _PIECE)
    if not 0 < changed <= 0.7:
        return 1.0
    return min(2.0, max(0.5, _changed_lines(raw, base, _LINE_EVERY) / changed))


def _pieces(n_bytes: int, piece: int, most: int, lane_bytes: int, *, whole: bool) -> _Places:
    """Lanes of a sample: `piece` bytes of every `most`, of small chunks of more, or all. whole: no piece that ends early, but the first."""
    every = most if n_bytes >= 64 * most else most // 8 if n_bytes >= 64 * piece else piece
    lanes, step, n = piece // lane_bytes, every // lane_bytes, n_bytes // lane_bytes
    starts = np.arange(0, n, step)
    if whole and n >= lanes:
        starts = starts[starts + lanes <= n]
    pick = (starts[:, None] + np.arange(lanes)).reshape(-1)
    return pick[pick < n]


def _alone(x: Any, bits: list[float]) -> tuple[float, float]:
    """Bits as ROT, and as ROTU or -1. bits: of the planes of ROT."""
    rot = sum(bits)
    negative = bool((x >> x.dtype.type(8 * x.itemsize - 1)).any())
    return rot, -1.0 if negative else rot - bits[-1] + min(bits[-1], 7.0)


def sample(raw: Any, base: Any, lane_bytes: int) -> Estimate:
    """Estimate from 64 bytes of every 4 KiB, with a base from 256 of every 8 KiB (small chunks: from more of them, or from all)."""
    x = lanes_of(raw, lane_bytes)
    if base is None:
        x = x[_pieces(x.nbytes, _PIECE, _EVERY, lane_bytes, whole=False)]
        counts = [np.bincount(plane, minlength=256).astype(np.float64) for plane in planes_of(rotated(x))]
        rot, rotu = _alone(x, [_symbol_bits(one) for one in counts])
        return Estimate(rot, rotu, -1.0, (-1.0,) * 4, _dominant(counts[0]), 0.0, x.size)
    under = lanes_of(base, lane_bytes)
    if under.size != x.size or x.nbytes > MAX_RAW_BYTES:
        raise ValueError(f"raw has {x.nbytes} bytes, base {under.nbytes}: they must be equal, at most {MAX_RAW_BYTES}")
    pick = _pieces(x.nbytes, _DELTA_PIECE, _DELTA_EVERY, lane_bytes, whole=True)
    whole = x.view(np.uint8), under.view(np.uint8)
    x, under = x[pick], under[pick]
    factor = _correction(*whole, (x.view(np.uint8), under.view(np.uint8)))
    row = min(x.size, _DELTA_PIECE // lane_bytes)
    planes = planes_of(rotated(x))
    counts = [_counted(plane) for plane in planes]
    rot, rotu = _alone(x, [_or_runs(_symbol_bits(n), n, plane, row) for n, plane in zip(counts, planes, strict=True)])
    dominant = _dominant(counts[0])
    z = difference(x, under)
    planes = planes_of(z)
    packs = []
    for bits in PACK_BITS:
        esc = z.dtype.type((1 << bits) - 1)
        if np.count_nonzero(z >= esc) > _MOST_FAR * z.size:
            packs.append(8.0 * lane_bytes)
            continue
        packed = pack_bits_of(np.minimum(z, esc).astype(np.uint8), bits)
        far = z[z >= esc] - esc
        escape_bits = sum(_plane_bits(plane, far.size) for plane in planes_of(far)) if far.size else 0.0
        packs.append(_plane_bits(packed, (row * bits + 7) // 8) * bits / 8 + far.size / z.size * escape_bits)
    one, two, four, eight = (factor * bits for bits in packs)
    sub = factor * sum(_plane_bits(plane, row) for plane in planes)
    return Estimate(rot, rotu, sub, (one, two, four, eight), dominant, _dominant(_counted(planes[0])), x.size)

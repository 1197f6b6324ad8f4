"""Estimates the size of a chunk for each way of storing it, from a sample."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fastckpt._types import U8
from fastckpt.kernels.reference.streams import difference, lanes_of, pack_bits_of, planes_of, rotated
from fastckpt.kernels.transform import PACK_BITS


class Estimate(NamedTuple):
    """Estimated bits per lane for each way of storing a chunk; negative: not possible. Fields in the native kernel's order."""

    rot: float
    rotu: float
    sub: float
    subpack: tuple[float, float, float, float]
    """For 1, 2, 4 and 8 pack bits."""
    rot_dominant: float
    """Share of the most frequent byte in the highest ROT plane."""
    sub_dominant: float
    lanes: int
    """Number of lanes in the sample."""


_PIECE, _EVERY = 64, 4096


def _symbol_bits(values: U8) -> float:
    """Bits for each symbol in a block of literals. At most 8; a symbol in more than half of the places still takes one bit; 0 if all
    symbols are equal.
    """
    counts = np.bincount(values, minlength=256)
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


def _dominant(values: U8) -> float:
    return float(np.bincount(values).max() / values.size)


def sample(raw: Any, base: Any, lane_bytes: int) -> Estimate:
    """Estimate from 64 bytes of every 4 KiB (small chunks: of every 512 bytes, or from all bytes)."""
    x = lanes_of(raw, lane_bytes)
    under = x if base is None else lanes_of(base, lane_bytes)
    if under.size != x.size:
        raise ValueError(f"raw has {x.nbytes} bytes, base {under.nbytes}: they must be equal")
    every = _EVERY if x.nbytes >= 64 * _EVERY else _EVERY // 8 if x.nbytes >= 64 * _PIECE else _PIECE
    lanes, step = _PIECE // lane_bytes, every // lane_bytes
    pick = (np.arange(0, x.size, step)[:, None] + np.arange(lanes)).reshape(-1)
    pick = pick[pick < x.size]
    x = x[pick]
    planes = planes_of(rotated(x))
    plane_bits = [_symbol_bits(plane) for plane in planes]
    rot = sum(plane_bits)
    negative = bool((x >> x.dtype.type(8 * lane_bytes - 1)).any())
    rotu = -1.0 if negative else rot - plane_bits[-1] + min(plane_bits[-1], 7.0)
    if base is None:
        return Estimate(rot, rotu, -1.0, (-1.0,) * 4, _dominant(planes[0]), 0.0, x.size)
    z = difference(x, under[pick])
    sub_planes = planes_of(z)
    packs = []
    for bits in PACK_BITS:
        esc = z.dtype.type((1 << bits) - 1)
        values = np.minimum(z, esc).astype(np.uint8)
        whole = [
            values[i : i + lanes] for i in range(0, values.size, lanes)
        ]  # bytes do not cross the borders of pieces
        packed = np.concatenate([pack_bits_of(piece[: piece.size * bits // 8 * 8 // bits], bits) for piece in whole])
        far = z[z >= esc] - esc
        escape_bits = sum(_symbol_bits(plane) for plane in planes_of(far)) if far.size else 0.0
        packs.append(_symbol_bits(packed) * bits / 8 + far.size / z.size * escape_bits)
    one, two, four, eight = packs
    sub = sum(_symbol_bits(plane) for plane in sub_planes)
    return Estimate(rot, rotu, sub, (one, two, four, eight), _dominant(planes[0]), _dominant(sub_planes[0]), x.size)

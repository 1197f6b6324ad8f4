"""The kernels compiled by numba: for installations without the native extension. Imported lazily (about a second, once).

The loops over lanes are compiled; bit packing, samples and CAST use the NumPy code: they process few bytes, or run at memory speed already.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from fastckpt.kernels import reference
from fastckpt.kernels.reference import STRIPE_LANES
from fastckpt.kernels.transform import Transform

_TABLES = reference.crc_tables()


@numba.njit(nogil=True)
def _crc(tables: Any, words: Any, tail: Any) -> Any:
    crc = ~np.uint64(0)
    byte = np.uint64(255)
    for word in words:
        x = crc ^ word
        crc = np.uint64(0)
        for k in range(8):
            crc ^= tables[7 - k, (x >> np.uint64(8 * k)) & byte]
    for value in tail:
        crc = (crc >> np.uint64(8)) ^ tables[0, (crc ^ np.uint64(value)) & byte]
    return ~crc


@numba.njit(nogil=True)
def _rotate(source: Any, out: Any) -> None:
    one, rest = source.dtype.type(1), source.dtype.type(8 * source.itemsize - 1)
    for i in range(source.size):
        out[i] = (source[i] << one) | (source[i] >> rest)


@numba.njit(nogil=True)
def _unrotate(source: Any, out: Any) -> None:
    one, rest = source.dtype.type(1), source.dtype.type(8 * source.itemsize - 1)
    for i in range(source.size):
        out[i] = (source[i] >> one) | (source[i] << rest)


@numba.njit(nogil=True)
def _subtract(source: Any, base: Any, out: Any) -> None:
    kind = source.dtype.type
    one, rest, zero = kind(1), kind(8 * source.itemsize - 1), kind(0)
    top = kind(one << rest)
    for i in range(source.size):
        x, b = source[i], base[i]
        d = kind(kind(x ^ (kind(zero - (x >> rest)) | top)) - kind(b ^ (kind(zero - (b >> rest)) | top)))
        out[i] = kind(d << one) ^ kind(zero - (d >> rest))


@numba.njit(nogil=True)
def _add(source: Any, base: Any, out: Any) -> None:
    kind = source.dtype.type
    one, rest, zero = kind(1), kind(8 * source.itemsize - 1), kind(0)
    top = kind(one << rest)
    for i in range(source.size):
        z, b = source[i], base[i]
        d = kind(z >> one) ^ kind(zero - (z & one))
        m = kind(d + kind(b ^ (kind(zero - (b >> rest)) | top)))
        out[i] = m ^ (kind(~kind(zero - (m >> rest))) | top)


@numba.njit(nogil=True)
def _plane(lanes: Any, shift: int, out: Any) -> None:
    for i in range(lanes.size):
        out[i] = np.uint8(lanes[i] >> lanes.dtype.type(shift))


@numba.njit(nogil=True)
def _unplane(plane: Any, shift: int, lanes: Any) -> None:
    for i in range(lanes.size):
        lanes[i] |= lanes.dtype.type(lanes.dtype.type(plane[i]) << lanes.dtype.type(shift))


def crc64nvme(data: Any) -> int:
    """See `reference.crc64nvme`."""
    view = np.frombuffer(data, np.uint8)
    whole = view.size & ~7
    return int(_crc(_TABLES, view[:whole].view("<u8"), view[whole:]))


def split(raw: Any, base: Any, transform: int, lane_bytes: int, pack_bits: int, stream: Any) -> int | None:
    """See `reference.split`."""
    if transform not in (Transform.ROT, Transform.SUB):
        return reference.split(raw, base, transform, lane_bytes, pack_bits, stream)
    reference.check_arguments(transform, raw, base, pack_bits)
    x = reference.lanes_of(raw, lane_bytes)
    out = np.frombuffer(stream, np.uint8)
    if out.size < x.nbytes:
        return None
    mapped = np.empty(min(x.size, STRIPE_LANES), x.dtype)
    for first in range(0, x.size, STRIPE_LANES):
        some = x[first : first + STRIPE_LANES]
        y = mapped[: some.size]
        if transform == Transform.ROT:
            _rotate(some, y)
        else:
            _subtract(some, reference.lanes_of(base, lane_bytes)[first : first + STRIPE_LANES], y)
        planes = out[first * lane_bytes : (first + some.size) * lane_bytes].reshape(lane_bytes, some.size)
        for k in range(lane_bytes):
            _plane(y, 8 * (lane_bytes - 1 - k), planes[k])
    return x.nbytes


def merge(stream: Any, base: Any, transform: int, lane_bytes: int, pack_bits: int, raw: Any) -> bool:
    """See `reference.merge`."""
    if transform not in (Transform.ROT, Transform.SUB):
        return reference.merge(stream, base, transform, lane_bytes, pack_bits, raw)
    reference.check_arguments(transform, raw, base, pack_bits)
    x = reference.lanes_of(raw, lane_bytes)
    source = np.frombuffer(stream, np.uint8)
    if source.size != x.nbytes:
        return False
    joined = np.empty(min(x.size, STRIPE_LANES), x.dtype)
    for first in range(0, x.size, STRIPE_LANES):
        some = x[first : first + STRIPE_LANES]
        y = joined[: some.size]
        y[:] = 0
        planes = source[first * lane_bytes : (first + some.size) * lane_bytes].reshape(lane_bytes, some.size)
        for k in range(lane_bytes):
            _unplane(planes[k], 8 * (lane_bytes - 1 - k), y)
        if transform == Transform.ROT:
            _unrotate(y, some)
        else:
            _add(y, reference.lanes_of(base, lane_bytes)[first : first + STRIPE_LANES], some)
    return True


def warm_up() -> None:
    """Compile all kernels: takes a second or two on the calling thread."""
    for width in (2, 4, 8):
        raw, base = np.zeros(16, np.uint8), np.zeros(16, np.uint8)
        stream = np.empty(16, np.uint8)
        for transform in (Transform.ROT, Transform.SUB):
            split(raw, base, transform, width, 0, stream)
            merge(stream, base, transform, width, 0, raw)
    crc64nvme(bytes(16))

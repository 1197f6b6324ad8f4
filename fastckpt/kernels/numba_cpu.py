"""The kernels compiled by numba: for installations without the native extension. Imported lazily (about a second, once)."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from fastckpt.kernels import reference
from fastckpt.kernels.reference import STRIPE_LANES

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
def _split(lanes: Any, stream: Any, width: int) -> None:
    one, rest = lanes.dtype.type(1), lanes.dtype.type(8 * width - 1)
    for first in range(0, lanes.size, STRIPE_LANES):
        n = min(STRIPE_LANES, lanes.size - first)
        for k in range(width):
            shift = lanes.dtype.type(8 * (width - 1 - k))
            # Slices of their own: with `array[start + i]` numba must allow for negative indices and does not vectorise.
            plane = stream[first * width + k * n : first * width + (k + 1) * n]
            source = lanes[first : first + n]
            for i in range(n):
                x = source[i]
                plane[i] = ((x << one) | (x >> rest)) >> shift


@numba.njit(nogil=True)
def _merge(stream: Any, lanes: Any, width: int) -> None:
    kind = lanes.dtype.type
    one, rest = kind(1), kind(8 * width - 1)
    for first in range(0, lanes.size, STRIPE_LANES):
        n = min(STRIPE_LANES, lanes.size - first)
        target = lanes[first : first + n]
        target[:] = 0
        for k in range(width):
            plane = stream[first * width + k * n : first * width + (k + 1) * n]
            shift = kind(8 * (width - 1 - k))
            for i in range(n):
                target[i] |= kind(plane[i]) << shift
        for i in range(n):
            target[i] = (target[i] >> one) | (target[i] << rest)


def crc64nvme(data: Any) -> int:
    """See `reference.crc64nvme`."""
    view = np.frombuffer(data, np.uint8)
    whole = view.size & ~7
    return int(_crc(_TABLES, view[:whole].view("<u8"), view[whole:]))


def rot_split(raw: Any, out: Any, lane_bytes: int) -> None:
    """See `reference.rot_split`."""
    reference.check_same_length(raw, out)
    _split(reference.lanes_of(raw, lane_bytes), np.frombuffer(out, np.uint8), lane_bytes)


def rot_merge(stream: Any, out: Any, lane_bytes: int) -> None:
    """See `reference.rot_merge`."""
    reference.check_same_length(stream, out)
    _merge(np.frombuffer(stream, np.uint8), reference.lanes_of(out, lane_bytes), lane_bytes)

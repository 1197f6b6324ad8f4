"""The kernels in NumPy: the definition of what the others must compute (docs/format.md, sections 1 and 4.3)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

STRIPE_LANES = 131072
_POLYNOMIAL_REFLECTED = 0x9A6C9329AC4BC9B5  # 0xAD93D23594C93659 with its bits reversed
_PARALLEL = 1024  # stretches of the input whose CRC registers advance side by side
_ALL_ONES = (1 << 64) - 1

U8 = npt.NDArray[np.uint8]
U64 = npt.NDArray[np.uint64]


def crc_tables() -> U64:
    """[8, 256]: table k advances a register whose low byte is the index by k + 1 bytes."""
    first = np.arange(256, dtype=np.uint64)
    for _ in range(8):
        first = (first >> np.uint64(1)) ^ np.where(first & np.uint64(1), np.uint64(_POLYNOMIAL_REFLECTED), np.uint64(0))
    tables = [first]
    for _ in range(7):
        tables.append((tables[-1] >> np.uint64(8)) ^ first[(tables[-1] & np.uint64(255)).astype(np.intp)])
    return np.stack(tables)


_TABLES = crc_tables()
_BYTE_TABLE: list[int] = _TABLES[0].tolist()


def _advance_by_8(register: U64) -> U64:
    shifts = np.arange(0, 64, 8, dtype=np.uint64)
    index = ((register[..., None] >> shifts) & np.uint64(255)).astype(np.intp)
    return np.asarray(np.bitwise_xor.reduce(_TABLES[np.arange(7, -1, -1), index], axis=-1), dtype=np.uint64)


def _apply(columns: U64, vectors: U64) -> U64:
    """A linear map over GF(2), given by the images of the 64 unit vectors, applied to each of `vectors`."""
    bits = (vectors[..., None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    return np.asarray(
        np.bitwise_xor.reduce(np.where(bits.astype(bool), columns, np.uint64(0)), axis=-1), dtype=np.uint64
    )


def _advance_by_zeros(words: int) -> U64:
    """The map "8 × words zero bytes pass through the register"."""
    unit = np.uint64(1) << np.arange(64, dtype=np.uint64)
    result, power = unit, _advance_by_8(unit)
    while words:
        if words & 1:
            result = _apply(power, result)
        power = _apply(power, power)
        words >>= 1
    return result


def crc64nvme(data: Any) -> int:
    """CRC-64/NVME of a buffer."""
    view = np.frombuffer(data, np.uint8)
    register, start = _ALL_ONES, 0
    words = view.size // (8 * _PARALLEL)
    if words:
        start = 8 * _PARALLEL * words
        columns = view[:start].view("<u8").reshape(_PARALLEL, words).T.copy()
        state = np.zeros(_PARALLEL, np.uint64)
        state[0] = np.uint64(register)
        for column in columns:
            state = _advance_by_8(state ^ column)
        step = _advance_by_zeros(words)
        total = state[:1]
        for i in range(1, _PARALLEL):
            total = _apply(step, total) ^ state[i : i + 1]
        register = int(total[0])
    for byte in view[start:].tobytes():
        register = (register >> 8) ^ _BYTE_TABLE[(register ^ byte) & 0xFF]
    return register ^ _ALL_ONES


def lanes_of(buffer: Any, lane_bytes: int) -> npt.NDArray[Any]:
    if lane_bytes not in (2, 4, 8):
        raise ValueError(f"lane_bytes is {lane_bytes}: 2, 4 or 8 are known")
    view = np.frombuffer(buffer, np.uint8)
    if view.size % lane_bytes:
        raise ValueError(f"{view.size} bytes are no whole number of {lane_bytes}-byte lanes")
    return view.view(f"<u{lane_bytes}")


def check_same_length(source: Any, out: Any) -> None:
    if memoryview(source).nbytes != memoryview(out).nbytes:
        raise ValueError(
            f"source has {memoryview(source).nbytes} bytes, target {memoryview(out).nbytes}: they must be equal"
        )


def rot_split(raw: Any, out: Any, lane_bytes: int) -> None:
    """Raw bytes into the ROT stream: lanes rotated left by one, byte planes, highest first, stripe by stripe."""
    check_same_length(raw, out)
    lanes = lanes_of(raw, lane_bytes)
    stream = np.frombuffer(out, np.uint8)
    for first in range(0, lanes.size, STRIPE_LANES):
        x = lanes[first : first + STRIPE_LANES]
        y = (x << x.dtype.type(1)) | (x >> x.dtype.type(8 * lane_bytes - 1))
        planes = y.view(np.uint8).reshape(-1, lane_bytes)[:, ::-1].T
        stream[first * lane_bytes : (first + x.size) * lane_bytes].reshape(lane_bytes, x.size)[:] = planes


def rot_merge(stream: Any, out: Any, lane_bytes: int) -> None:
    """The ROT stream into raw bytes."""
    check_same_length(stream, out)
    lanes = lanes_of(out, lane_bytes)
    source = np.frombuffer(stream, np.uint8)
    for first in range(0, lanes.size, STRIPE_LANES):
        n = min(STRIPE_LANES, lanes.size - first)
        planes = source[first * lane_bytes : (first + n) * lane_bytes].reshape(lane_bytes, n)
        y = np.ascontiguousarray(planes[::-1].T).view(lanes.dtype).reshape(n)
        lanes[first : first + n] = (y >> y.dtype.type(1)) | (y << y.dtype.type(8 * lane_bytes - 1))

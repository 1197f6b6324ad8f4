"""CRC-64/NVME (docs/format.md, section 1)."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from fastckpt._types import U64

_POLYNOMIAL_REFLECTED = 0x9A6C9329AC4BC9B5  # 0xAD93D23594C93659 with its bits reversed
_PARALLEL = 1024  # stretches of the input whose CRC registers advance side by side
_ALL_ONES = (1 << 64) - 1


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
    """Apply a linear map over GF(2) to each of `vectors`. The map is given by the images of the 64 unit vectors."""
    bits = (vectors[..., None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    return np.asarray(
        np.bitwise_xor.reduce(np.where(bits.astype(bool), columns, np.uint64(0)), axis=-1), dtype=np.uint64
    )


def _advance_by_zeros(words: int) -> U64:
    """The map of a register that reads "8 × words" zero bytes."""
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


def _product(a: int, b: int) -> int:
    """The product of two polynomials modulo the CRC's. The highest bit is x^0."""
    result = 0
    for bit in range(63, -1, -1):
        if a >> bit & 1:
            result ^= b
        b = b >> 1 ^ (_POLYNOMIAL_REFLECTED if b & 1 else 0)
    return result


@functools.lru_cache(maxsize=256)
def _power(n_bytes: int) -> int:
    """x^(8 × n_bytes) modulo the CRC's polynomial. Cached: most chunks are equally long."""
    result, power = 1 << 63, 1 << (63 - 8)
    while n_bytes:
        if n_bytes & 1:
            result = _product(result, power)
        power = _product(power, power)
        n_bytes >>= 1
    return result


def crc64nvme_combine(first: int, second: int, second_bytes: int) -> int:
    """CRC-64/NVME of two stretches of bytes, one after the other, from the CRC of each and the length of the second."""
    return _product(first, _power(second_bytes)) ^ second

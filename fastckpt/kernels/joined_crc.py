"""CRC-64/NVME of bytes that come in parts: a buffer that fits the cache of a core, instead of all bytes in memory at once.

The CRC of A followed by B is that of A, advanced over as many zero bytes as B has, xor that of B. Advancing is a product of polynomials
over GF(2), reflected: bit 63 stands for 1.
"""

from __future__ import annotations

import functools

_POLYNOMIAL_REFLECTED = 0x9A6C9329AC4BC9B5
_ONE, _X_TO_THE_8 = 1 << 63, 1 << 55


def joined(first: int, second: int, n_bytes: int) -> int:
    """The CRC of two stretches, one after the other. n_bytes: length of the second one."""
    return _product(_zeros(n_bytes), first) ^ second


@functools.lru_cache(64)
def _zeros(n_bytes: int) -> int:
    """x to the power of 8 × n_bytes."""
    result, power = _ONE, _X_TO_THE_8
    while n_bytes:
        if n_bytes & 1:
            result = _product(result, power)
        power = _product(power, power)
        n_bytes >>= 1
    return result


def _product(a: int, b: int) -> int:
    """Of two polynomials, modulo that of the CRC."""
    result = 0
    for bit in range(63, -1, -1):
        if a >> bit & 1:
            result ^= b
        b = b >> 1 ^ _POLYNOMIAL_REFLECTED if b & 1 else b >> 1
    return result

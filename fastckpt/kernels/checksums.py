"""The two checksums of the format (docs/format.md, section 1). Both release the GIL on large buffers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import xxhash

from fastckpt.kernels.select import kernels


def digest(data: Any) -> bytes:
    """XXH3-128 of raw bytes, 16 bytes, canonical order."""
    return xxhash.xxh3_128_digest(data)


def digest_of(parts: Iterable[Any]) -> bytes:
    """As `digest`, of bytes that come in parts, one after another."""
    found = xxhash.xxh3_128()
    for part in parts:
        found.update(part)
    return found.digest()


def crc64nvme_combine(first: int, second: int, second_bytes: int) -> int:
    """CRC-64/NVME of two stretches of bytes, one after the other, from the CRC of each and the length of the second. Some 3 µs."""
    return kernels().crc64nvme_combine(first, second, second_bytes)


def crc64nvme(data: Any) -> int:
    """CRC-64/NVME of stored bytes."""
    return kernels(memoryview(data).nbytes).crc64nvme(data)


def crc64nvme_of(parts: Iterable[Any]) -> int:
    """As `crc64nvme`, of bytes that come in parts, one after another."""
    found = 0
    for part in parts:
        found = crc64nvme_combine(found, crc64nvme(part), memoryview(part).nbytes)
    return found

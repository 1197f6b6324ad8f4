"""The two checksums of the format (docs/format.md, section 1). Both release the GIL on large buffers."""

from __future__ import annotations

from typing import Any

import xxhash

from fastckpt.kernels.select import kernels


def digest(data: Any) -> bytes:
    """XXH3-128 of raw bytes, 16 bytes, canonical order."""
    return xxhash.xxh3_128_digest(data)


def crc64nvme(data: Any) -> int:
    """CRC-64/NVME of stored bytes."""
    return kernels(memoryview(data).nbytes).crc64nvme(data)

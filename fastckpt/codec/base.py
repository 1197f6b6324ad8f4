"""The result of encoding a chunk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastckpt.kernels.transform import Transform

NO_PARAMETER = bytes(8)


class CodecError(ValueError):
    """Stored bytes that cannot be decoded. `expected` and `found` are texts for a damage report."""

    def __init__(self, expected: str, found: str) -> None:
        super().__init__(f"expected {expected}, found {found}")
        self.expected = expected
        self.found = found


@dataclass(frozen=True, slots=True)
class Encoded:
    """The result of encoding one chunk. `stored` may be a view of the caller's raw buffer (RAW) or of its `out`."""

    transform: Transform
    lane_bytes: int
    pack_bits: int
    parameter: bytes
    """CONST: the lane. For transforms with a base the caller fills it in."""
    stored: Any
    digest: bytes
    """XXH3-128 of the raw bytes."""
    crc64nvme: int
    """crc64nvme of the stored bytes; 0 if there are none."""

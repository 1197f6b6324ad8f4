"""Numbers shared by codec and format: transforms, and limits of a chunk (docs/format.md, section 4)."""

from __future__ import annotations

import enum
from typing import Any

MAX_RAW_BYTES = 4 << 20
MAX_CHUNK_ELEMENTS = 1 << 20
PACK_BITS = (1, 2, 4, 8)
MAX_BASE_CHAIN = 64
"""Longest chain from a chunk over its base, the base of that, and so on, to a chunk without a base. A reader decodes them all."""


class Transform(enum.IntEnum):
    """The way in which stored bytes become raw bytes."""

    RAW = 1
    CONST = 2
    ROT = 3
    ROTU = 4
    SUB = 5
    SUBPACK = 6
    CAST = 7
    REF = 8


IMPLEMENTED = frozenset(Transform)
HAS_FRAME = frozenset({Transform.ROT, Transform.ROTU, Transform.SUB, Transform.SUBPACK})
HAS_BASE = frozenset({Transform.SUB, Transform.SUBPACK, Transform.CAST, Transform.REF})
STORES_NOTHING = frozenset({Transform.CONST, Transform.CAST, Transform.REF})


def transform_name(number: int) -> str:
    """The name of a transform, for messages. Accepts any number."""
    try:
        return Transform(number).name
    except ValueError:
        return f"number {number}"


def max_frame_bytes(raw_bytes: Any) -> Any:
    """Longest frame that the format allows for a chunk; an integer or an array of them."""
    return 2 * raw_bytes + 1024

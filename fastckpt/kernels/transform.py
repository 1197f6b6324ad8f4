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

DECODE_WORK = {
    Transform.RAW: (0.95, 0.5),
    Transform.CONST: (0.7, 0.2),
    Transform.ROT: (1.0, 1.0),
    Transform.ROTU: (1.1, 1.6),
    Transform.SUB: (0.4, 1.9),
    Transform.SUBPACK: (0.4, 1.9),
    Transform.CAST: (0.9, 0.5),
    Transform.REF: (0.05, 0.3),
}
"""Processor time for each raw byte of a record, in that of ROT: (to memory that nobody has touched, to memory that is in use).

Of a delta it is what comes on top of its base, in place of which it is decoded. Measured with `read_chunks`, AVX-512, from a file in the
page cache: chunks of 4 MiB of a GPT's AdamW state 1 to 50 steps apart. ROT of float32 takes 1.05 ns a byte to new memory, most of it the
kernel's for the pages, and 0.17 to memory in use. SUB of float32 takes 0.33 to 0.47 of the first (parameters and second moments), 1.3 to
2.3 of the second. bfloat16: the more is stored, the more is decoded: see `delta_work`.
"""


def delta_work(lane_bytes: Any, stored_bytes: Any, raw_bytes: Any) -> Any:
    """Processor time for each raw byte of SUB and SUBPACK to new memory, as in DECODE_WORK, from their size. Numbers or arrays.

    bfloat16: 0.11 at 5 % stored, 0.35 at 26 %, 0.7 at 45 %; wider lanes: 0.3 to 0.5.
    """
    ratio = stored_bytes / raw_bytes
    return (lane_bytes == 2) * (0.05 + 1.35 * ratio) + (lane_bytes != 2) * (0.1 + 0.5 * ratio)


def transform_name(number: int) -> str:
    """The name of a transform, for messages. Accepts any number."""
    try:
        return Transform(number).name
    except ValueError:
        return f"number {number}"


def max_frame_bytes(raw_bytes: Any) -> Any:
    """Longest frame that the format allows for a chunk; an integer or an array of them."""
    return 2 * raw_bytes + 1024

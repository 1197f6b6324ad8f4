"""Which transform and which coder a chunk gets. Pure: from a sample's estimate to a choice.

                   bits per lane           gains over 8 %?            commonest byte > ½?
sample of 1/64 ─→  ROT(U) SUB SUBPACK ─→   a delta, else ROT(U)  ─→   real zstd, else our Huffman
"""

from __future__ import annotations

import enum
from typing import NamedTuple

from fastckpt.kernels import Estimate
from fastckpt.kernels.transform import PACK_BITS, Transform


class Effort(enum.IntEnum):
    """How much time a byte is worth. The bandwidth controller moves between these; each includes those before."""

    NONE = 0
    """RAW: the link is faster than any encoder."""
    FAST = 1
    """Our own Huffman frames: 2 to 4 GB/s a core."""
    NORMAL = 2
    """Where one byte dominates (zero rows, sparse deltas), zstd's search for matches: 0.4 to 1.3 GB/s a core, for such chunks only."""
    HIGH = 3
    """The same with zstd -9: for links under 50 MB/s a core, and for work in the background."""


class Coding(NamedTuple):
    """What to do with a chunk."""

    transform: Transform
    pack_bits: int = 0
    zstd_level: int | None = None
    """None: our own frames."""


# A delta makes a restore read two chunks. Below this gain it is not worth that.
_MIN_DELTA_GAIN = 0.08
# A chunk that saves less than this is stored as it is: decoding it costs about as much time as a fast disk takes to read 1 %.
MIN_SAVING = 0.01
# Huffman codes have a bit at least: a byte that is more frequent than this wastes part of it.
_DOMINANT = 0.5


def choose(estimate: Estimate, lane_bytes: int, effort: Effort = Effort.NORMAL) -> Coding:
    """The coding of a chunk of floats. estimate: with a base, if there is one that may be used."""
    if effort == Effort.NONE:
        return Coding(Transform.RAW)
    # ROTU decodes faster than ROT where both are possible, and is never larger.
    alone = Transform.ROTU if estimate.rotu >= 0 else Transform.ROT
    alone_bits = estimate.rotu if estimate.rotu >= 0 else estimate.rot
    level = None if effort < Effort.NORMAL else 1 if effort == Effort.NORMAL else 9
    if estimate.sub >= 0:
        bits, pack_bits = min(zip((estimate.sub, *estimate.subpack), (0, *PACK_BITS), strict=True))
        if bits < alone_bits * (1 - _MIN_DELTA_GAIN):
            if pack_bits:
                # Huffman's bit for each packed byte is more than half of it: nearly nothing has changed.
                sparse = bits < 2 * pack_bits / 8
                return Coding(Transform.SUBPACK, pack_bits, level if sparse else None)
            return Coding(Transform.SUB, 0, level if estimate.sub_dominant > _DOMINANT else None)
    dominated = estimate.rot_dominant > _DOMINANT
    if dominated and level is not None:
        return Coding(Transform.ROT, 0, level)
    if alone_bits > 8 * lane_bytes * (1 - MIN_SAVING):
        return Coding(Transform.RAW)
    return Coding(alone)

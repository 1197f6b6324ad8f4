"""Chooses transform and coder of a chunk. Pure: from the estimate of a sample to a choice.

                   bits per lane           gains over 8 %?            commonest byte > ½?
sample of 1/64 ─→  ROT(U) SUB SUBPACK ─→   a delta, else ROT     ─→   real zstd if it makes less than our Huffman, else ours
"""

from __future__ import annotations

import enum
from typing import NamedTuple

from fastckpt.kernels import Estimate
from fastckpt.kernels.transform import PACK_BITS, Transform


class Effort(enum.IntEnum):
    """How much time may be spent to save a byte. Each level includes the ones before it."""

    NONE = 0
    """RAW: the link is faster than any encoder."""
    FAST = 1
    """Our own Huffman frames: 2 to 4 GB/s a core."""
    NORMAL = 2
    """Also zstd's match search where one byte value dominates, and runs of zeros are not most of the chunk: 0.4 to 1.3 GB/s a core, for
    such chunks only.
    """
    HIGH = 3
    """The same with zstd -9: for links under 50 MB/s a core, and for background work."""


class Coding(NamedTuple):
    """The way in which a chunk is stored."""

    transform: Transform
    pack_bits: int = 0
    zstd_level: int | None = None
    """None: fastckpt's own frames. Otherwise of zstd's match search, where it makes less than they do."""


# A delta makes a restore read two chunks. A smaller gain is not worth that.
MIN_DELTA_GAIN = 0.08
# Of lanes of 4 and 8 bytes SUBPACK takes more time than SUB, and an estimate may be wrong by as much.
_MIN_PACK_GAIN = 0.02
# A chunk that saves less than this is stored raw: decoding it would take about as long as a fast disk needs to read 1 %.
MIN_SAVING = 0.01
# Huffman codes have at least one bit: a byte value that is more frequent than this wastes part of it.
_DOMINANT = 0.5


def choose(
    estimate: Estimate, lane_bytes: int, effort: Effort = Effort.NORMAL, min_gain: float = MIN_DELTA_GAIN
) -> Coding:
    """Choose the coding of a chunk of floats.

    estimate: includes deltas if there is a base that may be used. min_gain: the share of its bytes that a delta must save.
    """
    if effort == Effort.NONE:
        return Coding(Transform.RAW)
    # ROTU decodes faster than ROT where both are possible, and its stream is never larger.
    alone = Transform.ROTU if estimate.rotu >= 0 else Transform.ROT
    alone_bits = estimate.rotu if estimate.rotu >= 0 else estimate.rot
    level = None if effort < Effort.NORMAL else 1 if effort == Effort.NORMAL else 9
    if estimate.sub >= 0:
        bits, pack_bits = min(zip(estimate.subpack, PACK_BITS, strict=True))
        if bits >= estimate.sub * (1 - _MIN_PACK_GAIN if lane_bytes > 2 else 1):
            bits, pack_bits = estimate.sub, 0
        if bits < alone_bits * (1 - min_gain):
            # Never zstd's match search: our own frames have runs of zeros, which are all that it finds in a delta.
            return Coding(Transform.SUBPACK if pack_bits else Transform.SUB, pack_bits)
    dominated = estimate.rot_dominant > _DOMINANT
    if dominated and level is not None:
        return Coding(alone, 0, level)
    if alone_bits > 8 * lane_bytes * (1 - MIN_SAVING):
        return Coding(Transform.RAW)
    return Coding(alone)

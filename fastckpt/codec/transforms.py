"""One chunk: raw bytes to stored bytes and back (docs/format.md, section 4). Pure; buffers belong to the caller.

Every function may be called from any thread; large work releases the GIL.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fastckpt.codec import frames
from fastckpt.codec.base import NO_PARAMETER, CodecError, Encoded
from fastckpt.kernels import kernels
from fastckpt.transform import Transform

U8 = npt.NDArray[np.uint8]

# A frame must save this much of the chunk to be worth decoding again: 1 % of bytes costs about as much time at the
# rate of a fast disk as decoding does.
_MIN_SAVING = 0.01


def constant_lane(raw: U8, lane_bytes: int) -> bytes | None:
    """The lane that all of `raw` repeats, or None."""
    lanes = raw.view(f"<u{lane_bytes}")
    if lanes[0] != lanes[-1] or (lanes[: 1 << 10] != lanes[0]).any():  # the usual answer, without a pass over the chunk
        return None
    return lanes[:1].tobytes() if bool((lanes == lanes[0]).all()) else None


def encode(raw: U8, const_lane_bytes: int, rot_lane_bytes: int) -> Encoded:
    """Encode one chunk: CONST if it repeats one lane; else ROT (unless rot_lane_bytes is 0) if it pays; else RAW.

    raw: 1 … 4 MiB, contiguous, a whole number of lanes; must not change during the call. RAW's `stored` is `raw` itself.
    """
    lane = constant_lane(raw, const_lane_bytes)
    if lane is not None:
        return Encoded(Transform.CONST, const_lane_bytes, lane.ljust(8, b"\0"), b"")
    if rot_lane_bytes:
        stream = np.empty(raw.size, np.uint8)
        kernels(raw.size).rot_split(raw, stream, rot_lane_bytes)
        frame = frames.compress(stream)
        if len(frame) <= raw.size * (1 - _MIN_SAVING):
            return Encoded(Transform.ROT, rot_lane_bytes, NO_PARAMETER, frame)
    return Encoded(Transform.RAW, 1, NO_PARAMETER, raw)


def decode(transform: Transform, lane_bytes: int, parameter: bytes, stored: Any, out: U8) -> None:
    """Fill `out` (as long as the raw bytes) from the stored bytes. CodecError when they cannot be right.

    The caller has checked the crc of a frame before: damage never reaches the decoder, only malice does.
    """
    if transform is Transform.RAW:
        out[:] = np.frombuffer(stored, np.uint8)
    elif transform is Transform.CONST:
        out.view(f"<u{lane_bytes}")[:] = np.frombuffer(parameter[:lane_bytes], f"<u{lane_bytes}")
    elif transform is Transform.ROT:
        kernels(out.size).rot_merge(frames.decompress(stored, out.size), out, lane_bytes)
    else:
        raise CodecError("RAW, CONST or ROT", transform.name)

"""One chunk: from raw bytes to stored bytes and back (docs/format.md, section 4). Pure; buffers belong to the caller.

Every function may be called from any thread; large work releases the GIL. Besides the caller's buffers, each thread needs and keeps at most
15 MiB.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import numpy as np

from fastckpt._types import U8
from fastckpt.codec import frames
from fastckpt.codec.base import NO_PARAMETER, CodecError, Encoded
from fastckpt.codec.choose import MIN_DELTA_GAIN, MIN_SAVING, Coding, Effort, choose
from fastckpt.kernels import kernels, reference
from fastckpt.kernels.checksums import crc64nvme, digest
from fastckpt.kernels.reference import STRIPE_LANES
from fastckpt.kernels.transform import HAS_FRAME, Transform

_FOUND = 0.5
"""Of the raw bytes: where our own frames take no more, their runs of zeros have found what there is, and zstd's match search finds less."""
# XXH3 has other rules for shorter inputs; native kernels leave those to the xxhash package.
_MIN_FUSED_BYTES = 241


class _Scratch(threading.local):
    """A thread's buffer for streams: allocating fresh pages for every chunk would cost a quarter of the encoding time."""

    def __init__(self) -> None:
        self.buffer = np.empty(0, np.uint8)

    def of(self, n_bytes: int) -> U8:
        if self.buffer.size < n_bytes:
            self.buffer = np.empty(n_bytes, np.uint8)
        return self.buffer[:n_bytes]


_scratch = _Scratch()


def encode(
    raw: U8,
    const_lane_bytes: int,
    float_lane_bytes: int,
    *,
    base: U8 | None = None,
    min_gain: float = MIN_DELTA_GAIN,
    effort: Effort = Effort.NORMAL,
    out: U8 | None = None,
) -> Encoded:
    """Encode one chunk: CONST if it repeats one lane; else, for floats, the coding that `choose` returns, if it pays; else RAW.

    raw: 1 … 4 MiB, contiguous, a whole number of lanes; must not change during the call. float_lane_bytes: 0 if the elements are no
    floating-point numbers. base: for deltas; as long as raw. min_gain: the share of its bytes that a delta must save. out: a buffer for
    stored bytes, at least as long as raw; None: it is allocated.
    """
    found = _smaller(raw, const_lane_bytes, float_lane_bytes, base, min_gain, effort, out)
    return found or Encoded(Transform.RAW, 1, 0, NO_PARAMETER, raw, digest(raw), crc64nvme(raw))


def encode_into(
    raw: U8,
    const_lane_bytes: int,
    float_lane_bytes: int,
    out: U8,
    *,
    base: U8 | None = None,
    min_gain: float = MIN_DELTA_GAIN,
    effort: Effort = Effort.NORMAL,
) -> Encoded:
    """As `encode`, but all stored bytes lie at the beginning of `out`, those of a RAW chunk, too: `raw` may change afterwards."""
    found = _smaller(raw, const_lane_bytes, float_lane_bytes, base, min_gain, effort, out)
    if found is None:
        return _copied(raw, out)
    if type(found.stored) is bytes and found.stored:  # libzstd allocates its frames itself
        out[: len(found.stored)] = np.frombuffer(found.stored, np.uint8)
        return replace(found, stored=out[: len(found.stored)])
    return found


def _copied(raw: U8, out: U8) -> Encoded:
    """A RAW chunk as a copy. Native kernels copy, digest and checksum piece by piece: the memory is read once."""
    kernel, stored = kernels(raw.size), out[: raw.size]
    if kernel.encode is not None:
        found = kernel.encode(raw, None, Transform.RAW, 1, 0, stored)
        assert found is not None
        fused = found[2] if raw.size >= _MIN_FUSED_BYTES else digest(raw)
        return Encoded(Transform.RAW, 1, 0, NO_PARAMETER, stored, fused, found[1])
    np.copyto(stored, raw)
    return Encoded(Transform.RAW, 1, 0, NO_PARAMETER, stored, digest(stored), crc64nvme(stored))


def _smaller(
    raw: U8,
    const_lane_bytes: int,
    float_lane_bytes: int,
    base: U8 | None,
    min_gain: float,
    effort: Effort,
    out: U8 | None,
) -> Encoded | None:
    """The chunk as CONST or as a frame; None if neither pays."""
    if kernels(raw.size).is_constant(raw, const_lane_bytes):
        lane = raw[:const_lane_bytes].tobytes().ljust(8, b"\0")
        return Encoded(Transform.CONST, const_lane_bytes, 0, lane, b"", digest(raw), 0)
    if float_lane_bytes and effort > Effort.NONE:
        estimate = kernels(raw.size).sample(raw, base, float_lane_bytes)
        coding = choose(estimate, float_lane_bytes, effort, min_gain)
        while coding.transform is not Transform.RAW:
            encoded = _encoded(coding, raw, base, float_lane_bytes, out)
            if encoded is not None:
                return encoded
            # ROTU met a sign bit that the sample had missed: try ROT. Any other transform does not pay: store RAW.
            coding = Coding(Transform.ROT if coding.transform is Transform.ROTU else Transform.RAW)
    return None


def _encoded(coding: Coding, raw: U8, base: U8 | None, lane_bytes: int, out: U8 | None) -> Encoded | None:
    """As `encode_as`, but zstd's match search is used only where it makes less than our own frames do."""
    if coding.zstd_level is None:
        return encode_as(coding, raw, base, lane_bytes, out)
    searching = coding._replace(transform=Transform.ROT)
    if kernels(raw.size).encode is None:
        return encode_as(searching, raw, base, lane_bytes, out)
    own = encode_as(coding._replace(zstd_level=None), raw, base, lane_bytes, out)
    if own is not None and len(own.stored) <= _FOUND * raw.size:
        return own
    searched = encode_as(searching, raw, base, lane_bytes, out)
    if own is None or searched is None:
        return own or searched
    return searched if len(searched.stored) < len(own.stored) else own


def encode_as(coding: Coding, raw: U8, base: U8 | None, lane_bytes: int, out: U8 | None = None) -> Encoded | None:
    """Make a frame with the given coding. None if it does not pay, or the transform cannot take these numbers."""
    most = int(raw.size * (1 - MIN_SAVING))
    kernel = kernels(raw.size)
    transform, pack_bits = coding.transform, coding.pack_bits
    if coding.zstd_level is None and kernel.encode is not None:
        stored = (out if out is not None else np.empty(raw.size, np.uint8))[:most]
        found = kernel.encode(raw, base, transform, lane_bytes, pack_bits, stored)
        if found is None:
            return None
        n_bytes, crc, fused = found
        found_digest = fused if raw.size >= _MIN_FUSED_BYTES else digest(raw)
        return Encoded(transform, lane_bytes, pack_bits, NO_PARAMETER, stored[:n_bytes], found_digest, crc)
    stream = _scratch.of(2 * raw.size + 64)
    used = kernel.split(raw, base, transform, lane_bytes, pack_bits, stream)
    if used is None:
        return None
    frame = frames.compress(stream[:used], coding.zstd_level, _cuts(transform, raw.size // lane_bytes, lane_bytes))
    if len(frame) > most:
        return None
    return Encoded(transform, lane_bytes, pack_bits, NO_PARAMETER, frame, digest(raw), crc64nvme(frame))


def _cuts(transform: Transform, lanes: int, lane_bytes: int) -> list[int]:
    """Positions where the planes of the last, shorter stripe begin; planes of full stripes are whole blocks anyway."""
    rest = lanes % STRIPE_LANES
    if not rest or transform is Transform.SUBPACK:
        return []
    start = reference.stream_bytes(transform, lanes - rest, lane_bytes)
    return [at for k in range(lane_bytes) if (at := start + k * rest)]


def decode(
    transform: Transform,
    lane_bytes: int,
    pack_bits: int,
    parameter: bytes,
    stored: Any,
    out: U8,
    base: Any = None,
) -> bytes:
    """Decode the stored bytes into `out` (as long as the raw bytes); returns its digest. CodecError if the bytes cannot be right.

    base: SUB, SUBPACK, REF: as long as `out`, and it may be the very memory of `out`, which keeps the base's bytes if CodecError is raised;
    CAST: twice as long. The caller has checked the crc of a frame before, so only a deliberately
    wrong frame reaches the decoder, never damage.
    """
    if transform is Transform.RAW:
        source = np.frombuffer(stored, np.uint8)
        if source.ctypes.data != out.ctypes.data:
            out[:] = source
    elif transform is Transform.CONST:
        out.view(f"<u{lane_bytes}")[:] = np.frombuffer(parameter[:lane_bytes], f"<u{lane_bytes}")
    elif transform is Transform.REF:
        source = np.frombuffer(base, np.uint8)
        if source.ctypes.data != out.ctypes.data:
            out[:] = source
    elif transform is Transform.CAST:
        kernels(out.size).cast(base, out)
    elif transform in HAS_FRAME:
        return _decode_frame(transform, lane_bytes, pack_bits, stored, out, base)
    else:
        raise CodecError("a transform of version 1", transform.name)
    return digest(out)


def _decode_frame(transform: Transform, lane_bytes: int, pack_bits: int, stored: Any, out: U8, base: Any) -> bytes:
    kernel = kernels(out.size)
    if kernel.decode is not None:
        fused = kernel.decode(stored, base, transform, lane_bytes, pack_bits, out)
        if fused is not None:
            return fused if out.size >= _MIN_FUSED_BYTES else digest(out)
    # A frame of another writer, or damage: libzstd decides.
    expected = stream_bytes(transform, lane_bytes, pack_bits, out.size, stored)
    stream = frames.decompress(stored, expected)
    if not kernel.merge(stream, base, transform, lane_bytes, pack_bits, out):
        raise CodecError(f"a {transform.name} stream of {out.size} bytes", f"{len(stream)} bytes that are none")
    return digest(out)


def stream_bytes(transform: Transform, lane_bytes: int, pack_bits: int, n_bytes: int, frame: Any) -> int:
    """The length that the stream in a frame must have. CodecError if the frame's own size is impossible."""
    lanes = n_bytes // lane_bytes
    if transform is not Transform.SUBPACK:
        return reference.stream_bytes(transform, lanes, lane_bytes)
    # The length depends on the number of escapes: accept the length that the frame declares, if it is possible.
    found, least = frames.content_bytes(frame), 4 + (lanes * pack_bits + 7) // 8
    if not least <= found <= min(least + n_bytes, 2 * n_bytes + 64) or (found - least) % lane_bytes:
        raise CodecError(f"a SUBPACK stream of {least} to {min(least + n_bytes, 2 * n_bytes + 64)} bytes", f"{found}")
    return found

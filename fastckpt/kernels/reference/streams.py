"""The transforms: from raw bytes to streams and back (docs/format.md, sections 4.3 and 4.4)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fastckpt._types import U8
from fastckpt.kernels.transform import PACK_BITS, Transform

STRIPE_LANES = 131072


def lanes_of(buffer: Any, lane_bytes: int) -> npt.NDArray[Any]:
    """View a buffer as unsigned integers. ValueError unless lane_bytes is 2, 4 or 8 and the buffer's length is a multiple of it."""
    if lane_bytes not in (2, 4, 8):
        raise ValueError(f"lane_bytes is {lane_bytes}: 2, 4 or 8 are known")
    view = np.frombuffer(buffer, np.uint8)
    if view.size == 0 or view.size % lane_bytes:
        raise ValueError(f"{view.size} bytes are no whole number of {lane_bytes}-byte lanes")
    return view.view(f"<u{lane_bytes}")


def check_arguments(transform: int, raw: Any, base: Any, pack_bits: int) -> None:
    """ValueError for arguments that no transform accepts."""
    if transform not in (Transform.ROT, Transform.ROTU, Transform.SUB, Transform.SUBPACK):
        raise ValueError(f"transform {transform} has no stream")
    if transform in (Transform.SUB, Transform.SUBPACK):
        if base is None:
            raise ValueError(f"{Transform(transform).name} needs a base")
        if memoryview(base).nbytes != memoryview(raw).nbytes:
            raise ValueError(
                f"raw has {memoryview(raw).nbytes} bytes, base {memoryview(base).nbytes}: they must be equal"
            )
    if transform == Transform.SUBPACK and pack_bits not in PACK_BITS:
        raise ValueError(f"pack_bits is {pack_bits}: 1, 2, 4 or 8 are known")


def _ordered(x: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Map floats to integers of the same order: m of the format."""
    top = x.dtype.type(1 << (8 * x.itemsize - 1))
    return np.where(x & top, ~x, x | top)


def _unordered(m: npt.NDArray[Any]) -> npt.NDArray[Any]:
    top = m.dtype.type(1 << (8 * m.itemsize - 1))
    return np.where(m & top, m ^ top, ~m)


def rotated(x: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Each lane rotated left by one bit."""
    one, rest = x.dtype.type(1), x.dtype.type(8 * x.itemsize - 1)
    return np.asarray((x << one) | (x >> rest))


def _unrotated(y: npt.NDArray[Any]) -> npt.NDArray[Any]:
    one, rest = y.dtype.type(1), y.dtype.type(8 * y.itemsize - 1)
    return np.asarray((y >> one) | (y << rest))


def difference(x: npt.NDArray[Any], base: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """z of SUB: the distance of each lane from its base, counted in floats, with the sign in the lowest bit."""
    one, rest = x.dtype.type(1), x.dtype.type(8 * x.itemsize - 1)
    d = _ordered(x) - _ordered(base)
    return np.asarray((d << one) ^ (x.dtype.type(0) - (d >> rest)))


def _undifference(z: npt.NDArray[Any], base: npt.NDArray[Any]) -> npt.NDArray[Any]:
    one = z.dtype.type(1)
    d = (z >> one) ^ (z.dtype.type(0) - (z & one))
    return _unordered(d + _ordered(base))


def planes_of(y: npt.NDArray[Any]) -> list[U8]:
    """Byte planes, highest first."""
    columns = np.ascontiguousarray(y).view(np.uint8).reshape(-1, y.itemsize)
    return [np.ascontiguousarray(columns[:, k]) for k in reversed(range(y.itemsize))]


def _joined(planes: list[U8], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    return np.ascontiguousarray(np.stack(planes[::-1], axis=1)).view(dtype).reshape(-1)


def pack_bits_of(values: U8, bits: int) -> U8:
    """The low `bits` of each value, least significant first, in as few bytes as hold them."""
    wide = np.unpackbits(values[:, None], axis=1, bitorder="little")[:, :bits]
    return np.packbits(wide.reshape(-1), bitorder="little")


def unpack_bits_of(packed: U8, n: int, bits: int) -> U8:
    """The inverse of `pack_bits_of`, for n values."""
    wide = np.unpackbits(packed, bitorder="little")[: n * bits].reshape(n, bits)
    return np.packbits(wide, axis=1, bitorder="little").reshape(-1)


def stream_bytes(transform: int, n_lanes: int, lane_bytes: int) -> int:
    """Length of a ROT, ROTU or SUB stream."""
    if transform != Transform.ROTU:
        return n_lanes * lane_bytes
    whole, rest = divmod(n_lanes, STRIPE_LANES)
    return n_lanes * (lane_bytes - 1) + whole * (7 * STRIPE_LANES // 8) + (7 * rest + 7) // 8


def split(raw: Any, base: Any, transform: int, lane_bytes: int, pack_bits: int, stream: Any) -> int | None:
    """Transform raw bytes into a stream; returns its length. None if it does not fit into `stream`, or the transform cannot take these
    numbers (ROTU: a sign bit is set).
    """
    check_arguments(transform, raw, base, pack_bits)
    x = lanes_of(raw, lane_bytes)
    b = lanes_of(base, lane_bytes) if base is not None and transform in (Transform.SUB, Transform.SUBPACK) else None
    parts: list[U8] = []
    if transform == Transform.SUBPACK:
        assert b is not None
        z, esc = difference(x, b), (1 << pack_bits) - 1
        far = z >= z.dtype.type(esc)
        parts = [
            np.frombuffer(int(far.sum()).to_bytes(4, "little"), np.uint8),
            pack_bits_of(np.minimum(z, z.dtype.type(esc)).astype(np.uint8), pack_bits),
            *planes_of(z[far] - z.dtype.type(esc)),
        ]
        if sum(part.size for part in parts) > 2 * x.nbytes + 64:
            return None
    else:
        for first in range(0, x.size, STRIPE_LANES):
            some = slice(first, first + STRIPE_LANES)
            planes = planes_of(rotated(x[some]) if b is None else difference(x[some], b[some]))
            if transform == Transform.ROTU:
                if (planes[-1] & 1).any():
                    return None
                planes[-1] = pack_bits_of(planes[-1] >> np.uint8(1), 7)
            parts += planes
    out = np.frombuffer(stream, np.uint8)
    total = sum(part.size for part in parts)
    if total > out.size:
        return None
    np.concatenate(parts, out=out[:total])
    return total


def merge(stream: Any, base: Any, transform: int, lane_bytes: int, pack_bits: int, raw: Any) -> bool:
    """Transform a stream back into raw bytes. False if it cannot be the stream of such a chunk."""
    check_arguments(transform, raw, base, pack_bits)
    x = lanes_of(raw, lane_bytes)
    b = lanes_of(base, lane_bytes) if base is not None and transform in (Transform.SUB, Transform.SUBPACK) else None
    source = np.frombuffer(stream, np.uint8)
    if transform == Transform.SUBPACK:
        assert b is not None
        return _merge_packed(source, b, pack_bits, x)
    if source.size != stream_bytes(transform, x.size, lane_bytes):
        return False
    at = 0
    for first in range(0, x.size, STRIPE_LANES):
        some = slice(first, first + STRIPE_LANES)
        n = x[some].size
        planes: list[U8] = []
        for k in range(lane_bytes):
            packed = transform == Transform.ROTU and k == lane_bytes - 1
            n_bytes = (7 * n + 7) // 8 if packed else n
            plane = source[at : at + n_bytes]
            if packed and 7 * n % 8 and plane[-1] >> (7 * n % 8):
                return False  # unused bits are zero
            planes.append(unpack_bits_of(plane, n, 7) << np.uint8(1) if packed else plane)
            at += n_bytes
        y = _joined(planes, x.dtype)
        x[some] = _unrotated(y) if b is None else _undifference(y, b[some])
    return True


def _merge_packed(source: U8, base: npt.NDArray[Any], bits: int, out: npt.NDArray[Any]) -> bool:
    n, w, packed_bytes = out.size, out.itemsize, (out.size * bits + 7) // 8
    if source.size < 4 or source.size > 2 * out.nbytes + 64:
        return False
    escapes = int.from_bytes(source[:4].tobytes(), "little")
    if escapes > n or source.size != 4 + packed_bytes + escapes * w:
        return False
    packed = source[4 : 4 + packed_bytes]
    if n * bits % 8 and packed[-1] >> (n * bits % 8):
        return False  # unused bits are zero
    z = unpack_bits_of(packed, n, bits).astype(out.dtype)
    far = z == out.dtype.type((1 << bits) - 1)
    if int(far.sum()) != escapes:
        return False
    planes = source[4 + packed_bytes :].reshape(w, escapes)
    z[far] += _joined(list(planes), out.dtype)
    out[:] = _undifference(z, base)
    return True


def cast(wide: Any, narrow: Any) -> None:
    """Round float32 bit patterns to bfloat16: to nearest, ties to even; NaNs stay NaNs (CAST)."""
    u, out = np.frombuffer(wide, "<u4"), np.frombuffer(narrow, "<u2")
    if u.size != out.size:
        raise ValueError(f"{u.nbytes} bytes of float32 are not twice {out.nbytes} of bfloat16")
    nan = (u & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    high = u >> np.uint32(16)
    with np.errstate(over="ignore"):
        nearest = (u + np.uint32(0x7FFF) + (high & np.uint32(1))) >> np.uint32(16)
    out[:] = np.where(nan, high | np.uint32(0x0040), nearest).astype("<u2")


_CAST_LANES = 32 << 10


def cast_equal(narrow: Any, wide: Any) -> bool:
    """Whether `cast` makes these bfloat16 of those float32; ends at the first 32,768 lanes that differ."""
    x, u = np.frombuffer(narrow, np.uint8), np.frombuffer(wide, np.uint8)
    if u.size != 2 * x.size or x.size % 2:
        raise ValueError(f"{u.size} bytes of float32 are not twice {x.size} of bfloat16")
    lanes, made = x.view("<u2"), np.empty(min(x.size // 2, _CAST_LANES), "<u2")
    for at in range(0, lanes.size, _CAST_LANES):
        some = lanes[at : at + _CAST_LANES]
        cast(u[4 * at : 4 * (at + some.size)], made[: some.size])
        if not np.array_equal(some, made[: some.size]):
            return False
    return True


def is_constant(raw: Any, lane_bytes: int) -> bool:
    """Whether all lanes are equal. ValueError unless lane_bytes is 1, 2, 4 or 8 and the buffer's length is a multiple of it and not 0."""
    if lane_bytes not in (1, 2, 4, 8):
        raise ValueError(f"lane_bytes is {lane_bytes}: 1, 2, 4 or 8 are known")
    view = np.frombuffer(raw, np.uint8)
    if view.size == 0 or view.size % lane_bytes:
        raise ValueError(f"{view.size} bytes are no whole number of {lane_bytes}-byte lanes, one or more")
    lanes = view.view(f"<u{lane_bytes}")
    if (
        lanes[0] != lanes[-1] or (lanes[: 1 << 10] != lanes[0]).any()
    ):  # decides most chunks without a pass over all lanes
        return False
    return bool((lanes == lanes[0]).all())

"""The kernels in NumPy: the definition of what the others must compute (docs/format.md, sections 1, 4.3 and 4.4)."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastckpt._types import U8
from fastckpt.kernels.transform import PACK_BITS, Transform

STRIPE_LANES = 131072
_POLYNOMIAL_REFLECTED = 0x9A6C9329AC4BC9B5  # 0xAD93D23594C93659 with its bits reversed
_PARALLEL = 1024  # stretches of the input whose CRC registers advance side by side
_ALL_ONES = (1 << 64) - 1

U64 = npt.NDArray[np.uint64]


def crc_tables() -> U64:
    """[8, 256]: table k advances a register whose low byte is the index by k + 1 bytes."""
    first = np.arange(256, dtype=np.uint64)
    for _ in range(8):
        first = (first >> np.uint64(1)) ^ np.where(first & np.uint64(1), np.uint64(_POLYNOMIAL_REFLECTED), np.uint64(0))
    tables = [first]
    for _ in range(7):
        tables.append((tables[-1] >> np.uint64(8)) ^ first[(tables[-1] & np.uint64(255)).astype(np.intp)])
    return np.stack(tables)


_TABLES = crc_tables()
_BYTE_TABLE: list[int] = _TABLES[0].tolist()


def _advance_by_8(register: U64) -> U64:
    shifts = np.arange(0, 64, 8, dtype=np.uint64)
    index = ((register[..., None] >> shifts) & np.uint64(255)).astype(np.intp)
    return np.asarray(np.bitwise_xor.reduce(_TABLES[np.arange(7, -1, -1), index], axis=-1), dtype=np.uint64)


def _apply(columns: U64, vectors: U64) -> U64:
    """A linear map over GF(2), given by the images of the 64 unit vectors, applied to each of `vectors`."""
    bits = (vectors[..., None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    return np.asarray(
        np.bitwise_xor.reduce(np.where(bits.astype(bool), columns, np.uint64(0)), axis=-1), dtype=np.uint64
    )


def _advance_by_zeros(words: int) -> U64:
    """The map "8 × words zero bytes pass through the register"."""
    unit = np.uint64(1) << np.arange(64, dtype=np.uint64)
    result, power = unit, _advance_by_8(unit)
    while words:
        if words & 1:
            result = _apply(power, result)
        power = _apply(power, power)
        words >>= 1
    return result


def crc64nvme(data: Any) -> int:
    """CRC-64/NVME of a buffer."""
    view = np.frombuffer(data, np.uint8)
    register, start = _ALL_ONES, 0
    words = view.size // (8 * _PARALLEL)
    if words:
        start = 8 * _PARALLEL * words
        columns = view[:start].view("<u8").reshape(_PARALLEL, words).T.copy()
        state = np.zeros(_PARALLEL, np.uint64)
        state[0] = np.uint64(register)
        for column in columns:
            state = _advance_by_8(state ^ column)
        step = _advance_by_zeros(words)
        total = state[:1]
        for i in range(1, _PARALLEL):
            total = _apply(step, total) ^ state[i : i + 1]
        register = int(total[0])
    for byte in view[start:].tobytes():
        register = (register >> 8) ^ _BYTE_TABLE[(register ^ byte) & 0xFF]
    return register ^ _ALL_ONES


def lanes_of(buffer: Any, lane_bytes: int) -> npt.NDArray[Any]:
    """A buffer as unsigned integers. ValueError for another width than 2, 4 or 8, or a length that is no multiple of it."""
    if lane_bytes not in (2, 4, 8):
        raise ValueError(f"lane_bytes is {lane_bytes}: 2, 4 or 8 are known")
    view = np.frombuffer(buffer, np.uint8)
    if view.size == 0 or view.size % lane_bytes:
        raise ValueError(f"{view.size} bytes are no whole number of {lane_bytes}-byte lanes")
    return view.view(f"<u{lane_bytes}")


def check_arguments(transform: int, raw: Any, base: Any, pack_bits: int) -> None:
    """ValueError for what no transform takes."""
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
    """Floats in the order of integers: m of the format."""
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
    """z of SUB: how far each lane lies from its base, counted in floats, the sign in the lowest bit."""
    one, rest = x.dtype.type(1), x.dtype.type(8 * x.itemsize - 1)
    d = _ordered(x) - _ordered(base)
    return np.asarray((d << one) ^ (x.dtype.type(0) - (d >> rest)))


def _undifference(z: npt.NDArray[Any], base: npt.NDArray[Any]) -> npt.NDArray[Any]:
    one = z.dtype.type(1)
    d = (z >> one) ^ (z.dtype.type(0) - (z & one))
    return _unordered(d + _ordered(base))


def _planes(y: npt.NDArray[Any]) -> list[U8]:
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
    """The inverse, for n values."""
    wide = np.unpackbits(packed, bitorder="little")[: n * bits].reshape(n, bits)
    return np.packbits(wide, axis=1, bitorder="little").reshape(-1)


def stream_bytes(transform: int, n_lanes: int, lane_bytes: int) -> int:
    """Length of a ROT, ROTU or SUB stream."""
    if transform != Transform.ROTU:
        return n_lanes * lane_bytes
    whole, rest = divmod(n_lanes, STRIPE_LANES)
    return n_lanes * (lane_bytes - 1) + whole * (7 * STRIPE_LANES // 8) + (7 * rest + 7) // 8


def split(raw: Any, base: Any, transform: int, lane_bytes: int, pack_bits: int, stream: Any) -> int | None:
    """Raw bytes into the stream of a transform; returns its length, None if it does not fit into `stream` or the transform is not for
    such numbers (ROTU: a sign bit is set)."""
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
            *_planes(z[far] - z.dtype.type(esc)),
        ]
        if sum(part.size for part in parts) > 2 * x.nbytes + 64:
            return None
    else:
        for first in range(0, x.size, STRIPE_LANES):
            some = slice(first, first + STRIPE_LANES)
            planes = _planes(rotated(x[some]) if b is None else difference(x[some], b[some]))
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
    """A stream into raw bytes. False if it cannot be the stream of such a chunk."""
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
    """float32 bit patterns rounded to bfloat16: to nearest, ties to even; NaNs stay NaNs (CAST)."""
    u, out = np.frombuffer(wide, "<u4"), np.frombuffer(narrow, "<u2")
    if u.size != out.size:
        raise ValueError(f"{u.nbytes} bytes of float32 are not twice {out.nbytes} of bfloat16")
    nan = (u & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    high = u >> np.uint32(16)
    with np.errstate(over="ignore"):
        nearest = (u + np.uint32(0x7FFF) + (high & np.uint32(1))) >> np.uint32(16)
    out[:] = np.where(nan, high | np.uint32(0x0040), nearest).astype("<u2")


def gather(addresses: U64, lengths: U64, out: U8) -> None:
    """Join stretches of memory, which the caller keeps alive. ValueError if they are not as long as `out` together."""
    if int(lengths.sum()) != out.size:
        raise ValueError(f"the stretches are not {out.size} bytes together")
    to = out.ctypes.data
    for address, n_bytes in zip(addresses.tolist(), lengths.tolist(), strict=True):
        ctypes.memmove(to, address, n_bytes)
        to += n_bytes


WHOLE_BELOW = 64 << 10
"""Shorter stretches of memory are sampled whole."""
_GOLDEN = 0x9E3779B97F4A7C15


def lines_bytes(lengths: U64) -> int:
    """How long the sample of `lines` is."""
    n = lengths.astype(np.int64)
    return int(np.where(n < WHOLE_BELOW, n, -(-n // _EVERY) * _PIECE).sum())


def lines(addresses: U64, lengths: U64, seed: int, out: U8) -> None:
    """A sample of stretches of memory, which the caller keeps alive: of each 4 KiB one line of 64 bytes, which the seed chooses; what is
    shorter than 64 KiB whole. ValueError if it is not as long as `out`.
    """
    if lines_bytes(lengths) != out.size:
        raise ValueError(f"the sample does not take {out.size} bytes")
    to = pages = 0
    for address, n_bytes in zip(addresses.tolist(), lengths.tolist(), strict=True):
        if n_bytes < WHOLE_BELOW:
            ctypes.memmove(out.ctypes.data + to, address, n_bytes)
            to += n_bytes
            continue
        n = -(-n_bytes // _EVERY)
        k = np.arange(pages, pages + n, dtype=np.uint64) + np.uint64(seed & _ALL_ONES)
        line = (k * np.uint64(_GOLDEN)) >> np.uint64(58)
        at = np.minimum(np.arange(n) * _EVERY + line.astype(np.int64) * _PIECE, n_bytes - _PIECE)
        memory = np.frombuffer((ctypes.c_uint8 * n_bytes).from_address(address), np.uint8)
        out[to : to + n * _PIECE] = memory[at[:, None] + np.arange(_PIECE)].reshape(-1)
        to += n * _PIECE
        pages += n


ROW_WORDS = 4096
_BLOCK_ROWS = 4  # 128 KiB, and as much again: they stay in the cache


def rows(data: Any, keys: U64, out: U64) -> None:
    """A number for each 32 KiB of bytes, the last ones made up by zeros: the sum of all words, xor the key of their place in the row, each
    times its own upper half as a signed number, modulo 2^64. ValueError if there are not as many as `out` has.
    """
    view = np.frombuffer(data, np.uint8)
    if keys.size != ROW_WORDS:
        raise ValueError(f"{keys.nbytes} bytes of keys: expected {8 * ROW_WORDS}")
    if -(-view.size // (8 * ROW_WORDS)) != out.size:
        raise ValueError(f"{view.size} bytes are not {out.size} rows")
    whole = view.size // (8 * ROW_WORDS)
    words = view[: whole * 8 * ROW_WORDS].view(np.uint64).reshape(whole, ROW_WORDS)
    for first in range(0, whole, _BLOCK_ROWS):
        some = slice(first, min(first + _BLOCK_ROWS, whole))
        out[some] = _row_sums(words[some], keys)
    if whole < out.size:
        last = np.zeros(8 * ROW_WORDS, np.uint8)
        last[: view.size - whole * last.size] = view[whole * last.size :]
        out[whole:] = _row_sums(last.view(np.uint64)[None], keys)


def _row_sums(words: U64, keys: U64) -> U64:
    x = words ^ keys
    return np.asarray((x * (x.view(np.int64) >> 32).view(np.uint64)).sum(axis=1, dtype=np.uint64))


def is_constant(raw: Any, lane_bytes: int) -> bool:
    """Whether all lanes are equal."""
    lanes = np.frombuffer(raw, np.uint8).view(f"<u{lane_bytes}")
    if lanes[0] != lanes[-1] or (lanes[: 1 << 10] != lanes[0]).any():  # the usual answer, without a pass over the chunk
        return False
    return bool((lanes == lanes[0]).all())


class Estimate(NamedTuple):
    """Bits per lane that each way of storing a chunk would take, from a sample; negative: not possible. In the native kernel's order."""

    rot: float
    rotu: float
    sub: float
    subpack: tuple[float, float, float, float]
    """By pack bits 1, 2, 4, 8."""
    rot_dominant: float
    """Share of the commonest byte in the highest ROT plane."""
    sub_dominant: float
    lanes: int
    """Sampled."""


_PIECE, _EVERY = 64, 4096


def _symbol_bits(values: U8) -> float:
    """Bits a symbol as a block of literals has them: 8 at most; a symbol in more than half of the places takes a bit all the same; 0 where
    all are equal."""
    counts = np.bincount(values, minlength=256)
    counts = counts[counts > 0]
    if counts.size <= 1:
        return 0.0
    total = float(counts.sum())
    entropy = (
        np.log2(total) - float((counts * np.log2(counts)).sum()) / total + (counts.size - 1) / (2 * 0.6931 * total)
    )
    most = float(counts.max()) / total
    if most > 0.5:
        entropy += 1 + most * np.log2(most) + (1 - most) * np.log2(1 - most)
    return float(min(entropy, 8.0))


def _dominant(values: U8) -> float:
    return float(np.bincount(values).max() / values.size)


def sample(raw: Any, base: Any, lane_bytes: int) -> Estimate:
    """Estimate from 64 bytes of every 4 KiB (of small chunks: of every 512 bytes, or all)."""
    x = lanes_of(raw, lane_bytes)
    every = _EVERY if x.nbytes >= 64 * _EVERY else _EVERY // 8 if x.nbytes >= 64 * _PIECE else _PIECE
    lanes, step = _PIECE // lane_bytes, every // lane_bytes
    pick = (np.arange(0, x.size, step)[:, None] + np.arange(lanes)).reshape(-1)
    pick = pick[pick < x.size]
    x = x[pick]
    planes = _planes(rotated(x))
    plane_bits = [_symbol_bits(plane) for plane in planes]
    rot = sum(plane_bits)
    negative = bool((x >> x.dtype.type(8 * lane_bytes - 1)).any())
    rotu = -1.0 if negative else rot - plane_bits[-1] + min(plane_bits[-1], 7.0)
    if base is None:
        return Estimate(rot, rotu, -1.0, (-1.0,) * 4, _dominant(planes[0]), 0.0, x.size)
    z = difference(x, lanes_of(base, lane_bytes)[pick])
    sub_planes = _planes(z)
    packs = []
    for bits in PACK_BITS:
        esc = z.dtype.type((1 << bits) - 1)
        values = np.minimum(z, esc).astype(np.uint8)
        whole = [values[i : i + lanes] for i in range(0, values.size, lanes)]  # bytes do not span pieces
        packed = np.concatenate([pack_bits_of(piece[: piece.size * bits // 8 * 8 // bits], bits) for piece in whole])
        far = z[z >= esc] - esc
        escape_bits = sum(_symbol_bits(plane) for plane in _planes(far)) if far.size else 0.0
        packs.append(_symbol_bits(packed) * bits / 8 + far.size / z.size * escape_bits)
    one, two, four, eight = packs
    sub = sum(_symbol_bits(plane) for plane in sub_planes)
    return Estimate(rot, rotu, sub, (one, two, four, eight), _dominant(planes[0]), _dominant(sub_planes[0]), x.size)

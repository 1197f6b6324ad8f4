"""Test vectors for driver.cpp, and a check of the frames that it writes, with NumPy, zstandard and xxhash: no code of fastckpt.

    python make_vectors.py make DIR         write vectors into DIR
    python make_vectors.py check DIR OUT    decode the frames that `driver vectors DIR OUT` has written with stock zstd, compare

A vector file is little-endian: the magic FCVECT01; u32 transform, lane bytes, pack bits, 1 if there is a base; u64 raw bytes, stream
bytes, bytes of a stock zstd frame of the stream; 16 bytes digest of the raw bytes; u64 crc64nvme of the raw bytes; then raw, base (if
any), stream and stock frame. Transforms and streams: docs/format.md, sections 4.1, 4.3 and 4.4.
"""

import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash
import zstandard
from numpy.typing import NDArray

ROT, ROTU, SUB, SUBPACK = 3, 4, 5, 6
NAMES = {ROT: "rot", ROTU: "rotu", SUB: "sub", SUBPACK: "subpack"}
STRIPE = 131072
HEAD = struct.Struct("<8s4I3Q16sQ")
MAGIC = b"FCVECT01"
ROW = 1024  # bytes that a CRC's parallel registers take each

Lanes = NDArray[Any]  # unsigned integers of one width


class Vector(NamedTuple):
    transform: int
    lane: int
    pack: int
    raw: bytes
    base: bytes
    stream: bytes


# ---- docs/format.md, section 4 ----


def planes(lanes: Lanes) -> list[Lanes]:
    """The byte planes, highest first."""
    w = lanes.dtype.itemsize
    by_byte = lanes.view("u1").reshape(-1, w)
    return [by_byte[:, k] for k in reversed(range(w))]


def stripes(lanes: Lanes) -> Iterator[Lanes]:
    return (lanes[i : i + STRIPE] for i in range(0, lanes.size, STRIPE))


def rotated(x: Lanes) -> Lanes:
    return (x << 1) | (x >> (8 * x.dtype.itemsize - 1))


def ordered(x: Lanes) -> Lanes:
    top = x.dtype.type(1 << (8 * x.dtype.itemsize - 1))
    return np.where(x & top, ~x, x | top).astype(x.dtype)


def zigzag(x: Lanes, base: Lanes) -> Lanes:
    d = ordered(x) - ordered(base)
    ones = x.dtype.type(2 ** (8 * x.dtype.itemsize) - 1)
    z: Lanes = (d << 1) ^ np.where(d >> (8 * x.dtype.itemsize - 1), ones, x.dtype.type(0)).astype(x.dtype)
    return z


def least_bits_first(values: Lanes, bits: int) -> bytes:
    flat = np.unpackbits(values.astype("u1").reshape(-1, 1), axis=1, bitorder="little")[:, :bits]
    return np.packbits(flat.reshape(-1), bitorder="little").tobytes()


def stream_of(transform: int, lane: int, pack: int, raw: bytes, base: bytes) -> bytes:
    x = np.frombuffer(raw, f"<u{lane}")
    if transform == ROT:
        return b"".join(p.tobytes() for s in stripes(rotated(x)) for p in planes(s))
    if transform == ROTU:
        parts = []
        for s in stripes(rotated(x)):
            *high, low = planes(s)
            assert not (low & 1).any(), "a sign bit is set"
            parts += [p.tobytes() for p in high] + [least_bits_first(low >> 1, 7)]
        return b"".join(parts)
    z = zigzag(x, np.frombuffer(base, f"<u{lane}"))
    if transform == SUB:
        return b"".join(p.tobytes() for s in stripes(z) for p in planes(s))
    esc = (1 << pack) - 1
    escapes = (z[z >= esc] - np.array(esc, z.dtype)).astype(z.dtype)
    packed = least_bits_first(np.minimum(z, np.array(esc, z.dtype)), pack)
    return struct.pack("<I", escapes.size) + packed + b"".join(p.tobytes() for p in planes(escapes))


# ---- CRC-64/NVME, with a register for each row of bytes ----


def crc_table() -> NDArray[np.uint64]:
    polynomial = int(f"{0xAD93D23594C93659:064b}"[::-1], 2)
    table = []
    for byte in range(256):
        crc = byte
        for _ in range(8):
            crc = (crc >> 1) ^ (polynomial if crc & 1 else 0)
        table.append(crc)
    return np.array(table, np.uint64)


CRC_TABLE = crc_table()


def advance(registers: NDArray[np.uint64], rows: NDArray[np.uint8]) -> NDArray[np.uint64]:
    for column in rows.T:
        registers = (registers >> np.uint64(8)) ^ CRC_TABLE[(registers & np.uint64(255)).astype("u1") ^ column]
    return registers


# What each bit of a register becomes by ROW bytes of zeros.
OVER_ROW = [int(r) for r in advance(np.uint64(1) << np.arange(64, dtype=np.uint64), np.zeros((64, ROW), "u1"))]


def crc64nvme(data: bytes) -> int:
    """By the definition, in rows: zeros in front leave a register of 0 as it is, so the rows may be equally long."""
    ones = 2**64 - 1
    if len(data) < 8:
        return int(advance(np.array([ones], np.uint64), np.frombuffer(data, "u1").reshape(1, -1))[0]) ^ ones
    inverted = bytes(b ^ 255 for b in data[:8]) + data[8:]  # the same as starting from all ones
    rows = np.frombuffer(bytes(-len(data) % ROW) + inverted, "u1").reshape(-1, ROW)
    crc = 0
    for register in advance(np.zeros(len(rows), np.uint64), rows):
        moved = 0
        for bit in range(64):
            if crc >> bit & 1:
                moved ^= OVER_ROW[bit]
        crc = moved ^ int(register)
    return crc ^ ones


# ---- data ----


def values(rng: np.random.Generator, kind: str, n: int, w: int) -> Lanes:
    """n lanes as they occur: floats, and what an entropy coder meets rarely."""
    dtype = np.dtype(f"<u{w}")
    if kind == "floats":
        numbers = rng.standard_normal(n) * 0.02
        if w == 2:
            return (numbers.astype("<f4").view("<u4") >> 16).astype(dtype)
        return numbers.astype(f"<f{w}").view(dtype)
    if kind == "noise":
        return rng.integers(0, 2 ** (8 * w), n, dtype=np.uint64 if w == 8 else np.int64).astype(dtype)
    if kind == "constant":
        return np.full(n, 0x3F803F803F803F80 >> (64 - 8 * w), dtype)
    if kind == "two":  # two values, one of them rare
        return np.where(rng.random(n) < 0.001, 0x4049, 0x3C00).astype(dtype)
    if kind == "edges":  # zeros of both signs, denormals, infinities, NaNs, all ones
        top = 1 << (8 * w - 1)
        exponent = {2: 0x7F80, 4: 0x7F800000, 8: 0x7FF0000000000000}[w]
        some = [0, top, 1, top | 1, exponent, exponent | top, exponent | 1, 2 * top - 1, top - 1]
        return np.array(some, dtype)[rng.integers(0, len(some), n)]
    assert kind == "skewed"  # all byte values, geometrically: deep Huffman codes
    return np.minimum(rng.geometric(0.06, (n, w)) - 1, 255).astype("u1").reshape(-1).view(dtype)


KINDS = ("floats", "noise", "constant", "two", "edges", "skewed")


def near(rng: np.random.Generator, base: Lanes, spread: int) -> Lanes:
    """Lanes a few steps from `base`, some of them far away."""
    steps = rng.integers(-spread, spread + 1, base.size).astype("<i8").astype(base.dtype)
    far = rng.random(base.size) < 0.01
    return np.where(far, values(rng, "noise", base.size, base.dtype.itemsize), base + steps).astype(base.dtype)


def vectors(seed: int = 20240607) -> Iterator[tuple[str, Vector]]:
    rng = np.random.default_rng(seed)
    number = 0
    for w in (2, 4, 8):
        sizes = [
            1,
            2,
            7,
            8,
            9,
            31,
            63,
            64,
            65,
            1000,
            1023,
            1024,
            1025,
            1030,
            4096,
            16383,
            16385,
            int(rng.integers(20000, 60000)),
        ]
        sizes += [STRIPE + int(rng.integers(-3, 4)), 2 * STRIPE // w * 2 + 77]
        for transform, pack in [(ROT, 0), (ROTU, 0), (SUB, 0), *((SUBPACK, p) for p in (1, 2, 4, 8))]:
            # Every size, with one kind of data after another; the long ones for two transforms of each width only.
            for n in sizes[: None if (transform + pack) % 3 == w % 3 else -2]:
                number += 1
                kind = KINDS[number % len(KINDS)] if n < 30000 or number % 3 == 0 else "floats"
                x = values(rng, kind, n, w)
                if transform == ROTU:
                    x = x & x.dtype.type((1 << (8 * w - 1)) - 1)
                raw, base = x.tobytes(), b""
                if transform in {SUB, SUBPACK}:
                    base, raw = (
                        raw,
                        (
                            values(rng, kind, n, w) if number % 5 == 0 else near(rng, x, (1 << max(pack, 3)) // 3)
                        ).tobytes(),
                    )
                stream = stream_of(transform, w, pack, raw, base)
                if len(stream) <= 2 * len(raw) + 64:
                    name = f"{number:03}-{NAMES[transform]}{pack or ''}-w{w}-{kind}-{n}"
                    yield name, Vector(transform, w, pack, raw, base, stream)


def make(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    compressor = zstandard.ZstdCompressor(level=3)
    n = 0
    for name, v in vectors():
        stock = compressor.compress(v.stream)
        numbers = (v.transform, v.lane, v.pack, int(bool(v.base)), len(v.raw), len(v.stream), len(stock))
        head = HEAD.pack(MAGIC, *numbers, xxhash.xxh3_128(v.raw).digest(), crc64nvme(v.raw))
        (folder / f"{name}.vec").write_bytes(head + v.raw + v.base + v.stream + stock)
        n += 1
    print(f"{n} vectors")


def check(folder: Path, out: Path) -> None:
    """`out` has a frame for each vector, NAME.zst, and NAME.crc, its crc64nvme in hex."""
    paths = sorted(folder.glob("*.vec"))
    assert paths, f"no vectors in {folder}"
    for path in paths:
        data = path.read_bytes()
        _, _, _, _, has_base, n_raw, n_stream, *_ = HEAD.unpack_from(data)
        start = HEAD.size + n_raw * (1 + has_base)
        stream = data[start : start + n_stream]
        frame = (out / f"{path.stem}.zst").read_bytes()
        parameters = zstandard.get_frame_parameters(frame)
        assert parameters.content_size == n_stream, (
            f"{path.stem}: the frame's content size is {parameters.content_size}"
        )
        assert parameters.dict_id == 0
        assert parameters.window_size <= 8 << 20, f"{path.stem}: a window of {parameters.window_size} bytes"
        decoder = zstandard.ZstdDecompressor().decompressobj()
        found = decoder.decompress(frame)
        assert found == stream, f"{path.stem}: stock zstd decodes another stream"
        assert decoder.eof, f"{path.stem}: the frame does not end"
        assert not decoder.unused_data, f"{path.stem}: {len(decoder.unused_data)} bytes behind the frame"
        crc = int((out / f"{path.stem}.crc").read_text(), 16)
        assert crc == crc64nvme(frame), f"{path.stem}: the frame's crc64nvme"
    print(f"{len(paths)} frames")


def main(arguments: list[str]) -> None:
    match arguments:
        case ["make", folder]:
            make(Path(folder))
        case ["check", folder, out]:
            check(Path(folder), Path(out))
        case _:
            sys.exit(__doc__)


assert crc64nvme(b"123456789") == 0xAE8B14860A799888, "the check value of docs/format.md"
if __name__ == "__main__":
    main(sys.argv[1:])

"""All implementations of the kernels, on every instruction set that this machine has, compute the same on any bytes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest
import torch
import xxhash
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from fastckpt.kernels.checksums import crc64nvme_of
from fastckpt.kernels.reference import ROW_WORDS, WHOLE_BELOW, lines_bytes
from fastckpt.kernels.select import Kernels, load
from fastckpt.kernels.transform import PACK_BITS, Transform

try:
    from fastckpt import _native
except ImportError:  # no compiler here
    _native = None  # type: ignore[assignment]

U8 = npt.NDArray[np.uint8]
ROT, ROTU, SUB, SUBPACK = Transform.ROT, Transform.ROTU, Transform.SUB, Transform.SUBPACK
LANES_AT_EDGES = (1, 2, 3, 7, 8, 9, 63, 64, 65, 1023, 1024, 1025, 131071, 131072, 131073, 262145)
SHAPES = [(t, w, 0) for t in (ROT, ROTU, SUB) for w in (2, 4, 8)] + [
    (SUBPACK, w, p) for w in (2, 4, 8) for p in PACK_BITS
]
ISAS = _native.isas().split() if _native is not None else []
IMPLEMENTATIONS = [*(f"native {isa}" for isa in ISAS), "numba", "reference"]


@pytest.fixture(params=IMPLEMENTATIONS, scope="module")
def kernels(request: pytest.FixtureRequest) -> Iterator[Kernels]:
    name, _, isa = request.param.partition(" ")
    try:
        found = load(name)
    except ImportError as error:
        pytest.skip(f"the {name} kernels are not here: {error}")
    if isa:
        _native.use_isa(isa)
    yield found
    if isa:
        _native.use_isa(None)


@pytest.fixture(params=ISAS)
def native(request: pytest.FixtureRequest) -> Iterator[Kernels]:
    _native.use_isa(request.param)
    yield load("native")
    _native.use_isa(None)


def some_bytes(n: int, seed: int = 0) -> bytes:
    return np.random.default_rng((n, seed)).bytes(n)


# -- checksums ------------------------------------------------------------------------------------------------------------


def test_check_value(kernels: Kernels) -> None:
    assert kernels.crc64nvme(b"123456789") == 0xAE8B14860A799888
    assert kernels.crc64nvme(b"") == 0


def crc_bit_by_bit(data: bytes) -> int:
    crc = (1 << 64) - 1
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x9A6C9329AC4BC9B5 if crc & 1 else 0)
    return crc ^ ((1 << 64) - 1)


@given(parts=st.lists(st.binary(max_size=300), max_size=5))
@settings(deadline=None, max_examples=60)
def test_crc_of_parts_is_that_of_the_whole(parts: list[bytes]) -> None:
    assert crc64nvme_of(parts) == crc_bit_by_bit(b"".join(parts))


@given(data=st.binary(max_size=900))
@settings(deadline=None, max_examples=60)
def test_crc_is_that_of_the_definition(kernels: Kernels, data: bytes) -> None:
    assert kernels.crc64nvme(data) == crc_bit_by_bit(data)


@given(data=st.binary(max_size=400), cut=st.integers(0, 400))
@settings(deadline=None, max_examples=40)
def test_crc_of_two_parts_is_that_of_the_whole(kernels: Kernels, data: bytes, cut: int) -> None:
    first, second = data[:cut], data[cut:]
    parts = kernels.crc64nvme(first), kernels.crc64nvme(second)
    assert kernels.crc64nvme_combine(*parts, len(second)) == kernels.crc64nvme(data)


def test_crc_of_long_parts(kernels: Kernels) -> None:
    first, second = some_bytes(1_000_003), some_bytes(3_145_731)
    parts = kernels.crc64nvme(first), kernels.crc64nvme(second)
    assert kernels.crc64nvme_combine(*parts, len(second)) == kernels.crc64nvme(first + second)


@pytest.mark.parametrize(
    "n", [0, 1, 7, 8, 9, 127, 128, 129, 255, 256, 511, 512, 513, 8191, 8192, 8193, 131071, 1_000_003]
)
def test_crc_of_long_data(kernels: Kernels, n: int) -> None:
    assert kernels.crc64nvme(some_bytes(n)) == load("reference").crc64nvme(some_bytes(n))


@pytest.mark.parametrize("n", [*range(241, 400), 1023, 1024, 1025, 1088, 2047, 2048, 2049, 65_536, 1_000_003, 1 << 22])
def test_our_xxh3_is_xxhashs(native: Kernels, n: int) -> None:
    data = some_bytes(n)
    assert _native.xxh3_128(data) == xxhash.xxh3_128_digest(data)


def test_short_digests_are_left_to_the_package() -> None:
    if _native is None:
        pytest.skip("no native kernels: there was no compiler")
    with pytest.raises(ValueError, match="241"):
        _native.xxh3_128(bytes(240))


# -- streams --------------------------------------------------------------------------------------------------------------


def rot_stream(raw: bytes, w: int) -> bytes:
    """As docs/format.md spells it."""
    x = np.frombuffer(raw, f"<u{w}")
    y = (x << 1) | (x >> (8 * w - 1))
    stripes = (y[i : i + 131072] for i in range(0, y.size, 131072))
    return b"".join(s.view("u1").reshape(-1, w)[:, k].tobytes() for s in stripes for k in reversed(range(w)))


def prepared(transform: Transform, w: int, raw: bytes, near: bool = True, seed: int = 0) -> tuple[U8, U8]:
    """Raw bytes that the transform is for, and a base: near the raw bytes, as after a small step, or anywhere."""
    x = np.frombuffer(raw, np.uint8).copy()
    if transform == ROTU:
        x.view(f"<u{w}")[:] >>= 1
    rng = np.random.default_rng((x.size, seed))
    if not near:
        return x, np.frombuffer(rng.bytes(x.size), np.uint8)
    base = x.copy()
    lanes = base.view(f"<u{w}")
    moved = rng.random(lanes.size) < 0.3
    lanes[moved] += rng.integers(0, 300, int(moved.sum())).astype(lanes.dtype)
    return x, base


def split(kernels: Kernels, raw: U8, base: U8, transform: Transform, w: int, p: int) -> bytes | None:
    stream = np.full(2 * raw.size + 64, 0xA5, np.uint8)
    n = kernels.split(raw, base, transform, w, p, stream)
    return None if n is None else stream[:n].tobytes()


def check(kernels: Kernels, raw: U8, base: U8, transform: Transform, w: int, p: int) -> None:
    expected = split(load("reference"), raw, base, transform, w, p)
    stream = split(kernels, raw, base, transform, w, p)
    assert stream == expected
    if transform == ROT:
        assert stream == rot_stream(raw.tobytes(), w)
    if stream is None:
        return
    back = np.full(raw.size, 0x5A, np.uint8)
    assert kernels.merge(stream, base, transform, w, p, back) is True
    assert back.tobytes() == raw.tobytes()
    in_place = transform in (SUB, SUBPACK)
    if in_place:
        over = base.copy()
        assert kernels.merge(stream, over, transform, w, p, over) is True
        assert over.tobytes() == raw.tobytes()
        over[:] = base
        assert kernels.merge(stream[:-1], over, transform, w, p, over) is False
        assert over.tobytes() == base.tobytes()
    if kernels.encode is None or kernels.decode is None:
        return
    room = np.empty(2 * raw.size + 2048, np.uint8)
    found = kernels.encode(raw, base, transform, w, p, room)
    assert found is not None
    n, crc, digest = found
    frame = room[:n].tobytes()
    assert zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False) == stream
    assert crc == load("reference").crc64nvme(frame)
    back[:] = 0
    assert kernels.decode(frame, base, transform, w, p, back) == digest
    assert back.tobytes() == raw.tobytes()
    assert digest == (xxhash.xxh3_128_digest(raw) if raw.size > 240 else bytes(16))
    if in_place:
        over = base.copy()
        assert kernels.decode(frame, over, transform, w, p, over) == digest
        assert over.tobytes() == raw.tobytes()
        over[:] = base
        assert kernels.decode(frame[:-1], over, transform, w, p, over) is None
        assert over.tobytes() == base.tobytes()


@pytest.mark.parametrize("lanes", LANES_AT_EDGES)
@pytest.mark.parametrize(("transform", "w", "p"), SHAPES)
def test_streams_at_the_edges_of_stripes(kernels: Kernels, transform: Transform, w: int, p: int, lanes: int) -> None:
    check(kernels, *prepared(transform, w, some_bytes(lanes * w)), transform, w, p)


@given(data=st.binary(min_size=8, max_size=700), shape=st.sampled_from(SHAPES), near=st.booleans())
@settings(deadline=None, max_examples=150)
def test_streams_of_any_bytes(kernels: Kernels, data: bytes, shape: tuple[Transform, int, int], near: bool) -> None:
    transform, w, p = shape
    check(kernels, *prepared(transform, w, data[: len(data) // w * w], near), transform, w, p)


def weights(n: int, w: int, kind: str) -> bytes:
    """Floats as they occur, and those that trip entropy coders up."""
    rng = np.random.default_rng((n, w, len(kind)))
    x = rng.standard_normal(n) * 0.02
    if kind == "zero rows":
        x.reshape(-1, 64)[rng.random(n // 64) < 0.6] = 0
    if kind == "late symbol":  # the sample of a plane misses it
        x[n - 7] = 1e30
        x[n // 2 + 1] = -1e-30
    if kind == "many scales":
        x = np.ldexp(x, rng.integers(-14, 15, n))
    if kind == "special":
        x[rng.integers(0, n, n // 50)] = rng.choice([np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45], n // 50)
    if w == 2:
        return torch.from_numpy(x).to(torch.bfloat16).view(torch.int16).numpy().tobytes()
    with np.errstate(over="ignore", under="ignore"):
        return x.astype(np.float32 if w == 4 else np.float64).tobytes()


@pytest.mark.parametrize("kind", ["plain", "zero rows", "late symbol", "many scales", "special"])
@pytest.mark.parametrize("w", [2, 4, 8])
@pytest.mark.parametrize("n", [2048, 20_480, 140_032])
def test_streams_of_floats(kernels: Kernels, kind: str, w: int, n: int) -> None:
    raw = weights(n, w, kind)
    for transform, p in ((ROT, 0), (ROTU, 0), (SUB, 0), (SUBPACK, 1), (SUBPACK, 2), (SUBPACK, 4), (SUBPACK, 8)):
        check(kernels, *prepared(transform, w, raw, seed=1), transform, w, p)


def test_signs_are_not_for_rotu(kernels: Kernels) -> None:
    raw = np.zeros(4000, np.uint8)
    raw[-1] = 0x80
    assert split(kernels, raw, raw, ROTU, 4, 0) is None
    if kernels.encode is not None:
        assert kernels.encode(raw, None, ROTU, 4, 0, np.empty(9000, np.uint8)) is None


@pytest.mark.parametrize(("transform", "w", "p"), SHAPES)
def test_whatever_does_not_fit_is_refused(kernels: Kernels, transform: Transform, w: int, p: int) -> None:
    raw, base = prepared(transform, w, some_bytes(3000 * w))
    stream = split(kernels, raw, base, transform, w, p)
    assert stream is not None
    assert kernels.split(raw, base, transform, w, p, np.empty(len(stream) - 1, np.uint8)) is None
    if kernels.encode is not None:
        room = np.empty(2 * raw.size + 2048, np.uint8)
        found = kernels.encode(raw, base, transform, w, p, room)
        assert found is not None
        for n in (0, 1, 8, 9, 12, found[0] // 2, found[0] - 1):
            small = np.full(n + 64, 0xA5, np.uint8)
            again = kernels.encode(raw, base, transform, w, p, small[:n])
            assert again is None or again[0] <= n
            assert (small[n:] == 0xA5).all(), "wrote past its room"


@pytest.mark.parametrize(("transform", "w", "p"), SHAPES)
def test_streams_of_another_length_are_none(kernels: Kernels, transform: Transform, w: int, p: int) -> None:
    raw, base = prepared(transform, w, some_bytes(500 * w))
    stream = split(kernels, raw, base, transform, w, p)
    assert stream is not None
    out = np.empty(raw.size, np.uint8)
    for bad in (b"", stream[:-1], stream + b"\0", stream[: len(stream) // 2], stream * 2):
        assert kernels.merge(bad, base, transform, w, p, out) is False


def test_escapes_that_do_not_add_up_are_none(kernels: Kernels) -> None:
    raw, base = prepared(SUBPACK, 2, some_bytes(600))
    stream = split(kernels, raw, base, SUBPACK, 2, 2)
    assert stream is not None
    out = np.empty(raw.size, np.uint8)
    n = int.from_bytes(stream[:4], "little")
    fewer = (n - 1).to_bytes(4, "little") + stream[4:]
    assert kernels.merge(fewer, base, SUBPACK, 2, 2, out) is False
    assert kernels.merge((1 << 31).to_bytes(4, "little") + stream[4:], base, SUBPACK, 2, 2, out) is False
    none_escapes = bytearray(stream)
    none_escapes[4 : 4 + 75] = bytes(75)
    assert kernels.merge(none_escapes, base, SUBPACK, 2, 2, out) is False


def test_unused_bits_are_zero(kernels: Kernels) -> None:
    raw = np.arange(6, dtype=np.uint8)
    stream = bytearray(split(kernels, raw, raw, SUBPACK, 2, 1) or b"")
    assert len(stream) == 5
    stream[4] |= 0x80
    assert kernels.merge(stream, raw, SUBPACK, 2, 1, np.empty(6, np.uint8)) is False


def test_unused_bits_of_rotu_are_zero(kernels: Kernels) -> None:
    raw = np.zeros(6, np.uint8)
    stream = bytearray(split(kernels, raw, raw, ROTU, 2, 0) or b"")
    assert len(stream) == 6
    stream[5] |= 0x80
    assert kernels.merge(stream, None, ROTU, 2, 0, np.empty(6, np.uint8)) is False


@pytest.mark.parametrize("w", [0, 1, 3, 5, 16])
def test_other_lanes_are_refused(kernels: Kernels, w: int) -> None:
    for call in (kernels.split, kernels.merge):
        with pytest.raises(ValueError, match="2, 4 or 8"):
            call(bytes(240), None, ROT, w, 0, bytearray(240))


def test_senseless_calls_are_refused(kernels: Kernels) -> None:
    for call in (kernels.split, kernels.merge):
        with pytest.raises(ValueError, match="base"):
            call(bytes(8), None, SUB, 2, 0, bytearray(8))
        with pytest.raises(ValueError, match="equal"):
            call(bytes(8), bytes(6), SUB, 2, 0, bytearray(8 if call is kernels.merge else 80))
        with pytest.raises(ValueError, match="transform"):
            call(bytes(8), bytes(8), Transform.REF, 2, 0, bytearray(8))
        with pytest.raises(ValueError, match="pack"):
            call(bytes(8), bytes(8), SUBPACK, 2, 3, bytearray(8))
    with pytest.raises(ValueError, match="lane"):
        kernels.split(bytes(7), None, ROT, 2, 0, bytearray(8))


# -- samples, CAST --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("w", [2, 4, 8])
@pytest.mark.parametrize("lanes", [1, 5, 64, 3000, 40_000, 300_000])
def test_samples_agree(kernels: Kernels, w: int, lanes: int) -> None:
    for kind in ("plain", "zero rows"):
        raw, base = prepared(SUB, w, weights((2 * lanes + 63) & ~63, w, kind)[: lanes * w])
        for other in (None, base):
            expected = load("reference").sample(raw, other, w)
            found = kernels.sample(raw, other, w)
            np.testing.assert_allclose(np.hstack(found), np.hstack(expected), rtol=1e-6)


def test_cast_is_torchs_rounding(kernels: Kernels) -> None:
    rng = np.random.default_rng(3)
    u = rng.integers(0, 1 << 32, 70_001, dtype=np.uint32)
    u[:6] = [0x7F7FFFFF, 0x00008000, 0x00018000, 0x80000001, 0x7F800000, 0xFF800000]
    narrow = np.empty(u.size, np.uint16)
    kernels.cast(u, narrow)
    floats = torch.from_numpy(u.view(np.float32))
    torchs = floats.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    real = ~torch.isnan(floats).numpy()
    assert (narrow[real] == torchs[real]).all()
    assert ((narrow[~real] & 0x7FFF) > 0x7F80).all(), "NaNs stay NaNs"
    assert (narrow[~real] == ((u[~real] >> 16) | 0x40)).all(), "with their payload"


@given(data=st.binary(min_size=1, max_size=64), w=st.sampled_from([1, 2, 4, 8]), times=st.integers(1, 300))
@settings(deadline=None, max_examples=60)
def test_constants(kernels: Kernels, data: bytes, w: int, times: int) -> None:
    lane = data[:w].ljust(w, b"\1")
    raw = np.frombuffer(lane * times, np.uint8).copy()
    assert kernels.is_constant(raw, w)
    if times > 1:
        raw[(len(data) * 7919) % raw.size] ^= 1
        assert not kernels.is_constant(raw, w)


# -- gathering --------------------------------------------------------------------------------------------------------------


@given(lengths=st.lists(st.integers(0, 5000), max_size=30))
@settings(deadline=None, max_examples=50)
def test_stretches_of_memory_are_joined(lengths: list[int]) -> None:
    memory = np.frombuffer(some_bytes(5000 + len(lengths)), np.uint8)
    addresses = np.array([memory.ctypes.data + n for n in range(len(lengths))], np.uint64)
    expected = b"".join(memory[n : n + length].tobytes() for n, length in enumerate(lengths))
    for name in ("native", "reference") if _native is not None else ("reference",):
        out = np.empty(len(expected), np.uint8)
        load(name).gather(addresses, np.array(lengths, np.uint64), out)
        assert out.tobytes() == expected
        with pytest.raises(ValueError, match="bytes together"):
            load(name).gather(addresses, np.array(lengths, np.uint64), np.empty(len(expected) + 1, np.uint8))


# -- sampling memory --------------------------------------------------------------------------------------------------------


def sampled(kernels: Kernels, memory: U8, lengths: list[int], seed: int) -> U8:
    """Of stretches one behind the other."""
    starts = np.cumsum([0, *lengths])[:-1]
    n = np.array(lengths, np.uint64)
    out = np.full(lines_bytes(n), 0xA5, np.uint8)
    kernels.lines((starts + memory.ctypes.data).astype(np.uint64), n, seed, out)
    return out


@given(
    lengths=st.lists(st.integers(0, 300) | st.integers(65_400, 65_700) | st.integers(65_536, 400_000), max_size=5),
    seed=st.integers(0, (1 << 64) - 1),
)
@settings(deadline=None, max_examples=60)
def test_samples_of_memory_agree(kernels: Kernels, lengths: list[int], seed: int) -> None:
    memory = np.frombuffer(some_bytes(sum(lengths) + 1), np.uint8)
    found = sampled(kernels, memory, lengths, seed)
    assert found.tobytes() == sampled(load("reference"), memory, lengths, seed).tobytes()
    at = to = 0
    for n in lengths:  # as it is promised: the whole, or 64 bytes of each page, which the seed chooses
        if n < WHOLE_BELOW:
            assert found[to : to + n].tobytes() == memory[at : at + n].tobytes()
            to += n
        else:
            for page in range(at, at + n, 4096):
                line, around = found[to : to + 64].tobytes(), memory[max(page - 64, 0) : min(page + 4096, at + n)]
                assert line in around.tobytes()
                to += 64
        at += n
    assert to == found.size


def test_a_sample_into_other_room_is_refused(kernels: Kernels) -> None:
    memory = np.zeros(100_000, np.uint8)
    address, n = np.array([memory.ctypes.data], np.uint64), np.array([memory.size], np.uint64)
    for room in (0, 64, 1599, 1601):
        with pytest.raises(ValueError, match="sample"):
            kernels.lines(address, n, 0, np.empty(room, np.uint8))


def test_every_line_has_its_turn_and_seeds_choose_others(kernels: Kernels) -> None:
    """What is written to the same columns of every row is met, too: of 64 pages in a row each has another line."""
    memory = np.repeat(np.tile(np.arange(64, dtype=np.uint8), 256), 64)
    first = sampled(kernels, memory, [memory.size], 1)[::64]
    assert {*first.tolist()} == {*range(64)}
    assert all(len({*first[n : n + 64].tolist()}) > 40 for n in range(192))
    assert (sampled(kernels, memory, [memory.size], 2**63)[::64] != first).mean() > 0.9


@pytest.mark.parametrize("n", [1, 4096, 65_535, 65_536, 1 << 20, (1 << 22) + 4])
def test_a_stretch_that_is_swapped_has_another_sample(kernels: Kernels, n: int) -> None:
    memory, other = (np.frombuffer(some_bytes(n, seed), np.uint8) for seed in (1, 2))
    assert sampled(kernels, memory, [n], 5).tobytes() != sampled(kernels, other, [n], 5).tobytes()


# -- fingerprints of rows ---------------------------------------------------------------------------------------------------

KEYS = np.frombuffer(some_bytes(8 * ROW_WORDS, 9), np.uint64)


def row_prints(kernels: Kernels, data: U8) -> npt.NDArray[np.uint64]:
    out = np.empty(-(-data.size // (8 * ROW_WORDS)), np.uint64)
    kernels.rows(data, KEYS, out)
    return out


@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 32_767, 32_768, 32_769, 200_000, (1 << 22) - 3])
def test_fingerprints_of_rows_agree(kernels: Kernels, n: int) -> None:
    data = np.frombuffer(some_bytes(n), np.uint8)
    expected = []
    for start in range(0, n, 8 * ROW_WORDS):  # word by word, as it is defined
        words = np.frombuffer(data[start : start + 8 * ROW_WORDS].tobytes().ljust(8 * ROW_WORDS, b"\0"), np.uint64)
        mixed = [x * ((x >> 32) - ((x >> 63) << 32)) for x in (words ^ KEYS).tolist()]
        expected.append(sum(mixed) % (1 << 64))
    assert row_prints(kernels, data).tolist() == expected
    with pytest.raises(ValueError, match="rows"):
        kernels.rows(data, KEYS, np.empty(len(expected) + 1, np.uint64))
    with pytest.raises(ValueError, match="keys"):
        kernels.rows(data, KEYS[1:], np.empty(len(expected), np.uint64))


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, np.int64])
def test_fingerprints_of_rows_see_changes_of_constants_and_signs(kernels: Kernels, dtype: type) -> None:
    """Sums of words times numbers do not: a change of high bits in all words of a row adds up to a multiple of 2^64."""
    n = 16 * ROW_WORDS // np.dtype(dtype).itemsize * 2
    constants = {v: row_prints(kernels, np.full(n, v, dtype).view(np.uint8)).tobytes() for v in (0, 1, 2, -1, -2, 4)}
    assert len({*constants.values()}) == len(constants)
    values = np.random.default_rng(1).standard_normal(n).astype(dtype)
    if dtype is not np.int64:
        one = row_prints(kernels, values.view(np.uint8))
        assert (row_prints(kernels, (-values).view(np.uint8)) != one).all()
        values[[3, 700]] *= -1
        assert row_prints(kernels, values.view(np.uint8))[0] != one[0]

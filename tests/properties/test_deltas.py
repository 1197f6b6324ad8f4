"""Deltas as they occur and as they do not: one frame for all instruction sets, which any zstd reads, decoded in place of the base too."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from fastckpt import codec
from fastckpt._types import U8
from fastckpt.codec import Coding
from fastckpt.kernels import kernels
from fastckpt.kernels.checksums import digest
from fastckpt.kernels.select import load
from fastckpt.kernels.transform import PACK_BITS, Transform

try:
    from fastckpt import _native
except ImportError:  # no compiler here
    _native = None  # type: ignore[assignment]

needs_native = pytest.mark.skipif(_native is None, reason="no native kernels: there was no compiler")
CODINGS = [Coding(Transform.SUB), *(Coding(Transform.SUBPACK, bits) for bits in PACK_BITS)]
KINDS = ("equal", "escapes", "sparse", "rows", "zeros", "payloads", "denormals", "one", "ends")


def pair(kind: str, lanes: int, w: int, seed: int) -> tuple[U8, U8]:
    """Raw bytes and their base."""
    rng = np.random.default_rng(seed)
    base = np.frombuffer(rng.bytes(lanes * w), f"<u{w}").copy()
    raw, top = base.copy(), base.dtype.type(1) << base.dtype.type(8 * w - 1)
    if kind == "escapes":
        raw = np.frombuffer(rng.bytes(lanes * w), f"<u{w}").copy()
    elif kind == "sparse":
        raw[rng.random(lanes) < 0.02] += rng.integers(1, 40, 1).astype(raw.dtype)[0]
    elif kind == "rows":  # of an embedding table: most of them equal, of the others all lanes differ
        row = rng.random(-(-lanes // 384)) < 0.1
        moved = np.repeat(row, 384)[:lanes]
        raw[moved] += rng.integers(0, 2000, int(moved.sum())).astype(raw.dtype)
    elif kind == "zeros":
        base[:] = rng.choice(np.array([0, top], base.dtype), lanes)
        raw = rng.choice(np.array([0, top], base.dtype), lanes)
    elif kind == "payloads":
        base |= ~top & ~base.dtype.type((1 << (8 * w - 9)) - 1)
        raw = base ^ rng.integers(0, 1 << 7, lanes).astype(base.dtype)
    elif kind == "denormals":
        base &= top | base.dtype.type((1 << (8 * w - 10)) - 1)
        raw = base ^ (rng.random(lanes) < 0.5).astype(base.dtype)
    elif kind == "one":
        raw[lanes // 2] ^= raw.dtype.type(1)
    elif kind == "ends":
        raw[[0, -1]] ^= raw.dtype.type(5)
    return raw.view(np.uint8), base.view(np.uint8)


@pytest.fixture(params=_native.isas().split() if _native is not None else [])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    _native.use_isa(request.param)
    yield request.param
    _native.use_isa(None)


def check(raw: U8, base: U8, coding: Coding, w: int) -> None:
    room = np.empty(3 * raw.size + 2048, np.uint8)
    native, slow = load("native"), load("reference")
    assert native.encode is not None
    assert native.decode is not None
    frames = []
    for name in _native.isas().split():
        _native.use_isa(name)
        found = native.encode(raw, base, coding.transform, w, coding.pack_bits, room)
        assert found is not None
        frames.append(room[: found[0]].tobytes())
        over = base.copy()
        assert native.decode(frames[0], over, coding.transform, w, coding.pack_bits, over) == found[2]
        assert over.tobytes() == raw.tobytes()
    _native.use_isa(None)
    assert len(set(frames)) == 1
    stream = zstandard.ZstdDecompressor().decompress(frames[0], allow_extra_data=False)
    back = base.copy()
    assert slow.merge(stream, back, coding.transform, w, coding.pack_bits, back)
    assert back.tobytes() == raw.tobytes()


@needs_native
@given(
    kind=st.sampled_from(KINDS),
    lanes=st.integers(1, 3000) | st.sampled_from([16_384, 65_537, 131_071, 131_072, 140_001]),
    w=st.sampled_from([2, 4, 8]),
    coding=st.sampled_from(CODINGS),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=150)
def test_all_that_a_lane_can_do(kind: str, lanes: int, w: int, coding: Coding, seed: int) -> None:
    check(*pair(kind, lanes, w, seed), coding, w)


@needs_native
@pytest.mark.parametrize("kind", ["rows", "escapes"])
def test_the_largest_chunks(kind: str) -> None:
    check(*pair(kind, 1 << 20, 4, 1), Coding(Transform.SUB), 4)
    check(*pair(kind, 1 << 21, 2, 1), Coding(Transform.SUBPACK, 1), 2)


@needs_native
@pytest.mark.parametrize("w", [2, 4])
@pytest.mark.parametrize("kind", ["sparse", "rows"])
def test_runs_of_zeros_are_as_small_as_matches(kind: str, w: int) -> None:
    """zstd's match search is what our frames of deltas do without."""
    raw, base = pair(kind, 1 << 19, w, 3)
    for coding in CODINGS:
        ours, searched = (codec.encode_as(one, raw, base, w) for one in (coding, coding._replace(zstd_level=1)))
        if ours is None or searched is None:  # neither is smaller than the raw bytes
            continue
        assert len(ours.stored) <= 1.03 * len(searched.stored), coding


@needs_native
@pytest.mark.parametrize("kind", ["sparse", "rows", "one", "payloads"])
@pytest.mark.parametrize("level", [1, 9])
def test_frames_of_zstd_are_decoded_in_place(kind: str, level: int, isa: str) -> None:
    """Our decoder leaves most of them, some after it has decoded a part: libzstd then needs the base as it was."""
    for coding in (Coding(Transform.SUB, 0, level), Coding(Transform.SUBPACK, 4, level)):
        raw, base = pair(kind, 300_001, 4, level)
        made = codec.encode_as(coding, raw, base, 4)
        if made is None:
            continue
        assert codec.decode(made.transform, 4, made.pack_bits, bytes(8), made.stored, base, base) == digest(raw)
        assert np.array_equal(base, raw)


def test_a_base_is_only_used_where_it_pays() -> None:
    rng = np.random.default_rng(2)
    base = (rng.standard_normal(60_000) * 0.02).astype("<f4").view(np.uint8)
    raw = base.copy()
    raw.view("<u4")[:] += rng.integers(0, 200, 60_000).astype("<u4")
    out = np.empty(raw.size, np.uint8)
    near = codec.encode_into(raw, 4, 4, out, base=base)
    assert near.transform in (Transform.SUB, Transform.SUBPACK)
    share = len(near.stored) / len(codec.encode(raw, 4, 4).stored)
    assert codec.encode_into(raw, 4, 4, out, base=base, min_gain=1 - share + 0.05).transform is Transform.ROT
    assert codec.encode_into(raw, 4, 4, out, base=base, min_gain=1 - share - 0.05).transform is near.transform
    assert codec.encode_into(raw, 4, 4, out, base=rng.permutation(base)).transform is Transform.ROT


def test_estimates_see_zero_rows() -> None:
    """Of deltas in which most rows are equal, too: the policy rests on it."""
    for w in (2, 4):
        raw, base = pair("rows", (4 << 20) // 4, w, 7)
        estimate = kernels().sample(raw, base, w)
        for coding, bits in zip(CODINGS, (estimate.sub, *estimate.subpack), strict=True):
            made = codec.encode_as(coding, raw, base, w)
            assert made is not None
            if kernels().name == "native":
                assert len(made.stored) * 8 / (raw.size // w) == pytest.approx(bits, rel=0.12), (w, coding)

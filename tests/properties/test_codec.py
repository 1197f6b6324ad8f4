"""decode(encode(x)) == x for any bytes; what is stored is what docs/format.md says; what is hostile is refused."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import xxhash
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from fastckpt import codec
from fastckpt.codec import Coding, Effort, choose
from fastckpt.format.element_types import _BY_NAME, element_type
from fastckpt.kernels import Estimate, kernels
from fastckpt.kernels.select import load
from fastckpt.kernels.transform import HAS_FRAME, PACK_BITS, Transform
from tests.properties.test_kernels import SHAPES, prepared, rot_stream, some_bytes, weights

NAMES = [*sorted(_BY_NAME), "numpy:<f8", "numpy:>f4", "numpy:<c16", "numpy:|b1"]
U8 = npt.NDArray[np.uint8]


def decoded(encoded: codec.Encoded, stored: bytes, n_bytes: int, base: U8 | None = None) -> bytes:
    out = np.full(n_bytes, 0xA5, np.uint8)
    found = codec.decode(encoded.transform, encoded.lane_bytes, encoded.pack_bits, encoded.parameter, stored, out, base)
    assert found == encoded.digest
    return out.tobytes()


def check(raw: U8, name: str, effort: Effort = Effort.NORMAL, base: U8 | None = None) -> codec.Encoded:
    element = element_type(name)
    assert element is not None
    encoded = codec.encode(raw, element.const_lane_bytes, element.float_lane_bytes, effort=effort, base=base)
    stored = bytes(encoded.stored)
    w = element.const_lane_bytes
    constant = raw.tobytes() == raw[:w].tobytes() * (raw.size // w)
    assert (encoded.transform is Transform.CONST) == constant
    assert len(stored) <= raw.size
    assert encoded.digest == xxhash.xxh3_128_digest(raw)
    assert encoded.crc64nvme == (load("reference").crc64nvme(stored) if stored else 0)
    if encoded.transform in HAS_FRAME:
        assert len(stored) <= raw.size * 0.99
        stream = zstandard.ZstdDecompressor().decompress(stored, allow_extra_data=False)
        if encoded.transform is Transform.ROT:
            assert stream == rot_stream(raw.tobytes(), encoded.lane_bytes)
        parameters = zstandard.get_frame_parameters(stored)
        assert (parameters.content_size, parameters.dict_id) == (len(stream), 0)
        assert parameters.window_size <= 8 << 20
    assert decoded(encoded, stored, raw.size, base) == raw.tobytes()
    return encoded


@given(data=st.data(), name=st.sampled_from(NAMES), effort=st.sampled_from(Effort))
@settings(deadline=None, max_examples=300)
def test_round_trip_of_any_bytes(data: st.DataObject, name: str, effort: Effort) -> None:
    element = element_type(name)
    assert element is not None
    n = data.draw(st.integers(1, 200)) * element.n_bytes
    unit = data.draw(st.binary(min_size=1, max_size=element.n_bytes * 2))
    repeated = (unit * n)[:n]
    raw = bytearray(data.draw(st.one_of(st.just(repeated), st.binary(min_size=n, max_size=n))))
    if data.draw(st.booleans()):
        raw[data.draw(st.integers(0, n - 1))] ^= 1 << data.draw(st.integers(0, 7))
    x = np.frombuffer(bytes(raw), np.uint8)
    base = np.frombuffer(data.draw(st.binary(min_size=n, max_size=n)), np.uint8) if data.draw(st.booleans()) else None
    check(x, name, effort, base)


@pytest.mark.parametrize("effort", Effort)
@pytest.mark.parametrize("kind", ["plain", "zero rows", "late symbol", "many scales", "special"])
@pytest.mark.parametrize("name", ["float32", "bfloat16", "float64"])
def test_round_trip_of_floats(name: str, kind: str, effort: Effort) -> None:
    w = {"bfloat16": 2, "float32": 4, "float64": 8}[name]
    raw, base = prepared(Transform.SUB, w, weights(140_032, w, kind))
    transforms = {check(raw, name, effort, other).transform for other in (None, base)}
    assert (transforms == {Transform.RAW}) == (effort is Effort.NONE)


@pytest.mark.parametrize("kernel", ["native", "numba", "reference"])
def test_every_kernel_reads_every_others_frames(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, list[tuple[codec.Encoded, bytes, U8, U8]]] = {}
    available = ["numba", "reference"] + (["native"] if kernels().name == "native" else [])
    if kernel not in available:
        pytest.skip(f"the {kernel} kernels are not here")
    for name in available:
        monkeypatch.setenv("FASTCKPT_KERNELS", name)
        made[name] = []
        for transform, w, p in SHAPES:
            raw, base = prepared(transform, w, weights(20_480, w, "zero rows"))
            encoded = codec.encode_as(Coding(transform, p), raw, base, w)
            assert encoded is not None, (name, transform)
            made[name].append((encoded, bytes(encoded.stored), raw, base))
    monkeypatch.setenv("FASTCKPT_KERNELS", kernel)
    for frames in made.values():
        for encoded, stored, raw, base in frames:
            assert decoded(encoded, stored, raw.size, base) == raw.tobytes()


# -- choosing -------------------------------------------------------------------------------------------------------------


def estimate(**changes: Any) -> Estimate:
    usual = Estimate(26.5, -1.0, -1.0, (-1.0,) * 4, 0.2, 0.0, 1000)
    return usual._replace(**changes)


def test_choices() -> None:
    assert choose(estimate(), 4) == Coding(Transform.ROT)
    assert choose(estimate(rotu=26.4), 4) == Coding(Transform.ROTU)
    assert choose(estimate(rot=31.9), 4) == Coding(Transform.RAW)
    assert choose(estimate(), 4, Effort.NONE) == Coding(Transform.RAW)
    assert choose(estimate(rot_dominant=0.6), 4) == Coding(Transform.ROT, 0, 1)
    assert choose(estimate(rot_dominant=0.6, rotu=26.4), 4) == Coding(Transform.ROTU, 0, 1)
    assert choose(estimate(rot_dominant=0.6), 4, Effort.HIGH) == Coding(Transform.ROT, 0, 9)
    assert choose(estimate(rot_dominant=0.6), 4, Effort.FAST) == Coding(Transform.ROT)
    packs = (20.0, 9.0, 12.0, 14.0)
    assert choose(estimate(sub=20.0, subpack=packs), 4) == Coding(Transform.SUBPACK, 2)
    assert choose(estimate(sub=8.0, subpack=packs), 4) == Coding(Transform.SUB)
    assert choose(estimate(sub=8.0, subpack=(0.2, 0.3, 0.6, 1.1)), 4) == Coding(Transform.SUBPACK, 1)
    assert choose(estimate(sub=8.0, subpack=(0.3, 0.4, 0.6, 1.1)), 4) == Coding(Transform.SUBPACK, 1)
    assert choose(estimate(sub=8.0, subpack=packs, sub_dominant=0.9), 4) == Coding(Transform.SUB)
    assert choose(estimate(sub=25.0, subpack=(32.0,) * 4), 4) == Coding(Transform.ROT), (
        "5 % are not worth a second read"
    )


@pytest.mark.parametrize("w", [2, 4])
def test_the_estimate_is_near_the_truth(w: int) -> None:
    """Within 5 % of what is stored: the choice between transforms rests on it."""
    lanes = (4 << 20) // 4
    raw = np.frombuffer(weights(lanes, w, "plain"), np.uint8)
    base = raw.copy()
    rng = np.random.default_rng(5)
    base.view(f"<u{w}")[rng.random(lanes) < 0.4] += 1
    found = kernels().sample(raw, base, w)
    promised = {(Transform.ROT, 0): found.rot, (Transform.SUB, 0): found.sub}
    promised |= {(Transform.SUBPACK, p): bits for p, bits in zip(PACK_BITS, found.subpack, strict=True)}
    for (transform, p), bits in promised.items():
        encoded = codec.encode_as(Coding(transform, p), raw, base, w)
        assert encoded is not None, transform
        assert len(encoded.stored) * 8 / lanes == pytest.approx(bits, rel=0.05, abs=0.05), (transform, p)


# -- hostile frames -------------------------------------------------------------------------------------------------------


@given(data=st.data(), shape=st.sampled_from(SHAPES))
@settings(deadline=None, max_examples=300)
def test_broken_frames_are_errors_or_right(data: st.DataObject, shape: tuple[Transform, int, int]) -> None:
    """A frame of ours with any change: CodecError, or a result (which its digest then judges); never anything else."""
    transform, w, p = shape
    raw, base = prepared(transform, w, weights(2048, w, data.draw(st.sampled_from(["plain", "zero rows"]))))
    encoded = codec.encode_as(Coding(transform, p), raw, base, w)
    assert encoded is not None
    stored = bytearray(encoded.stored)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, max(0, len(stored) - 1)))
        action = data.draw(st.sampled_from(["flip", "cut", "add", "random"]))
        if action == "flip" and stored:
            stored[at] ^= 1 << data.draw(st.integers(0, 7))
        elif action == "cut":
            del stored[at : at + data.draw(st.integers(1, 40))]
        elif action == "add":
            stored[at:at] = data.draw(st.binary(min_size=1, max_size=40))
        else:
            stored[at : at + 8] = data.draw(st.binary(min_size=8, max_size=8))
    out = np.empty(raw.size, np.uint8)
    with contextlib.suppress(codec.CodecError):
        found = codec.decode(transform, w, p, bytes(8), bytes(stored), out, base)
        assert found == xxhash.xxh3_128_digest(out)


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\x28",
        some_bytes(100),
        zstandard.ZstdCompressor(write_content_size=False).compress(bytes(4096)),
        zstandard.ZstdCompressor().compress(bytes(4095)),
        zstandard.ZstdCompressor().compress(bytes(4096)) + b"\0",
        zstandard.ZstdCompressor().compress(bytes(4096))[:-1],
        bytes.fromhex("28b52ffda0") + (1 << 31).to_bytes(4, "little") + bytes(20),
    ],
)
@pytest.mark.parametrize(("transform", "w", "p"), SHAPES)
def test_frames_that_are_none_of_ours(transform: Transform, w: int, p: int, frame: bytes) -> None:
    out, base = np.empty(4096, np.uint8), np.zeros(4096, np.uint8)
    with pytest.raises(codec.CodecError):
        codec.decode(transform, w, p, bytes(8), frame, out, base)

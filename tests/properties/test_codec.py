"""decode(encode(x)) == x for any bytes; what is stored is what docs/format.md says."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from fastckpt import codec
from fastckpt.format.element_types import _BY_NAME, element_type
from fastckpt.transform import Transform
from tests.properties.test_kernels import rot_stream

NAMES = [*sorted(_BY_NAME), "numpy:<f8", "numpy:>f4", "numpy:<c16", "numpy:|b1"]


def check(raw: npt.NDArray[np.uint8], name: str) -> codec.Encoded:
    element = element_type(name)
    assert element is not None
    encoded = codec.encode(raw, element.const_lane_bytes, element.rot_lane_bytes)
    stored = bytes(encoded.stored)
    w = element.const_lane_bytes
    constant = raw.tobytes() == raw[:w].tobytes() * (raw.size // w)
    assert (encoded.transform is Transform.CONST) == constant
    assert len(stored) <= raw.size
    if encoded.transform is Transform.ROT:
        assert len(stored) < raw.size
        stream = zstandard.ZstdDecompressor().decompress(stored, allow_extra_data=False)
        assert stream == rot_stream(raw.tobytes(), encoded.lane_bytes)
        parameters = zstandard.get_frame_parameters(stored)
        assert (parameters.content_size, parameters.dict_id) == (raw.size, 0)
        assert parameters.window_size <= 8 << 20
    out = np.full(raw.size, 0xA5, np.uint8)
    codec.decode(encoded.transform, encoded.lane_bytes, encoded.parameter, stored, out)
    assert out.tobytes() == raw.tobytes()
    return encoded


@given(data=st.data(), name=st.sampled_from(NAMES))
@settings(deadline=None, max_examples=300)
def test_round_trip_of_any_bytes(data: st.DataObject, name: str) -> None:
    element = element_type(name)
    assert element is not None
    n = data.draw(st.integers(1, 200)) * element.n_bytes
    unit = data.draw(st.binary(min_size=1, max_size=element.n_bytes * 2))
    repeated = (unit * n)[:n]
    raw = bytearray(data.draw(st.one_of(st.just(repeated), st.binary(min_size=n, max_size=n))))
    if data.draw(st.booleans()):
        raw[data.draw(st.integers(0, n - 1))] ^= 1 << data.draw(st.integers(0, 7))
    check(np.frombuffer(bytes(raw), np.uint8), name)


@pytest.mark.parametrize("n", [1, 131071, 131072, 131073, 1 << 20])
@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_numbers_like_weights_are_rotated(name: str, n: int) -> None:
    numbers = np.random.default_rng(n).standard_normal(n).astype("<f4")
    raw = numbers.view("<u4") >> 16 if name == "bfloat16" else numbers
    raw = raw.astype("<u2") if name == "bfloat16" else raw.astype("<f2") if name == "float16" else raw
    encoded = check(np.ascontiguousarray(raw).view(np.uint8), name)
    assert encoded.transform is (Transform.CONST if n == 1 else Transform.ROT)


@pytest.mark.parametrize("at", [0, 1, 1023, 1024, 5000, 9999])
def test_one_other_lane_is_not_constant(at: int) -> None:
    lanes = np.full(10000, 7, "<i4")
    lanes[at] = 8
    assert check(lanes.view(np.uint8), "int32").transform is Transform.RAW


def test_zeros_of_either_sign_are_not_the_same() -> None:
    assert check(np.array([0.0, -0.0], "<f4").view(np.uint8), "float32").transform is not Transform.CONST


@given(frame=st.binary(max_size=200), n=st.integers(1, 64))
@settings(deadline=None)
def test_garbage_is_a_codec_error(frame: bytes, n: int) -> None:
    for stored in (frame, b"\x28\xb5\x2f\xfd" + frame):
        try:
            codec.decode(Transform.ROT, 4, bytes(8), stored, np.empty(4 * n, np.uint8))
        except codec.CodecError:
            continue

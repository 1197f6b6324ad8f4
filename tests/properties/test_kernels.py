"""All implementations of the kernels compute the same, on any bytes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastckpt.kernels.select import Kernels, _load

LANES_AT_EDGES = (0, 1, 2, 3, 7, 8, 63, 131071, 131072, 131073, 262145)


@pytest.fixture(params=["native", "numba", "reference"], scope="module")
def kernels(request: pytest.FixtureRequest) -> Kernels:
    try:
        return _load(request.param)
    except ImportError as error:
        pytest.skip(f"the {request.param} kernels are not here: {error}")


def some_bytes(n: int) -> bytes:
    return np.random.default_rng(n).bytes(n)


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


@given(data=st.binary(max_size=600))
@settings(deadline=None, max_examples=60)
def test_crc_is_that_of_the_definition(kernels: Kernels, data: bytes) -> None:
    assert kernels.crc64nvme(data) == crc_bit_by_bit(data)


@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 127, 128, 129, 8191, 8192, 8193, 131071, 131073, 1_000_003])
def test_crc_of_long_data(kernels: Kernels, n: int) -> None:
    assert kernels.crc64nvme(some_bytes(n)) == _load("reference").crc64nvme(some_bytes(n))


def rot_stream(raw: bytes, w: int) -> bytes:
    """As docs/format.md spells it."""
    x = np.frombuffer(raw, f"<u{w}")
    y = (x << 1) | (x >> (8 * w - 1))
    stripes = (y[i : i + 131072] for i in range(0, y.size, 131072))
    return b"".join(s.view("u1").reshape(-1, w)[:, k].tobytes() for s in stripes for k in reversed(range(w)))


def check_rot(kernels: Kernels, raw: bytes, w: int) -> None:
    stream, back = bytearray(len(raw)), bytearray(len(raw))
    kernels.rot_split(raw, stream, w)
    assert bytes(stream) == rot_stream(raw, w)
    kernels.rot_merge(stream, back, w)
    assert bytes(back) == raw


@pytest.mark.parametrize("w", [2, 4, 8])
@pytest.mark.parametrize("lanes", LANES_AT_EDGES)
def test_rot_at_the_edges_of_stripes(kernels: Kernels, lanes: int, w: int) -> None:
    check_rot(kernels, some_bytes(lanes * w), w)


@given(data=st.binary(max_size=500), w=st.sampled_from([2, 4, 8]))
@settings(deadline=None, max_examples=60)
def test_rot_of_any_bytes(kernels: Kernels, data: bytes, w: int) -> None:
    if len(data) % w:
        with pytest.raises(ValueError, match="lane"):
            kernels.rot_split(data, bytearray(len(data)), w)
        with pytest.raises(ValueError, match="lane"):
            kernels.rot_merge(data, bytearray(len(data)), w)
    check_rot(kernels, data[: len(data) // w * w], w)


@pytest.mark.parametrize("w", [0, 1, 3, 5, 16])
def test_other_lanes_are_refused(kernels: Kernels, w: int) -> None:
    with pytest.raises(ValueError, match="2, 4 or 8"):
        kernels.rot_split(bytes(240), bytearray(240), w)


def test_lengths_that_differ_are_refused(kernels: Kernels) -> None:
    with pytest.raises(ValueError, match="equal"):
        kernels.rot_split(bytes(8), bytearray(16), 2)

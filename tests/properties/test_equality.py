"""Comparisons that decide whether bytes are stored at all: of two buffers, and of a bfloat16 copy with its float32 master."""

from __future__ import annotations

import numpy as np
import pytest

from fastckpt.kernels.select import Kernels, load


@pytest.fixture(params=["native", "numba", "reference"], scope="module")
def kernels(request: pytest.FixtureRequest) -> Kernels:
    try:
        return load(request.param)
    except ImportError as error:
        pytest.skip(f"the {request.param} kernels are not here: {error}")


def some_bytes(n: int) -> bytes:
    return np.random.default_rng(n).bytes(n)


def test_cast_equal_is_by_cast(kernels: Kernels) -> None:
    for lanes in (0, 1, 5, 4096, 32_768, 32_769, 70_001):
        wide = np.frombuffer(some_bytes(4 * lanes), "<u4")
        narrow = np.empty(lanes, "<u2")
        kernels.cast(wide, narrow)
        assert kernels.cast_equal(narrow, wide) is True
        for at in {0, lanes // 2, lanes - 1} if lanes else ():
            narrow[at] ^= 1
            assert kernels.cast_equal(narrow, wide) is False
            narrow[at] ^= 1
    with pytest.raises(ValueError, match="twice"):
        kernels.cast_equal(bytes(4), bytes(4))


def test_equal_bytes(kernels: Kernels) -> None:
    for n in (0, 1, 63, 65_536, 65_537, 300_000):
        one = np.frombuffer(some_bytes(n), np.uint8)
        other = one.copy()
        assert kernels.equal(one, other) is True
        assert kernels.equal(one, memoryview(other)) is True
        for at in {0, n // 2, n - 1} if n else ():
            other[at] ^= 128
            assert kernels.equal(one, other) is False
            other[at] ^= 128
        assert kernels.equal(one, bytes(n + 1)) is False

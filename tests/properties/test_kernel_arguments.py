"""Whatever numbers and lengths a kernel is called with, it computes or raises ValueError: no C function trusts a width, count or seed.

The C interface itself, with buffers that end at their last byte, is tried by `driver arguments` under sanitizers (tests/native).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastckpt.kernels.reference import ROW_WORDS
from fastckpt.kernels.select import Kernels, load
from fastckpt.kernels.transform import Transform

try:
    from fastckpt import _native
except ImportError:  # no compiler here
    _native = None  # type: ignore[assignment]

NAMES = ("native", "numba", "reference")
DELTAS = (Transform.SUB, Transform.SUBPACK)
STREAMS = (Transform.ROT, Transform.ROTU, *DELTAS)
ALL_ONES = (1 << 64) - 1
# Around what is known, and what becomes it when high bits are dropped or a sign is.
NUMBERS = st.one_of(
    st.sampled_from([1, 2, 4, 8]),
    st.integers(-2, 20),
    st.sampled_from([63, 64, 65, 100, 127, 128, 255, 256]),
    st.builds(lambda low, high: low + high, st.integers(0, 8), st.sampled_from([1 << 31, 1 << 32, 1 << 63, 1 << 64])),
    st.builds(lambda low, high: low - high, st.integers(0, 8), st.sampled_from([1 << 31, 1 << 32, 1 << 63, 1 << 64])),
)
SIZES = st.integers(0, 300) | st.sampled_from([1 << 12, (1 << 17) + 6])
HUGE = st.sampled_from([1 << 47, 1 << 62, 1 << 63, (1 << 63) - 1, (1 << 64) - 1, (1 << 64) - 4096, (1 << 64) - 65_536])


@pytest.fixture(params=NAMES, scope="module")
def kernels(request: pytest.FixtureRequest) -> Kernels:
    try:
        return load(request.param)
    except ImportError as error:
        pytest.skip(f"the {request.param} kernels are not here: {error}")


def refuses(call: Callable[..., object], *arguments: Any) -> bool:
    """Whether it raises ValueError; any other exception fails the test."""
    try:
        call(*arguments)
    except ValueError:
        return True
    return False


def filled(n: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.full(n, 7, np.uint8)


@given(n=SIZES, width=NUMBERS)
@settings(deadline=None, max_examples=150)
def test_is_constant(kernels: Kernels, n: int, width: int) -> None:
    known = width in (1, 2, 4, 8) and n > 0 and n % width == 0
    assert refuses(kernels.is_constant, filled(n), width) is not known
    if known:
        assert kernels.is_constant(filled(n), width) is True


@given(n=SIZES, n_base=st.none() | SIZES, width=NUMBERS, equal=st.booleans())
@settings(deadline=None, max_examples=150)
def test_sample(kernels: Kernels, n: int, n_base: int | None, width: int, equal: bool) -> None:
    if equal and n_base is not None:
        n_base = n
    known = width in (2, 4, 8) and n > 0 and n % width == 0 and n_base in (None, n)
    base = None if n_base is None else filled(n_base)
    assert refuses(kernels.sample, filled(n), base, width) is not known


@given(
    n=SIZES,
    n_base=st.none() | SIZES,
    n_other=st.integers(0, 700),
    transform=st.sampled_from(STREAMS) | NUMBERS,
    width=NUMBERS,
    pack=NUMBERS,
    equal=st.booleans(),
)
@settings(deadline=None, max_examples=400)
def test_the_codec(
    kernels: Kernels, n: int, n_base: int | None, n_other: int, transform: int, width: int, pack: int, equal: bool
) -> None:
    if equal:
        n_base = n
    base = None if n_base is None else filled(n_base)
    known = transform in STREAMS and width in (2, 4, 8) and n > 0 and n % width == 0
    known &= transform not in DELTAS or n_base == n
    known &= transform != Transform.SUBPACK or pack in (1, 2, 4, 8)
    # Only native kernels look at what the transform does not use.
    unused = (transform not in DELTAS and n_base not in (None, n)) or not 0 <= pack < 1 << 32
    for name in ("split", "merge", "encode", "decode"):
        call = getattr(kernels, name)
        if call is None or (transform == Transform.RAW and name == "encode"):
            continue
        sides = (filled(n), filled(n_other)) if name in ("split", "encode") else (filled(n_other), filled(n))
        refused = refuses(call, sides[0], base, transform, width, pack, sides[1])
        assert refused is not known or (known and unused), name


@given(
    n=st.integers(0, 4),
    more=st.integers(-1, 1),
    lengths=st.lists(HUGE | st.integers(0, 2), max_size=130),
    room=st.sampled_from([0, 1, 64, 4096]),
    seed=NUMBERS,
)
@settings(deadline=None, max_examples=150)
def test_stretches_that_no_memory_has(
    kernels: Kernels, n: int, more: int, lengths: list[int], room: int, seed: int
) -> None:
    """Lengths whose sum wraps to the room that there is, and addresses past the end, before any byte is read."""
    wild = [*lengths, *[1 << 63] * 2 * n]
    out = np.empty(room, np.uint8)
    memory = np.zeros(8, np.uint8)
    addresses = np.full(max(0, len(wild) + more), memory.ctypes.data, np.uint64)
    if sum(wild) == room and addresses.size == len(wild):
        return
    assert refuses(kernels.gather, addresses, np.array(wild, np.uint64), out)
    if any(length >= 1 << 47 for length in wild):
        assert refuses(kernels.lines, addresses, np.array(wild, np.uint64), seed, out)


def test_sums_that_wrap_are_noticed(kernels: Kernels) -> None:
    memory, out = np.zeros(8, np.uint8), np.empty(0, np.uint8)
    for length, count in ((1 << 63, 2), (1 << 62, 4), (ALL_ONES, 1), ((1 << 62) + 1, 64), (1 << 58, 64)):
        addresses, lengths = np.full(count, memory.ctypes.data, np.uint64), np.full(count, length, np.uint64)
        assert refuses(kernels.gather, addresses, lengths, out)
        assert refuses(kernels.lines, addresses, lengths, 0, out)


def test_addresses_that_are_none(kernels: Kernels) -> None:
    out = np.empty(16, np.uint8)
    for address in (0, ALL_ONES - 15, ALL_ONES):
        assert refuses(kernels.gather, np.array([address], np.uint64), np.array([16], np.uint64), out)
        assert refuses(kernels.lines, np.array([address], np.uint64), np.array([16], np.uint64), 0, out)
    kernels.gather(np.zeros(1, np.uint64), np.zeros(1, np.uint64), np.empty(0, np.uint8))  # nothing is anywhere


@pytest.mark.parametrize("seed", [-1, 1 << 64, -(1 << 64)])
def test_seeds_are_of_64_bits(kernels: Kernels, seed: int) -> None:
    memory, out = np.zeros(100, np.uint8), np.empty(100, np.uint8)
    with pytest.raises(ValueError, match="seed"):
        kernels.lines(np.array([memory.ctypes.data], np.uint64), np.array([100], np.uint64), seed, out)


@given(n_wide=st.integers(0, 70), n_narrow=st.integers(0, 40))
@settings(deadline=None, max_examples=60)
def test_cast(kernels: Kernels, n_wide: int, n_narrow: int) -> None:
    known = n_wide % 4 == 0 and n_wide == 2 * n_narrow
    assert refuses(kernels.cast, filled(n_wide), filled(n_narrow)) is not known


@given(n=st.sampled_from([0, 1, 8, 32_768, 32_769, 65_536]), n_keys=st.sampled_from([0, 1, ROW_WORDS]), n_out=NUMBERS)
@settings(deadline=None, max_examples=60)
def test_rows(kernels: Kernels, n: int, n_keys: int, n_out: int) -> None:
    keys, out = np.zeros(n_keys, np.uint64), np.zeros(min(abs(n_out), 20), np.uint64)
    known = n_keys == ROW_WORDS and out.size == -(-n // 32_768)
    assert refuses(kernels.rows, filled(n), keys, out) is not known


needs_native = pytest.mark.skipif(_native is None, reason="no native kernels: there was no compiler")


@needs_native
@pytest.mark.parametrize("shift", range(1, 8))
def test_words_that_do_not_lie_on_words_are_refused(shift: int) -> None:
    def off(n: int) -> Any:
        return memoryview(bytearray(8 * n + 16))[shift : shift + 8 * n]

    for call, arguments in (
        (_native.gather, (off(2), bytes(16), bytearray(0))),
        (_native.lines, (bytes(16), off(2), 0, bytearray(0))),
        (_native.rows, (bytes(5), off(ROW_WORDS), bytearray(8))),
        (_native.rows, (bytes(5), bytes(8 * ROW_WORDS), off(1))),
        (_native.rows, (bytes(5), bytes(8 * ROW_WORDS), bytearray(8 + shift))),
        (_native.gather, (bytes(8 + shift), bytes(8 + shift), bytearray(0))),
    ):
        with pytest.raises(ValueError, match="uint64 in their places"):
            call(*arguments)


@needs_native
def test_numbers_of_another_kind_are_type_errors() -> None:
    for call, arguments in (
        (_native.is_constant, (bytes(8), 2.0)),
        (_native.sample, (bytes(8), None, "2")),
        (_native.crc64nvme, (b"", None)),
        (_native.split, (bytes(8), None, 3, 2.0, 0, bytearray(8))),
    ):
        with pytest.raises(TypeError):
            call(*arguments)
    for crc in (-1, 1 << 64):
        with pytest.raises(ValueError, match="crc is"):
            _native.crc64nvme(b"", crc)


@needs_native
@pytest.mark.parametrize("name", ["", "SCALAR", "scalar ", "scalar\0", "avx512 avx2 scalar"])
def test_an_instruction_set_is_named_exactly(name: str) -> None:
    before = _native.isa()
    with pytest.raises(ValueError, match="instruction set"):
        _native.use_isa(name)
    assert _native.isa() == before


@needs_native
def test_cast_equal_compares_lanes_of_as_many() -> None:
    for narrow, wide in ((2, 2), (1, 2), (3, 6), (4, 4)):
        with pytest.raises(ValueError, match="twice"):
            _native.cast_equal(bytes(narrow), bytes(wide))
    assert _native.cast_equal(bytes(4), bytes(8)) is True

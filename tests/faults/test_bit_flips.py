"""Damage of every kind is found, named and placed; no value ever comes out of damaged bytes."""

from __future__ import annotations

import io
import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastckpt
from fastckpt.errors import CheckpointError, CorruptCheckpointError, NotACheckpointError
from fastckpt.format.container import FOOTER_BYTES, HEADER_BYTES, parse_footer
from fastckpt.format.records import unpack
from fastckpt.format.tensor_names import dotted
from tests.faults.tools import ARRAY_GLOBALS, as_path, container_of, rich_state, seeded
from tests.support.readers import index_of

PARTS = {"header", "payload", "directory", "file table", "records", "skeleton", "footer"}


@cache
def good() -> bytes:
    return container_of(rich_state())


@cache
def names_of_chunks() -> list[tuple[int, int, frozenset[str]]]:
    """Where the stored bytes of each record are, and which tensors need them."""
    with fastckpt.open(io.BytesIO(good())) as reader:
        inner = index_of(reader)
        found = []
        for record, row in enumerate(inner.records):
            begin, size = int(row["offset"]), int(row["stored_bytes"])
            names = {
                dotted(tensor.name)
                for tensor in inner.directory.tensors
                if any(piece[0] == record for piece in inner.pieces(tensor.storage))
            }
            found.append((begin, begin + size, frozenset(names)))
        return found


@pytest.fixture(autouse=True)
def _arrays_are_safe() -> Iterator[None]:
    with torch.serialization.safe_globals(ARRAY_GLOBALS):
        yield


def expect_named(error: BaseException, note: object) -> CorruptCheckpointError:
    assert isinstance(error, CorruptCheckpointError), (note, error)
    assert error.damage, note
    for item in error.damage:
        assert item.part in PARTS, (note, item)
        assert item.place, (note, item)
        assert item.expected != item.found, (note, item)
        assert item.part != "payload" or item.tensors, (note, item)
    return error


def refused(source: Any, note: object) -> BaseException:
    try:
        value = fastckpt.load(source)
    except CheckpointError as error:
        return error
    raise AssertionError(f"{note}: load returned {type(value).__name__}")


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit >> 3] ^= 1 << (bit & 7)
    return bytes(changed)


def spoiled(begin: int, end: int) -> frozenset[str]:
    """Tensors whose stored bytes overlap a stretch of the file."""
    hit = [names for first, last, names in names_of_chunks() if begin < last and first < end]
    return frozenset().union(*hit)


def check_everywhere(data: bytes, note: object) -> None:
    """load and open refuse; every tensor that open still gives is right."""
    expect_named(refused(io.BytesIO(data), note), note)
    try:
        reader = fastckpt.open(io.BytesIO(data))
    except CheckpointError as error:
        expect_named(error, note)
        return
    changed = [i for i in range(len(data)) if data[i] != good()[i]] if len(data) == len(good()) else []
    affected = spoiled(changed[0], changed[-1] + 1) if changed else frozenset()
    assert affected, f"{note}: open sees no damage"
    with reader:
        for name in sorted(affected)[:2]:
            with pytest.raises(CorruptCheckpointError) as caught:
                reader[name]
            assert name in {tensor for item in caught.value.damage for tensor in item.tensors}, (note, name)


def test_the_good_one_loads_and_holds_all_transforms() -> None:
    loaded = fastckpt.load(io.BytesIO(good()))
    expected = rich_state()
    assert loaded["tied"] is loaded["weight"] or loaded["tied"].data_ptr() == loaded["weight"].data_ptr()
    assert torch.equal(loaded["weight"], expected["weight"])
    assert np.array_equal(loaded["array"], expected["array"])
    footer = parse_footer(good()[-FOOTER_BYTES:], len(good()), "good")
    part = footer.parts["records"]
    assert set(unpack(good()[part.offset : part.offset + part.n_bytes])["transform"].tolist()) == {1, 2, 3}


@pytest.mark.parametrize("n", [250, pytest.param(1000, marks=pytest.mark.slow)])
def test_any_bit(tmp_path: Path, n: int) -> None:
    """Over 5 s: each file is loaded once or twice and up to two tensors fetched."""
    rng = seeded("bits")
    for i, bit in enumerate(rng.sample(range(len(good()) * 8), n)):
        data = flipped(good(), bit)
        check_everywhere(data, f"bit {bit}")
        if i % 4 == 0:
            expect_named(refused(as_path(tmp_path, data), bit), bit)


def index_regions() -> list[tuple[str, int, int]]:
    footer = parse_footer(good()[-FOOTER_BYTES:], len(good()), "good")
    records = footer.parts["records"]
    return [
        ("header", 0, HEADER_BYTES),
        ("records", records.offset, records.offset + records.n_bytes),
        ("footer", len(good()) - FOOTER_BYTES, len(good())),
    ]


@pytest.mark.parametrize(("part", "begin", "end"), index_regions())
def test_every_bit_of_the_index(part: str, begin: int, end: int) -> None:
    for bit in range(8 * begin, 8 * end):
        error = expect_named(refused(io.BytesIO(flipped(good(), bit)), bit), bit)
        assert part in {item.part for item in error.damage}, (bit, error)


def test_every_byte_of_directory_and_skeleton() -> None:
    rng = seeded("index bytes")
    footer = parse_footer(good()[-FOOTER_BYTES:], len(good()), "good")
    for part in ("directory", "file table", "skeleton"):
        entry = footer.parts[part]
        for at in range(entry.offset, entry.offset + entry.n_bytes):
            error = expect_named(refused(io.BytesIO(flipped(good(), 8 * at + rng.randrange(8))), at), at)
            assert [item.part for item in error.damage] == [part], at


def test_any_length_that_is_cut_short(tmp_path: Path) -> None:
    rng = seeded("cuts")
    lengths = {*range(1, 20), 63, 64, 255, 256, 319, 320, len(good()) - 1, *rng.sample(range(1, len(good())), 280)}
    for length in sorted(lengths):
        for source in (io.BytesIO(good()[:length]), as_path(tmp_path, good()[:length])):
            error = refused(source, length)
            if length < 8:  # not even the magic is left
                assert isinstance(error, NotACheckpointError), (length, error)
            else:
                expect_named(error, length)


def test_bytes_behind_the_end(tmp_path: Path) -> None:
    rng = seeded("appended")
    for n in [*range(1, 20), 64, 255, 256, 257, 320, 4096, *(rng.randrange(1, 9999) for _ in range(50))]:
        for tail in (bytes(n), rng.randbytes(n)):
            expect_named(refused(as_path(tmp_path, good() + tail), n), n)
            expect_named(refused(io.BytesIO(good() + tail), n), n)
    expect_named(refused(as_path(tmp_path, good() + good()), "twice"), "twice")
    expect_named(refused(as_path(tmp_path, b"x" + good()), "in front"), "in front")


def ranges(rng: random.Random) -> Iterator[tuple[int, int]]:
    for _ in range(100):
        begin = rng.randrange(len(good()))
        yield begin, min(len(good()), begin + int(2 ** rng.uniform(3, 17)))
    yield from ((at, at + 1024) for at in range(0, len(good()), 1024))


def test_ranges_of_zeros() -> None:
    """Over 5 s: some three hundred files."""
    for begin, end in ranges(seeded("zeros")):
        stop = min(end, len(good()))
        data = good()[:begin] + bytes(stop - begin) + good()[stop:]
        if data != good():
            check_everywhere(data, f"zeros {begin}–{stop}")


def test_both_ends_lost() -> None:
    data = bytes(8) + good()[8:-8] + bytes(8)
    assert isinstance(refused(io.BytesIO(data), "ends"), NotACheckpointError)


def test_chunks_swapped() -> None:
    stretches = sorted({(begin, end) for begin, end, _ in names_of_chunks() if end > begin})
    assert len(stretches) >= 4
    for i, (a, b) in enumerate(stretches):
        for c, d in stretches[i + 1 :]:
            data = good()[:a] + good()[c:d] + good()[b:c] + good()[a:b] + good()[d:]
            assert len(data) == len(good())
            if data != good():
                check_everywhere(data, f"swapped {a}–{b} and {c}–{d}")


def test_all_damage_is_listed_at_once() -> None:
    data = bytearray(good())
    stretches = sorted({(begin, end) for begin, end, _ in names_of_chunks() if end > begin})
    for begin, _ in stretches:
        data[begin] ^= 1
    error = expect_named(refused(io.BytesIO(bytes(data)), "all"), "all")
    assert len(error.damage) == len(stretches)
    damaged = {name for item in error.damage for name in item.tensors}
    assert damaged == spoiled(HEADER_BYTES, len(good()))


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_damage_in_a_state_that_threads_decode(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than 4 MiB, so that the pool is used; the error is the same for any number of threads."""
    monkeypatch.setenv("FASTCKPT_THREADS", str(threads))
    rng = seeded("threads")
    big = torch.randn(3 << 20, generator=torch.Generator().manual_seed(3))
    data = container_of({"big": big, "other": torch.arange(1 << 20)})
    payload = parse_footer(data[-FOOTER_BYTES:], len(data), "big").payload_end
    for _ in range(12):
        bit = rng.randrange(8 * HEADER_BYTES, 8 * payload)
        error = expect_named(refused(io.BytesIO(flipped(data, bit)), bit), bit)
        (item,) = error.damage
        assert item.tensors in (("big",), ("other",)), bit

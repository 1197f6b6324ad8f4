"""Tensors that are put together from blocks of saved ones equal torch's own slices, and only chunks that are needed are read."""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastckpt
from fastckpt.errors import CorruptCheckpointError, TooLargeError
from fastckpt.format.wholes import Block, is_covered, overlaps
from fastckpt.options import Options
from fastckpt.reading.assembly import Move, Source, Target, assemble
from fastckpt.reading.chunk_reader import Reader
from fastckpt.reading.object_source import BytesSource

OPTIONS = Options(threads=2)


def numbers(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    count = torch.Size(shape).numel()
    return (torch.arange(count) % 30_011).to(dtype).view(shape)


SAVED = {
    "rows": numbers(2300, 1100),  # three chunks
    "turned": numbers(1000, 1500).t(),
    "deep": numbers(7, 300, 900, dtype=torch.int16),
    "long": numbers(2_500_000, dtype=torch.uint8),
    "one": torch.tensor(7.5),
    "small": numbers(3, 5, dtype=torch.float64),
    "view": numbers(400, 50)[10:90, 3:20],
}


@pytest.fixture(scope="module")
def reader() -> Reader:
    return opened(SAVED)


def opened(state: Any) -> Reader:
    file = io.BytesIO()
    fastckpt.save(state, file)
    return Reader.open(BytesSource(file.getvalue(), "a file"), alone=True)


def source(reader: Reader, name: str, at: Sequence[int], shape: Sequence[int], rank: int = 0) -> Source:
    (entry,) = [entry for entry in reader.directory.tensors if entry.name == (name,)]
    offset = entry.offset + sum(a * s for a, s in zip(at, entry.stride, strict=True))
    return Source(rank, entry.storage, offset, entry.stride, tuple(shape))


@st.composite
def boxes(draw: st.DrawFn) -> tuple[str, list[list[int]]]:
    """A tensor, and for each of its dimensions the places where a target is cut out of it and cut up."""
    name = draw(st.sampled_from(sorted(SAVED)))
    cuts = []
    for size in SAVED[name].shape:
        places = draw(st.lists(st.integers(0, size), min_size=2, max_size=4, unique=True).map(sorted))
        cuts.append(places)
    return name, cuts


@settings(max_examples=80, deadline=None)
@given(st.lists(boxes(), min_size=1, max_size=3))
def test_blocks_of_blocks(reader: Reader, asked: list[tuple[str, list[list[int]]]]) -> None:
    targets, expected = [], []
    for name, cuts in asked:
        pairs = [list(itertools.pairwise(places)) for places in cuts]
        origin = [places[0] for places in cuts]
        moves = []
        for block in itertools.product(*pairs):
            at, shape = [a for a, _ in block], [b - a for a, b in block]
            to = tuple(a - o for a, o in zip(at, origin, strict=True))
            moves.append(Move(source(reader, name, at, shape), to))
        where = tuple(slice(places[0], places[-1]) for places in cuts)
        expected.append(SAVED[name][where])
        targets.append(Target(str(SAVED[name].dtype).removeprefix("torch."), tuple(expected[-1].shape), tuple(moves)))
    found = list(assemble({0: reader}, targets, OPTIONS, 2))
    for tensor, wanted in zip(found, expected, strict=True):
        assert tensor.dtype == wanted.dtype
        assert torch.equal(tensor, wanted)
        assert tensor.is_contiguous()


def test_blocks_of_several_votes_and_none(reader: Reader) -> None:
    moves = (
        Move(source(reader, "rows", (0, 0), (700, 1100)), (0, 0)),
        Move(source(reader, "rows", (700, 0), (1600, 1100), rank=5), (700, 0)),
    )
    nothing = Target("float16", (3, 0), ())
    whole, empty = assemble({0: reader, 5: reader}, [Target("int32", (2300, 1100), moves), nothing], OPTIONS, 2)
    assert torch.equal(whole, SAVED["rows"])
    assert empty.shape == (3, 0)
    assert empty.dtype == torch.float16


class Counting(BytesSource):
    def __init__(self, data: bytes) -> None:
        super().__init__(data, "a file")
        self.n_bytes_read = 0

    def read_into(self, offset: int, out: Any) -> None:
        self.n_bytes_read += len(memoryview(out).cast("B"))
        super().read_into(offset, out)


def test_only_chunks_that_are_needed_are_read() -> None:
    file = io.BytesIO()
    torch.manual_seed(0)
    state = torch.randint(-(2**31), 2**31 - 1, (8 << 20,), dtype=torch.int32)  # 8 chunks that do not compress
    fastckpt.save({"t": state}, file)
    counting = Counting(file.getvalue())
    reader = Reader.open(counting, alone=True)
    counting.n_bytes_read = 0
    quarter = Target("int32", (2 << 20,), (Move(source(reader, "t", (2 << 20,), (2 << 20,)), (0,)),))
    (found,) = assemble({0: reader}, [quarter], OPTIONS, 2)
    assert torch.equal(found, state[2 << 20 : 4 << 20])
    assert counting.n_bytes_read <= 1.01 * found.nbytes


def test_a_flipped_bit_is_named_and_limits_hold() -> None:
    file = io.BytesIO()
    fastckpt.save({"t": numbers(2 << 20)}, file)
    data = bytearray(file.getvalue())
    data[5000] ^= 4
    reader = Reader.open(BytesSource(bytes(data), "a file"), alone=True)
    target = Target(
        "int32",
        (100, 7),
        (Move(source(reader, "t", (5,), (1,))._replace(stride=(7, 1), shape=(100, 7)), (0, 0)),),
        ("w",),
    )
    with pytest.raises(CorruptCheckpointError, match="w"):
        list(assemble({0: reader}, [target], OPTIONS, 2))
    with pytest.raises(TooLargeError):
        list(assemble({0: reader}, [target], Options(max_load_bytes=1000), 2))


@given(st.data())
def test_overlaps_cover_what_they_should(data: st.DataObject) -> None:
    """Against a count of each element."""
    n_dims = data.draw(st.integers(0, 3))
    whole = tuple(data.draw(st.integers(1, 6)) for _ in range(n_dims))
    cuts = [[0, *sorted(data.draw(st.sets(st.integers(1, n), max_size=2)) - {n}), n] for n in whole]
    blocks = [
        Block(tuple(a for a, _ in one), tuple(b - a for a, b in one), 0, 0, 0, (1,) * n_dims)
        for one in itertools.product(*(list(itertools.pairwise(c)) for c in cuts))
    ]
    if blocks and data.draw(st.booleans()):
        blocks.pop(data.draw(st.integers(0, len(blocks) - 1)))
    offset = tuple(data.draw(st.integers(0, n - 1)) for n in whole)
    shape = tuple(data.draw(st.integers(1, n - o)) for n, o in zip(whole, offset, strict=True))
    seen = torch.zeros(shape, dtype=torch.int64)
    known = torch.zeros(whole, dtype=torch.int64)
    for block in blocks:
        known[tuple(slice(a, a + n) for a, n in zip(block.at, block.shape, strict=True))] += 1
    found = list(overlaps(blocks, (offset, shape)))
    for one in found:
        seen[tuple(slice(a, a + n) for a, n in zip(one.to, one.shape, strict=True))] += 1
        assert all(a + n <= m for a, n, m in zip(one.within, one.shape, one.block.shape, strict=True))
    wanted = known[tuple(slice(a, a + n) for a, n in zip(offset, shape, strict=True))]
    assert torch.equal(seen, wanted)
    assert is_covered(found, (offset, shape)) == bool((wanted == 1).all())

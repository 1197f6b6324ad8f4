"""Chunks with bases that are read from a store: few requests, the order of need, and reads that stall, fail or come wrong in a chain."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import fastckpt
from fastckpt.errors import StoreUnavailableError
from fastckpt.format.directory import Extent
from fastckpt.kernels.transform import Transform
from fastckpt.reading import storage_loader
from fastckpt.reading.chunk_reader import Reader
from fastckpt.reading.fill import fill
from fastckpt.reading.hedging import Hedging
from fastckpt.store.memory import MemoryStore
from fastckpt.store.wrap import Wrapper
from tests.support.chains import Rows

_WAIT_S = 30.0
_CHUNKS = 8


class Watched(Wrapper):
    """Tells of each read of a pack before it is made, and after."""

    def __init__(self) -> None:
        super().__init__(MemoryStore())
        self.reads: list[tuple[str, int]] = []
        self.before: Callable[[int, str], None] = lambda number, key: None
        self.after: Callable[[int, str, memoryview], None] = lambda number, key, view: None
        self._lock = threading.Lock()

    def get_into(self, key: str, offset: int, out: Any) -> None:
        with self._lock:
            self.reads.append((key, offset))
            number = len(self.reads)
        self.before(number, key)
        super().get_into(key, offset, out)
        self.after(number, key, memoryview(out).cast("B"))


@pytest.fixture(scope="module")
def rows() -> tuple[Rows, list[list[Extent]]]:
    """Eight chunks of 400 kB, each a delta onto a delta onto a whole row; the packs of three saves."""
    rows, storages = Rows(), []
    random = np.random.default_rng(0)
    raws = [random.standard_normal(100_000).astype("<f4").view(np.uint8) for _ in range(_CHUNKS)]
    numbers = [rows.add(raw, Transform.ROT) for raw in raws]
    for save in (1, 2):
        for at, raw in enumerate(raws):
            raw.view("<u4")[::17] += 1
            numbers[at] = rows.add(raw, Transform.SUBPACK, (numbers[at], 0), pack=save, pack_bits=2)
    storages = [[Extent(number, 0, raws[0].size)] for number in numbers]
    return rows, storages


@pytest.fixture
def store() -> Watched:
    return Watched()


@pytest.fixture
def reader(rows: tuple[Rows, list[list[Extent]]], store: Watched) -> Reader:
    return rows[0].vote(store, rows[1])


def loaded(reader: Reader) -> list[bytes]:
    memory = {n: np.zeros(one.n_bytes, np.uint8) for n, one in enumerate(reader.directory.storages)}
    fill(reader, memory, fastckpt.Options(threads=2))
    return [memory[n].tobytes() for n in range(len(memory))]


@pytest.fixture
def expected(rows: tuple[Rows, list[list[Extent]]]) -> list[bytes]:
    return [rows[0].raw_of(extents) for extents in rows[1]]


def test_rows_side_by_side_come_with_one_request(reader: Reader, store: Watched, expected: list[bytes]) -> None:
    assert loaded(reader) == expected
    of_pack = Counter(key for key, _ in store.reads)
    assert len(of_pack) == 3
    assert max(of_pack.values()) <= 4, "ranges of a MiB, the least that is worth a request"
    stored = reader.records["stored_bytes"].sum()
    assert len(store.reads) <= 3 + stored // (1 << 20) + 1


def test_one_tensor_takes_a_request_for_each_pack(reader: Reader, store: Watched, expected: list[bytes]) -> None:
    memory = np.zeros(len(expected[3]), np.uint8)
    fill(reader, {3: memory}, fastckpt.Options(threads=2))
    assert memory.tobytes() == expected[3]
    assert len(store.reads) == 3


@pytest.mark.parametrize("pack", [0, 1, 2])
def test_a_stalled_read_holds_up_its_own_chains_and_is_made_again(
    reader: Reader, store: Watched, expected: list[bytes], pack: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first read of one save's pack hangs until the load is over."""
    over = threading.Event()
    stalled: list[int] = []
    rule = Hedging(times=0.0, least_s=0.0, samples=1, unknown_s=30.0, share=0.0)
    monkeypatch.setattr(storage_loader, "Hedging", lambda: rule)

    def stall(number: int, key: str) -> None:
        if key == reader.files[pack].key and not stalled:
            stalled.append(number)
            assert over.wait(_WAIT_S)

    store.before = stall
    try:
        assert loaded(reader) == expected
    finally:
        over.set()
    assert stalled


@pytest.mark.parametrize("pack", [0, 1, 2])
def test_a_row_that_comes_wrong_is_asked_for_once_more(
    reader: Reader, store: Watched, expected: list[bytes], pack: int
) -> None:
    spoiled: list[int] = []

    def spoil(number: int, key: str, view: memoryview) -> None:
        if key == reader.files[pack].key and not spoiled:
            spoiled.append(number)
            view[view.nbytes // 2] ^= 1

    store.after = spoil
    assert loaded(reader) == expected
    assert spoiled


@pytest.mark.parametrize("pack", [0, 2])
def test_a_range_that_ends_early_is_read_row_by_row(
    reader: Reader, store: Watched, expected: list[bytes], pack: int
) -> None:
    cut: list[int] = []

    def end_early(number: int, key: str) -> None:
        if key == reader.files[pack].key and not cut:
            cut.append(number)
            raise EOFError("the object ends")

    store.before = end_early
    assert loaded(reader) == expected
    assert cut


def test_an_error_of_the_store_is_raised_as_it_is(reader: Reader, store: Watched) -> None:
    def refuse(number: int, key: str) -> None:
        if key == reader.files[1].key:
            raise StoreUnavailableError("gone")

    store.before = refuse
    with pytest.raises(StoreUnavailableError, match="gone"):
        loaded(reader)


def test_what_is_needed_first_comes_first(reader: Reader, store: Watched, expected: list[bytes]) -> None:
    """A single read at a time, in the order of the storages: the first storage has come before the last one is asked for."""
    with storage_loader.StorageLoader(reader, 1, 0, [5, 1]) as loader:
        first = loader.take(5)
        read = set(store.reads)
        assert first.nbytes() == len(expected[5])
        loader.take(1)
        assert set(store.reads) > read

"""Loads of objects of a store: few requests, bounded memory, and bytes that came wrong are asked for once more."""

from __future__ import annotations

import io
import os
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastckpt
from fastckpt.errors import CorruptCheckpointError, StoreUnavailableError
from fastckpt.reading import storage_loader
from fastckpt.reading.chunk_reader import Reader
from fastckpt.reading.fill import fill
from fastckpt.reading.hedging import Hedging
from fastckpt.reading.object_source import ObjectSource
from fastckpt.reading.range_reads import RangeReads
from fastckpt.reading.reads import PLAIN_READS, Reads
from fastckpt.reading.sources import FileObjectSource
from fastckpt.reading.window import Window
from fastckpt.store.local import LocalStore
from fastckpt.store.memory import MemoryStore
from fastckpt.store.wrap import Wrapper

_WAIT_S = 30.0
_KEY = "state.fckpt"


def state(n: int = 8) -> dict[str, torch.Tensor]:
    return {f"w{i}": torch.randn(1_200_000, generator=torch.Generator().manual_seed(i)) for i in range(n)}


class Watched(Wrapper):
    """Counts reads, and lets `change` do something to the bytes of the payload's."""

    def __init__(self, inner: MemoryStore) -> None:
        super().__init__(inner)
        self.reads: list[tuple[int, int]] = []
        self.change: Callable[[int, int, memoryview], None] = lambda number, offset, view: None
        self._lock = threading.Lock()

    def get_into(self, key: str, offset: int, out: Any) -> None:
        view = memoryview(out).cast("B")
        with self._lock:
            self.reads.append((offset, view.nbytes))
            number = len(self.reads)
        super().get_into(key, offset, out)
        self.change(number, offset, view)


@pytest.fixture(scope="module")
def saved() -> bytes:
    buffer = io.BytesIO()
    fastckpt.save(state(), buffer)
    return buffer.getvalue()


@pytest.fixture
def store(saved: bytes) -> Watched:
    inner = MemoryStore()
    inner.put(_KEY, saved)
    return Watched(inner)


Change = Callable[[int, int, memoryview], None]


def loaded(
    store: Watched, change: Change | None = None, reads: Reads = PLAIN_READS
) -> dict[int, np.ndarray[Any, np.dtype[np.uint8]]]:
    """All storages, in memory of the caller. change: of what the reads of the payload bring, by their number from 1."""
    reader = Reader.open(ObjectSource(store, _KEY), alone=True)
    store.reads.clear()
    store.change = change or store.change
    memory = {n: np.zeros(one.n_bytes, np.uint8) for n, one in enumerate(reader.directory.storages)}
    fill(reader, memory, 2, reads)
    return memory


def is_right(found: dict[int, np.ndarray[Any, np.dtype[np.uint8]]]) -> bool:
    expected = [tensor.numpy().tobytes() for tensor in state().values()]
    return sorted(one.tobytes() for one in found.values()) == sorted(expected)


def test_chunks_side_by_side_come_with_one_request(store: Watched, saved: bytes) -> None:
    assert is_right(loaded(store))
    assert len(store.reads) <= Reads().at_once + 1
    assert sum(n for _, n in store.reads) <= len(saved)
    assert max(n for _, n in store.reads) <= max(8 << 20, 5 << 20)


def test_bytes_that_come_wrong_are_asked_for_once_more(store: Watched) -> None:
    flipped: list[tuple[int, int]] = []

    def flip_first(number: int, offset: int, view: memoryview) -> None:
        if len(flipped) < 3 and (offset, view.nbytes) not in flipped:
            flipped.append((offset, view.nbytes))
            view[view.nbytes // 2] ^= 1

    assert is_right(loaded(store, flip_first))
    again = Counter(store.reads)
    assert {read for read, n in again.items() if n > 1} == set(flipped)
    assert max(again.values()) == 2


def test_a_range_that_ends_early_is_asked_for_once_more(store: Watched) -> None:
    def cut_first(number: int, offset: int, view: memoryview) -> None:
        if number == 2:
            view[:] = bytes(view.nbytes)
            raise EOFError("the object ends")

    assert is_right(loaded(store, cut_first))


@pytest.mark.parametrize("how", ["flipped", "truncated"])
def test_what_stays_wrong_is_damage(store: Watched, how: str, saved: bytes) -> None:
    middle = len(saved) // 2

    def spoil(number: int, offset: int, view: memoryview) -> None:
        if offset <= middle < offset + view.nbytes:
            if how == "truncated":
                raise EOFError("the object ends")
            view[middle - offset] ^= 1

    with pytest.raises(CorruptCheckpointError) as caught:
        loaded(store, spoil)
    assert [item.part for item in caught.value.damage] == ["payload"]
    assert caught.value.damage[0].tensors


def test_an_error_of_the_store_is_raised_as_it_is(store: Watched) -> None:
    def refuse(number: int, offset: int, view: memoryview) -> None:
        if number == 3:
            raise StoreUnavailableError("gone")

    with pytest.raises(StoreUnavailableError, match="gone"):
        loaded(store, refuse)


def test_reads_under_way_have_bounded_memory(store: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half as much room as the state has bytes, and reads that all wait for each other."""
    most, buffer_for = 0, RangeReads._buffer_for

    def watched(self: RangeReads, range_: Any) -> Any:
        nonlocal most
        found = buffer_for(self, range_)
        most = max(most, self._held_bytes)
        return found

    monkeypatch.setattr(RangeReads, "_buffer_for", watched)
    small = Reads(at_once=16, buffers_bytes=16 << 20)
    assert is_right(loaded(store, reads=small))
    assert 0 < most <= 16 << 20


def test_the_slowest_read_is_made_again(store: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """One request hangs until the load is over: the load does not wait for it."""
    over, hanging = threading.Event(), threading.Event()
    rule = Hedging(times=0.0, least_s=0.0, samples=1, unknown_s=30.0, share=0.0)
    monkeypatch.setattr(storage_loader, "Hedging", lambda: rule)

    def hang(number: int, offset: int, view: memoryview) -> None:
        if number == 1:
            hanging.set()
            assert over.wait(_WAIT_S)
            view[:] = bytes(view.nbytes)
        else:
            assert hanging.wait(_WAIT_S)

    found = loaded(store, hang)
    assert is_right(found)
    over.set()
    assert is_right(found), "the read that lost has written into the state"


def test_one_tensor_takes_as_few_requests_as_its_place_needs(saved: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """The length, header, index with footer, the tensor's bytes: whatever else the object holds is not read."""
    inner = MemoryStore()
    inner.put(_KEY, saved)
    store = Watched(inner)
    monkeypatch.setattr("fastckpt.reading.opening.open_object", lambda url: (store, _KEY))
    with fastckpt.open(f"memory://place/{_KEY}") as reader:
        assert torch.equal(reader["w3"], state()["w3"])
    assert len(store.reads) <= 4
    own = storage_bytes_of(saved, "w3")
    assert sum(n for _, n in store.reads) <= own + (256 << 10) + 64
    for _ in range(2):
        store.reads.clear()
        with fastckpt.open(f"memory://place/{_KEY}") as reader:
            assert len(reader) == 8
        assert len(store.reads) == 2


def storage_bytes_of(saved: bytes, name: str) -> int:
    """Stored bytes of a tensor."""
    reader = Reader.open(FileObjectSource(io.BytesIO(saved)), alone=True)
    (number,) = [entry.storage for entry in reader.directory.tensors if entry.name == (name,)]
    chunks = [piece.chunk for piece in reader.pieces(number)]
    return int(reader.records["stored_bytes"][chunks].sum())


class Files(Wrapper):
    """Counts what is asked of a directory."""

    def __init__(self, inner: LocalStore) -> None:
        super().__init__(inner)
        self.asked: list[str] = []

    def _call(self, verb: str, key: str, operation: Callable[[], Any]) -> Any:
        self.asked.append(verb)
        return operation()


@pytest.mark.parametrize("is_cold", [False, True])
def test_objects_that_are_files_are_opened_and_not_copied(
    saved: bytes, is_cold: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastckpt.reading.object_source.is_cold", lambda fd, n_bytes: is_cold)
    store = Files(LocalStore(tmp_path))
    store.put(_KEY, saved)
    reader = Reader.open(ObjectSource(store, _KEY), alone=True)
    memory = {n: np.zeros(one.n_bytes, np.uint8) for n, one in enumerate(reader.directory.storages)}
    store.asked.clear()
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    fill(reader, memory, 2)
    assert is_right(memory)
    assert len(store.asked) <= (40 if is_cold else 20), "a range was opened more than twice"
    assert not before or len(os.listdir("/proc/self/fd")) == before
    store.inner.delete(_KEY)
    with pytest.raises(CorruptCheckpointError, match="does not exist"):
        fill(reader, memory, 2)


@pytest.mark.parametrize("window_bytes", [0, 1 << 20, 16 << 20])
def test_storages_that_go_on_are_begun_only_as_far_as_the_window_goes(
    saved: bytes, window_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = MemoryStore()
    inner.put(_KEY, saved)
    reader = Reader.open(ObjectSource(inner, _KEY), alone=True)
    most, enter = 0, Window.enter

    def watched(self: Window, number: int, n_bytes: int, n_chunks: int) -> None:
        nonlocal most
        enter(self, number, n_bytes, n_chunks)
        most = max(most, self._held_bytes)

    monkeypatch.setattr(Window, "enter", watched)
    with storage_loader.StorageLoader(reader, 2, window_bytes) as loader:
        taken = (loader.take(number) for number in range(len(reader.directory.storages)))
        found = {n: torch.empty(0, dtype=torch.uint8).set_(one).numpy().copy() for n, one in enumerate(taken)}
    assert is_right(found)
    largest = max(one.n_bytes for one in reader.directory.storages)
    assert most <= window_bytes + 2 * largest + max(window_bytes // 2, 4 << 20)

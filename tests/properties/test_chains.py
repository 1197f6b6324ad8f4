"""Loads of chunks that are relative to others: their raw bytes, each stored byte read once, in bounded memory."""

from __future__ import annotations

import contextlib
import tempfile
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastckpt
from fastckpt._types import U8
from fastckpt.errors import CorruptCheckpointError, TooLargeError
from fastckpt.format.directory import Extent
from fastckpt.kernels.transform import Transform
from fastckpt.reading import chains, storage_loader
from fastckpt.reading.chain_chunks import Allowance
from fastckpt.reading.chains import Together, plan_chain, plan_chains
from fastckpt.reading.chunk_reader import Reader
from fastckpt.reading.fill import fill
from fastckpt.reading.jobs import plan_jobs, rows_needed
from fastckpt.reading.parking import Parking
from fastckpt.reading.ranges import Limits
from fastckpt.reading.reads import Reads
from fastckpt.reading.storage_loader import StorageLoader
from fastckpt.store.local import LocalStore
from fastckpt.store.memory import MemoryStore
from tests.support.chains import Counted, Rows, world

_DEPTHS = st.integers(0, 6) | st.sampled_from([20, 60])
_SEEDS = st.integers(0, 1 << 32)


def filled(reader: Reader, memory: dict[int, Any] | None = None, **options: Any) -> list[bytes]:
    memory = memory or {n: np.zeros(one.n_bytes, np.uint8) for n, one in enumerate(reader.directory.storages)}
    fill(reader, memory, fastckpt.Options(threads=2, **options))
    return [bytes(memory[n]) for n in sorted(memory)]


def small_world(seed: int, depth: int) -> tuple[Rows, list[list[Extent]], list[bytes]]:
    rows, storages = world(seed, depth=depth, most_bytes=60_000 if depth < 20 else 2_000)
    return rows, storages, [rows.raw_of(extents) for extents in storages]


@given(_SEEDS, _DEPTHS)
@settings(max_examples=25)
def test_every_way_to_load_gives_the_raw_bytes(seed: int, depth: int) -> None:
    rows, storages, expected = small_world(seed, depth)
    store = Counted(MemoryStore())
    reader = rows.vote(store, storages)
    for number, raw in enumerate(rows.raws[-10:], max(0, len(rows.raws) - 10)):
        out = np.empty(raw.size, np.uint8)
        assert reader.read_chunk(number, out) is None
        assert np.array_equal(out, raw)
    assert filled(reader) == expected
    with tempfile.TemporaryDirectory() as folder:
        assert filled(rows.vote(LocalStore(folder), storages)) == expected
    for window_bytes in (0, 50_000):
        with StorageLoader(reader, 2, window_bytes) as loader:
            for number in range(len(storages)):
                found = torch.empty(0, dtype=torch.uint8).set_(loader.take(number))
                assert found.numpy().tobytes() == expected[number]


@given(_SEEDS, st.integers(1, 6))
@settings(max_examples=30)
def test_a_load_reads_each_stored_byte_once(seed: int, depth: int) -> None:
    """But for what lies between wanted bytes: an eighth at most."""
    rows, storages, expected = small_world(seed, depth)
    store = Counted(MemoryStore())
    reader = rows.vote(store, storages)
    wanted = list(storage_loader.LoadPlan(reader).pieces)
    needed = reader.records[rows_needed(wanted, plan_chains(wanted, reader.records, Together()))]
    assert filled(reader) == expected
    least = sum(n for _, _, n in {tuple(one) for one in needed[["file", "offset", "stored_bytes"]].tolist()})
    read = sum(n for _, _, n in store.reads)
    assert least <= read <= least * 1.125
    assert len(store.reads) == len(set(store.reads))


@given(_SEEDS, st.integers(1, 4), st.sampled_from([0, 2_000, 20_000]))
@settings(max_examples=20)
def test_memory_of_what_waits_is_bounded(seed: int, depth: int, limit_bytes: int) -> None:
    """Where there is no room, rows are read again."""
    rows, storages, expected = small_world(seed, depth)
    parked, scratch = [0], [0]
    bring, held = Parking.bring, Allowance.held

    def watched(self: Parking, *arguments: Any) -> Any:
        found = bring(self, *arguments)
        parked.append(self._held_bytes)
        return found

    @contextlib.contextmanager
    def watched_held(self: Allowance, n_bytes: int) -> Iterator[None]:
        with held(self, n_bytes):
            scratch.append(self._held_bytes - n_bytes)
            yield

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Parking, "bring", watched)
        patched.setattr(Allowance, "held", watched_held)
        patched.setattr(
            Reads, "with_chains", lambda self, **_: self._replace(parked_bytes=limit_bytes, scratch_bytes=limit_bytes)
        )
        assert filled(rows.vote(Counted(MemoryStore()), storages)) == expected
    assert max(parked) <= limit_bytes
    assert max(scratch) <= limit_bytes


class OneRoom:
    """A sink with a single room: whoever waits for it while he holds it would wait for ever."""

    room_of = threading.Lock()

    def __init__(self, n_bytes: int) -> None:
        self.data = np.zeros(n_bytes, np.uint8)

    @contextlib.contextmanager
    def room(self, position: int, n_bytes: int) -> Iterator[U8]:
        assert self.room_of.acquire(timeout=60), "a thread waits for a room that it holds"
        try:
            room = np.full(n_bytes, 170, np.uint8)
            yield room
            self.data[position : position + n_bytes] = room
        finally:
            self.room_of.release()

    def __bytes__(self) -> bytes:
        return self.data.tobytes()


@given(_SEEDS, st.integers(1, 4), st.booleans())
@settings(max_examples=20)
def test_what_goes_to_a_device_takes_one_room_at_a_time(seed: int, depth: int, is_remote: bool) -> None:
    rows, storages, expected = small_world(seed, depth)
    with tempfile.TemporaryDirectory() as folder:
        reader = rows.vote(MemoryStore() if is_remote else LocalStore(folder), storages)
        sinks = {n: OneRoom(one.n_bytes) for n, one in enumerate(reader.directory.storages)}
        assert filled(reader, sinks) == expected  # type: ignore[comparison-overlap]


def test_each_missing_row_of_one_chain_is_found() -> None:
    """A row that is wanted itself lies behind another missing one in the chain of a third."""
    rows, storages, _ = small_world(178875959, 5)
    store = MemoryStore()
    reader = rows.vote(store, storages)
    file = int(reader.records["file"][19])
    store.delete(reader.files[file - 1].key)
    with pytest.raises(CorruptCheckpointError) as caught:
        filled(reader)
    assert {name for one in caught.value.damage for name in one.tensors} == set(reader.tensors_of_file(file))


@given(_SEEDS, st.integers(1, 5), st.booleans(), st.data())
@settings(max_examples=30)
def test_a_flipped_bit_names_all_that_is_relative_to_it(
    seed: int, depth: int, is_missing: bool, data: st.DataObject
) -> None:
    rows, storages, _ = small_world(seed, depth)
    store = MemoryStore()
    reader = rows.vote(store, storages)
    stored = [row for row in range(len(rows.raws)) if reader.records["stored_bytes"][row]]
    row = data.draw(st.sampled_from(stored))
    file = int(reader.records["file"][row])
    key = reader.files[file - 1].key
    if is_missing:
        store.delete(key)
        hurt = [one for one in stored if reader.records["file"][one] == file]
    else:
        flipped = bytearray(store.get(key))
        flipped[int(reader.records["offset"][row])] ^= 1
        store.put(key, bytes(flipped))
        hurt = [row]
    lost = {
        f"t{number}"
        for number in range(len(storages))
        if any(
            set(rows_needed([piece.chunk], [plan_chain(piece.chunk, reader.records)])) & set(hurt)
            for piece in reader.pieces(number)
        )
    }
    assert lost == {name for one in hurt for name in reader.tensors_of(one)}
    if is_missing:
        assert lost == set(reader.tensors_of_file(file))
    if not lost:
        filled(reader)
        return
    with pytest.raises(CorruptCheckpointError) as caught:
        filled(reader)
    named = {name for one in caught.value.damage for name in one.tensors}
    assert named == lost
    if not is_missing:
        assert len(caught.value.damage) == 1
    for number in range(len(storages)):
        memory = {number: np.zeros(reader.directory.storages[number].n_bytes, np.uint8)}
        if f"t{number}" in lost:
            with pytest.raises(CorruptCheckpointError):
                fill(reader, memory, fastckpt.Options(threads=2))
        else:
            fill(reader, memory, fastckpt.Options(threads=2))
            assert memory[number].tobytes() == rows.raw_of(storages[number])


def floats(n: int, seed: int = 0) -> U8:
    return np.random.default_rng(seed).standard_normal(n).astype("<f4").view(np.uint8).copy()


def add_chain(rows: Rows, n: int) -> int:
    """A full row of 4,000 bytes, and so many differences, each against the one before. The number of the newest."""
    raw = floats(1000)
    number = rows.add(raw, Transform.ROT)
    for _ in range(n):
        raw.view("<u4")[7] += 1
        number = rows.add(raw, Transform.SUB, (number, 0))
    return number


def test_a_copy_is_decoded_with_its_master_unless_that_is_wanted_much_later() -> None:
    rows = Rows()
    master = floats(1000)
    narrow = np.zeros(2000, np.uint8)
    masters = [rows.add(master, Transform.ROT) for _ in range(4)]
    copies = [rows.add(narrow, Transform.CAST, (row, 0), lane_bytes=2) for row in masters]
    wanted = [*copies, *masters]
    near = plan_chains(wanted, rows.records, Together())
    assert [(one.wanted, one.scratch_bytes) for one in near] == [((copies[n], masters[n]), 0) for n in range(4)]
    far = plan_chains(wanted, rows.records, Together(reach_bytes=8_000))
    assert [one.wanted for one in far] == [(copies[0], masters[0]), *[(copy,) for copy in copies[1:]]]
    apart = plan_chains(wanted, rows.records, Together(reach_bytes=1_000))
    assert [one.wanted for one in apart] == [(copy,) for copy in copies]
    assert all(one.scratch_bytes == master.size for one in apart)
    ranges = plan_jobs(wanted, apart, rows.records, Limits(reach_bytes=1_000), ahead=True).all
    assert sum(len(one.chunks) + len(one.parts) for one in ranges) == 8  # type: ignore[union-attr]


def test_a_master_of_many_differences_is_decoded_once_for_its_copy() -> None:
    rows = Rows()
    master = add_chain(rows, 20)
    wanted = [master, rows.add(np.zeros(2000, np.uint8), Transform.CAST, (master, 0), lane_bytes=2)]
    (chain,) = plan_chains(wanted, rows.records, Together(raw_bytes=6000))
    assert chain.wanted == tuple(wanted)
    assert (len(chain.links), chain.scratch_bytes) == (22, 0)


def test_deltas_are_decoded_in_the_place_of_the_newest() -> None:
    rows = Rows()
    number = add_chain(rows, 5)
    (chain,) = plan_chains([number], rows.records, Together())
    assert [link.room for link in chain.links] == [number] * 6
    assert [link.is_first for link in chain.links] == [True, *[False] * 5]
    assert chain.scratch_bytes == 0


def test_a_row_that_many_need_is_decoded_once_within_the_limits() -> None:
    """One old chunk, cut into ten: each of these is relative to a part of it."""
    rows = Rows()
    old = rows.add(floats(1000), Transform.ROT)
    wanted = [rows.add(rows.raws[old][at * 400 : (at + 1) * 400], Transform.SUB, (old, at * 100)) for at in range(10)]
    (chain,) = plan_chains(wanted, rows.records, Together())
    assert chain.wanted == tuple(wanted)
    assert chain.scratch_bytes == 4000
    for limits in (Together(raw_bytes=2000), Together(all_bytes=6000)):
        some = plan_chains(wanted, rows.records, limits)
        assert [len(one.wanted) for one in some] == [5, 5]
    jobs = plan_jobs(wanted, some, rows.records, Limits(), ahead=True).all
    assert [(part.row, len(part.takers)) for job in jobs for part in job.parts if part.row == old] == [(old, 2)]  # type: ignore[union-attr]


def test_hostile_indexes_ask_for_too_much() -> None:
    """Every row lies across two others: each level needs one more than the one above, and all of them twice as many if they are apart."""
    rows = Rows()
    level = [rows.add(floats(2, seed), Transform.RAW) for seed in range(100)]
    for _ in range(40):
        level = [rows.add(floats(2), Transform.REF, (row, 1), lane_bytes=4) for row in level[:-1]]
    assert len(plan_chain(level[-1], rows.records).links) == 41 * 42 // 2
    table = np.concatenate([rows.records, rows.records])
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(chains, "_MOST_ROWS", 800)
        with pytest.raises(TooLargeError, match="more than 800 others"):
            plan_chain(level[-1], table)
        patched.setattr(chains, "_MOST_ROWS", 8000)
        patched.setattr(chains, "MOST_SCRATCH_BYTES", 100)
        with pytest.raises(TooLargeError, match="more than 100 bytes"):
            plan_chains(level, table, Together())
        store = MemoryStore()
        reader = rows.vote(store, [[Extent(level[-1], 0, 8)]])
        damage = reader.read_chunk(level[-1], np.empty(8, np.uint8))
        assert damage is not None
        assert damage.tensors == ("t0",)
        with pytest.raises(TooLargeError):
            filled(reader)

"""Slabs of a base: they give way to snapshots, never while somebody reads them, and the budget holds at every moment."""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from fastckpt._types import U8
from fastckpt.format.element_types import element_type
from fastckpt.snapshot import pool as pool_module
from fastckpt.snapshot.base_slabs import BaseSlabs
from fastckpt.snapshot.pool import Slab, SlabPool
from fastckpt.snapshot.slots import PAGE_BYTES, Slot
from fastckpt.state.chunking import Chunk, Piece
from tests.support.host_training import SHORT_S

SLABS = 4
"""Of a snapshot; a chunk in each half of each of them."""
HALF = PAGE_BYTES // 2
PLACES = {2 * slab + half: Slot(slab, half * HALF) for slab in range(SLABS) for half in range(2)}

ELEMENT = element_type("uint8")
assert ELEMENT is not None
CHUNKS = [Chunk((Piece(n, 0, HALF),), ELEMENT, "exp_avg" if slot.slab % 2 else "") for n, slot in PLACES.items()]


class Snapshot:
    """Slabs full of one number, which go to a base."""

    def __init__(self, pool: SlabPool, slabs: list[Slab], content: int) -> None:
        self.base = BaseSlabs(pool.bases, PLACES, CHUNKS)
        self.slabs, self.content = slabs, content
        for slab in slabs:
            slab.array[:] = content


@settings(max_examples=60, stateful_step_count=40)
class Lending(RuleBasedStateMachine):
    snapshots = Bundle("snapshots")
    bases = Bundle("bases")
    leases = Bundle("leases")

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(pool_module, "LEASE_LIMIT_S", 0.0)
        self.pool = SlabPool(3 * SLABS * PAGE_BYTES)
        self.n = 0
        self.lent: dict[int, tuple[U8, int]] = {}

    def teardown(self) -> None:
        self.patch.undo()

    def number(self) -> int:
        self.n = self.n % 255 + 1
        return self.n

    @rule(target=snapshots)
    def begin(self) -> Snapshot | object:
        fits = self.pool.used_bytes + SLABS * PAGE_BYTES <= self.pool.budget_bytes
        slabs = self.pool.take_all([PAGE_BYTES] * SLABS, False)
        if slabs is None:
            assert not fits or self.lent, "a base never keeps a snapshot from its memory"
            return multiple()
        assert fits
        return Snapshot(self.pool, slabs, self.number())

    @rule(snapshot=consumes(snapshots), stays=st.booleans())
    def fail(self, snapshot: Snapshot, stays: bool) -> None:
        if stays:
            for number, slab in enumerate(snapshot.slabs[:2]):
                snapshot.base.keep(number, slab)
        self.pool.give_back(snapshot.slabs)
        snapshot.base.drop()
        assert not snapshot.base.slabs

    @rule(target=bases, snapshot=consumes(snapshots))
    def keep(self, snapshot: Snapshot) -> Snapshot:
        before = self.pool.held_bytes
        for number, slab in enumerate(snapshot.slabs):
            snapshot.base.keep(number, slab)
        assert snapshot.base.kept_bytes == SLABS * PAGE_BYTES
        assert self.pool.held_bytes == before
        return snapshot

    @rule(target=leases, snapshot=bases, chunk=st.integers(0, 2 * SLABS))
    def lend(self, snapshot: Snapshot, chunk: int) -> tuple[int, contextlib.ExitStack] | object:
        stack = contextlib.ExitStack()
        found = stack.enter_context(snapshot.base.lend(chunk))
        if found is None:
            stack.close()
            return multiple()
        self.lent[id(stack)] = found, snapshot.content
        return id(stack), stack

    @rule(lease=consumes(leases))
    def end(self, lease: tuple[int, contextlib.ExitStack]) -> None:
        del self.lent[lease[0]]
        lease[1].close()

    @rule(snapshot=bases)
    def drop(self, snapshot: Snapshot) -> None:
        snapshot.base.drop()
        with snapshot.base.lend(0) as found:
            assert found is None

    @rule()
    def take_ahead(self) -> None:
        before = self.pool.bases.n_bytes
        slab = self.pool.take(2 * PAGE_BYTES, False, from_bases=False)
        assert self.pool.bases.n_bytes == before
        self.pool.give_back([] if slab is None else [slab])

    @rule()
    def need_all(self) -> None:
        self.pool.evict_bases()
        assert self.lent or not self.pool.bases.n_bytes

    @invariant()
    def holds(self) -> None:
        pool = self.pool
        assert pool.used_bytes + pool.bases.n_bytes + pool.free_bytes == pool.held_bytes <= pool.budget_bytes
        for content, expected in self.lent.values():
            assert (content == expected).all(), "what is lent stays as it is"


test_a_base_gives_way_and_keeps_what_is_lent = Lending.TestCase


def kept(pool: SlabPool, content: int) -> BaseSlabs:
    slabs = pool.take_all([PAGE_BYTES] * SLABS, False)
    assert slabs is not None
    snapshot = Snapshot(pool, slabs, content)
    for number, slab in enumerate(slabs):
        snapshot.base.keep(number, slab)
    return snapshot.base


@contextlib.contextmanager
def is_there(base: BaseSlabs, slab: int) -> Iterator[bool]:
    with base.lend(2 * slab) as found:
        yield found is not None


def there(base: BaseSlabs) -> list[int]:
    found = []
    for slab in range(SLABS):
        with is_there(base, slab) as yes:
            found += [slab] if yes else []
    return found


def test_only_as_much_is_given_up_as_is_needed() -> None:
    pool = SlabPool(6 * PAGE_BYTES)
    base = kept(pool, 1)
    assert pool.take_all([PAGE_BYTES] * SLABS, False) is not None
    assert there(base) == [2, 3], "the encoder needs those last"
    assert base.evicted_bytes == 2 * PAGE_BYTES
    assert pool.take_all([PAGE_BYTES] * 3, False) is None
    assert there(base) == [2, 3], "nothing is given up for what does not fit anyway"


def test_what_is_worth_least_is_given_up_first() -> None:
    pool = SlabPool(6 * PAGE_BYTES)
    base = kept(pool, 1)
    base.sort({"exp_avg": 0.05, "": 0.3}.__getitem__)
    assert pool.take_all([PAGE_BYTES] * SLABS, False) is not None
    assert there(base) == [0, 2]
    base.sort({"exp_avg": 0.3, "": 0.05}.__getitem__)  # what is gone stays gone
    assert there(base) == [0, 2]


def test_what_the_save_under_way_has_encoded_is_used_before_new_memory_is_made() -> None:
    pool = SlabPool(100 * PAGE_BYTES)
    old = kept(pool, 1)
    young = pool.take_all([PAGE_BYTES] * SLABS, False)
    assert young is not None
    base = BaseSlabs(pool.bases, PLACES, CHUNKS)
    for number in range(2):
        base.keep(number, young[number])
    before = pool.held_bytes
    assert pool.take_all([PAGE_BYTES] * 3, False) is not None
    assert pool.held_bytes == before + PAGE_BYTES
    assert (there(old), old.evicted_bytes) == ([2, 3], 0)
    base.drop()  # that save has failed
    assert pool.take_all([PAGE_BYTES] * 3, False) is not None
    assert there(old) == [2, 3], "two are free, and one is made: the old base is that of the next save"


def test_a_snapshot_waits_for_the_chunk_that_is_being_read() -> None:
    pool = SlabPool(SLABS * PAGE_BYTES)
    base = kept(pool, 7)
    begun, seen = threading.Event(), list[bool]()

    def read() -> None:
        with base.lend(1) as found:
            assert found is not None
            begun.set()
            while pool.used_bytes < (SLABS - 1) * PAGE_BYTES:  # the other slabs are taken, this one is waited for
                pass
            seen.append(bool((found == 7).all()))

    reader = threading.Thread(target=read)
    reader.start()
    assert begun.wait(SHORT_S)
    slabs = pool.take_all([PAGE_BYTES] * SLABS, False)
    reader.join(SHORT_S)
    assert slabs is not None
    assert len(slabs) == SLABS
    assert seen == [True]
    assert there(base) == []


def test_a_snapshot_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "LEASE_LIMIT_S", 0.01)
    pool = SlabPool(SLABS * PAGE_BYTES)
    base = kept(pool, 7)
    with base.lend(0):
        assert pool.take_all([PAGE_BYTES] * SLABS, False) is None
    assert pool.take_all([PAGE_BYTES] * SLABS, False) is not None


def test_a_dropped_base_is_free_memory_once_nobody_reads_it() -> None:
    pool = SlabPool(100 * PAGE_BYTES)
    base = kept(pool, 7)
    with base.lend(0) as found:
        base.drop()
        assert pool.free_bytes == (SLABS - 1) * PAGE_BYTES
        assert found is not None
        assert (found == 7).all()
    assert pool.free_bytes == pool.held_bytes == SLABS * PAGE_BYTES
    base.drop()


def test_threads_read_bases_while_snapshots_take_their_memory() -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    pool = SlabPool(3 * SLABS * PAGE_BYTES)
    newest: list[tuple[BaseSlabs, int]] = []
    ended = threading.Event()
    failed: list[BaseException] = []

    def guarded(work: Callable[[random.Random], None], number: int) -> None:
        try:
            work(random.Random(seed + number))
        except BaseException as error:
            failed.append(error)
        finally:
            ended.set()

    def train(draw: random.Random) -> None:
        for step in range(1, 400):
            slabs = pool.take_all([PAGE_BYTES] * SLABS, False)
            assert slabs is not None, "there is room for it whatever is kept"
            snapshot = Snapshot(pool, slabs, step % 256)
            assert pool.held_bytes <= pool.budget_bytes
            for number, slab in enumerate(slabs):
                snapshot.base.keep(number, slab)
            if draw.random() < 0.3:
                snapshot.base.drop()
                continue
            older, newest[:] = newest[:], [(snapshot.base, step % 256)]
            for base, _ in older:
                if draw.random() < 0.8:
                    base.drop()

    def read(draw: random.Random) -> None:
        while not ended.is_set():
            for base, content in newest[:]:
                with base.lend(draw.randrange(2 * SLABS)) as found:
                    assert found is None or np.unique(found).tolist() == [content]

    threads = [threading.Thread(target=guarded, args=(work, n)) for n, work in enumerate([train, read, read])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SHORT_S)
    assert not failed
    assert not pool.used_bytes

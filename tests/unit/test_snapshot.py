"""Snapshots of host tensors: their memory and its budget, rings, stores that hang, and state that goes away before it has been copied.

Those of device tensors are tested in tests/fakegpu/suite.
"""

from __future__ import annotations

import contextlib
import math
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastckpt import Checkpointer, Every, Options, events
from fastckpt.errors import SaveError, SnapshotStalledError
from fastckpt.host.threads import ENV_EXIT_TIMEOUT
from fastckpt.repository.catalog import Catalog
from fastckpt.repository.repository import Repository
from fastckpt.snapshot import Stager
from fastckpt.snapshot import pool as pool_module
from fastckpt.snapshot.pool import Slab, SlabPool
from fastckpt.snapshot.slots import PAGE_BYTES, lay_out, slab_limit
from fastckpt.spot import Notice
from fastckpt.state import Captured
from fastckpt.store.memory import MemoryStore
from fastckpt.training import save_queue
from tests.repositories import HeldStore

ROOT = Path(__file__).parents[2]
SHORT_S = 20.0  # no wait of these tests comes near it
MIB = 1 << 20


# -- slabs -------------------------------------------------------------------------------------------------------------


class Memory:
    """What stands behind a pool: counts what is alive, and fails when it is told to."""

    def __init__(self) -> None:
        self.live_bytes = self.made = 0
        self.pinnable, self.there = True, True

    def _tensor(self, n_bytes: int) -> torch.Tensor:
        tensor = torch.empty(n_bytes, dtype=torch.uint8)
        self.live_bytes += n_bytes
        self.made += 1
        weakref.finalize(tensor, self._gone, n_bytes)
        return tensor

    def _gone(self, n_bytes: int) -> None:
        self.live_bytes -= n_bytes

    def pinned(self, n_bytes: int) -> torch.Tensor:
        if not self.there:
            raise MemoryError("as the test wants it")
        if not self.pinnable:
            raise RuntimeError("cannot be pinned, as the test wants it")
        return self._tensor(n_bytes)

    def pageable(self, n_bytes: int) -> torch.Tensor:
        if not self.there:
            raise MemoryError("as the test wants it")
        return self._tensor(n_bytes)


SIZES = [PAGE_BYTES << n for n in range(5)]
ACTS = st.lists(
    st.one_of(
        st.tuples(st.just("take"), st.sampled_from(SIZES), st.booleans()),
        st.tuples(st.just("take_all"), st.lists(st.sampled_from(SIZES), max_size=4), st.booleans()),
        st.tuples(st.just("give_back"), st.integers(0, 99), st.integers(1, 3)),
        st.tuples(st.just("forget"), st.integers(0, 99), st.integers(1, 2)),
        st.tuples(st.sampled_from(["pinnable", "there"]), st.booleans(), st.none()),
    ),
    max_size=60,
)


@settings(max_examples=300)
@given(budget=st.integers(0, 40).map(lambda pages: pages * PAGE_BYTES), acts=ACTS)
def test_slabs_are_counted_exactly(budget: int, acts: list[tuple[Any, Any, Any]]) -> None:
    memory = Memory()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool_module, "_pageable", memory.pageable)
        patch.setattr(pool_module, "empty_host_cache", lambda: None)  # there may be no device whose cache it is
        _check_slabs(SlabPool(budget, memory.pinned), memory, acts)


def _check_slabs(pool: SlabPool, memory: Memory, acts: list[tuple[Any, Any, Any]]) -> None:
    held: list[Slab] = []
    lost: list[Slab] = []
    free: dict[int, Slab] = {}
    """By id; what was dropped since is in it, too."""
    unpinned = 0

    def got(slab: Slab, n_bytes: int, for_device: bool) -> None:
        nonlocal unpinned
        assert slab.n_bytes == n_bytes == slab.tensor.numel() == slab.array.size
        assert slab.tensor.data_ptr() == slab.array.ctypes.data
        assert slab.for_device is for_device
        assert slab.pinned is False or for_device
        assert all(slab is not other for other in [*held, *lost]), "somebody has it"
        if free.pop(id(slab), None) is None and for_device and not slab.pinned:
            unpinned += n_bytes
        held.append(slab)

    def taking(take: Callable[[], Any]) -> Any:
        try:
            return take()
        except MemoryError:
            assert not memory.there
            return None

    for act, first, second in acts:
        used = pool.used_bytes
        if act == "take":
            waiting = sum(s.n_bytes == first and s.for_device is second for s in _kept(pool))
            made = memory.made
            slab = taking(lambda first=first, second=second: pool.take(first, second))
            if slab is not None:
                got(slab, first, second)
                assert (memory.made == made) == bool(waiting), "those that wait are used before others are made"
            elif memory.there:
                assert used + first > pool.budget_bytes
                assert not waiting
        elif act == "take_all":
            slabs = taking(lambda first=first, second=second: pool.take_all(first, second))
            if slabs is None:
                assert pool.used_bytes == used, "all or nothing"
                if memory.there:
                    assert used + sum(first) > pool.budget_bytes
                free.update({id(slab): slab for slab in _kept(pool)})
                unpinned = pool.unpinned_bytes  # of those that were made and given back at once
            else:
                for slab, n_bytes in zip(slabs, first, strict=True):
                    got(slab, n_bytes, second)
        elif act in ("give_back", "forget"):
            chosen = [held.pop(first % len(held)) for _ in range(min(second, len(held)))]
            if act == "forget":
                lost += chosen
                pool.forget(chosen)
            else:
                pool.give_back(chosen)
                free.update({id(slab): slab for slab in chosen})
        else:
            setattr(memory, act, first)
        slab = slabs = chosen = None
        kept = _kept(pool)
        free = {id(one): one for one in kept}
        assert pool.used_bytes == sum(one.n_bytes for one in held)
        assert pool.held_bytes == pool.used_bytes + sum(one.n_bytes for one in kept) <= pool.budget_bytes
        assert memory.live_bytes == pool.held_bytes + sum(one.n_bytes for one in lost), "what is dropped is freed"
        assert pool.unpinned_bytes == unpinned
    pool.give_back(held)
    assert pool.used_bytes == 0


def _kept(pool: SlabPool) -> list[Slab]:
    return [slab for slabs in pool._free.values() for slab in slabs]


def test_threads_share_a_pool() -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    pool = SlabPool(64 * PAGE_BYTES)
    owner: dict[int, int] = {}
    failed: list[BaseException] = []

    def work(number: int) -> None:
        draw, mine = random.Random(seed + number), list[Slab]()
        try:
            for _ in range(1500):
                if draw.random() < 0.55:
                    slabs = pool.take_all([PAGE_BYTES << draw.randrange(4) for _ in range(draw.randrange(1, 4))], False)
                    for slab in slabs or []:
                        assert owner.setdefault(id(slab), number) == number
                        mine.append(slab)
                elif mine:
                    slab = mine.pop(draw.randrange(len(mine)))
                    del owner[id(slab)]
                    pool.give_back([slab])
                assert pool.used_bytes <= pool.budget_bytes
            for slab in mine:
                del owner[id(slab)]
            pool.give_back(mine)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SHORT_S)
    assert not failed
    assert pool.used_bytes == 0
    assert pool.held_bytes == sum(slab.n_bytes for slab in _kept(pool)) <= pool.budget_bytes


@settings(max_examples=200)
@given(
    budget=st.integers(16 * 1024, 512 * MIB),
    sizes=st.lists(st.integers(1, 4 * MIB), min_size=1, max_size=60),
)
def test_chunks_lie_apart_and_in_their_slabs(budget: int, sizes: list[int]) -> None:
    limit = slab_limit(budget, max(sizes))
    if not limit:
        assert 2 * max(PAGE_BYTES, 1 << (max(sizes) - 1).bit_length()) > budget
        return
    assert 2 * limit <= budget
    layout = lay_out(sizes, limit)
    end: dict[int, int] = {}
    for slot, n_bytes in zip(layout.slots, sizes, strict=True):
        assert slot.offset % PAGE_BYTES == 0
        assert slot.offset >= end.get(slot.slab, 0)
        end[slot.slab] = slot.offset + n_bytes
    assert list(end) == list(range(len(layout.slab_bytes))), "in order"
    assert all(end[slab] <= n_bytes <= limit for slab, n_bytes in enumerate(layout.slab_bytes))
    assert all(n_bytes & (n_bytes - 1) == 0 for n_bytes in layout.slab_bytes)


# -- a training run ----------------------------------------------------------------------------------------------------


@pytest.fixture
def store() -> Iterator[HeldStore]:
    held = HeldStore()
    yield held
    held.open.set()


class Training:
    """Parameters, statistics, moments: `mib` MiB in all (4, 16 or 64)."""

    def __init__(self, mib: int = 4) -> None:
        torch.manual_seed(3)
        self.width = 256 * math.isqrt(mib)
        self.model = torch.nn.Sequential(*[torch.nn.Linear(self.width, self.width, bias=False) for _ in range(2)])
        self.norm = torch.nn.BatchNorm1d(self.width)
        self.optim = torch.optim.SGD([*self.model.parameters(), *self.norm.parameters()], lr=0.01, momentum=0.9)
        self.state = {"model": self.model, "norm": self.norm, "optim": self.optim}
        self.done = 0

    def step(self) -> int:
        self.done += 1
        x = torch.randn(2, self.width, generator=torch.Generator().manual_seed(self.done))
        self.norm(self.model(x)).square().mean().backward()
        self.optim.step()
        self.optim.zero_grad()
        return self.done

    def now(self) -> list[torch.Tensor]:
        moments = [self.optim.state[p]["momentum_buffer"] for p in self.model.parameters() if p in self.optim.state]
        tensors = [*self.model.state_dict().values(), *self.norm.state_dict().values(), *moments]
        return [tensor.clone() for tensor in tensors]


def after(steps: int, mib: int = 4) -> list[torch.Tensor]:
    training = Training(mib)
    for _ in range(steps):
        training.step()
    return training.now()


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def go_on_and_check(store: HeldStore, ckpt: Any, training: Training) -> None:
    """Change everything by no optimizer's step, as a replayed graph or statistics in forward do: nothing committed may show it."""
    before = training.now()
    with torch.no_grad():
        for tensor in [*training.model.parameters(), *training.norm.buffers()]:
            tensor.add_(1)
    store.open.set()
    with contextlib.suppress(SaveError):
        ckpt.wait(SHORT_S)
    ckpt.close()
    for step in committed(store):
        other = Training(64)
        with checkpointer(store, other) as again:
            assert again.restore(step=step) == 1
        assert same(other.now(), before), "torn"


def options(**settings: Any) -> Options:
    settings = {"host_budget_bytes": 128 * MIB, "verify_snapshot": "off", **settings}
    return Options(threads=1, connections=1, compress=False, **settings)


def checkpointer(store: MemoryStore, training: Training, **settings: Any) -> Checkpointer:
    settings = {"every": Every(steps=1), "keep": None, "spot": None, "options": options(), **settings}
    return Checkpointer(store, training.state, **settings)


def committed(store: MemoryStore) -> list[int]:
    return sorted(found.step for found in Catalog(Repository(store)).history())


def check(store: MemoryStore, steps: list[int], mib: int = 4) -> None:
    """These checkpoints exist, and hold the states of their steps."""
    assert committed(store) == steps
    for step in steps:
        other = Training(mib)
        with checkpointer(store, other) as ckpt:
            assert ckpt.restore(step=step) == step
        assert same(other.now(), after(step, mib)), f"step {step}"


# -- budgets -----------------------------------------------------------------------------------------------------------


class Watched(SlabPool):
    """Notes the most that was ever held."""

    peak_bytes = 0
    slabs: set[int]

    def take(self, *arguments: Any, **named: Any) -> Slab | None:
        slab = super().take(*arguments, **named)
        self.peak_bytes = max(self.peak_bytes, self.held_bytes)
        if slab is not None:
            self.slabs.add(slab.array.ctypes.data)
        return slab


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> None:
    def made(self: Watched, budget_bytes: int) -> None:
        SlabPool.__init__(self, budget_bytes)
        self.slabs = set()

    monkeypatch.setattr(Watched, "__init__", made)
    monkeypatch.setattr("fastckpt.snapshot.stager.SlabPool", Watched)


def pool_of(ckpt: Checkpointer) -> Watched:
    assert isinstance(ckpt._stager.pool, Watched)
    return ckpt._stager.pool


@pytest.mark.parametrize(("budget_mib", "of_state"), [(192, 2.0), (108, 1.0), (32, 0.25)])
@pytest.mark.usefixtures("watched")
def test_snapshots_stay_in_their_budget(store: HeldStore, budget_mib: int, of_state: float) -> None:
    """Of 2, 1 and ¼ times the state: the last is a ring, which has to turn several times."""
    training, one = Training(64), options(host_budget_bytes=budget_mib * MIB)
    assert of_state <= one.snapshot_bytes / (64 * MIB) <= of_state + 0.02
    with checkpointer(store, training, options=one) as ckpt:
        for _ in range(3):
            ckpt.step(training.step())
        training.step()
        ckpt.wait(SHORT_S)
        assert 0 < pool_of(ckpt).peak_bytes <= one.snapshot_bytes
        assert pool_of(ckpt).used_bytes == ckpt.stats.snapshot_bytes == 0
        saved = committed(store)
        assert len(saved) == ckpt.stats.saves == 3 - ckpt.stats.deferred
    check(store, saved, 64)
    assert same(training.now(), after(4, 64))


@pytest.mark.usefixtures("watched")
def test_slabs_are_used_again_from_save_to_save(store: HeldStore) -> None:
    training = Training()
    with checkpointer(store, training) as ckpt:
        for _ in range(2):
            ckpt.save_now(training.step()).wait(SHORT_S)
            ckpt.wait(SHORT_S)
        slabs = set(pool_of(ckpt).slabs)
        for _ in range(4):
            ckpt.save_now(training.step()).wait(SHORT_S)
            ckpt.wait(SHORT_S)
        assert pool_of(ckpt).slabs == slabs
    check(store, [1, 2, 3, 4, 5, 6])


def test_a_ring_of_a_quarter_of_the_state_keeps_training_until_the_last_copy(store: HeldStore) -> None:
    """The store takes nothing until the optimizer waits: so the state was copied in parts, the last of them in the fence."""
    training = Training(64)
    one = options(host_budget_bytes=32 * MIB)
    assert one.snapshot_bytes == 16 * MIB
    waits: list[events.FenceWaited] = []
    with checkpointer(store, training, options=one) as ckpt:
        ckpt.step(training.step())
        ckpt.wait(SHORT_S)
        store.open.clear()
        store.reached.clear()
        ckpt.step(training.step())
        assert store.reached.wait(SHORT_S)
        threading.Timer(0.1, store.open.set).start()
        with events.subscribe(lambda e: waits.append(e) if isinstance(e, events.FenceWaited) else None):
            training.step()
        assert store.open.is_set(), "the optimizer did not wait"
        assert [event.why for event in waits] == ["optimizer step"]
        assert ckpt.stats.stall_s > waits[0].seconds > 0.01
    check(store, [1, 2], 64)


# -- out of memory, out of threads -------------------------------------------------------------------------------------


def test_without_host_memory_the_save_fails_at_its_caller(store: HeldStore, monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training()
    with checkpointer(store, training) as ckpt:
        ckpt.step(training.step())
        ckpt.wait(SHORT_S)
        ckpt._stager.pool._drop_free()

        def none_left(n_bytes: int) -> torch.Tensor:
            raise MemoryError(f"{n_bytes} bytes, as the test wants it")

        with monkeypatch.context() as patch:
            patch.setattr(pool_module, "_pageable", none_left)
            training.step()
            with pytest.raises(MemoryError, match="as the test wants"):
                ckpt.step(2)
            with pytest.raises(MemoryError, match="as the test wants"):
                ckpt.save_now(2)
        assert ckpt.stats.snapshot_bytes == 0
        assert ckpt.stats.saves == 1
        assert committed(store) == [1]
        ckpt.save_now(2).wait(SHORT_S)
        ckpt.step(training.step())
    check(store, [1, 2, 3])
    assert same(training.now(), after(3))


def test_a_ring_that_finds_no_memory_midway_fails(store: HeldStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the training thread has what the first slabs need; what a background thread asks for later is refused."""
    training, made = Training(64), pool_module._pageable
    one = options(host_budget_bytes=32 * MIB)

    def for_main_only(n_bytes: int) -> torch.Tensor:
        if threading.current_thread() is not threading.main_thread():
            raise MemoryError("as the test wants it")
        return made(n_bytes)

    def keep_none(self: SlabPool, slabs: Any) -> None:
        self.forget(slabs)

    with checkpointer(store, training, options=one) as ckpt:
        ckpt.step(training.step())
        ckpt.wait(SHORT_S)
        with monkeypatch.context() as patch:
            patch.setattr(pool_module, "_pageable", for_main_only)
            patch.setattr(SlabPool, "give_back", keep_none)
            ckpt.step(training.step())
            training.step()  # its fence ends with the snapshot
            with pytest.raises((MemoryError, SaveError)) as caught:
                ckpt.wait(SHORT_S)
        print(f"{type(caught.value).__name__}: {caught.value}")
        assert isinstance(caught.value, MemoryError), "the cause, not what came of it"
        assert ckpt.stats.snapshot_bytes == 0
        assert committed(store) == [1]
        ckpt.save_now(3).wait(SHORT_S)
    check(store, [1, 3], 64)


def test_a_save_that_gets_no_thread_fails_and_is_over(store: HeldStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(*arguments: Any) -> None:
        raise RuntimeError("can't start new thread")

    training = Training()
    with checkpointer(store, training, every=None, close_timeout_s=0.1) as ckpt:
        ckpt.save_now(training.step()).wait(SHORT_S)
        ckpt.wait(SHORT_S)
        with monkeypatch.context() as patch:
            patch.setattr(save_queue, "start_thread", none_left)
            training.step()
            with pytest.raises(RuntimeError, match="can't start new thread"):
                ckpt.save_now(2)
        left = ckpt._queue.jobs
        for job in left:
            job.source.close()  # or its threads keep this process
        assert not left, "nobody would ever run it"
        assert ckpt.stats.snapshot_bytes == 0
        ckpt.wait(SHORT_S)
        ckpt.save_now(training.step()).wait(SHORT_S)
    check(store, [1, 3])


# -- stores that hang --------------------------------------------------------------------------------------------------


def hung(store: HeldStore, ckpt: Checkpointer, training: Training) -> None:
    """The save of step 2 is a ring whose store takes nothing any more."""
    ckpt.step(training.step())
    ckpt.wait(SHORT_S)
    store.open.clear()
    store.reached.clear()
    ckpt.step(training.step())
    assert store.reached.wait(SHORT_S)


def test_training_goes_on_when_the_store_hangs(store: HeldStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENV_EXIT_TIMEOUT, "0.1")
    training = Training(64)
    dropped: list[events.SnapshotDropped] = []
    ckpt = checkpointer(store, training, options=options(host_budget_bytes=32 * MIB, max_stall_s=1.0))
    hung(store, ckpt, training)
    began = time.monotonic()
    with events.subscribe(lambda e: dropped.append(e) if isinstance(e, events.SnapshotDropped) else None):
        training.step()
    assert 1.0 <= time.monotonic() - began < 5
    assert [event.step for event in dropped] == [2]
    with pytest.raises(SnapshotStalledError, match=r"max_stall_s = 1 s .* Nothing was committed"):
        ckpt.step(3)
    began = time.monotonic()
    for _ in range(3):  # the hung save keeps the memory: those that are due wait, training does not
        ckpt.step(training.step())
    assert ckpt.stats.deferred == 3
    assert time.monotonic() - began < 5
    with pytest.raises(SaveError, match=r"steps \[2\] were not durable after FASTCKPT_EXIT_TIMEOUT_S = 0\.1 s"):
        ckpt.close()
    assert time.monotonic() - began < 10
    assert same(training.now(), after(6, 64))
    store.open.set()
    assert ckpt._queue.wait_idle(SHORT_S)
    assert ckpt.stats.snapshot_bytes == 0
    check(store, [1], 64)


def test_a_first_save_without_hooks_stalls_no_longer(store: HeldStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing has been seen of the optimizer, so `step` fences at once: it is the one that waits."""
    monkeypatch.setenv(ENV_EXIT_TIMEOUT, "0.1")
    training = Training(64)
    ckpt = checkpointer(store, training, options=options(host_budget_bytes=32 * MIB, max_stall_s=0.2))
    store.open.clear()
    began = time.monotonic()
    assert ckpt.step(1) is False
    assert 0.2 <= time.monotonic() - began < 5
    assert ckpt.stats.stall_s >= 0.2
    with pytest.raises(SnapshotStalledError):
        ckpt.step(2)
    with pytest.raises(SaveError, match="not durable"):
        ckpt.close()
    store.open.set()
    assert ckpt._queue.wait_idle(SHORT_S)
    assert committed(store) == []


def test_a_state_that_is_written_through_stalls_no_longer(store: HeldStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even a ring fits the budget."""
    monkeypatch.setenv(ENV_EXIT_TIMEOUT, "0.1")
    training = Training(64)
    ckpt = checkpointer(store, training, options=options(host_budget_bytes=16 * MIB, max_stall_s=0.2))
    store.open.clear()
    began = time.monotonic()
    assert ckpt.step(1) is False
    assert 0.2 <= time.monotonic() - began < 5
    training.step()
    with pytest.raises(SnapshotStalledError, match=r"not uploaded after 0\.2 s"):
        ckpt.step(2)
    with pytest.raises(SaveError, match="not durable"):
        ckpt.close()
    store.open.set()
    assert ckpt._queue.wait_idle(SHORT_S)
    assert committed(store) == []
    assert same(training.now(), after(1, 64))


def test_leaving_by_an_exception_takes_no_longer_than_was_asked_for(store: HeldStore) -> None:
    """`close_timeout_s`, and not `max_stall_s` for the copies as well."""
    training = Training(64)
    one = options(host_budget_bytes=32 * MIB, max_stall_s=SHORT_S)
    ckpt = checkpointer(store, training, options=one, close_timeout_s=0.1)
    hung(store, ckpt, training)
    began = time.monotonic()
    with pytest.raises(ZeroDivisionError), ckpt:
        raise ZeroDivisionError
    took_s = time.monotonic() - began
    store.open.set()
    assert ckpt._queue.wait_idle(SHORT_S)
    assert took_s < 5
    assert ckpt.stats.snapshot_bytes == 0
    check(store, [1], 64)


def test_leaving_by_an_exception_with_a_last_save_takes_no_longer_either(store: HeldStore) -> None:
    """Two saves hold the queue, and the store hangs: the last save that was asked for gets its time, and no more."""
    training = Training()
    ckpt = checkpointer(store, training, on_exception="save", close_timeout_s=0.1)
    ckpt.step(training.step())
    ckpt.wait(SHORT_S)
    store.open.clear()
    for _ in range(3):
        ckpt.step(training.step())

    def leave() -> None:
        with ckpt:
            raise ZeroDivisionError

    assert isinstance(in_time(leave, store), ZeroDivisionError)
    store.open.set()
    assert ckpt._queue.wait_idle(SHORT_S)
    assert committed(store)[0] == 1


def in_time(call: Callable[[], Any], store: HeldStore) -> Any:
    """The call's error, or what it returned. If it does not end by itself, the store is let go on, and the test fails."""
    late = threading.Event()

    def give_up() -> None:
        late.set()
        store.open.set()

    timer = threading.Timer(8.0, give_up)
    timer.start()
    try:
        return call()
    except Exception as error:
        return error
    finally:
        timer.cancel()
        assert not late.is_set(), "it waited for the store"


def test_save_now_does_not_wait_for_a_store_that_hangs(store: HeldStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The save before it was given up, but its thread is in the store and keeps its memory: nothing can be saved. It says so, and uses
    no processor meanwhile.
    """
    monkeypatch.setenv(ENV_EXIT_TIMEOUT, "0.1")
    training = Training(64)
    ckpt = checkpointer(store, training, options=options(host_budget_bytes=32 * MIB, max_stall_s=1.0))
    hung(store, ckpt, training)
    training.step()
    with pytest.raises(SnapshotStalledError):
        ckpt.step(3)
    busy_s = time.thread_time()
    outcome = in_time(lambda: ckpt.save_now(3), store)
    busy_s = time.thread_time() - busy_s
    assert isinstance(outcome, SaveError)
    assert busy_s < 1.0
    with pytest.raises(SaveError):
        ckpt.close()


def test_a_final_save_ends_in_time_behind_a_store_that_hangs(store: HeldStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two saves hold the queue when the notice comes: the wait for room has the notice's deadline as well."""
    monkeypatch.setenv(ENV_EXIT_TIMEOUT, "0.1")
    monkeypatch.setattr("fastckpt.spot.deadline.GUARD_S", 0.1)

    class Source:
        name = "test"
        notices: list[Notice] = []

        def poll(self, now_s: float) -> list[Notice]:
            found, self.notices = self.notices, []
            return found

    training, source = Training(), Source()
    ckpt = checkpointer(store, training, spot=[source])
    ckpt.step(training.step())
    ckpt.wait(SHORT_S)
    store.open.clear()
    for _ in range(2):
        ckpt.step(training.step())
    source.notices = [Notice("terminate", "test", time.monotonic() + 2.0, "")]
    while ckpt.notice is None:
        assert not training.done > 10_000
        training.step()
        training.done -= 1  # the same data: nothing but time passes
    outcome = in_time(lambda: ckpt.step(4), store)
    assert isinstance(outcome, SaveError)
    assert "not durable when the time was over. What stands is step 1" in str(outcome)
    with pytest.raises(SaveError):
        ckpt.close()


# -- back-pressure -----------------------------------------------------------------------------------------------------


def test_back_pressure_is_counted(store: HeldStore) -> None:
    training = Training()
    told: list[events.SaveDeferred] = []
    with (
        checkpointer(store, training) as ckpt,
        events.subscribe(lambda e: told.append(e) if isinstance(e, events.SaveDeferred) else None),
    ):
        store.open.clear()
        for _ in range(6):  # one is uploaded, one is staged, four are due and wait
            ckpt.step(training.step())
        assert (ckpt.stats.saves, ckpt.stats.deferred) == (2, 4)
        assert [(event.step, event.waiting) for event in told] == [(3, 2), (4, 2), (5, 2), (6, 2)]
        assert ckpt.stats.snapshot_bytes > 0
        store.open.set()
        ckpt.wait(SHORT_S)
        ckpt.step(training.step())
    check(store, [1, 2, 7])


def test_memory_that_another_snapshot_holds_is_back_pressure_too(store: HeldStore) -> None:
    """Room for one snapshot: the second waits, though the queue would take it."""
    training = Training(16)
    one = options(host_budget_bytes=40 * MIB)
    assert 16 * MIB <= one.snapshot_bytes < 32 * MIB
    with checkpointer(store, training, options=one) as ckpt:
        store.open.clear()
        for _ in range(3):
            ckpt.step(training.step())
        assert (ckpt.stats.saves, ckpt.stats.deferred) == (1, 2)
        assert len(ckpt._queue) == 1
        threading.Timer(0.0, store.open.set).start()
        ckpt.save_now(3).wait(SHORT_S)  # waits for the memory
        assert ckpt.stats.saves == 2
    check(store, [1, 3], 16)


# -- Ctrl-C ------------------------------------------------------------------------------------------------------------


def test_an_interrupt_while_host_tensors_are_copied(store: HeldStore, monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training()
    read = Captured.read

    def interrupted(self: Captured, pieces: Any, out: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.raise_signal(signal.SIGINT)
        read(self, pieces, out)

    with checkpointer(store, training) as ckpt:
        ckpt.step(training.step())
        ckpt.wait(SHORT_S)
        training.step()
        with monkeypatch.context() as patch:
            patch.setattr(Captured, "read", interrupted)
            with pytest.raises(KeyboardInterrupt):
                ckpt.step(2)
        ckpt.wait(SHORT_S)
        assert ckpt.stats.snapshot_bytes == 0
        ckpt.save_now(2).wait(SHORT_S)  # either it is, or it is made now
    check(store, [1, 2])


@pytest.mark.parametrize("budget_mib", [128, 32, 16], ids=["whole", "ring", "written_through"])
def test_an_interrupt_in_a_save_that_may_leave_nothing_to_a_hook(
    store: HeldStore, monkeypatch: pytest.MonkeyPatch, budget_mib: int
) -> None:
    """No hook has been seen, so `step` alone sees to it that all is copied before anything changes. An interrupt ends `step`, too: then
    that save is over, or its copies are.
    """
    begin = Stager.begin

    def interrupted(self: Stager, *arguments: Any, **named: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return begin(self, *arguments, **named)

    training = Training(64)
    ckpt = checkpointer(store, training, options=options(host_budget_bytes=budget_mib * MIB, max_stall_s=SHORT_S))
    store.open.clear()
    with monkeypatch.context() as patch:
        patch.setattr(Stager, "begin", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ckpt.step(1)
    go_on_and_check(store, ckpt, training)


def test_an_interrupt_while_a_ring_waits_in_a_save_without_hooks(store: HeldStore) -> None:
    training, main = Training(64), threading.main_thread().ident
    assert main is not None
    ckpt = checkpointer(store, training, options=options(host_budget_bytes=32 * MIB, max_stall_s=SHORT_S))
    store.open.clear()

    def press() -> None:
        assert store.reached.wait(SHORT_S)
        signal.pthread_kill(main, signal.SIGINT)

    presser = threading.Thread(target=press)
    presser.start()
    with pytest.raises(KeyboardInterrupt):
        ckpt.step(1)
    presser.join(SHORT_S)
    go_on_and_check(store, ckpt, training)


def test_an_interrupt_while_a_state_is_written_through(store: HeldStore) -> None:
    """It is read from where training goes on writing, if the interrupt is caught: so that save must be over."""
    training, main = Training(64), threading.main_thread().ident
    assert main is not None
    ckpt = checkpointer(store, training, options=options(host_budget_bytes=16 * MIB, max_stall_s=SHORT_S))
    ckpt.step(training.step())
    training.step()
    store.open.clear()
    store.reached.clear()

    def press() -> None:
        assert store.reached.wait(SHORT_S)
        signal.pthread_kill(main, signal.SIGINT)

    presser = threading.Thread(target=press)
    presser.start()
    with pytest.raises(KeyboardInterrupt):
        ckpt.step(2)
    presser.join(SHORT_S)
    training.step()
    store.open.set()
    with contextlib.suppress(SaveError):  # of the save that was interrupted
        ckpt.wait(SHORT_S)
    ckpt.save_now(3).wait(SHORT_S)
    ckpt.close()
    check(store, [1, 3], 64)


# -- storages freed or resized before they have been copied ------------------------------------------------------------

CHANGES = {
    "other data": "weight.data = torch.zeros_like(weight)",
    "deleted": "model = weight = None; optim.state.clear(); optim.param_groups[0]['params'] = []",
    "freed": "weight.untyped_storage().resize_(0)",
    "grown": "weight.untyped_storage().resize_(64 << 20)",
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_state_that_goes_away_before_it_has_been_copied(tmp_path: Path, change: str) -> None:
    """Whole, or refused; never torn, and never the end of the process. In one of its own, for that reason."""
    script = """
        import sys, threading, torch, fastckpt
        from fastckpt.snapshot.host_copies import HostCopies
        torch.manual_seed(0)
        model = torch.nn.Linear(2000, 2000)
        optim = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        weight = model.weight
        def step():
            model(torch.ones(2, 2000)).square().mean().backward()
            optim.step()
            optim.zero_grad()
        copying, go, copy = threading.Event(), threading.Event(), HostCopies._copy_in_thread
        def held(self, *arguments):
            copying.set()
            assert go.wait(20)
            copy(self, *arguments)
        options = fastckpt.Options(threads=1, connections=1, compress=False, verify_snapshot="off")
        ckpt = fastckpt.Checkpointer(sys.argv[1], {"m": model, "o": optim}, every=None, spot=None, options=options)
        step()
        ckpt.save_now(1).wait(20)
        ckpt.step(1)
        step()
        expected = model.weight.detach().clone()
        HostCopies._copy_in_thread = held
        handle = ckpt.save_now(2)
        assert copying.wait(20)
        CHANGE
        go.set()
        ckpt.fence()
        try:
            handle.wait(20)
        except fastckpt.SaveError as error:
            print(f"refused: {error}")
            try:
                ckpt.wait(20)
            except fastckpt.SaveError:
                pass
        ckpt.close()
        other = torch.nn.Linear(2000, 2000)
        optim = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
        with fastckpt.Checkpointer(sys.argv[1], {"m": other, "o": optim}, every=None, spot=None) as ckpt:
            if ckpt.restore() == 2:
                assert torch.equal(other.weight, expected)
                print("whole")
    """
    code = textwrap.dedent(script).replace("CHANGE", change)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(tmp_path / "run")],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        env=dict(os.environ),
    )
    print(done.stdout, done.stderr)
    assert done.returncode == 0, done.stderr
    assert "whole" in done.stdout or "refused" in done.stdout
    if change in (CHANGES["other data"], CHANGES["deleted"]):
        assert "whole" in done.stdout, "the snapshot has the memory"

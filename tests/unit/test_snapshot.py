"""Snapshots of host tensors: budgets, rings, memory and threads that run out. tests/fakegpu/suite has those of device tensors."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from fastckpt import Checkpointer, events
from fastckpt.errors import SaveError
from fastckpt.snapshot import pool as pool_module
from fastckpt.snapshot.pool import Slab, SlabPool
from fastckpt.training import save_queue
from tests.support.host_training import MIB, SHORT_S, Training, after, check, checkpointer, committed, options, same
from tests.support.stores import HeldStore

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
    assert isinstance(ckpt._engine.stager.pool, Watched)
    return ckpt._engine.stager.pool


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
        training.backward()  # may take longer than the timer
        threading.Timer(0.1, store.open.set).start()
        with events.subscribe(lambda e: waits.append(e) if isinstance(e, events.FenceWaited) else None):
            training.update()
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
        ckpt._engine.stager.pool._drop_free()

        def none_left(n_bytes: int) -> torch.Tensor:
            raise MemoryError(f"{n_bytes} bytes, as the test wants it")

        with monkeypatch.context() as patch:
            patch.setattr(pool_module, "pageable", none_left)
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
    training, made = Training(64), pool_module.pageable
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
            patch.setattr(pool_module, "pageable", for_main_only)
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
        left = ckpt._engine.queue.jobs
        for job in left:
            job.source.close()  # or its threads keep this process
        assert not left, "nobody would ever run it"
        assert ckpt.stats.snapshot_bytes == 0
        ckpt.wait(SHORT_S)
        ckpt.save_now(training.step()).wait(SHORT_S)
    check(store, [1, 3])


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
        assert len(ckpt._engine.queue) == 1
        threading.Timer(0.0, store.open.set).start()
        ckpt.save_now(3).wait(SHORT_S)  # waits for the memory
        assert ckpt.stats.saves == 2
    check(store, [1, 3], 16)

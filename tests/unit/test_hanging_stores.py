"""Training goes on, and ends in time, when the store of a snapshot hangs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from fastckpt import Checkpointer, events
from fastckpt.errors import SaveError, SnapshotStalledError
from fastckpt.host.threads import ENV_EXIT_TIMEOUT
from fastckpt.spot import Notice
from tests.support.host_training import MIB, SHORT_S, Training, after, check, checkpointer, committed, options, same
from tests.support.stores import HeldStore


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
    assert ckpt._engine.queue.wait_idle(SHORT_S)
    assert ckpt.stats.snapshot_bytes == 0
    check(store, [1], 64)


def give_up_and_open(ckpt: Checkpointer, store: HeldStore) -> None:
    """Close while the store hangs, which must not be waited for; then let the store go on, and what was given up end."""
    with pytest.raises(SaveError, match="not durable"):
        ckpt.close()
    store.open.set()
    assert ckpt._engine.queue.wait_idle(SHORT_S)


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
    give_up_and_open(ckpt, store)
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
    give_up_and_open(ckpt, store)
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
    assert ckpt._engine.queue.wait_idle(SHORT_S)
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
    assert ckpt._engine.queue.wait_idle(SHORT_S)
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
    monkeypatch.setattr("fastckpt.spot.ladder.GUARD_S", 0.1)

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

"""What a save costs does not follow the age of the run: thousands of saves, the store's clock moved by hand."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from fastckpt.repository.catalog import Catalog
from fastckpt.repository.incarnation import Incarnation
from fastckpt.repository.repository import Repository
from fastckpt.repository.retention import Keep
from fastckpt.store.memory import MemoryStore
from fastckpt.store.wrap import Wrapper
from fastckpt.training.checkpointer import Checkpointer
from tests.support.repositories import OPTIONS, check_all, history
from tests.support.states import sealed, small_state

KEYS_A_PAGE = 1000


@dataclass
class Cost:
    """Of some saves and the retention behind them."""

    requests: int = 0
    n_bytes: int = 0


class Counted(Wrapper):
    """Counts requests and the bytes of their answers as an object store would have them: a LIST is a request a page."""

    def __init__(self, inner: MemoryStore) -> None:
        super().__init__(inner)
        self.cost = Cost()
        self._lock = threading.Lock()

    def _call(self, verb: str, key: str, operation: Callable[[], Any]) -> Any:
        found = operation()
        with self._lock:
            pages = -(-len(found) // KEYS_A_PAGE) if verb == "list" else 1
            self.cost.requests += max(1, pages)
            self.cost.n_bytes += sum(300 + len(info.key) for info in found) if verb == "list" else 0
            self.cost.n_bytes += len(found) if isinstance(found, bytes) else 0
        return found

    def take(self) -> Cost:
        cost, self.cost = self.cost, Cost()
        return cost


def run_of(seconds_a_save: float, saves: int, watched: set[int]) -> tuple[Counted, MemoryStore, dict[int, Cost]]:
    now_s = [1e9]
    inner = MemoryStore(clock=lambda: now_s[0])
    store = Counted(inner)
    run = Incarnation(Repository(store), OPTIONS)
    run.choose_and_claim()
    state, found = sealed(small_state(1.0)), {}
    store.take()
    for step in range(1, saves + 1):
        run.save(state, step)
        run.retain(Keep(last=3))
        now_s[0] += seconds_a_save
        cost = store.take()
        if step in watched:
            found[step] = cost
    return store, inner, found


@pytest.mark.parametrize(
    ("seconds_a_save", "saves"),
    [
        pytest.param(600.0, 400, id="tombstones expire"),
        pytest.param(0.0, 400, id="all tombstones live"),
        pytest.param(600.0, 2000, id="of 2000 most expire", marks=[pytest.mark.slow, pytest.mark.timeout(600)]),
        pytest.param(0.0, 2000, id="all of 2000 live", marks=[pytest.mark.slow, pytest.mark.timeout(600)]),
    ],
)
def test_a_save_costs_as_much_after_hundreds_of_others(seconds_a_save: float, saves: int) -> None:
    """Of 2,000 saves: 20 s, and two minutes where all their tombstones are within their grace."""
    early, late = range(11, 31), range(saves - 19, saves + 1)
    store, inner, costs = run_of(seconds_a_save, saves, {*early, *late})
    if (
        seconds_a_save
    ):  # the first retired bytes and tombstones go after the grace: compare with a run that has come so far
        early = range(61, 81)
        costs.update(run_of(seconds_a_save, 80, set(early))[2])

    def total(steps: range) -> Cost:
        return Cost(sum(costs[n].requests for n in steps), sum(costs[n].n_bytes for n in steps))

    before, after = total(early), total(late)
    assert after.requests <= 1.2 * before.requests, (before, after)
    if seconds_a_save:
        assert after.n_bytes <= 1.2 * before.n_bytes, (before, after)
        assert len(list(inner.list(""))) < 100, "nothing of what was retired is left"
    store.take()
    Catalog(Repository(store)).choose()
    assert store.take().requests <= (10 if seconds_a_save else 10 + 2 * saves // KEYS_A_PAGE)
    assert [c.step for c in history(inner)] == [saves, saves - 1, saves - 2]
    check_all(inner)


def test_memory_of_a_run_is_that_of_what_is_there() -> None:
    now_s = [1e9]
    store = MemoryStore(clock=lambda: now_s[0])
    run = Incarnation(Repository(store), OPTIONS)
    run.choose_and_claim()
    sizes = []
    for step in range(1, 201):
        run.save(sealed(small_state(1.0)), step)
        run.retain(Keep(last=2))
        now_s[0] += 600.0
        collector = run._collector
        known = collector._repository
        parts = (collector._needed_by, collector._living, collector._bare, known._known, known._infos, run._attempts)
        sizes.append(sum(len(part) for part in parts))
    assert max(sizes[100:]) <= max(sizes[50:100]) + 2


class Slow(Wrapper):
    """Counts operations, and holds those of retention while it is told to."""

    def __init__(self, inner: MemoryStore) -> None:
        super().__init__(inner)
        self.open = threading.Event()
        self.open.set()
        self.reached = threading.Event()
        self.after_hold = 0

    def _call(self, verb: str, key: str, operation: Callable[[], Any]) -> Any:
        if threading.current_thread().name == "fastckpt-retention" and not self.open.is_set():
            self.reached.set()
            assert self.open.wait(60)
            self.after_hold += 1
        return operation()


def held_retention() -> tuple[Slow, Checkpointer]:
    """A Checkpointer whose retention stands in its first request."""
    store = Slow(MemoryStore())
    ckpt = Checkpointer(store, {"w": torch.zeros(4)}, every=None, spot=None, keep=Keep(last=1), grace_s=0.0)
    ckpt.restore()
    ckpt.save_now(1).wait()
    ckpt.wait()
    store.open.clear()
    ckpt.save_now(2).wait(60)
    assert store.reached.wait(60)
    return store, ckpt


def test_a_save_does_not_wait_for_retention_which_ends_for_it() -> None:
    store, ckpt = held_retention()
    ckpt.save_now(3).wait(60)
    assert not store.open.is_set()
    store.open.set()
    ckpt.wait()
    assert [c.step for c in history(store.inner)] == [3]
    ckpt.close()


def test_a_job_that_always_has_a_save_queued_retires_all_the_same() -> None:
    ran: list[bool] = []

    class Run:
        def retain(self, keep: Keep, grace_s: float, interrupted: Callable[[], bool]) -> Any:
            from fastckpt.repository.collector import PassInterrupted
            from fastckpt.repository.retention import RetentionPlan

            if interrupted():
                raise PassInterrupted
            ran.append(True)
            return RetentionPlan()

    from fastckpt.repository.retaining import Retaining

    retaining = Retaining(Run(), Keep(), 0.0, busy=lambda: True, stopped=lambda: False)  # type: ignore[arg-type]
    for _ in range(8):
        retaining.wake(True)
        assert retaining.wait_idle(60)
    assert ran
    assert len(ran) < 8


def test_leaving_by_an_exception_ends_retention_before_its_next_request() -> None:
    store, ckpt = held_retention()
    with pytest.raises(ZeroDivisionError), ckpt:
        raise ZeroDivisionError
    store.open.set()
    assert ckpt._engine.queue.retaining.wait_idle(60)
    assert store.after_hold == 1


def test_a_run_that_has_ended_keeps_what_was_asked_for() -> None:
    store = MemoryStore()
    with Checkpointer(store, {"w": torch.zeros(4)}, every=None, spot=None, keep=Keep(last=2)) as ckpt:
        ckpt.restore()
        for step in range(1, 8):
            ckpt.save_now(step)
    assert [c.step for c in history(store)] == [7, 6]

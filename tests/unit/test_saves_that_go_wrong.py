"""What a save may meet at the worst moment: told once, to the right one; nothing hangs, nothing stays, nothing torn is committed."""

# ruff: noqa: PT012 - what happens inside of the `with` is what these tests are about

from __future__ import annotations

import errno
import gc
import signal
import threading
import time
import weakref
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch

from fastckpt import Every, Options
from fastckpt.errors import OutOfHostMemoryError, SaveError, SnapshotStalledError, StoreError
from fastckpt.host import pages
from fastckpt.host.interrupts import deferred_interrupt
from fastckpt.repository.retention import Keep
from fastckpt.snapshot import FencedTensors, host_copies
from fastckpt.snapshot import snapshot as engine
from fastckpt.spot import Notice
from fastckpt.store.memory import MemoryStore
from fastckpt.training import save_queue
from fastckpt.training.checkpointer import Checkpointer
from fastckpt.writing import container, packing
from fastckpt.writing.rank import SaveAsked
from tests.support.repositories import history
from tests.support.stores import HeldStore

MIB = 1 << 20
SHORT_S = 20.0
SMALL = Options(threads=1, connections=1, compress=False, host_budget_bytes=64 * MIB)


def open_on(store: MemoryStore, state: dict[str, Any], **settings: Any) -> Checkpointer:
    return Checkpointer(store, state, **{"every": None, "keep": None, "spot": None, "options": SMALL, **settings})


def noise(n: int) -> torch.Tensor:
    """What takes room in a pack: zeros take none."""
    return torch.randn(n, generator=torch.Generator().manual_seed(n))


class Beside(torch.nn.Module):
    """A parameter, and statistics that `forward` changes, in one storage."""

    def __init__(self) -> None:
        super().__init__()
        flat = torch.zeros(4 * MIB)
        self.p = torch.nn.Parameter(flat[: 2 * MIB])
        self.register_buffer("stat", flat[2 * MIB :])

    def forward(self) -> torch.Tensor:
        self.stat.add_(1)
        return (self.p * self.stat).sum()


def test_statistics_that_share_a_parameters_storage_are_copied_first() -> None:
    store = HeldStore()
    model = Beside()
    optim = torch.optim.SGD(model.parameters(), lr=0.0)
    with open_on(store, {"model": model, "optim": optim}, every=Every(steps=1)) as ckpt:
        for step in range(1, 4):
            optim.zero_grad()
            model().backward()
            optim.step()
            ckpt.wait()
            store.open.clear()
            ckpt.step(step)
            model()  # before the next step's fence
            store.open.set()
        ckpt.wait()
        assert model.stat[0] == 6
    again = Beside()
    with open_on(store, {"model": again, "optim": torch.optim.SGD(again.parameters(), lr=0.0)}) as ckpt:
        assert ckpt.restore() == 3
    assert again.stat.unique().tolist() == [5.0]


def test_parameters_that_share_a_storage_are_left_to_the_fence() -> None:
    flat = torch.zeros(24, 8)
    parts = [torch.nn.Parameter(flat[:8]), torch.nn.Parameter(flat[8:].t())]
    fenced = FencedTensors([torch.optim.SGD(parts, lr=0.1)])
    assert fenced.addresses == {flat.untyped_storage().data_ptr()}
    strided = torch.nn.Parameter(torch.zeros(16)[::2])
    assert not FencedTensors([torch.optim.SGD([strided], lr=0.1)]).addresses


def test_retention_that_fails_in_any_way_stops_no_later_save() -> None:
    class NoTombstones(MemoryStore):
        def put(self, key: str, data: Any) -> None:
            if b"tombstone" in bytes(memoryview(data)[:4096]):
                raise MemoryError("as the test wants it")
            super().put(key, data)

    store = NoTombstones()
    with open_on(store, {"x": noise(8)}, keep=Keep(last=1)) as ckpt:
        for step in (1, 2, 3):
            ckpt.save_now(step).wait(SHORT_S)
        ckpt.wait(SHORT_S)
    assert history(store)[0].step == 3


def test_a_save_that_gets_no_copying_thread_fails_and_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(*arguments: Any, **settings: Any) -> None:
        raise RuntimeError("can't start new thread")

    with open_on(MemoryStore(), {"x": noise(4 * MIB)}) as ckpt:
        with monkeypatch.context() as patch:
            patch.setattr(host_copies, "WorkerPool", none_left)
            with pytest.raises(SaveError, match="can't start new thread"):
                ckpt.save_now(1)
        assert ckpt.stats.snapshot_bytes == 0
        ckpt.save_now(1).wait(SHORT_S)


def test_room_that_comes_while_one_looks_for_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    with open_on(MemoryStore(), {"x": noise(8)}) as ckpt:
        begin, refused = ckpt._engine.stager.begin, list[Any]()

        def busy_once(*arguments: Any, **settings: Any) -> Any:
            if not refused:
                refused.append(1)
                return None
            return begin(*arguments, **settings)

        monkeypatch.setattr(ckpt._engine.stager, "begin", busy_once)
        ckpt.save_now(1).wait(SHORT_S)  # no job is left to wait for


def test_callbacks_of_a_handle_may_take_the_users_lock() -> None:
    store, lock = HeldStore(), threading.Lock()
    store.open.clear()
    store.failing = StoreError
    with open_on(store, {"x": noise(8)}) as ckpt:
        handle = ckpt.save_now(1)
        entered = threading.Event()

        def callback(_: Any) -> None:
            entered.set()
            with lock:
                pass

        handle.durable.add_done_callback(callback)
        with lock:
            store.open.set()
            assert entered.wait(SHORT_S)
            with pytest.raises(StoreError):
                ckpt.step(1)  # needs the queue's lock


def test_a_handle_cannot_be_cancelled_and_so_hides_no_error() -> None:
    store = HeldStore(held=True)
    with open_on(store, {"x": noise(8)}) as ckpt:
        handle = ckpt.save_now(1)
        assert not handle.durable.cancel()
        store.failing = StoreError
        store.open.set()
        with pytest.raises(StoreError):
            handle.wait(SHORT_S)
        with pytest.raises(StoreError):
            ckpt.wait(SHORT_S)
        assert "as the test wants" in repr(handle)


def test_what_fails_behind_the_commit_fails_no_save(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    close = engine.Snapshot.close

    def broken(self: engine.Snapshot) -> None:
        close(self)
        if self._progress.confirmed:
            raise RuntimeError("unspecified launch failure")

    monkeypatch.setattr(engine.Snapshot, "close", broken)
    with open_on(MemoryStore(), {"x": noise(8)}) as ckpt:
        assert ckpt.save_now(1).wait(SHORT_S).save.step == 1
    assert "unspecified launch failure" in caplog.text


@pytest.mark.parametrize("how", ["notice", "exception"])
def test_the_copy_keeps_to_the_time_that_is_left(how: str) -> None:
    store = HeldStore(held=True)
    state = {"x": noise(16 * MIB)}  # goes through a ring, which does not turn
    options = Options(threads=1, connections=1, compress=False, host_budget_bytes=48 * MIB, max_stall_s=60)
    ckpt = open_on(store, state, on_exception="save", close_timeout_s=0.5, options=options)
    began = time.monotonic()
    if how == "notice":
        notice = Notice("file", "test", began + 0.5)
        handle = ckpt._saver.begin(SaveAsked(1, trigger="notice"), notice.deadline)
        with pytest.raises(SnapshotStalledError, match="that were left"):
            handle.wait(SHORT_S)
    else:
        with pytest.raises(KeyError, match="mine"), ckpt:
            ckpt.step(1)
            raise KeyError("mine")
    assert 0.4 < time.monotonic() - began < SHORT_S
    store.open.set()
    assert ckpt._engine.queue.wait_idle(SHORT_S)
    assert not history(store)
    if how == "notice":
        with pytest.raises(SnapshotStalledError):
            ckpt.close()


def test_a_snapshot_that_was_dropped_keeps_no_state() -> None:
    store = HeldStore()
    store.failing = StoreError
    with open_on(store, {"x": noise(4 * MIB)}) as ckpt:
        with pytest.raises(StoreError):
            ckpt.save_now(1).wait(SHORT_S)
        assert ckpt._engine.queue.wait_idle(SHORT_S)
        assert ckpt._engine.fence._snapshot is not None
        assert not ckpt._engine.fence._snapshot._captured.owners
        with pytest.raises(StoreError):
            ckpt.step(1)


def test_failed_saves_leave_no_buffers_to_the_collector() -> None:
    """Large trainings switch it off."""
    store = HeldStore()
    store.failing = StoreError
    made: list[Any] = []
    with open_on(store, {"x": noise(4 * MIB)}) as ckpt:
        fresh = pages.fresh_pages
        gc.collect()
        gc.disable()
        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(packing, "fresh_pages", lambda n: made.append(_Watched(fresh(n))) or made[-1].array)
                for step in (1, 2, 3):
                    with pytest.raises(StoreError):
                        ckpt.save_now(step).wait(SHORT_S)
                    with pytest.raises(StoreError):
                        ckpt.step(step)
                assert ckpt._engine.queue.wait_idle(SHORT_S)
            alive = sum(one.alive() for one in made)
        finally:
            gc.enable()
    assert made
    assert alive <= len(made) // 3, f"{alive} of {len(made)} buffers are still there"


class _Watched:
    """An array that tells whether anybody holds it still."""

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self._ends = threading.Event()
        weakref.finalize(array, self._ends.set)
        self._array: Any = array

    @property
    def array(self) -> Any:
        array, self._array = self._array, None
        return array

    def alive(self) -> bool:
        return not self._ends.is_set()


def test_leaving_by_ctrl_c_is_not_swallowed_by_the_exception_before() -> None:
    store = HeldStore(held=True)
    ckpt = open_on(store, {"x": noise(8)}, close_timeout_s=SHORT_S)

    def interrupt() -> None:
        assert store.reached.wait(SHORT_S)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    with pytest.raises(KeyboardInterrupt), ckpt:
        ckpt.save_now(1)
        thread.start()
        raise KeyError("mine")
    thread.join()
    store.open.set()
    assert ckpt._engine.queue.wait_idle(SHORT_S)


def test_every_signal_with_a_handler_waits_for_the_end_of_the_block() -> None:
    class Stop(Exception):
        pass

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stop

    before = signal.signal(signal.SIGUSR1, stop)
    try:
        reached = False
        with pytest.raises(Stop), deferred_interrupt():
            signal.raise_signal(signal.SIGUSR1)
            reached = True
        assert reached
        assert signal.getsignal(signal.SIGUSR1) is stop
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_errors_of_others_keep_their_class() -> None:
    class Mine(RuntimeError):
        pass

    error = Mine("my store's")
    assert save_queue.as_save_error(error, 1) is error  # type: ignore[attr-defined]
    assert isinstance(save_queue.as_save_error(OSError(errno.ENOMEM, "none"), 1), OutOfHostMemoryError)  # type: ignore[attr-defined]


def test_buffers_of_the_encoder_are_no_threads_own() -> None:
    """np.empty in a thread stays in an arena of the C library when the thread ends: 630 MB after sixty saves."""
    scratch = container._Scratch.of(4 * MIB)
    assert scratch.raw.ctypes.data % 4096 == 0
    assert scratch.out.ctypes.data % 4096 == 0
    assert container._Scratch.of(0).raw.size == 0

"""What leaves the block after a notice: what is saved then, and with which status the process ends."""
# ruff: noqa: PT012 - what happens inside of the `with` is what these tests are about

from __future__ import annotations

import functools
import os
import random
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from fastckpt import Checkpointer, Options, RNGState
from fastckpt.errors import SaveError, StoreUnavailableError
from fastckpt.host.deadline import NEVER, Deadline
from fastckpt.repository.catalog import Catalog
from fastckpt.repository.repository import Repository
from fastckpt.spot import Notice
from fastckpt.store.memory import MemoryStore
from fastckpt.training.ending import is_changing
from tests.support.stores import GivenNotices, HeldStore

SHORT_S = 20.0  # no wait of these tests comes near it
NOTICE = 75


class Failure(Exception):
    """Of training."""


class Run:
    """A training with a Checkpointer."""

    def __init__(self, store: MemoryStore, state: dict[str, Any] | None = None, **settings: Any) -> None:
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)
        self.model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.5))
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.source = GivenNotices()
        self.ckpt = Checkpointer(
            store,
            state or {"model": self.model, "optimizer": self.optimizer, "rng": RNGState()},
            options=Options(threads=1, connections=1),
            **{"every": None, "spot": [self.source], **settings},
        )
        self.ckpt.restore()

    def forward(self) -> torch.Tensor:
        loss: torch.Tensor = self.model(torch.rand(2, 4)).square().mean()
        return loss * (random.random() + float(np.random.rand()) + 1)

    def train(self) -> None:
        self.optimizer.zero_grad()
        self.forward().backward()
        self.optimizer.step()

    def steps(self, n: int) -> None:
        for step in range(1, n + 1):
            self.train()
            assert self.ckpt.step(step) is False

    def notify(self, kind: str = "terminate", in_s: float = 100.0) -> None:
        self.source.notices = [Notice(kind, "test", time.monotonic() + in_s)]
        assert self.ckpt._ending._watcher is not None
        self.ckpt._ending._watcher.poll()  # as its thread does now and then


@pytest.fixture
def store() -> Iterator[HeldStore]:
    held = HeldStore()
    yield held
    held.open.set()


def living(store: MemoryStore) -> list[int]:
    return [c.step for c in Catalog(Repository(store)).history()]


def status(caught: pytest.ExceptionInfo[SystemExit], cause: type[BaseException]) -> int:
    assert type(caught.value.__cause__) is cause
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_the_last_step_is_saved_bit_for_bit(store: HeldStore, caplog: pytest.LogCaptureFixture) -> None:
    expected = Run(MemoryStore())
    expected.steps(3)
    after = [(torch.rand(3).tolist(), random.random(), np.random.rand()) for _ in range(2)]
    expected.ckpt.close()
    run = Run(store)
    with pytest.raises(SystemExit) as caught, run.ckpt:
        run.steps(3)
        run.notify()
        run.forward()  # draws for its dropout
        raise Failure("an NCCL operation was aborted")
    assert status(caught, Failure) == NOTICE
    assert living(store) == [3]
    (record,) = [record for record in caplog.records if record.exc_info]
    assert "an NCCL operation was aborted" in (record.exc_text or "")
    assert "the exit status is 75" in record.getMessage()
    again = Run(store)
    with again.ckpt:
        assert again.ckpt.restored is not None
        assert again.ckpt.restored.save.step == 3
        assert [(torch.rand(3).tolist(), random.random(), np.random.rand()) for _ in range(2)] == after
        pairs = zip(again.model.parameters(), expected.model.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def raising_optimizer(run: Run) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise Failure

    run.optimizer.register_step_post_hook(broken)
    run.train()


def updated(run: Run) -> None:
    run.train()
    raise Failure


@pytest.mark.parametrize("change", [updated, raising_optimizer])
@pytest.mark.parametrize("on_exception", [None, "save"])
def test_nothing_is_saved_from_an_update_under_way(
    store: HeldStore, change: Callable[[Run], None], on_exception: Any, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(store, on_exception=on_exception)
    with pytest.raises(SystemExit) as caught, run.ckpt as ckpt:
        run.steps(1)
        ckpt.save_now(1).wait(SHORT_S)
        run.train()
        ckpt.step(2)
        run.notify()
        change(run)
    assert status(caught, Failure) == NOTICE
    assert living(store) == [1]
    assert "the state is not saved as step 2: an optimizer has begun the next one" in caplog.text
    assert "what stands is step 1" in caplog.text


def test_a_save_under_way_is_let_finish(store: HeldStore, caplog: pytest.LogCaptureFixture) -> None:
    run = Run(store, close_timeout_s=0.001)  # the notice gives more
    with pytest.raises(SystemExit), run.ckpt as ckpt:
        run.steps(1)
        store.open.clear()
        ckpt.save_now(1)
        assert store.reached.wait(SHORT_S)
        run.train()
        ckpt.step(2)
        run.notify()
        run.train()
        threading.Timer(0.05, store.open.set).start()
        raise Failure
    assert living(store) == [1]
    assert "what stands is step 1" in caplog.text


def test_a_save_of_the_last_step_under_way_is_the_final_one(store: HeldStore) -> None:
    run = Run(store, close_timeout_s=0.001)
    with pytest.raises(SystemExit), run.ckpt as ckpt:
        run.steps(2)
        store.open.clear()
        ckpt.save_now(2)
        run.notify()
        run.train()
        threading.Timer(0.05, store.open.set).start()
        raise Failure
    assert living(store) == [2]
    assert run.ckpt._ending.left


class Counting:
    """A state of the user's own, without optimizers."""

    def __init__(self) -> None:
        self.n = 0

    def state_dict(self) -> dict[str, int]:
        return {"n": self.n}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.n = state["n"]


@pytest.mark.parametrize(("on_exception", "saved"), [(None, []), ("save", [3])])
def test_without_hooked_optimizers_only_who_asks_for_it_is_saved(
    store: HeldStore, on_exception: Any, saved: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(store, {"mine": Counting()}, on_exception=on_exception)
    with pytest.raises(SystemExit) as caught, run.ckpt:
        run.steps(3)
        run.notify()
        raise Failure
    assert status(caught, Failure) == NOTICE
    assert living(store) == saved
    assert ("no optimizer was seen to say" in caplog.text) is (not saved)


@pytest.mark.parametrize("what", ["buffers of 'norm'", "'place'", "'average'", "'parts'"])
def test_what_else_has_moved_is_not_saved(store: HeldStore, what: str, caplog: pytest.LogCaptureFixture) -> None:
    norm = torch.nn.BatchNorm1d(4)
    optimizer = torch.optim.SGD(norm.parameters())
    place: dict[str, Any] = {"epoch": 0, "nan": float("nan"), "more": [1, (2, 3), {"x": None}]}
    average, parts = torch.zeros(2), [torch.zeros(2)]
    state = {"norm": norm, "optimizer": optimizer, "place": place, "average": average, "parts": parts}
    run = Run(store, state)
    with pytest.raises(SystemExit), run.ckpt as ckpt:
        for step in (1, 2):
            norm(torch.rand(3, 4)).sum().backward()
            optimizer.step()
            ckpt.step(step)
        run.notify()
        assert ckpt._ending._settled.moved is None
        norm.eval()(torch.rand(3, 4))
        assert ckpt._ending._settled.moved is None
        changes: dict[str, Callable[[], Any]] = {
            "buffers of 'norm'": lambda: norm.train()(torch.rand(3, 4)),
            "'place'": lambda: place["more"][2].update(x=1),
            "'average'": lambda: average.add_(1),
            "'parts'": lambda: parts[0].add_(1),
        }
        changes[what]()
        raise Failure
    assert living(store) == []
    assert f"the state is not saved as step 2: {what} ha" in caplog.text
    assert "what stands is no step" in caplog.text


def test_large_containers_cost_no_step_its_time(store: HeldStore) -> None:
    run = Run(store, {"many": list(range(100_000)), "itself": (loop := list[Any]())})
    loop.append(loop)
    run.ckpt._ending._settled.mark()
    assert run.ckpt._ending._settled._values == [None, None]
    run.ckpt.close()


@pytest.mark.parametrize("kind", [None, "rebalance"])
@pytest.mark.parametrize("error", [Failure, KeyboardInterrupt])
def test_without_a_final_notice_an_error_is_what_it_was(
    store: HeldStore, kind: str | None, error: type[BaseException]
) -> None:
    run = Run(store)
    with pytest.raises(error), run.ckpt:
        run.steps(2)
        if kind is not None:
            run.notify(kind)
        raise error
    assert living(store) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit(3), GeneratorExit])
def test_who_leaves_is_saved_and_keeps_a_status_of_his_own(store: HeldStore, error: Any) -> None:
    run = Run(store)
    with pytest.raises((SystemExit, GeneratorExit)) as caught, run.ckpt:
        run.steps(2)
        run.notify()
        raise error
    assert living(store) == [2]
    if error is KeyboardInterrupt:
        assert status(caught, KeyboardInterrupt) == NOTICE  # type: ignore[arg-type]
    else:
        assert caught.value is error or caught.type is error


def test_an_interrupted_final_save_is_finished(store: HeldStore) -> None:
    run = Run(store)

    def interrupt() -> None:
        assert store.reached.wait(SHORT_S)
        os.kill(os.getpid(), signal.SIGINT)
        threading.Timer(0.05, store.open.set).start()

    thread = threading.Thread(target=interrupt)
    with pytest.raises(SystemExit) as caught, run.ckpt as ckpt:
        run.steps(2)
        run.notify()
        run.train()
        store.reached.clear()
        store.open.clear()
        thread.start()
        ckpt.step(3)
    thread.join()
    assert status(caught, KeyboardInterrupt) == NOTICE
    assert living(store) == [3]


def test_a_final_save_interrupted_before_it_was_copied_is_made_again(
    store: HeldStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(store)
    waits = []

    def fence(why: str, deadline: Deadline = NEVER) -> None:
        waits.append(why)
        if waits.count("save") == 2:  # behind the queueing: nothing is left to hooks that have not fired
            raise KeyboardInterrupt

    with pytest.raises(SystemExit) as caught, run.ckpt as ckpt:
        run.steps(2)
        run.notify()
        monkeypatch.setattr(ckpt._engine.fence, "wait", fence)
        ckpt.step(3)
    assert status(caught, KeyboardInterrupt) == NOTICE
    assert living(store) == [3]


def test_a_failed_final_save_keeps_the_status(store: HeldStore) -> None:
    run = Run(store)
    with pytest.raises(SystemExit) as caught, run.ckpt as ckpt:
        run.steps(1)
        ckpt.save_now(1).wait(SHORT_S)
        run.notify()
        run.train()
        store.failing = StoreUnavailableError
        ckpt.step(2)
    assert status(caught, StoreUnavailableError) == NOTICE
    assert living(store) == [1]


def test_a_save_under_way_is_let_finish_where_no_further_one_can_begin(
    store: HeldStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(store, close_timeout_s=0.001)

    def lost(*args: Any, **kwargs: Any) -> None:
        raise SaveError("the device is lost")

    with pytest.raises(SystemExit) as caught, run.ckpt as ckpt:
        run.steps(1)
        store.open.clear()
        ckpt.save_now(1)
        assert store.reached.wait(SHORT_S)
        run.train()
        ckpt.step(2)
        run.notify()
        monkeypatch.setattr(ckpt._saver, "try_begin", lost)
        threading.Timer(0.05, store.open.set).start()
        raise Failure
    assert status(caught, Failure) == NOTICE
    assert living(store) == [1]
    assert "the device is lost" in caplog.text
    assert "what stands is step 1" in caplog.text


def test_an_earlier_failure_does_not_take_the_final_save(store: HeldStore, caplog: pytest.LogCaptureFixture) -> None:
    run = Run(store)
    with run.ckpt as ckpt:
        run.steps(1)
        store.failing = StoreUnavailableError
        with pytest.raises(StoreUnavailableError):
            ckpt.save_now(1).wait(SHORT_S)
        store.failing = None
        run.notify()
        run.train()
        assert ckpt.step(2) is True
    assert living(store) == [2]
    assert "an earlier save had failed" in caplog.text


def test_after_the_deadline_it_is_said_and_nothing_waits(store: HeldStore) -> None:
    run = Run(store)
    with pytest.raises(SystemExit) as caught, run.ckpt:
        run.steps(2)
        run.notify(in_s=0.0)
        store.open.clear()
        raise Failure
    assert status(caught, Failure) == NOTICE
    store.open.set()
    assert run.ckpt._engine.queue.wait_idle(SHORT_S)
    assert living(store) == []


def test_nested_both_are_saved(store: HeldStore) -> None:
    other = HeldStore()
    with pytest.raises(SystemExit) as caught:
        outer = Run(store)
        with outer.ckpt:
            inner = Run(other)
            with inner.ckpt:
                outer.steps(2)
                inner.steps(4)
                outer.notify()
                inner.notify()
                raise Failure
    assert status(caught, Failure) == NOTICE
    assert (living(store), living(other)) == ([2], [4])


def test_an_interrupted_restore_is_not_saved(store: HeldStore, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(store)
    with pytest.raises(SystemExit), run.ckpt as ckpt:
        run.steps(1)
        ckpt.save_now(1).wait(SHORT_S)
        run.train()
        ckpt.step(2)
        run.notify()

        def interrupted(*args: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("fastckpt.training.stateful.apply", interrupted)
        ckpt.restore(step=1)
    assert living(store) == [1]


def test_a_missed_deadline_is_the_saves_error(store: HeldStore) -> None:
    run = Run(store)
    with pytest.raises(SystemExit) as caught, run.ckpt as ckpt:
        run.steps(1)
        run.notify(in_s=0.05)
        store.open.clear()
        run.train()
        ckpt.step(2)
    assert status(caught, SaveError) == NOTICE
    store.open.set()
    assert run.ckpt._engine.queue.wait_idle(SHORT_S)
    assert living(store) == []


def test_what_closing_raises_keeps_the_status(store: HeldStore, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(store)
    with pytest.raises(SystemExit) as caught, run.ckpt as ckpt:
        run.steps(1)
        run.notify()
        run.train()
        assert ckpt.step(2) is True
        monkeypatch.setattr(ckpt._engine.queue, "take_failures", lambda: [SaveError("of another save")])
    assert status(caught, SaveError) == NOTICE
    assert living(store) == [2]


def test_a_thread_that_trains_is_not_left_alone_by_the_main_one(store: HeldStore) -> None:
    run = Run(store)
    changing = functools.partial(is_changing, weakref.ref(run.ckpt._ending))
    run.steps(1)
    assert changing() is False
    run.train()
    assert changing() is True
    thread = threading.Thread(target=run.ckpt.step, args=(2,))
    thread.start()
    thread.join()
    assert changing() is True
    run.ckpt.step(3)
    assert changing() is False
    run.ckpt.close()


def test_a_signal_may_come_just_behind_the_error(store: HeldStore) -> None:
    """A launcher signals one process after the other."""
    run = Run(store, spot="signal")
    with pytest.raises(SystemExit) as caught, run.ckpt:
        run.steps(2)
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Terminated.")
    assert status(caught, RuntimeError) == NOTICE
    assert living(store) == [2]


def test_an_error_that_no_signal_follows_stays_what_it_is(store: HeldStore) -> None:
    run = Run(store, spot="signal")
    with pytest.raises(RuntimeError, match="mine"), run.ckpt:
        run.steps(2)
        raise RuntimeError("mine")
    assert living(store) == []


def test_a_forked_child_leaves_its_parents_block_with_its_own_error(store: HeldStore) -> None:
    run = Run(store)
    run.steps(1)
    run.notify()
    run.ckpt._ending._final = run.ckpt.notice
    pid = os.fork()
    if pid == 0:
        code = 9
        try:
            with run.ckpt:
                raise Failure
        except Failure:
            code = 3
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3
    run.ckpt.close()

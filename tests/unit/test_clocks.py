"""Whoever measures or waits takes a clock: these tests turn it by hand, and take no time of their own."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastckpt import Checkpointer, events
from fastckpt.repository.incarnation import Incarnation
from fastckpt.repository.repository import Repository
from fastckpt.spot import SignalSource
from fastckpt.state.chunks import LiveChunks
from fastckpt.store.memory import MemoryStore
from fastckpt.store.wrap import Wrapper
from fastckpt.training.ending import Ending
from fastckpt.training.save_queue import CommitHandle, Job, SaveQueue
from fastckpt.writing.rank import SaveAsked, UploadThreads
from tests.support.repositories import OPTIONS
from tests.support.states import captured, small_state
from tests.support.training import SHORT_S


class Clock:
    """Stands still, but for those that sleep by it."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.at: dict[float, Callable[[], object]] = {}
        """What happens at a moment that somebody sleeps past."""

    def __call__(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds
        for moment_s in [moment_s for moment_s in self.at if moment_s <= self.now_s]:
            self.at.pop(moment_s)()


class SlowVotes(Wrapper):
    """A vote takes 40 s by a clock."""

    def __init__(self, inner: MemoryStore, clock: Clock) -> None:
        super().__init__(inner)
        self._clock = clock

    def _call(self, verb: str, key: str, operation: Callable[[], Any]) -> Any:
        if verb == "put" and key.startswith("votes/"):
            self._clock.sleep(40.0)
        return operation()


def test_a_save_is_measured_by_the_queues_clock() -> None:
    """From the start of its upload; the event counts from the call."""
    clock = Clock()
    run = Incarnation(Repository(SlowVotes(MemoryStore(), clock)), OPTIONS)
    run.choose_and_claim()
    queue = SaveQueue(run, None, 0.0, clock=clock)
    state = captured(small_state(1.0))
    asked, handle = SaveAsked(1, called_s=clock() - 3.0), CommitHandle(1)
    seen: list[events.CheckpointDurable] = []
    with events.subscribe(lambda event: seen.append(event) if isinstance(event, events.CheckpointDurable) else None):
        threads = UploadThreads.start(state.own_bytes, OPTIONS)
        assert queue.put(Job(asked, state, LiveChunks(state), handle, threads))
        assert handle.wait(SHORT_S).save.step == 1
    assert queue.wait_idle(SHORT_S)
    assert queue.measured_s == 40.0
    assert [event.seconds for event in seen] == [43.0]


@pytest.fixture
def ended() -> Any:
    """Makes the end of a run that waits by a clock, and listens to a signal."""
    with Checkpointer(MemoryStore(), {"t": torch.zeros(1)}, every=None, spot=None) as ckpt:
        made: list[Ending] = []

        def make(clock: Clock) -> Ending:
            ending = Ending(ckpt._engine, ckpt._saver, None, 10.0, clock, clock.sleep)
            ending.watch([SignalSource([signal.SIGUSR2], grace_s=7)])
            made.append(ending)
            return ending

        yield make
        for ending in made:
            ending.close()


def test_a_signal_that_comes_soon_after_an_error_is_its_notice(ended: Callable[[Clock], Ending]) -> None:
    clock = Clock()
    ending = ended(clock)
    clock.at[1000.5] = lambda: signal.raise_signal(signal.SIGUSR2)
    notice = ending.notice_behind(RuntimeError("connection closed by peer"))
    assert notice is not None
    assert notice.source == "SIGUSR2"
    assert 1000.5 <= clock.now_s < 1000.6, "nobody waits longer than for the signal"


def test_an_error_without_a_notice_waits_a_second_and_no_longer(ended: Callable[[Clock], Ending]) -> None:
    clock = Clock()
    ending = ended(clock)
    assert ending.notice_behind(RuntimeError("connection closed by peer")) is None
    assert 1001.0 <= clock.now_s < 1001.1
    assert ending.notice_behind(ValueError("of training")) is None
    assert 1001.0 <= clock.now_s < 1001.1, "no lost peer causes such an error"

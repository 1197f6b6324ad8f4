"""Moments by which something has to be done, and what set them."""

from __future__ import annotations

import dataclasses
import math
import threading
import time

import pytest

from fastckpt.host.deadline import LONGEST_S, NEVER, Deadline


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What `time.monotonic` says, to be set by the test."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_seconds_from_now_become_a_moment(clock: list[float]) -> None:
    deadline = Deadline.after(2.5, "max_stall_s")
    assert deadline == Deadline(1002.5, "max_stall_s")
    assert deadline.left_s() == 2.5
    clock[0] = 1002.0
    assert deadline.left_s() == 0.5
    assert not deadline.expired()


@pytest.mark.parametrize("late_s", [0.0, 7.0])
def test_nothing_is_left_once_the_moment_has_come(clock: list[float], late_s: float) -> None:
    deadline = Deadline.after(1.0, "the notice")
    clock[0] = 1001.0 + late_s
    assert deadline.expired()
    assert deadline.left_s() == 0.0, "never negative: threading.Lock.acquire takes -1 for ever"


@pytest.mark.parametrize("seconds", [0.0, -3.0])
def test_no_time_at_all_has_expired_at_once(clock: list[float], seconds: float) -> None:
    assert Deadline.after(seconds, "close_timeout_s").expired()
    assert Deadline.after(seconds, "close_timeout_s").left_s() == 0.0


@pytest.mark.parametrize("never", [NEVER, Deadline.after(None, "close_timeout_s"), Deadline(math.inf, "x")])
def test_never_is_what_threading_waits_without_a_limit_for(clock: list[float], never: Deadline) -> None:
    clock[0] = 1e12
    assert not never.expired()
    assert never.left_s() is None
    opened = threading.Event()
    opened.set()
    assert opened.wait(never.left_s())


def test_the_sooner_one_keeps_its_own_reason(clock: list[float]) -> None:
    stall, notice = Deadline.after(60.0, "max_stall_s"), Deadline.after(2.0, "the notice")
    assert stall.sooner(notice) is notice
    assert notice.sooner(stall) is notice
    assert stall.sooner(NEVER) is stall
    assert NEVER.sooner(stall) is stall
    assert NEVER.sooner(Deadline.after(None, "x")) is NEVER


def test_of_equal_moments_the_first_one_is_named(clock: list[float]) -> None:
    first, second = Deadline.after(1.0, "max_stall_s"), Deadline.after(1.0, "the notice")
    assert first.sooner(second).why == "max_stall_s"
    assert second.sooner(first).why == "the notice"


def test_a_deadline_does_not_move() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        NEVER.at_s = 0.0  # type: ignore[misc] # what is tested


def test_what_is_left_can_be_waited_for() -> None:
    assert Deadline.after(math.inf, "as good as never").left_s() is None
    assert Deadline.after(1e300, "as good as never").left_s() == LONGEST_S

"""The limit for background saves: it holds over time, allows a burst, and is lifted when there is a hurry. Time is a number here."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

import fastckpt
from fastckpt.errors import SaveError
from fastckpt.format import keys
from fastckpt.spot import Notice
from fastckpt.store.memory import MemoryStore
from fastckpt.writing.rate_limit import RateLimit
from tests.support.repositories import check_all

MIB = 1 << 20


class Time:
    def __init__(self) -> None:
        self.now_s = 100.0
        self.slept: list[float] = []

    def clock(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now_s += seconds


def limit(bytes_per_s: float, time: Time, **settings: Any) -> RateLimit:
    return RateLimit(bytes_per_s, clock=time.clock, sleep=time.sleep, **settings)


@pytest.mark.parametrize("size", [MIB, 5 * MIB, 32 * MIB])
def test_over_time_it_holds(size: int) -> None:
    time = Time()
    one = limit(8 * MIB, time)
    sent = 0
    while time.now_s < 1100.0:
        one.wait(size)
        sent += size
    burst = 10 * 8 * MIB
    assert 1000 * 8 * MIB <= sent <= 1000 * 8 * MIB + burst + 2 * size
    assert max(time.slept) <= 0.25, "it looks for a hurry"


def test_what_was_not_used_is_a_burst() -> None:
    time = Time()
    one = limit(8 * MIB, time)
    for _ in range(10):
        assert one.wait(8 * MIB) == 0.0
    assert one.wait(8 * MIB) > 0.0
    time.now_s += 1000.0
    for _ in range(10):
        assert one.wait(8 * MIB) == 0.0, "ten seconds of it at most, however long nothing was sent"
    assert one.wait(8 * MIB) > 0.0


def test_a_hurry_lifts_it_in_the_middle_of_a_wait() -> None:
    time = Time()
    one = limit(MIB, time, in_a_hurry=lambda: time.now_s >= 110.0)
    assert one.wait(64 * MIB) == 0.0
    assert 9.9 <= one.wait(64 * MIB) <= 10.3, "there is a hurry ten seconds later, and the bucket is far from full"
    assert one.wait(64 * MIB) == 0.0


def test_no_limit() -> None:
    time = Time()
    one = limit(0, time)
    assert one.wait(1 << 50) == 0.0
    assert not time.slept


def test_a_wait_ends_with_the_error_of_whoever_looks() -> None:
    time = Time()
    one = limit(MIB, time)
    one.wait(64 * MIB)

    def look() -> None:
        if time.now_s > 105.0:
            raise SaveError("cancelled, as the test wants it")

    with pytest.raises(SaveError, match="as the test wants it"):
        one.wait(1, look)
    assert time.now_s < 106.0


def test_a_notice_lifts_the_limit_of_a_save_under_way() -> None:
    begun = threading.Event()

    class Telling(MemoryStore):
        def put(self, key: str, data: Any) -> None:
            super().put(key, data)
            if key.startswith(keys.DATA):
                begun.set()

    store = Telling()
    state = {"w": torch.randint(0, 256, (48 * MIB,), dtype=torch.uint8)}
    slow = fastckpt.Options(threads=1, connections=2, max_upload_bytes_per_s=1)  # after the first packs: for years
    with fastckpt.Checkpointer(store, state, every=None, spot=None, options=slow) as ckpt:
        handle = ckpt.save_now(1)
        assert begun.wait(60)
        assert not handle.durable.done()
        ckpt._ending._final = Notice("signal", "the test", None)
        handle.wait(60)
    check_all(store)


def test_close_lifts_it() -> None:
    store = MemoryStore()
    state = {"w": torch.randint(0, 256, (48 * MIB,), dtype=torch.uint8)}
    slow = fastckpt.Options(threads=1, connections=2, max_upload_bytes_per_s=1)
    with fastckpt.Checkpointer(store, state, every=None, spot=None, options=slow) as ckpt:
        handle = ckpt.save_now(1)
    assert handle.durable.done()
    check_all(store)

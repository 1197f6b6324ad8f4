"""A moment that somebody waits for at most."""

from __future__ import annotations

import math
import time

from fastckpt.host.deadline import LONGEST_S, NEVER, Deadline


def test_the_sooner_one_keeps_its_reason() -> None:
    soon, late = Deadline.after(1, "soon"), Deadline.after(2, "late")
    assert soon.sooner(late) is soon
    assert late.sooner(soon) is soon
    assert NEVER.sooner(late) is late
    assert late.sooner(NEVER) is late
    assert late.sooner(Deadline(late.at_s, "as late")) is late


def test_what_is_left_can_be_waited_for() -> None:
    assert NEVER.left_s() is None
    assert Deadline.after(None, "none").left_s() is None
    assert Deadline.after(math.inf, "as good").left_s() is None
    assert Deadline.after(1e300, "as good").left_s() == LONGEST_S
    assert Deadline(time.monotonic() - 1, "over").left_s() == 0.0
    left_s = Deadline.after(60, "a minute").left_s()
    assert left_s is not None
    assert 0 < left_s <= 60


def test_expired() -> None:
    assert Deadline(time.monotonic(), "now").expired()
    assert not Deadline.after(60, "a minute").expired()
    assert not NEVER.expired()

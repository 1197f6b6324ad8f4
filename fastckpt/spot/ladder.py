"""Decides what to do with the seconds that a notice leaves. Pure."""

from __future__ import annotations

import enum

GUARD_S = 5.0  # reserve for the commit, for a request that is slower than the last one, and for the clock


class Rung(enum.Enum):
    """What the final save of a rank does."""

    FRESH = "save this step; give up an older one that is under way"
    FINISH_THEN_FRESH = "let the older one finish, then save this step"
    FINISH = "let the older one finish: this step does not fit any more"


def rung_of(left_s: float | None, fresh_s: float | None, in_flight_s: float | None) -> Rung:
    """left_s: seconds until the machine goes; None: not known. fresh_s: seconds that a save of this step takes; None: not known.
    in_flight_s: seconds that an older save under way still takes at most; 0: there is none; None: there is one, and its time is not known.

    If there is time for both, the older save may finish first: it is mostly done, and then one checkpoint is safe even if the newer save
    fails.
    """
    if in_flight_s == 0:
        return (
            Rung.FRESH
        )  # even if there seems to be no time for it: estimates may be wrong, and nothing else can be done
    if left_s is None:
        return Rung.FINISH_THEN_FRESH
    room_s = left_s - GUARD_S
    if fresh_s is None or in_flight_s is None:
        return Rung.FINISH_THEN_FRESH
    if fresh_s + in_flight_s <= room_s:
        return Rung.FINISH_THEN_FRESH
    if fresh_s <= room_s:
        return Rung.FRESH
    return Rung.FINISH

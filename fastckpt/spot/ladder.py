"""What to do with the seconds that are left after a notice. Pure."""

from __future__ import annotations

import enum

GUARD_S = 5.0  # the commit, a request that is slower than the last one was, the clock


class Rung(enum.Enum):
    """The final save of one rank."""

    FRESH = "save this step; give up an older one that is under way"
    FINISH_THEN_FRESH = "let the older one finish, then save this step"
    FINISH = "let the older one finish: this step does not fit any more"


def rung_of(left_s: float | None, fresh_s: float | None, in_flight_s: float | None) -> Rung:
    """left_s: seconds until the machine goes; None: not known. fresh_s: what a save of this step takes; None: not known.
    in_flight_s: what an older save under way still takes at most; 0: there is none; None: there is one, and it is not known.

    The older one is let finish where both fit: it is most of the way, and then something stands whatever becomes of the other.
    """
    if in_flight_s == 0:
        return Rung.FRESH  # even if it does not fit: estimates are wrong at times, and there is nothing else to do
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

"""How much time the encoder may spend on a byte, so that a save is as fast as its link and its encoder allow together. Pure.

    encoded: bytes a second and stored / raw, of each level ─┐
    put_finished: what the link carries while packs wait ────┴→ of each level: the slower of encoder and link ─→ the fastest level

A level that was not used yet is taken to be better than it is likely to be, so it is tried once where that could help. What the link
carries is known only while packs wait for it; while it waits for packs, it is from time to time taken to carry more than it did.

HIGH is only for those who ask for it: on measured states it makes at most 0.2 % less than NORMAL, in five to eight times the time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastckpt.codec import Effort
from fastckpt.options import Options

_LEVELS = (Effort.NONE, Effort.FAST, Effort.NORMAL)
_FASTER = {Effort.NONE: 3.0, Effort.FAST: 1.5, Effort.NORMAL: 1.0}
"""How much faster than the level that is used one is taken to be that was never used."""
_AS_FAST = 0.97
"""Of levels that are as fast as this, the highest is taken: it makes fewer bytes."""
_WORTH = 1.05
_IN_A_ROW, _IN_A_ROW_IF_NO_FASTER = 3, 8
"""Puts that must demand another level, if that is faster by _WORTH, or not."""
_OLD = 0.9
"""What older measurements count against newer ones, for each put."""
_RAISE = 1.25
_PATIENCE, _MOST_PATIENCE = 4, 256
"""Puts in a row for which the link has waited, before it is taken to carry more. Doubled each time this was wrong."""
_WAITING = 0.3
"""The part of its time for which the encoder waits for the bytes of the state, if these are what holds up the save."""


@dataclass
class Used:
    """What was encoded with one level: in one save, or as far as it still counts."""

    chunks: int = 0
    raw_bytes: float = 0
    stored_bytes: float = 0
    seconds: float = 0.0
    waited_s: float = 0.0
    """For the bytes of the state, before they were encoded."""

    def add(self, raw_bytes: int, stored_bytes: int, seconds: float, waited_s: float) -> None:
        """One chunk more."""
        self.chunks += 1
        self.raw_bytes += raw_bytes
        self.stored_bytes += stored_bytes
        self.seconds += seconds
        self.waited_s += waited_s

    def fade(self) -> None:
        """Count less against what comes."""
        self.raw_bytes *= _OLD
        self.stored_bytes *= _OLD
        self.seconds *= _OLD
        self.waited_s *= _OLD


class _Carried:
    """What the link carries, as far as it is known."""

    def __init__(self) -> None:
        self.bytes_per_s = math.inf
        """Infinite: it has never held up a save."""
        self._since_s: float | None = None
        """Begin of a measurement, while packs wait."""
        self._puts = self._n_bytes = 0
        self._starved, self._patience, self._raised = 0, _PATIENCE, False

    def begin(self) -> None:
        self._since_s, self._starved = None, 0

    def put_finished(self, now_s: float, n_bytes: int, waiting: int, connections: int) -> None:
        if not waiting:
            self._since_s = None
            self._starved += 1
            if self._starved >= self._patience:
                self._starved, self._raised = 0, True
                self.bytes_per_s *= _RAISE
            return
        self._starved = 0
        if self._since_s is None:
            self._since_s, self._puts, self._n_bytes = now_s, 0, 0
            return
        self._puts, self._n_bytes = self._puts + 1, self._n_bytes + n_bytes
        if self._puts >= connections:  # puts that began together end together: one of each connection, or several
            self._measured(self._n_bytes / max(now_s - self._since_s, 1e-9))
            self._since_s, self._puts, self._n_bytes = now_s, 0, 0

    def _measured(self, bytes_per_s: float) -> None:
        before = self.bytes_per_s
        if self._raised:
            wrong = bytes_per_s < before / _RAISE * _WORTH
            self._patience = min(2 * self._patience, _MOST_PATIENCE) if wrong else _PATIENCE
        fresh = self._raised or not before / 2 < bytes_per_s < 2 * before  # otherwise it is another link than before
        self.bytes_per_s = bytes_per_s if fresh else (before + bytes_per_s) / 2
        self._raised = False


class Efforts:
    """See the module. `level` may be read by any thread at any time; the methods are called under the lock of their owner."""

    def __init__(self, encoders: int, fixed: Effort | None = None, least: Effort = Effort.NONE) -> None:
        """encoders: threads that encode. fixed: the level that a person wants; None: the fastest, and none below `least`."""
        self._encoders, self._follows = encoders, fixed is None
        self._levels = tuple(level for level in _LEVELS if level >= least)
        self.level = Effort.NORMAL if fixed is None else fixed
        self.why = "as it begins" if fixed is None else "as the options say"
        """The reason for the last change of the level, for events."""
        self.used: dict[Effort, Used] = {}
        """What was encoded since `begin`, by level."""
        self._known: dict[Effort, Used] = {}
        self._carried = _Carried()
        self._wanted, self._in_a_row = self.level, 0

    def begin(self) -> None:
        """A save begins. What was learned from earlier ones stays."""
        self.used = {}
        self._carried.begin()
        self._in_a_row = 0

    def encoded(self, effort: Effort, raw_bytes: int, stored_bytes: int, seconds: float, waited_s: float) -> None:
        """A chunk was encoded. waited_s: how long its bytes were waited for before that."""
        for found in (self.used, self._known):
            found.setdefault(effort, Used()).add(raw_bytes, stored_bytes, seconds, waited_s)

    def put_finished(self, now_s: float, n_bytes: int, waiting: int, connections: int) -> bool:
        """A put has ended while chunks are still to be encoded. Returns whether the level has changed.

        waiting: finished packs that no connection had begun to send.
        """
        self._carried.put_finished(now_s, n_bytes, waiting, connections)
        here = self._known.get(self.level)
        if not self._follows or here is None or not here.raw_bytes:
            return False
        speeds = {level: self._speed(level, here) for level in self._levels}
        most = max(speeds.values())
        wanted = max(level for level in self._levels if speeds[level] >= _AS_FAST * most)
        self._in_a_row = self._in_a_row + 1 if wanted == self._wanted else 1
        self._wanted = wanted
        here.fade()
        faster = speeds[wanted] >= _WORTH * speeds[self.level]
        if wanted == self.level or self._in_a_row < (_IN_A_ROW if faster else _IN_A_ROW_IF_NO_FASTER):
            return False
        self.why = (
            "the encoder is slower than the link" if wanted < self.level else "the link is slower than the encoder"
        )
        self.level, self._in_a_row = wanted, 0
        return True

    def _speed(self, level: Effort, here: Used) -> float:
        """Raw bytes a second that a save makes with a level. here: what is known of the level that is used now."""
        known = self._known.get(level)
        if known is None:
            seconds, ratio = here.seconds / here.raw_bytes / _FASTER[level], here.stored_bytes / here.raw_bytes
            ratio = 1.0 if level == Effort.NONE else ratio
        else:
            seconds, ratio = known.seconds / known.raw_bytes, known.stored_bytes / known.raw_bytes
        alone, waited = here.seconds / here.raw_bytes, here.waited_s / here.raw_bytes
        if waited > _WAITING * (alone + waited):  # however fast the encoder is, the bytes come no sooner
            seconds = max(seconds, alone + waited)
        return min(self._encoders / max(seconds, 1e-15), self._carried.bytes_per_s / max(ratio, 1e-6))


def fixed_effort(options: Options) -> Effort | None:
    """The effort that a person wants; None: as the link demands."""
    if not options.compress:
        return Effort.NONE
    return None if options.effort == "auto" else Effort[options.effort.upper()]


def least_effort(options: Options) -> Effort:
    """The least that a save which follows the link may spend. What a chain of differences stores is read at each restore of it and kept as
    long as any of them: a link that is faster than FAST is no reason to store it raw.
    """
    return Effort.FAST if options.deltas else Effort.NONE

"""Which ranks live: each one counts up on the board every few seconds while others may wait for it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from fastckpt.ranks.board import Board
from fastckpt.ranks.roles import share_s
from fastckpt.ranks.world import World

BEAT_S = 2.0
SILENT_S = 15.0
_MOST_OF_A_GAP = 0.8
"""Of the limit of silence: no pause between two looks counts for more, as the others may have stood still meanwhile, too."""


def beat_s(size: int) -> float:
    """Seconds between two beats of a rank: 2, and from 8,192 ranks on more, so that all together make 4,096 in a second: a store of
    torch.distributed takes ten times as many, as nobody waits for an answer.
    """
    return min(4.0, max(BEAT_S, share_s(size, 4096)))


def silent_s(size: int) -> float:
    """Seconds after which a rank that has said nothing is taken for dead: seven beats; not quite four where beats are slow. No survivor
    waits longer than 30 s for a decision.
    """
    return max(SILENT_S, 3 * beat_s(size))


class Pulse:
    """This rank's beat. For the thread beside training."""

    def __init__(self, world: World, board: Board, clock: Callable[[], float] = time.monotonic) -> None:
        self._world, self._board, self._clock = world, board, clock
        self._beats = 0
        self._last_s: float | None = None

    def beat(self) -> None:
        """Count up, if it is time to. BoardLostError."""
        now_s = self._clock()
        if self._last_s is None or now_s - self._last_s >= beat_s(self._world.size):
            self._beats += 1
            self._last_s = now_s
            self._board.put(f"pulse/{self._world.rank}", b"%d" % self._beats)


class Listener:
    """Hears the beats of others, by its own clock: clocks of machines differ. Any thread; what it has heard is kept between saves."""

    def __init__(self, world: World, board: Board, clock: Callable[[], float] = time.monotonic) -> None:
        self._board, self._clock, self._limit_s = board, clock, silent_s(world.size)
        self._heard: dict[int, tuple[bytes | None, float, float]] = {}
        """Rank → its last beat, for how many seconds it has been silent since, and when it was listened for last."""

    def silent(self, ranks: Iterable[int]) -> list[int]:
        """Those that have been heard of last, or listened for first, too long ago. BoardLostError."""
        found = []
        for rank in ranks:
            beat = self._board.get(f"pulse/{rank}")
            now_s = self._clock()
            known = self._heard.get(rank)
            gap_s = 0.0 if known is None else now_s - known[2]
            # Whoever did not listen for so long cannot tell silence from a machine that stood still as a whole.
            if known is None or known[0] != beat or gap_s > self._limit_s:
                self._heard[rank] = (beat, 0.0, now_s)
                continue
            quiet_s = known[1] + min(gap_s, _MOST_OF_A_GAP * self._limit_s)
            self._heard[rank] = (beat, quiet_s, now_s)
            if quiet_s > self._limit_s:
                found.append(rank)
        return found

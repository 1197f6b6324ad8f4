"""The ranks of one job, for one Checkpointer: who they are, their board, and the thread beside training that speaks for this rank."""

from __future__ import annotations

import collections
import itertools
import logging
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

from fastckpt.host.threads import start
from fastckpt.host.torch_names import process_group_store
from fastckpt.ranks.agreement import Agreement
from fastckpt.ranks.board import Board, BoardLostError, StoreBoard
from fastckpt.ranks.fate import Fate
from fastckpt.ranks.pulse import Pulse
from fastckpt.ranks.roll import Roll
from fastckpt.ranks.world import World

logger = logging.getLogger("fastckpt")
_numbers = itertools.count()
"""Teams of this process: all ranks make their Checkpointers in the same order."""


def look_s(size: int) -> float:
    """Seconds between two looks of a rank at a board that `size` ranks share: the host of the store answers some 8,000 requests a second at
    most, and training keeps its cores. 0.1 s for 8 ranks, 0.5 s for 1,024, 2 s from 4,096 on.
    """
    return min(2.0, max(0.1, size / 2048))


class Team:
    """See the module. `agreement`, `roll` and `fate` say who may call them."""

    def __init__(
        self,
        world: World,
        board: Board,
        *,
        come_s: float = 300.0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """come_s: see `Roll`. The thread beside training begins with `start`."""
        self.world, self.board = world, board
        self.clock, self.sleep = clock, sleep
        self.agreement = Agreement(world, board, clock=clock)
        self.roll = Roll(world, board, come_s, clock, sleep)
        self.pulse = Pulse(world, board, clock)
        self._stop, self._woken = threading.Event(), threading.Event()
        self._later: collections.deque[Callable[[], object]] = collections.deque()
        self._lost_told = False

    @classmethod
    def of_process_group(cls, world: World, come_s: float) -> Team:
        """The team of torch's default process group."""
        return cls(world, StoreBoard(process_group_store(), f"fastckpt/{next(_numbers)}/"), come_s=come_s)

    def fate(self, name: str) -> Fate:
        """Of the save of this name."""
        return Fate(self.world, self.board, name)

    def start(self) -> None:
        """Begin to speak for this rank: beats, answers, wishes."""
        thread = threading.Thread(
            target=_speak, args=(weakref.ref(self), self._stop, self._woken), name="fastckpt-ranks", daemon=True
        )
        start(thread)

    def later(self, call: Callable[[], object]) -> None:
        """Have the thread beside training make requests of the board, soon. Any thread; returns at once."""
        self._later.append(call)
        self._woken.set()

    def turn(self) -> float:
        """Do what is to be done once. Seconds until the next time."""
        try:
            while self._later:
                self._later.popleft()()
            self.pulse.beat()
            under_way = self.agreement.turn()
        except BoardLostError as error:
            if not self._lost_told:
                self._lost_told = True
                logger.warning("ranks cannot reach each other: %s", error)
            return 1.0
        self._lost_told = False
        pause_s = look_s(self.world.size)
        return pause_s / 2 if under_way else pause_s

    def begin_call(self) -> None:
        """One more call of `step` has begun: wait, if all are about to agree on one. MAX_HOLD_S at most."""
        agreement = self.agreement
        agreement.begin_call()
        with agreement.changed:
            while (left_s := agreement.must_wait()) > 0:
                agreement.changed.wait(min(left_s, 0.1))

    def close(self) -> None:
        """Speak no more. May be called twice."""
        self._stop.set()
        self._woken.set()
        close: Any = getattr(self.board, "close", None)
        if close is not None:
            close()


def _speak(team: weakref.ref[Team], stop: threading.Event, woken: threading.Event) -> None:
    while not stop.is_set():
        living = team()
        if living is None:
            return
        woken.clear()
        pause_s = living.turn()
        del living
        woken.wait(pause_s)

"""The ranks of one job, for one Checkpointer: who they are, their board, and the thread beside training that speaks for this rank."""

from __future__ import annotations

import collections
import contextlib
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
from fastckpt.ranks.board import SLOW_S, Board, BoardLostError, FallbackBoard, StoreBoard
from fastckpt.ranks.door import Door, enter, knock, new_session
from fastckpt.ranks.fate import Fate
from fastckpt.ranks.pulse import Pulse
from fastckpt.ranks.roles import share_s
from fastckpt.ranks.roll import Roll
from fastckpt.ranks.world import World

logger = logging.getLogger("fastckpt")
_LATE_S = 3.0
"""Answers come within two looks at the board: 0.2 s for 8 ranks."""
FAREWELL_S = 3.0
_numbers = itertools.count()
"""Teams of this process: all ranks make their Checkpointers in the same order."""


def look_s(size: int) -> float:
    """Seconds between two looks of a rank at a board that `size` ranks share: the host of the store answers some 40,000 requests a second
    (docs/scale.md), and training keeps its cores. 0.1 s for 8 ranks, 0.5 s for 1,024, 2 s from 4,096 on: calls of `step` are held for 5 s
    at most, and two looks have to fit.
    """
    return min(2.0, max(0.1, share_s(size, 2048)))


class Team:
    """See the module. `agreement`, `roll` and `fate` say who may call them."""

    def __init__(
        self,
        world: World,
        board: Board,
        *,
        objects: Board | None = None,
        come_s: float = 300.0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """objects: for agreement, where the board is lost. come_s: see `Roll`. The thread beside training begins with `start`."""
        self.world, self.board = world, board
        self.clock, self.sleep = clock, sleep
        self._board_of_agreement = (
            FallbackBoard(board, objects, clock, max(SLOW_S, share_s(world.size, 2048)))
            if objects is not None
            else None
        )
        self.agreement = Agreement(world, self._board_of_agreement or board, clock)
        self.roll = Roll(world, board, come_s, clock, sleep)
        self.pulse = Pulse(world, board, clock)
        self._stop, self._woken = threading.Event(), threading.Event()
        self._later: collections.deque[Callable[[], object]] = collections.deque()
        self._lost_told = False
        self._kept: object = None
        """What has to live as long as this."""
        self._door: Door | None = None
        """On rank 0, until all ranks are here."""

    @classmethod
    def of_process_group(cls, world: World, objects: Board, come_s: float) -> Team:
        """The team of torch's default process group. RanksError: rank 0 does not come within `come_s` seconds."""
        place = f"fastckpt/{next(_numbers)}"
        store, kept = process_group_store()
        lobby = StoreBoard(store, f"{place}/lobby/")
        try:
            session = new_session() if world.leads else knock(world, lobby, come_s)
            board = lobby.beside(f"{place}/{session}/")
            if not world.leads:
                enter(world, board)
        except BaseException:
            lobby.close()
            raise
        team = cls(world, board, objects=objects, come_s=come_s)
        team._kept = kept
        if world.leads:
            team._door = Door(world, lobby, board, session)
        return team

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
        pause_s = look_s(self.world.size)
        try:
            while self._later:
                self._later.popleft()()
            self.pulse.beat()
            if self._door is not None and not self._door.turn():
                self._door = None
            self._lost_told = False
        except BoardLostError as error:
            pause_s = max(1.0, pause_s)
            if not self._lost_told:
                self._lost_told = True
                logger.warning("ranks cannot reach each other as usual: %s", error)
        try:
            under_way = self.agreement.turn()
            self._doubt()
        except BoardLostError as error:
            logger.info("ranks cannot agree now: %s", error)
            return max(1.0, pause_s)
        return max(pause_s / 2, share_s(self.world.size, 8192)) if under_way else pause_s

    def _doubt(self) -> None:
        """Where answers are late, some ranks may have lost the board: look for them in the objects too."""
        board = self._board_of_agreement
        if board is None:
            return
        late = self.agreement.waits_s() > _LATE_S
        if late and not board.doubts:
            board.doubts = True
            self.agreement.repeat_answer()
        elif not late:
            board.doubts = False

    def begin_call(self) -> None:
        """One more call of `step` has begun: wait, if all are about to agree on one. MAX_HOLD_S at most."""
        agreement = self.agreement
        agreement.begin_call()
        while (left_s := agreement.must_wait()) > 0:
            self.hold(left_s)

    def hold(self, seconds: float) -> None:
        """Wait for what the thread beside training may have learned, so many seconds at most."""
        with self.agreement.changed:
            if self.agreement.must_wait() > 0:
                self.agreement.changed.wait(min(seconds, 0.1))

    def close(self) -> None:
        """Speak no more. May be called twice. Rank 0, whose process may hold the board, lets the others read it: FAREWELL_S at most."""
        if self._stop.is_set():
            return
        self._stop.set()
        self._woken.set()
        with contextlib.suppress(BoardLostError):
            self.board.join("gone", self.world.rank, b"1")
            end_s = self.clock() + FAREWELL_S
            while self.world.leads and self.board.n_joined("gone") < self.world.size and self.clock() < end_s:
                self.sleep(0.02)
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

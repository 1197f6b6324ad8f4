"""How ranks of one start find each other, in a store that may still hold what ranks of an earlier start have written.

torchrun keeps its store when it starts workers again. So every rank knocks with a name that is random, and rank 0 answers under that name,
with the name of the session: all that follows lies under it, and nothing of an earlier start can be taken for an answer.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence

from fastckpt.errors import RanksError
from fastckpt.ranks.board import Board, member_key
from fastckpt.ranks.roles import share_s
from fastckpt.ranks.world import World

_MAX_PAUSE_S = 0.25
_AT_ONCE = 1024
"""Ranks whose knocks are read by one request, once all of them are there."""


def new_session() -> str:
    """A name that no other start has."""
    return secrets.token_hex(8)


def knock(
    world: World,
    lobby: Board,
    come_s: float,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> str:
    """On every rank but 0: wait for the name of the session.

    Args:
        lobby: where ranks of all starts write.
        come_s: seconds for which rank 0 is waited for.

    Raises:
        RanksError: rank 0 does not come.
        BoardLostError: the store does not answer.
    """
    name = secrets.token_hex(8)
    lobby.join("knock", world.rank, name.encode())
    started_s, pause_s = clock(), 0.005
    while (answer := lobby.get(f"answer/{name}")) is None:
        if clock() - started_s > come_s:
            raise RanksError(
                f"making a Checkpointer: nothing was heard of rank 0 for {come_s:g} s (join_timeout_s). Every rank has to make the same "
                "calls of its Checkpointer. Look at the log of rank 0"
            )
        sleep(pause_s)
        pause_s = min(max(_MAX_PAUSE_S, share_s(world.size, 8192)), 1.5 * pause_s)
    return answer.decode()


def enter(world: World, inside: Board) -> None:
    """Tell rank 0 that this rank has the name of the session. inside: the board of the session. BoardLostError."""
    inside.join("here", world.rank, b"1")


class Door:
    """On rank 0: answers knocks until all ranks are inside. For the thread beside training."""

    def __init__(self, world: World, lobby: Board, inside: Board, session: str) -> None:
        """lobby, inside: see `knock` and `enter`."""
        self._size, self._lobby, self._inside, self._session = world.size, lobby, inside, session
        self._answered: dict[str, bytes] = {}
        """Key of a rank's knock → the knock that was answered: perhaps that of a process before."""
        self._n_knocks = -1

    def turn(self) -> bool:
        """Answer whoever has knocked since the last time. Whether ranks are still missing. BoardLostError."""
        n_knocks = self._lobby.n_joined("knock")
        if n_knocks != self._n_knocks:
            keys = [member_key("knock", rank) for rank in range(1, self._size)]
            for first in range(0, len(keys), _AT_ONCE):
                self._answer(keys[first : first + _AT_ONCE])
            self._n_knocks = n_knocks
        if self._inside.n_joined("here") < self._size - 1:
            return True
        return self._inside.get_all([member_key("here", rank) for rank in range(1, self._size)]) is None

    def _answer(self, keys: list[str]) -> None:
        knocks: Sequence[bytes | None] = self._lobby.get_all(keys) or [self._lobby.get(key) for key in keys]
        for key, name in zip(keys, knocks, strict=True):
            if name is not None and self._answered.get(key) != name:
                self._lobby.put(f"answer/{name.decode()}", self._session.encode())
                self._answered[key] = name

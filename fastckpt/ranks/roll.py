"""One rank decides, and all learn it: when a job begins and when it restores. Whoever waits gives up on ranks that are silent."""

from __future__ import annotations

import builtins
import contextlib
import json
import logging
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from fastckpt import errors
from fastckpt.errors import CheckpointError, CorruptCheckpointError, Damage, RanksError
from fastckpt.ranks.board import Board, BoardLostError, member_key, missing_members
from fastckpt.ranks.pulse import Listener, silent_s
from fastckpt.ranks.roles import share_s
from fastckpt.ranks.world import World

logger = logging.getLogger("fastckpt")
_SHOWN = 20
_LISTENED_TO = 64
"""Of more missing ranks only these: one that is dead is enough."""


class Roll:
    """See the module. For the thread that trains; all ranks make the same calls in the same order. Values are what JSON can hold."""

    def __init__(
        self,
        world: World,
        board: Board,
        come_s: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """come_s: seconds that ranks may come later than each other; after that they have to be heard of all the time."""
        self._world, self._board, self._come_s = world, board, come_s
        self._clock, self._sleep = clock, sleep
        self.listener = Listener(world, board, clock)
        """Of the whole team: who is silent when a save ends is silent for the next one, too."""
        self._patience_s = min(come_s, silent_s(world.size) / 2)
        """After which it is looked for who is missing."""
        self._number = 0

    def decide(self, what: str, said: Any, judge: Callable[[list[Any]], Any], *, meets: bool = False) -> Any:
        """Have rank 0 judge what all ranks say, and return what it found, on every rank.

        Args:
            what: is done, for errors: "restoring".
            said: by this rank.
            judge: called on rank 0 with what all have said, by rank. What it raises is raised on every rank.
            meets: this is the beginning of a call that all ranks make. Who does not make it is missed after `come_s`, also if it lives;
                else it may be at work for this call, and is waited for.

        Raises:
            RanksError: a rank does not come, is silent, or does something else.
        """
        self._number += 1
        group = f"roll/{self._number}"
        told = json.dumps({"what": what, "said": said}).encode()
        self._surely(lambda: self._board.join(group, self._world.rank, told))
        if not self._world.leads:
            return _verdict(self._wait(what, group, meets=meets))
        try:
            members = [member_key(group, rank) for rank in range(self._world.size)]
            verdict = judge(_alike(what, self._wait_all(what, group, members, meets=meets)))
        except BaseException as error:
            known = _error_bytes(error)
            with contextlib.suppress(BoardLostError):
                self._surely(lambda: self._board.put(f"{group}/verdict", known))
            raise
        self._surely(lambda: self._board.put(f"{group}/verdict", json.dumps({"verdict": verdict}).encode()))
        return verdict

    def _surely(self, write: Callable[[], None]) -> None:
        """Write, again while the board does not answer: the others wait for it as long as this rank lives. BoardLostError in the end."""
        end_s = self._clock() + silent_s(self._world.size)
        while True:
            try:
                return write()
            except BoardLostError:
                if self._clock() > end_s:
                    raise
                self._sleep(0.1)

    def _wait_all(self, what: str, group: str, members: list[str], *, meets: bool) -> list[Any]:
        started_s, pause_s, told = self._clock(), 0.002, False
        missing: list[int] | None = None
        while True:
            if missing == [] or self._board.n_joined(group) >= self._world.size:
                found = self._board.get_all(members)
                if found is not None:
                    return [json.loads(value) for value in found]
            waited_s = self._clock() - started_s
            if waited_s > self._patience_s:
                missing = missing_members(self._board, group, self._world.size, _LISTENED_TO)
                if missing and not told:
                    told = True
                    words = "%s: waiting for ranks %s of %d, for %.0f s at most where they have not come: every rank makes this call"
                    logger.warning(words, what, _ranks(missing), self._world.size, self._come_s)
                self._raise_if_gone(what, missing, waited_s, meets=meets)
            pause_s = self._pause(pause_s)

    def _wait(self, what: str, group: str, *, meets: bool) -> bytes:
        started_s, pause_s = self._clock(), max(0.002, share_s(self._world.size, 65536))
        while True:
            found = self._board.get(f"{group}/verdict")
            if found is not None:
                return found
            waited_s = self._clock() - started_s
            if waited_s > self._patience_s:
                is_missed = meets and self._board.get(member_key(group, 0)) is None
                self._raise_if_gone(what, [0], waited_s, meets=is_missed)
            pause_s = self._pause(pause_s)

    def _raise_if_gone(self, what: str, missing: list[int], waited_s: float, *, meets: bool) -> None:
        """RanksError for those that have died, that have never come, or that do something else while all `meets`."""
        silent, late = self.listener.silent(missing), waited_s > self._come_s
        living = [rank for rank in missing if self._board.get(f"pulse/{rank}") is not None]
        gone = [rank for rank in missing if (rank in silent if rank in living else late)]
        if not gone and not (meets and late and living):
            return
        named, s = f"{_ranks(gone or living)} of {self._world.size}", "s" if len(gone or living) > 1 else ""
        lives = "live, but have" if s else "lives, but has"
        words = f"nothing was heard of rank{s} {named}" if gone else f"rank{s} {named} {lives} not made this call"
        raise RanksError(
            f"{what}: {words} for {waited_s:.0f} s. Every rank has to make the same calls of its Checkpointer, not rank 0 "
            "alone. Look at the log of the first of them"
        )

    def _pause(self, pause_s: float) -> float:
        self._sleep(pause_s)
        return min(max(0.25, share_s(self._world.size, 8192)), 1.5 * pause_s)


def _alike(what: str, values: list[dict[str, Any]]) -> list[Any]:
    """What each rank has said, if all do the same. RanksError."""
    for rank, value in enumerate(values):
        if value["what"] != what:
            raise RanksError(
                f"ranks do not make the same calls of their Checkpointers: rank 0 is {what}, and rank {rank} is {value['what']}. "
                "Every rank has to make the same calls, in the same order"
            )
    return [value["said"] for value in values]


def _error_bytes(error: BaseException) -> bytes:
    told: dict[str, Any] = {"error": type(error).__name__, "words": str(error)}
    if isinstance(error, CorruptCheckpointError):
        told |= {
            "source": error.source,
            "advice": error.advice,
            "damage": [asdict(damage) for damage in error.damage[:_SHOWN]],
        }
    return json.dumps(told).encode()


def _verdict(data: bytes) -> Any:
    """What rank 0 has found, or its error, in this rank's hands."""
    value = json.loads(data)
    if "verdict" in value:
        return value["verdict"]
    if "damage" in value:
        damage = [_damage_of(one) for one in value["damage"]]
        damaged = CorruptCheckpointError(value["source"], damage, value["advice"])
        damaged.args = (value["words"],)  # of all that rank 0 has found
        raise damaged
    raise remote_error(value["error"], value["words"])


def _damage_of(told: dict[str, Any]) -> Damage:
    stored = told["stored"]
    return Damage(**{**told, "tensors": tuple(told["tensors"]), "stored": None if stored is None else tuple(stored)})


def remote_error(name: str, words: str) -> Exception:
    """Another rank's error: of its own type, where that takes nothing but words."""
    kind = getattr(errors, name, None) or getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, (CheckpointError, TypeError, ValueError)):
        try:
            return kind(words)
        except TypeError:  # it wants more than words
            pass
    return RanksError(f"rank 0: {name}: {words}")


def _ranks(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks[:_SHOWN])) + (f" and {len(ranks) - _SHOWN} more" if len(ranks) > _SHOWN else "")

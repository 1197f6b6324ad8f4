"""One rank decides, and all learn it: when a job begins and when it restores. Whoever waits gives up on ranks that are silent."""

from __future__ import annotations

import builtins
import json
import time
from collections.abc import Callable
from typing import Any

from fastckpt import errors
from fastckpt.errors import CheckpointError, RanksError
from fastckpt.ranks.board import Board, member_key
from fastckpt.ranks.pulse import Listener, silent_s
from fastckpt.ranks.world import World

_SHOWN = 20


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
        self._listener = Listener(world, board, clock)
        self._patience_s = min(come_s, silent_s(world.size) / 2)
        """After which it is looked for who is missing."""
        self._number = 0

    def decide(self, what: str, said: Any, judge: Callable[[list[Any]], Any]) -> Any:
        """Have rank 0 judge what all ranks say, and return what it found, on every rank.

        Args:
            what: is done, for errors: "restoring".
            said: by this rank.
            judge: called on rank 0 with what all have said, by rank. What it raises is raised on every rank.

        Raises:
            RanksError: a rank does not come, is silent, or does something else.
        """
        self._number += 1
        group = f"roll/{self._number}"
        self._board.join(group, self._world.rank, json.dumps({"what": what, "said": said}).encode())
        if not self._world.leads:
            return _verdict(self._wait(f"{what}: nothing was heard of rank 0", f"{group}/verdict", [0]))
        try:
            members = [member_key(group, rank) for rank in range(self._world.size)]
            verdict = judge(_alike(what, self._wait_all(what, group, members)))
        except BaseException as error:
            self._board.put(f"{group}/verdict", _error_bytes(error))
            raise
        self._board.put(f"{group}/verdict", json.dumps({"verdict": verdict}).encode())
        return verdict

    def _wait_all(self, what: str, group: str, members: list[str]) -> list[Any]:
        started_s, pause_s = self._clock(), 0.002
        while True:
            if self._board.n_joined(group) >= self._world.size:
                found = self._board.get_all(members)
                if found is not None:
                    return [json.loads(value) for value in found]
            waited_s = self._clock() - started_s
            if waited_s > self._patience_s:
                missing = [rank for rank, key in enumerate(members) if self._board.get(key) is None]
                gone = self._gone(missing, waited_s)
                if gone:
                    raise RanksError(
                        f"{what}: nothing was heard of rank{'s' if len(gone) > 1 else ''} {_ranks(gone)} of {self._world.size} for "
                        f"{waited_s:.0f} s. Every rank has to make the same calls of its Checkpointer. Look at the log of the first of them"
                    )
            pause_s = self._pause(pause_s)

    def _wait(self, why: str, key: str, ranks: list[int]) -> bytes:
        started_s, pause_s = self._clock(), 0.002
        while True:
            found = self._board.get(key)
            if found is not None:
                return found
            waited_s = self._clock() - started_s
            if waited_s > self._patience_s and self._gone(ranks, waited_s):
                raise RanksError(
                    f"{why} for {waited_s:.0f} s. Every rank has to make the same calls of its Checkpointer"
                )
            pause_s = self._pause(pause_s)

    def _gone(self, ranks: list[int], waited_s: float) -> list[int]:
        """Those that have died, or that have never come."""
        silent, late = self._listener.silent(ranks), waited_s > self._come_s
        return [rank for rank in ranks if (late if self._board.get(f"pulse/{rank}") is None else rank in silent)]

    def _pause(self, pause_s: float) -> float:
        self._sleep(pause_s)
        return min(0.25, 1.5 * pause_s)


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
    return json.dumps({"error": type(error).__name__, "words": str(error)}).encode()


def _verdict(data: bytes) -> Any:
    """What rank 0 has found, or its error, in this rank's hands."""
    value = json.loads(data)
    if "verdict" in value:
        return value["verdict"]
    raise remote_error(value["error"], value["words"])


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

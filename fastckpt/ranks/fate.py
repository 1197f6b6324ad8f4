"""What becomes of one save of all ranks: committed, or abandoned. Whoever writes a save's fate first on the board has decided it.

begun   rank → the step that it saves at this call
first   the step of the rank that has begun first
votes   rank → a summary of its vote, which is durable by then
fate    "commit", by a rank that has seen all votes, or why the save is abandoned, by any rank; never both
done    the outcome, by the rank that has put the commit record
"""

from __future__ import annotations

import json
from typing import Any

from fastckpt.ranks.board import Board, member_key, missing_members
from fastckpt.ranks.world import World

_COMMIT = b"commit"


class Fate:
    """One save, as one rank sees it. Any thread. Every method may raise BoardLostError."""

    def __init__(self, world: World, board: Board, name: str) -> None:
        """name: of the save, the same on all ranks."""
        self.rank, self._world, self._board, self._at = world.rank, world, board, f"save/{name}"

    def begin(self, step: int) -> tuple[int, int] | None:
        """Tell the others which step this rank saves. A rank that saves another one, and that step; None: there is none so far."""
        self._board.put(member_key(f"{self._at}/begun", self._world.rank), b"%d" % step)
        rank, other = map(int, self._board.put_once(f"{self._at}/first", b"%d %d" % (self._world.rank, step)).split())
        return None if other == step else (rank, other)

    def not_begun(self, ranks: list[int]) -> list[int]:
        """Those of these ranks that have not begun."""
        return [rank for rank in ranks if self._board.get(member_key(f"{self._at}/begun", rank)) is None]

    def vote(self, summary: dict[str, Any]) -> None:
        """This rank's part is durable."""
        self._board.join(f"{self._at}/votes", self._world.rank, json.dumps(summary).encode())

    def all_voted(self) -> bool:
        """Whether no vote is missing, as far as they were counted: see `Board.n_joined`."""
        return self._board.n_joined(f"{self._at}/votes") >= self._world.size

    def votes(self) -> list[dict[str, Any]] | None:
        """Summaries of all ranks' votes, rank 0's first; None while some are missing."""
        group = f"{self._at}/votes"
        found = self._board.get_all([member_key(group, rank) for rank in range(self._world.size)])
        return None if found is None else [json.loads(one) for one in found]

    def missing(self, most: int) -> list[int]:
        """The first ranks that have not voted, counted or not."""
        return missing_members(self._board, f"{self._at}/votes", self._world.size, most)

    def commit(self) -> str | None:
        """Decide that this save is committed. None: it is to be; else why it was abandoned before."""
        stands = self._board.put_once(f"{self._at}/fate", _COMMIT)
        return None if stands == _COMMIT else stands.decode()

    def abandon(self, why: str) -> str | None:
        """Decide that this save is abandoned. Returns the reason that stands, perhaps another rank's; None: it is to be committed."""
        stands = self._board.put_once(f"{self._at}/fate", why.encode())
        return None if stands == _COMMIT else stands.decode()

    def abandoned(self) -> str | None:
        """Why this save was abandoned; None: it was not, or not yet."""
        stands = self._board.get(f"{self._at}/fate")
        return None if stands is None or stands == _COMMIT else stands.decode()

    def decided(self) -> str | None:
        """The fate of this save, by one request while there is none. None: not yet; "": it is to be committed; else why it is not."""
        stands = self._board.get(f"{self._at}/fate")
        return None if stands is None else "" if stands == _COMMIT else stands.decode()

    def finish(self, outcome: dict[str, Any]) -> None:
        """Tell the others what came of putting the commit record."""
        self._board.put(f"{self._at}/done", json.dumps(outcome).encode())

    def outcome(self) -> dict[str, Any] | None:
        """What `finish` was given; None: not yet."""
        found = self._board.get(f"{self._at}/done")
        return None if found is None else json.loads(found)

    def forget(self) -> None:
        """Remove what this rank has told, some hundred bytes. Fate and outcome stay, for ranks that are slow."""
        self._board.delete([member_key(f"{self._at}/{group}", self._world.rank) for group in ("begun", "votes")])

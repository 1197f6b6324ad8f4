"""What becomes of one save of all ranks: committed, or abandoned. Whoever writes a save's fate first on the board has decided it.

begun   rank → the step that it saves at this call
votes   rank → a summary of its vote, which is durable by then
fate    "commit", by a rank that has seen all votes, or why the save is abandoned, by any rank; never both
done    the outcome, by the rank that has put the commit record
"""

from __future__ import annotations

import json
from typing import Any

from fastckpt.ranks.board import Board, member_key
from fastckpt.ranks.world import World

_COMMIT = b"commit"


class Fate:
    """One save, as one rank sees it. Any thread. Every method may raise BoardLostError."""

    def __init__(self, world: World, board: Board, name: str) -> None:
        """name: of the save, the same on all ranks."""
        self._world, self._board, self._at = world, board, f"save/{name}"

    def begin(self, step: int) -> None:
        """Tell the others which step this rank saves."""
        self._board.join(f"{self._at}/begun", self._world.rank, b"%d" % step)

    def steps(self) -> dict[int, int]:
        """Rank → the step that it saves, of ranks that have begun."""
        if self._board.n_joined(f"{self._at}/begun") >= self._world.size:
            found = self._board.get_all([member_key(f"{self._at}/begun", rank) for rank in range(self._world.size)])
            if found is not None:
                return dict(enumerate(map(int, found)))
        said = {rank: self._board.get(member_key(f"{self._at}/begun", rank)) for rank in range(self._world.size)}
        return {rank: int(step) for rank, step in said.items() if step is not None}

    def vote(self, summary: dict[str, Any]) -> None:
        """This rank's part is durable."""
        self._board.join(f"{self._at}/votes", self._world.rank, json.dumps(summary).encode())

    def votes(self) -> list[dict[str, Any]] | None:
        """Summaries of all ranks' votes, rank 0's first; None while some are missing."""
        group = f"{self._at}/votes"
        if self._board.n_joined(group) < self._world.size:
            return None
        found = self._board.get_all([member_key(group, rank) for rank in range(self._world.size)])
        return None if found is None else [json.loads(one) for one in found]

    def missing(self) -> list[int]:
        """Ranks that have not voted."""
        group = f"{self._at}/votes"
        return [rank for rank in range(self._world.size) if self._board.get(member_key(group, rank)) is None]

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

    def is_committed(self) -> bool:
        """Whether it was decided that this save is committed."""
        return self._board.get(f"{self._at}/fate") == _COMMIT

    def finish(self, outcome: dict[str, Any]) -> None:
        """Tell the others what came of putting the commit record."""
        self._board.put(f"{self._at}/done", json.dumps(outcome).encode())

    def outcome(self) -> dict[str, Any] | None:
        """What `finish` was given; None: not yet."""
        found = self._board.get(f"{self._at}/done")
        return None if found is None else json.loads(found)

    def forget(self) -> None:
        """Remove what nobody reads any more: an outcome stays, for a rank that is slow."""
        ranks = range(self._world.size)
        self._board.delete([member_key(f"{self._at}/{group}", rank) for group in ("begun", "votes") for rank in ranks])

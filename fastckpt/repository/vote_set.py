"""Whether the votes of one try make a save: the one answer that committing, retention and a person's tools go by. Pure."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass

from fastckpt.format.keys import VoteName


class VoteSetState(enum.Enum):
    """What the names of the votes of one try say."""

    COMPLETE = "complete"
    INCOMPLETE = "incomplete"
    CONTRADICTORY = "contradictory"
    """Ranks disagree about how many they are, or one has voted twice: no commit may come of that, now or later."""


@dataclass(frozen=True)
class VoteSet:
    """The votes of one try."""

    state: VoteSetState
    votes: tuple[VoteName, ...]
    """Rank 0's first."""
    why: str = ""
    """What contradicts what."""


def vote_set_of(names: Iterable[VoteName]) -> VoteSet:
    """Judge the votes of one try that are there."""
    votes = tuple(sorted(names, key=lambda name: (name.rank, name.digest)))
    worlds = sorted({vote.world for vote in votes})
    ranks = [vote.rank for vote in votes]
    twice = sorted({rank for rank in ranks if ranks.count(rank) > 1})
    if len(worlds) > 1 or twice:
        why = f"worlds {worlds}, more than one vote of ranks {twice}"
        return VoteSet(VoteSetState.CONTRADICTORY, votes, why)
    complete = bool(votes) and len(votes) == worlds[0]
    return VoteSet(VoteSetState.COMPLETE if complete else VoteSetState.INCOMPLETE, votes)

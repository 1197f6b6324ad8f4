"""Whether the votes of one try make a save: one answer, used by committing, by retention and by the command line. Pure."""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from fastckpt.format.keys import VoteName


class VoteSetState(enum.Enum):
    """The state of a try, judged by the names of its votes."""

    COMPLETE = "complete"
    INCOMPLETE = "incomplete"
    CONTRADICTORY = "contradictory"
    """Ranks disagree about how many they are, or one has voted twice: such votes must never be committed, now or later."""


@dataclass(frozen=True)
class VoteSet:
    """The votes of one try."""

    state: VoteSetState
    votes: tuple[VoteName, ...]
    """The votes, that of rank 0 first."""
    why: str = ""
    """The contradiction in words."""


def vote_set_of(names: Iterable[VoteName]) -> VoteSet:
    """Judge the existing votes of one try."""
    votes = tuple(sorted(names, key=lambda name: (name.rank, name.digest)))
    worlds = sorted({vote.world for vote in votes})
    ranks = [vote.rank for vote in votes]
    twice = sorted(rank for rank, n in Counter(ranks).items() if n > 1)
    if len(worlds) > 1 or twice:
        why = f"worlds {worlds}, more than one vote of ranks {twice}"
        return VoteSet(VoteSetState.CONTRADICTORY, votes, why)
    complete = bool(votes) and len(votes) == worlds[0]
    return VoteSet(VoteSetState.COMPLETE if complete else VoteSetState.INCOMPLETE, votes)

"""Votes of many ranks → commit record, without a collective: each rank tells of its vote, one commits, all learn what came of it.

    1. every rank places its vote in the store, then tells the others of it on the board
    2. the first of a few ranks that lives sees all votes, decides the fate of the save, and puts the commit record (`ranks.roles`)
    3. every rank finds the outcome on the board

A rank that has died is found by its silence, and the save is abandoned by all. Where the board is lost, the repository alone decides: the
commit record, or a tombstone in its place, whichever is created first.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from fastckpt.errors import (
    AbandonedError,
    BaseLostError,
    CheckpointError,
    CorruptCheckpointError,
    SaveError,
    StoreError,
    SupersededError,
    TornSnapshotError,
)
from fastckpt.events import logger
from fastckpt.format.directory import Directory, FileEntry
from fastckpt.format.keys import DATA, SaveId, VoteName, commit_key
from fastckpt.format.repository_records import Commit, Tombstone, parse_commit_record, tombstone_bytes, utc_now
from fastckpt.format.shares import GroupClaim, group_of_json, group_to_json, groups_at_odds
from fastckpt.format.vote import Vote, replica_conflicts, save_info, save_to_json, unmet_shares
from fastckpt.host.boot_clock import seconds_since_boot
from fastckpt.ranks.board import BoardLostError
from fastckpt.ranks.fate import Fate
from fastckpt.ranks.pulse import silent_s
from fastckpt.ranks.roles import N_COMMITTERS, commit_turn, committers, share_s, watches
from fastckpt.ranks.team import Team
from fastckpt.repository.commit import commit_votes, create, has_all_votes, poll_commit, read_vote, try_commit
from fastckpt.store.base import Store

_TURN_S = 2.0
"""How much later than the one before it each of them commits, and how long rank 0's silence has to be looked into."""
_MAX_LISTENED_TO = 64
"""Of more missing ranks only these are listened to: one that is dead is enough."""
_SHOWN = 20
_ASK_S = 1.0
_MAX_PAUSE_OF_OBJECTS_S = 8.0
_READING_S = 10.0
"""What it takes to read the votes of 16,384 ranks from a store."""
UNFINISHED = "abandoned: a rank gave no vote"
_random = random.Random()  # of our own: drawing from the global one would change what training draws


@dataclass
class _Since:
    """What this rank has done and seen, by its clock in seconds; None: not yet."""

    told: bool = False
    """The others know of its vote."""
    begun_s: float | None = None
    lost_s: float | None = None
    """The board has not answered since."""
    complete_s: float | None = None
    """All votes are there. Those in the store are found complete by whoever comes first when it has listed them, each time anew."""
    decided_s: float | None = None
    """It is to be committed; seconds after the beginning."""
    watched_s: float = 0.0
    """It has looked for the dead last; seconds after the beginning."""


def _longest_pause_s(size: int, *, commits: bool) -> float:
    """Seconds between two looks at the board: 0.01 for a few ranks, for whom it is most of what a commit takes; 0.25 with 1,024, and 4 with
    16,384, except for those few that commit.
    """
    pause_s = max(0.01, share_s(size, 4096))
    return min(0.25, pause_s) if commits else pause_s


class JointTurn(NamedTuple):
    """One save that all ranks make."""

    fate: Fate
    attempt: int
    """The same on all ranks."""


def summary_of(vote: Vote) -> dict[str, Any]:
    """What the others need to know of a vote, for JSON."""
    own = f"{DATA}{vote.name.save}/"
    found: dict[str, Any] = {
        "of": list(vote.name.save),
        "bytes": vote.name.n_bytes,
        "digest": vote.name.digest,
        "parts": dict(vote.parts),
        "save": save_to_json(vote.info),
        "groups": [group_to_json(claim) for claim in vote.groups],
        "foreign": [list(file) for file in vote.files if not file.key.startswith(own)],
    }
    if vote.name.rank == 0:
        found |= {"meta": vote.directory.meta, "writer": vote.directory.writer}
    return found


def vote_of(summary: dict[str, Any], save: SaveId, rank: int, world: int) -> Vote:
    """The vote that a summary is of; of its packs only those of other saves. CorruptCheckpointError."""
    name = VoteName(save, rank, world, summary["bytes"], summary["digest"])
    directory = Directory(
        (),
        (),
        step=save.step,
        rank=rank,
        world=world,
        writer=summary.get("writer", {}),
        meta=summary.get("meta", {}),
        save=summary["save"],
    )
    info = save_info(directory, name, f"the summary of rank {rank}'s vote for step {save.step}")
    parts = {part: (offset, n_bytes) for part, (offset, n_bytes) in summary["parts"].items()}
    files = tuple(FileEntry(*file) for file in summary["foreign"])
    return Vote(name, info, directory, parts, files, _groups(summary))


def _groups(summary: dict[str, Any]) -> tuple[GroupClaim, ...]:
    return tuple(map(group_of_json, summary["groups"]))


def _of_others(save: SaveId, summaries: list[dict[str, Any]]) -> str | None:
    """Why votes of one call are not votes of one save, in words for every rank."""
    for rank, summary in enumerate(summaries):
        other = SaveId(*summary["of"])
        if other != save:
            first = SaveId(*summaries[0]["of"])
            what = (
                f"step {other.step}, and rank 0 step {first.step}"
                if other.step != first.step
                else f"{other}, and rank 0 {first}"
            )
            return f"!ranks disagree: rank {rank} saves {what}, at the same call"
    return None


class JointCommit:
    """One rank's part in the end of one save. For the thread of saves."""

    def __init__(
        self,
        store: Store,
        team: Team,
        fate: Fate,
        acknowledge: Callable[[Commit], None],
        cancelled: Callable[[], bool],
        timeout_s: float,
    ) -> None:
        """acknowledge: what whoever commits looks at afterwards: SupersededError. timeout_s: how long votes are waited for."""
        self._store, self._team, self._fate, self._acknowledge = store, team, fate, acknowledge
        self._cancelled, self._timeout_s = cancelled, timeout_s
        self._turn = commit_turn(team.world)
        self._listener = team.roll.listener
        self._since, self._placed_s = _Since(), seconds_since_boot()
        self._pause_s = 0.005 if self._turn is not None else max(0.005, share_s(team.world.size, 8192))

    def run(self, vote: Vote) -> Commit:
        """After this rank's vote was placed: the commit record, once there is one; without its votes where another rank has put it.

        Raises:
            AbandonedError: all ranks abandon this save.
            SupersededError, StoreError: as those of a save of one rank.
        """
        while True:
            found = self.look(vote)
            if isinstance(found, Commit):
                return found
            self._team.sleep(found)

    def look(self, vote: Vote) -> Commit | float:
        """One look at what has become of the save. Seconds until the next one, while that is not known. Raises what `run` does."""
        since, now_s, size = self._since, self._team.clock(), self._team.world.size
        since.begun_s = now_s if since.begun_s is None else since.begun_s
        try:
            if not since.told:
                self._fate.vote(summary_of(vote))
                since.told = True
            commit = self._look(vote, now_s - since.begun_s)
            longest_s = _longest_pause_s(size, commits=self._turn is not None)
            since.lost_s = None
        except BoardLostError as error:
            longest_s = _MAX_PAUSE_OF_OBJECTS_S
            if since.lost_s is None:
                since.lost_s = now_s
                self._pause_s = max(0.5, min(_MAX_PAUSE_OF_OBJECTS_S, share_s(size, 128)))
                logger.warning("step %d: %s. Its votes are looked for in the store", vote.info.save.step, error)
                # Not all at the same time; and those that commit before those that wait for it.
                return self._pause_s * _random.uniform(0.5, 1) * (1 if self._turn is not None else 2)
            commit = self._look_at_objects(vote, now_s - since.lost_s)
        if commit is not None:
            return commit
        pause_s = self._pause_s * _random.uniform(0.7, 1.3)
        self._pause_s = min(longest_s, 1.5 * self._pause_s)
        return pause_s

    # -- by the board --------------------------------------------------------------------------------------------------

    def _look(self, vote: Vote, waited_s: float) -> Commit | None:
        if self._since.decided_s is None:
            decided = self._fate.decided()
            self._raise_if_abandoned(vote.info.save.step, decided or None)
            self._since.decided_s = None if decided is None else waited_s
        is_decided = self._since.decided_s is not None
        if is_decided:  # by a rank that has seen all votes
            self._since.complete_s = self._since.complete_s or self._team.clock()
        outcome = self._fate.outcome() if is_decided else None
        if outcome is not None:
            return self._learnt(vote, outcome)
        if self._is_my_turn(self._fate.all_voted, max(_TURN_S, share_s(self._team.world.size, 4096))):
            summaries = self._fate.votes()
            if summaries is not None:
                return self._commit(vote, summaries)
        if is_decided:
            return self._look_after_deaths(vote, waited_s)
        why = self._reason_to_give_up(vote, waited_s)
        if why is not None:
            self._raise_if_abandoned(vote.info.save.step, self._fate.abandon(why))
        return None

    def _is_my_turn(self, all_voted: Callable[[], bool], apart_s: float) -> bool:
        """Whether all votes have been there for so long that whoever comes before this rank would have committed."""
        if self._turn is None:
            return False
        if self._since.complete_s is None:
            if not all_voted():
                return False
            self._since.complete_s = self._team.clock()
        return self._team.clock() - self._since.complete_s >= self._turn * apart_s

    def _look_after_deaths(self, vote: Vote, waited_s: float) -> Commit | None:
        """It was decided to commit, and nothing came of it: if all that may commit have died, the repository alone decides."""
        assert self._since.decided_s is not None
        size = self._team.world.size
        if waited_s - self._since.decided_s < silent_s(size) + N_COMMITTERS * _TURN_S:
            return None
        return self._look_at_objects(vote, float("inf"))

    def _commit(self, vote: Vote, summaries: list[dict[str, Any]]) -> Commit:
        save, world = vote.info.save, self._team.world
        problem, votes = _of_others(save, summaries), []
        if problem is None:
            votes = [vote_of(summary, save, rank, world.size) for rank, summary in enumerate(summaries)]
            problem = self._problem(votes)
        self._raise_if_abandoned(save.step, self._fate.commit() if problem is None else self._fate.abandon(problem))
        try:
            commit = commit_votes(self._store, votes, self._placed_s)
        except CheckpointError as error:
            if not isinstance(error, StoreError) or world.rank == committers(world)[-1]:
                self._fate.finish({"failed": f"{type(error).__name__}: {error}"})  # nobody will try again
            raise
        outcome: dict[str, Any] = {
            name: getattr(commit, name)
            for name in (
                "digest",
                "trigger",
                "metrics",
                "meta",
                "raw_bytes",
                "stored_bytes",
                "seconds",
                "utc",
                "writer",
            )
        }
        try:
            self._acknowledge(commit)
        except SupersededError as error:
            outcome["superseded"] = str(error)
            raise
        finally:
            self._fate.finish(outcome)
        return commit

    def _problem(self, votes: list[Vote]) -> str | None:
        """Why votes that are all there must not be committed, in words for every rank."""
        first = votes[0].info
        for vote in votes:
            if vote.info.parent != first.parent:
                return f"!ranks disagree: rank 0 continues from {first.parent}, and rank {vote.name.rank} from {vote.info.parent}"
        odd = groups_at_odds([vote.groups for vote in votes])
        if odd is None:
            return None
        two = [read_vote(self._store, votes[rank].name) for rank in odd]
        words = [*replica_conflicts(two), *unmet_shares(two)] or ["their names, types or sizes differ"]
        more = f" and {len(words) - 3} more" if len(words) > 3 else ""
        return f"!ranks {odd[0]} and {odd[1]} do not hold alike what they should: {'; '.join(words[:3])}{more}"

    def _learnt(self, vote: Vote, outcome: dict[str, Any]) -> Commit:
        step = vote.info.save.step
        if "failed" in outcome:
            of_base = outcome["failed"].startswith((BaseLostError.__name__, CorruptCheckpointError.__name__))
            kind = BaseLostError if of_base else SaveError
            raise kind(f"step {step}: the commit record could not be written: {outcome['failed']}")
        if "superseded" in outcome:
            raise SupersededError(outcome["superseded"])
        return Commit(save=vote.info.save, world=self._team.world.size, parent=vote.info.parent, votes=(), **outcome)

    def _reason_to_give_up(self, vote: Vote, waited_s: float) -> str | None:
        """Why this save is to be abandoned, in words for every rank."""
        world, since = self._team.world, self._since
        if self._cancelled():
            return f"rank {world.rank} has given it up"
        if waited_s < max(_TURN_S, since.watched_s + _TURN_S) or not (self._turn is not None or watches(world)):
            return None
        since.watched_s = waited_s
        if self._turn is not None:
            late = self._fate.missing(_MAX_LISTENED_TO)
            if not late:  # a rank has died when it had voted, and before it was counted
                since.complete_s = since.complete_s or self._team.clock()
                return None
            dead = self._listener.silent(late)[:1]
        else:
            order = committers(world)
            silent = self._listener.silent(order)
            dead = silent if len(silent) == len(order) else []
        if dead:
            return f"!nothing was heard of rank{'s' if dead[1:] else ''} {', '.join(map(str, dead))} for {silent_s(world.size):.0f} s"
        if waited_s >= self._timeout_s and (missing := self._fate.missing(_SHOWN)):
            idle = self._fate.not_begun(missing)
            what = f", and ranks {idle} have not even begun it" if idle else ""
            return f"!no vote of ranks {missing} after {self._timeout_s:.0f} s{what}"
        return None

    def _raise_if_abandoned(self, step: int, why: str | None) -> None:
        if why is not None:
            raise AbandonedError(step, why)

    # -- without it ----------------------------------------------------------------------------------------------------

    def _look_at_objects(self, vote: Vote, lost_s: float) -> Commit | None:
        """lost_s: for how long the board has been lost."""
        save, size = vote.info.save, self._team.world.size
        limit_s = silent_s(size) + min(_READING_S, share_s(size, 1024))
        found = poll_commit(self._store, save.checkpoint)
        if found is None and self._is_my_turn(
            lambda: self._turn == 0 or has_all_votes(self._store, save),
            max(_TURN_S, min(_READING_S, share_s(size, 1024))),
        ):
            found = try_commit(self._store, save, vote)
        if found is None and lost_s >= limit_s:
            key = commit_key(save.checkpoint)
            stone = Tombstone(save.checkpoint, None, UNFINISHED, utc_now())
            found = parse_commit_record(
                create(self._store, key, tombstone_bytes(stone)), save.checkpoint, f"{self._store.url}/{key}"
            )
        if isinstance(found, Tombstone):
            raise AbandonedError(
                save.step,
                f"!ranks cannot reach each other any more, and not all votes were placed within {limit_s:.0f} s",
            )
        if found is not None and self._turn is not None:  # six requests, which need not be made by all
            self._acknowledge(found)
        return found


class Cancelled:
    """Whether an upload is to end early: this rank's own reason, or that another rank has abandoned the save. For several threads."""

    def __init__(self, fate: Fate, cancelled: Callable[[], bool], clock: Callable[[], float], size: int) -> None:
        """size: the number of ranks, which all ask."""
        self._fate, self._cancelled, self._clock = fate, cancelled, clock
        self._ask_s, self._asked_s = max(_ASK_S, share_s(size, 2048)), clock()
        self.why: str | None = None
        """Why the save was abandoned, if that is what ended it."""

    def __call__(self) -> bool:
        now_s = self._clock()
        if now_s - self._asked_s >= self._ask_s:  # asked before every chunk
            self._asked_s = now_s
            with contextlib.suppress(BoardLostError):
                self.why = self.why or self._fate.abandoned()
        return self.why is not None or self._cancelled()


def begin(fate: Fate, rank: int, step: int) -> None:
    """Tell the other ranks which step this one saves. AbandonedError if another rank saves another step at the same call."""
    with contextlib.suppress(BoardLostError):
        other = fate.begin(step)
        if other is not None:
            why = (
                f"!ranks disagree: rank {other[0]} saves step {other[1]}, and rank {rank} step {step}, at the same call"
            )
            raise AbandonedError(step, fate.abandon(why) or why)


def abandon(fate: Fate, rank: int, error: BaseException) -> None:
    """Tell the other ranks that this rank's part of a save has failed. Where they cannot be told, they will miss its vote."""
    failure = "" if isinstance(error, (TornSnapshotError, AbandonedError)) else "!"
    with contextlib.suppress(BoardLostError):
        fate.abandon(f"{failure}rank {rank}: {type(error).__name__}: {error}")

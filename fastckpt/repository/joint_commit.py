"""Votes of many ranks → commit record, without a collective: each rank tells of its vote, one commits, all learn what came of it.

    1. every rank places its vote in the store, then tells the others of it on the board
    2. the first rank that lives sees all votes, decides the fate of the save, and puts the commit record: rank 0, else 1, else 2
    3. every rank finds the outcome on the board

A rank that has died is found by its silence, and the save is abandoned by all. Where the board is lost, the repository alone decides: the
commit record, or a tombstone in its place, whichever is created first.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from typing import Any, NamedTuple

from fastckpt.errors import (
    AbandonedError,
    CheckpointError,
    MissingObjectError,
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
from fastckpt.ranks.board import BoardLostError
from fastckpt.ranks.fate import Fate
from fastckpt.ranks.pulse import Listener, silent_s
from fastckpt.ranks.team import Team
from fastckpt.repository.commit import commit_votes, create, read_commit, read_vote, try_commit
from fastckpt.store.base import Store

_N_COMMITTERS = 3
_TURN_S = 2.0
"""How much later than the one before it each of them commits, and how long rank 0's silence has to be looked into."""
_MAX_LISTENED_TO = 64
"""Of more missing ranks only these are listened to: one that is dead is enough."""
_ASK_S = 1.0
_MAX_PAUSE_OF_OBJECTS_S = 8.0
UNFINISHED = "abandoned: a rank gave no vote"
_random = random.Random()  # of our own: drawing from the global one would change what training draws


def _longest_pause_s(size: int) -> float:
    """Seconds between two looks at the board: 0.01 for a few ranks, for whom it is most of what a commit takes; 0.25 from 1,024 on."""
    return min(0.25, max(0.01, size / 4096))


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
        self._world, self._clock, self._sleep = team.world, team.clock, team.sleep
        self._listener = Listener(team.world, team.board, team.clock)

    def run(self, vote: Vote) -> Commit:
        """After this rank's vote was placed: the commit record, once there is one; without its votes where another rank has put it.

        Raises:
            AbandonedError: all ranks abandon this save.
            SupersededError, StoreError: as those of a save of one rank.
        """
        started_s, pause_s = self._clock(), 0.005
        told, lost_s = False, None
        while True:
            waited_s = self._clock() - started_s
            try:
                if not told:
                    self._fate.vote(summary_of(vote))
                    told = True
                commit = self._look(vote, waited_s)
                if commit is not None:
                    return commit
                lost_s, longest_s = None, _longest_pause_s(self._world.size)
            except BoardLostError as error:
                if lost_s is None:
                    lost_s, pause_s = self._clock(), 0.5
                    logger.warning("step %d: %s. Its votes are looked for in the store", vote.info.save.step, error)
                commit = self._look_at_objects(vote, self._clock() - lost_s)
                if commit is not None:
                    return commit
                longest_s = _MAX_PAUSE_OF_OBJECTS_S
            self._sleep(pause_s * _random.uniform(0.7, 1.3))
            pause_s = min(longest_s, 1.5 * pause_s)

    # -- by the board --------------------------------------------------------------------------------------------------

    def _look(self, vote: Vote, waited_s: float) -> Commit | None:
        outcome = self._fate.outcome()
        if outcome is not None:
            return self._learnt(vote, outcome)
        self._raise_if_abandoned(vote.info.save.step, self._fate.abandoned())
        if self._world.rank < _N_COMMITTERS and waited_s >= _TURN_S * self._world.rank:
            summaries = self._fate.votes()
            if summaries is not None:
                return self._commit(vote, summaries)
        why = self._reason_to_give_up(vote, waited_s)
        if why is not None:
            self._raise_if_abandoned(vote.info.save.step, self._fate.abandon(why))
        if (
            waited_s >= silent_s(self._world.size) and self._fate.is_committed()
        ):  # whoever decided so has died before the put
            commit = try_commit(self._store, vote.info.save, vote)
            if commit is not None:
                self._acknowledge(commit)
            return commit
        return None

    def _commit(self, vote: Vote, summaries: list[dict[str, Any]]) -> Commit:
        save, size = vote.info.save, self._world.size
        problem, votes = _of_others(save, summaries), []
        if problem is None:
            votes = [vote_of(summary, save, rank, size) for rank, summary in enumerate(summaries)]
            problem = self._problem(votes)
        self._raise_if_abandoned(save.step, self._fate.commit() if problem is None else self._fate.abandon(problem))
        try:
            commit = commit_votes(self._store, votes)
        except CheckpointError as error:
            if not isinstance(error, StoreError) or self._world.rank == min(_N_COMMITTERS, self._world.size) - 1:
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
            raise SaveError(f"step {step}: the commit record could not be written: {outcome['failed']}")
        if "superseded" in outcome:
            raise SupersededError(outcome["superseded"])
        return Commit(save=vote.info.save, world=self._world.size, parent=vote.info.parent, votes=(), **outcome)

    def _reason_to_give_up(self, vote: Vote, waited_s: float) -> str | None:
        """Why this save is to be abandoned, in words for every rank."""
        step = vote.info.save.step
        if self._cancelled():
            return f"rank {self._world.rank} has given it up"
        if waited_s < _TURN_S:
            return None
        missing = self._fate.missing()
        steps = self._fate.steps()
        others = {rank: other for rank, other in steps.items() if other != step}
        if others:
            rank, other = next(iter(sorted(others.items())))
            return f"!ranks disagree: rank {rank} saves step {other}, and rank {self._world.rank} step {step}, at the same call"
        dead = self._listener.silent(missing[:_MAX_LISTENED_TO])
        if dead:
            return f"!nothing was heard of rank {dead[0]} for {silent_s(self._world.size):.0f} s"
        if waited_s >= self._timeout_s:
            idle = [rank for rank in missing if rank not in steps]
            what = f", and ranks {idle[:20]} have not even begun it" if idle else ""
            return f"!no vote of ranks {missing[:20]} after {self._timeout_s:.0f} s{what}"
        return None

    def _raise_if_abandoned(self, step: int, why: str | None) -> None:
        if why is not None:
            raise AbandonedError(step, why)

    # -- without it ----------------------------------------------------------------------------------------------------

    def _look_at_objects(self, vote: Vote, lost_s: float) -> Commit | None:
        """lost_s: for how long the board has been lost."""
        save = vote.info.save
        found: Commit | Tombstone | None
        try:
            found = read_commit(self._store, save.checkpoint)
        except MissingObjectError:
            found = None
        if found is None and self._world.rank < _N_COMMITTERS and lost_s >= _TURN_S * self._world.rank:
            found = try_commit(self._store, save, vote)
        if found is None and lost_s >= silent_s(self._world.size):
            key = commit_key(save.checkpoint)
            stone = Tombstone(save.checkpoint, None, UNFINISHED, utc_now())
            found = parse_commit_record(
                create(self._store, key, tombstone_bytes(stone)), save.checkpoint, f"{self._store.url}/{key}"
            )
        if isinstance(found, Tombstone):
            raise AbandonedError(
                save.step,
                f"!ranks cannot reach each other any more, and not all votes were placed within {silent_s(self._world.size):.0f} s",
            )
        if found is not None:
            self._acknowledge(found)
        return found


class Cancelled:
    """Whether an upload is to end early: this rank's own reason, or that another rank has abandoned the save. For several threads."""

    def __init__(self, fate: Fate, cancelled: Callable[[], bool], clock: Callable[[], float]) -> None:
        self._fate, self._cancelled, self._clock = fate, cancelled, clock
        self._asked_s = clock()
        self.why: str | None = None
        """Why the save was abandoned, if that is what ended it."""

    def __call__(self) -> bool:
        now_s = self._clock()
        if now_s - self._asked_s >= _ASK_S:  # asked before every chunk
            self._asked_s = now_s
            with contextlib.suppress(BoardLostError):
                self.why = self.why or self._fate.abandoned()
        return self.why is not None or self._cancelled()


def abandon(fate: Fate, rank: int, error: BaseException) -> None:
    """Tell the other ranks that this rank's part of a save has failed. Where they cannot be told, they will miss its vote."""
    failure = "" if isinstance(error, (TornSnapshotError, AbandonedError)) else "!"
    with contextlib.suppress(BoardLostError):
        fate.abandon(f"{failure}rank {rank}: {type(error).__name__}: {error}")

"""A restore of all ranks of a job: rank 0 chooses, every rank loads its part, and all put it into their objects, or none does."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Any, TypeVar

from fastckpt.errors import CorruptCheckpointError, Damage, PartialRestoreError, RestoreError, RetiredError
from fastckpt.format.keys import CheckpointId, vote_key
from fastckpt.format.repository_records import Commit, Skipped, Tombstone
from fastckpt.ranks.roll import remote_error
from fastckpt.ranks.team import Team
from fastckpt.repository.catalog import Choice, Which
from fastckpt.repository.node_votes import remove_shared_votes, shared_votes
from fastckpt.repository.saved_ranks import SavedRanks
from fastckpt.training.engine import Engine
from fastckpt.training.joint_start import adopt, claimed
from fastckpt.training.restore_asked import Reassign, RestoreAsked
from fastckpt.training.restorer import MOST_ROUNDS, Compared, Damaged, Loaded, Restorer, found_or_refused

T = TypeVar("T")
_DOING = "restoring"


class JointRestorer(Restorer):
    """See the module. Used by the thread that trains; every rank makes the same calls."""

    def __init__(self, engine: Engine, team: Team, *, read_only: bool, reassign: Reassign | None = None) -> None:
        super().__init__(engine, read_only=read_only, reassign=reassign)
        self._team = team

    def restore(self, step: Which, asked: RestoreAsked) -> Loaded | None:
        decide, known_bad, own = self._team.roll.decide, list[Skipped](), set[int]()
        rounds = retired = 0
        while True:
            claims_first = rounds == MOST_ROUNDS
            choice: list[Choice | None] = []  # of rank 0

            def choose(_: list[Any], choice: list[Choice | None] = choice, claims_first: bool = claims_first) -> Any:
                choice.append(self._choose(step, known_bad, own, claims_first=claims_first))
                return _told(choice[0])

            told = decide(_DOING, None, choose, meets=True)
            found: Loaded | None = None
            said: dict[str, Any] = {}
            if told is not None:
                compared, said = self._compare_and_tell(told, asked)
                if not said:
                    found, said = self._load_and_tell(told, asked, compared)

            def judge(
                all_said: list[dict[str, Any]],
                choice: list[Choice | None] = choice,
                claims_first: bool = claims_first,
                retired: int = retired,
            ) -> dict[str, Any]:
                again = self._judge(all_said, choice[0], step, known_bad, retired)
                if again is not None:
                    return {"again": again}
                if any("lacks" in said for said in all_said):
                    return {"fill": True}
                if not (self._read_only or claims_first or self._incarnation.claim(choice[0], step, own)):
                    return {"again": "moved"}
                epoch = self._incarnation.epoch
                return {"claimed": None if self._read_only or epoch is None else claimed(epoch, self._incarnation.last)}

            try:
                verdict = decide(_DOING, said, judge)
                if "fill" in verdict:  # no rank writes before all have found that what they have read fits
                    verdict = decide(_DOING, self._fill_and_tell(found), judge)
            finally:
                if told is not None:
                    remove_shared_votes(self._world, told["nonce"])
            if "again" not in verdict:
                if verdict["claimed"] is not None:
                    adopt(self._team, self._incarnation, verdict["claimed"])
                return found_or_refused(found, self._repository.url, read_only=self._read_only)
            del found
            retired += verdict["again"] == "retired"
            rounds += verdict["again"] == "moved"

    def _compare_and_tell(self, told: dict[str, Any], asked: RestoreAsked) -> tuple[Compared | None, dict[str, Any]]:
        """What saved ranks had for themselves: each rank compares some of them. None where there are as many ranks as have saved."""
        if told["world"] == self._team.world.size:
            return None, {}
        mine, said = self._told_of(lambda: self._compare(told, asked))

        def join(all_found: list[dict[str, str] | None]) -> dict[str, str]:
            joined: dict[str, str] = {}
            for found in all_found:
                joined = {**(found or {}), **joined}
            return joined

        differing = self._team.roll.decide(_DOING, None if mine is None else dict(mine.differing), join)
        return None if mine is None else mine._replace(differing=differing), said

    def _compare(self, told: dict[str, Any], asked: RestoreAsked) -> Compared:
        commit = self._same_record(CheckpointId(told["epoch"], told["step"]), told["digest"])
        some = range(self._world.rank, commit.world, self._world.size)
        ranks = SavedRanks(self._repository.store, commit)
        differing = self._with_damage_named(commit, lambda: self._differing(ranks, asked, some))
        return Compared(ranks, differing)

    def _load_and_tell(
        self, told: dict[str, Any], asked: RestoreAsked, compared: Compared | None
    ) -> tuple[Loaded | None, dict[str, Any]]:
        """This rank's part, and what it has to say of it."""

        def load() -> Loaded:
            if compared is not None:
                return self._load(compared.ranks.commit, asked, compared=compared)
            commit = self._same_record(CheckpointId(told["epoch"], told["step"]), told["digest"])
            own = vote_key(commit.vote(self._world.rank))
            with shared_votes(self._repository.store, self._world, told["nonce"], own) as store:
                return self._load(commit, asked, store=store)

        found, said = self._told_of(load)
        return found, {"lacks": True} if found is not None and found.straight.storages else said

    def _fill_and_tell(self, found: Loaded | None) -> dict[str, Any]:
        """Read what goes straight into the objects of this rank, and tell how that went."""
        assert found is not None  # every rank has loaded its part
        self.writing.begins(found.plan)  # others may have, and it is one restore
        return self._told_of(lambda: self._fill(found))[1]

    def _told_of(self, call: Callable[[], T]) -> tuple[T | None, dict[str, Any]]:
        """The result of a call, or what this rank has to say of its failure."""
        try:
            return call(), {}
        except RetiredError as error:
            return None, {"retired": str(error)}
        except Damaged as damaged:
            return None, {
                "damaged": [
                    [d.part, d.place, d.expected, d.found, d.tensors, d.stored] for d in damaged.error.damage[:20]
                ]
            }
        except Exception as error:
            return None, {"error": type(error).__name__, "words": str(error)}

    def _same_record(self, checkpoint: CheckpointId, digest: str) -> Commit:
        found = self._repository.commit(checkpoint)
        if isinstance(found, Tombstone):
            raise RetiredError(
                f"{self._repository.location(checkpoint)} was retired while it was being read. Try again"
            )
        if found.digest != digest:
            raise RestoreError(
                f"{self._repository.location(checkpoint)} is not what rank 0 reads there: this rank sees another repository"
            )
        return found

    def _judge(
        self,
        all_said: list[dict[str, Any]],
        choice: Choice | None,
        step: Which,
        known_bad: list[Skipped],
        retired: int,
    ) -> str | None:
        """On rank 0: why another round is needed; None: every rank has its part. Raises what ends the restore."""
        for rank, said in enumerate(all_said):
            if "error" in said:
                raise remote_error(said["error"], f"rank {rank}: {said['words']}")
        if any("retired" in said for said in all_said):
            if not isinstance(step, str) or retired:
                raise RetiredError(next(said["retired"] for said in all_said if "retired" in said))
            return "retired"
        damage = [
            Damage(part, f"rank {rank}, {place}", expected, found, tuple(tensors), stored and tuple(stored))
            for rank, said in enumerate(all_said)
            for part, place, expected, found, tensors, stored in said.get("damaged", ())
        ]
        if damage:
            assert choice is not None
            where = self._repository.location(choice.commit.checkpoint)
            error = CorruptCheckpointError(where, damage)
            known_bad[:] = self._pass_over(Damaged(choice.commit, error), step, choice)
            return "damaged"
        return None

    def put_in(self, found: Loaded) -> None:
        try:
            super().put_in(found)
            words = None
        except PartialRestoreError as error:
            words = str(error)

        def judge(all_said: list[str | None]) -> None:
            for rank, said in enumerate(all_said):
                if said is not None:
                    raise PartialRestoreError(f"rank {rank}: {said}")

        self._team.roll.decide("putting the restored state into the objects", words, judge)


def _told(choice: Choice | None) -> dict[str, Any] | None:
    """What rank 0 tells the others of its choice."""
    if choice is None:
        return None
    commit, nonce = choice.commit, secrets.token_hex(8)
    epoch, step = commit.checkpoint
    return {"epoch": epoch, "step": step, "digest": commit.digest, "world": commit.world, "nonce": nonce}

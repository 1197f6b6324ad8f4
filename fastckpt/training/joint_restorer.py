"""A restore of all ranks of a job: rank 0 chooses, every rank loads its part, and all put it into their objects, or none does."""

from __future__ import annotations

import secrets
from typing import Any

from fastckpt.errors import CorruptCheckpointError, Damage, PartialRestoreError, RestoreError, RetiredError
from fastckpt.format.keys import CheckpointId, vote_key
from fastckpt.format.repository_records import Commit, Skipped, Tombstone
from fastckpt.ranks.roll import remote_error
from fastckpt.ranks.team import Team
from fastckpt.repository.catalog import Choice, Which
from fastckpt.repository.node_votes import remove_shared_votes, shared_votes
from fastckpt.training.engine import Engine
from fastckpt.training.joint_start import adopt, claimed
from fastckpt.training.restorer import MOST_ROUNDS, Damaged, Loaded, Restorer

_DOING = "restoring"


class JointRestorer(Restorer):
    """See the module. Used by the thread that trains; every rank makes the same calls."""

    def __init__(self, engine: Engine, team: Team, *, read_only: bool) -> None:
        super().__init__(engine, read_only=read_only)
        self._team = team

    def restore(self, step: Which, weights_only: bool) -> Loaded | None:
        decide, known_bad, own = self._team.roll.decide, list[Skipped](), set[int]()
        rounds = retired = 0
        while True:
            claims_first = rounds == MOST_ROUNDS
            choice: list[Choice | None] = []  # of rank 0

            def choose(_: list[Any], choice: list[Choice | None] = choice, claims_first: bool = claims_first) -> Any:
                choice.append(self._choose(step, known_bad, own, claims_first=claims_first))
                return self._told(choice[0])

            told = decide(_DOING, None, choose, meets=True)
            found: Loaded | None = None
            said: dict[str, Any] = {}
            if told is not None:
                found, said = self._load_and_tell(told, weights_only)

            def judge(
                all_said: list[dict[str, Any]],
                choice: list[Choice | None] = choice,
                claims_first: bool = claims_first,
                retired: int = retired,
            ) -> dict[str, Any]:
                again = self._judge(all_said, choice[0], step, known_bad, retired)
                if again is not None:
                    return {"again": again}
                if not (self._read_only or claims_first or self._incarnation.claim(choice[0], step, own)):
                    return {"again": "moved"}
                epoch = self._incarnation.epoch
                return {"claimed": None if self._read_only or epoch is None else claimed(epoch, self._incarnation.last)}

            try:
                verdict = decide(_DOING, said, judge)
            finally:
                if told is not None:
                    remove_shared_votes(self._world, told["nonce"])
            if "again" not in verdict:
                if verdict["claimed"] is not None:
                    adopt(self._team, self._incarnation, verdict["claimed"])
                return self._found(found)
            del found
            retired += verdict["again"] == "retired"
            rounds += verdict["again"] == "moved"

    def _told(self, choice: Choice | None) -> dict[str, Any] | None:
        """What rank 0 tells the others of its choice."""
        if choice is None:
            return None
        checkpoint = choice.commit.checkpoint
        if choice.commit.world != self._team.world.size:
            raise RestoreError(
                f"{self._repository.location(checkpoint)} was saved by {choice.commit.world} ranks, and this job has "
                f"{self._team.world.size}: this version restores on as many ranks as have saved. Nothing was changed"
            )
        nonce = secrets.token_hex(8)
        return {"epoch": checkpoint.epoch, "step": checkpoint.step, "digest": choice.commit.digest, "nonce": nonce}

    def _load_and_tell(self, told: dict[str, Any], weights_only: bool) -> tuple[Loaded | None, dict[str, Any]]:
        """This rank's part, and what it has to say of it."""
        checkpoint = CheckpointId(told["epoch"], told["step"])
        try:
            commit = self._same_record(checkpoint, told["digest"])
            own = vote_key(commit.vote(self._world.rank))
            with shared_votes(self._repository.store, self._world, told["nonce"], own) as store:
                return self._load(commit, weights_only, store=store), {}
        except RetiredError as error:
            return None, {"retired": str(error)}
        except Damaged as damaged:
            return None, {
                "damaged": [[d.part, d.place, d.expected, d.found, list(d.tensors)] for d in damaged.error.damage[:20]]
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
            Damage(part, f"rank {rank}, {place}", expected, found, tuple(tensors))
            for rank, said in enumerate(all_said)
            for part, place, expected, found, tensors in said.get("damaged", ())
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

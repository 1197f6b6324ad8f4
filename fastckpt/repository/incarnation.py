"""One incarnation of a job in its repository: it claims an epoch, saves steps, acknowledges durable saves, retires unwanted ones.

Knows nothing of training; that is the task of `Checkpointer`. Called from one thread at a time.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Collection, Sequence

from fastckpt.errors import AbandonedError, RepositoryError, SaveError, SupersededError
from fastckpt.format.keys import MARKER, MAX_STEP, MAX_TRY, SaveId, epoch_key
from fastckpt.format.repository_records import Commit, Epoch, Parent, Skipped, epoch_bytes
from fastckpt.format.sealed_state import SealedState
from fastckpt.format.vote import Vote
from fastckpt.options import Options
from fastckpt.ranks.board import BoardLostError
from fastckpt.ranks.fate import Fate
from fastckpt.ranks.team import Team
from fastckpt.repository.acknowledgement import look
from fastckpt.repository.base_check import usable
from fastckpt.repository.catalog import Catalog, Choice, Which, complete_pending
from fastckpt.repository.collector import Collector
from fastckpt.repository.commit import create, list_votes, require_vote, try_commit
from fastckpt.repository.joint_commit import Cancelled, JointCommit, JointTurn, abandon, begin
from fastckpt.repository.repository import Repository
from fastckpt.repository.retention import GRACE_S, Keep, RetentionPlan, plan_retention
from fastckpt.repository.still_ours import StillOurs
from fastckpt.writing.bases import Base, Uploaded
from fastckpt.writing.rank import SaveAsked, SaveRequest, UploadThreads, upload
from fastckpt.writing.uplink import Uplink

_MAX_POLL_S = 5.0
# A generator of our own: drawing from the global one would change the numbers that training draws.
_random = random.Random()


class Incarnation:
    """See the module. rank and world: this process's place among those that save together; rank 0 claims, and the others `adopt`."""

    def __init__(
        self,
        repository: Repository,
        options: Options,
        *,
        rank: int = 0,
        world: int = 1,
        team: Team | None = None,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
        in_a_hurry: Callable[[], bool] = lambda: False,
    ) -> None:
        """team: the ranks of one job; None: votes of other ranks, if there are any, are waited for by looking for them in the store.
        in_a_hurry: whether a notice has come; after that no limit for uploads holds.
        """
        self.repository = repository
        self.epoch: Epoch | None = None
        self.last: Parent | None = None
        """The newest checkpoint that this incarnation restored or saw committed."""
        self.in_flight: set[SaveId] = set()
        self._options = options
        self._rank, self._world = (rank, world) if team is None else (team.world.rank, team.world.size)
        self._team = team
        self._attempts: dict[int, int] = {}
        self._collector = Collector(repository)
        self.uplink = Uplink(options, in_a_hurry)
        self._told: Fate | None = None
        """Of the last save that all ranks made."""
        self._sleep, self._clock = sleep, clock

    def choose_and_claim(
        self, step: Which = "latest", known_bad: Sequence[Skipped] = (), own: set[int] | None = None
    ) -> Choice | None:
        """Choose a checkpoint and claim an epoch that continues from it. None: nothing was ever committed, start from 0.

        own: epochs that this restore has claimed so far. Errors as those of `choose`.
        """
        own = set() if own is None else own
        choice = self.choose(step, known_bad, own)
        while not self.claim(choice, step, own):
            choice = self.choose(step, [*known_bad, *(() if choice is None else choice.skipped)], own)
        return choice

    def choose(
        self, step: Which = "latest", known_bad: Sequence[Skipped] = (), own: Collection[int] = ()
    ) -> Choice | None:
        """Choose the checkpoint that `choose_and_claim` would choose. Claims nothing, but first completes saves that died between vote and
        commit.

        known_bad: checkpoints whose data a caller found damaged. own: epochs to ignore. NoCheckpointError, CorruptCheckpointError,
        StoreError.
        """
        self.repository.initialise()
        catalog = Catalog(self.repository, checks_votes=self._team is None)
        if isinstance(step, str) and complete_pending(self.repository, catalog):
            catalog = Catalog(self.repository, checks_votes=self._team is None)
        return catalog.choose(step, known_bad, own)

    def claim(self, choice: Choice | None, step: Which, own: set[int]) -> bool:
        """Claim an epoch that continues from the result of `choose(step)`. False: the newest checkpoint has changed meanwhile, choose
        again.

        own: the new epoch's number is added to it.
        """
        parent = None if choice is None else Parent(choice.commit.checkpoint, choice.commit.digest)
        skipped = () if choice is None else choice.skipped
        named = not isinstance(step, str)
        number = self.epoch.number if self.epoch is not None else 0
        self.epoch = self.repository.claim(
            parent, rewind=named or bool(skipped), skipped=skipped, world=self._world, above=number
        )
        own.add(self.epoch.number)
        self.last, self._attempts = parent, {}
        if named:  # a person asked for this checkpoint: newer commits elsewhere change nothing
            return True
        # The second reading: an older incarnation may have committed before it could see our claim; its checkpoint must not be lost (G8).
        catalog = Catalog(self.repository)
        if any(c.epoch == self.epoch.number for c in catalog.listing.commits):
            own.discard(self.epoch.number)  # this store let two incarnations claim one number
            return False
        passed = {s.checkpoint for s in skipped}
        head = next((c for c in catalog.history(own) if c not in passed), None)
        return head == (None if parent is None else parent.checkpoint)

    def begin(self, *, fresh: bool = False) -> Epoch:
        """Claim an epoch that continues from nothing. RepositoryError if there are checkpoints and `fresh` is False."""
        self.repository.initialise()
        if not fresh:
            self._refuse_existing(Catalog(self.repository))
        number = self.epoch.number if self.epoch is not None else 0
        self.epoch = self.repository.claim(None, fresh=fresh, world=self._world, above=number)
        if not fresh:
            self._refuse_existing(Catalog(self.repository))
        self.last, self._attempts = None, {}
        return self.epoch

    def _refuse_existing(self, catalog: Catalog) -> None:
        newest = next(catalog.history(), None)
        if newest is not None:
            self.epoch = None
            raise RepositoryError(
                f"{self.repository.url} has checkpoints already (newest: step {newest.step}). Call restore() before the first save, "
                "use another URL, or pass fresh=True to begin a new history beside them"
            )

    def check_step(self, step: int) -> None:
        """SaveError unless a save of this step can follow what was restored and saved."""
        if type(step) is not int or not 0 <= step <= MAX_STEP:
            raise SaveError(f"step is {step!r}: expected an integer from 0 to {MAX_STEP}")
        if self.last is not None and step <= self.last.checkpoint.step:
            what = "saved" if self.epoch is not None and self.last.checkpoint.epoch == self.epoch.number else "restored"
            raise SaveError(
                f"step {step} does not come after step {self.last.checkpoint.step}, which was {what}: a step is saved once. "
                "Count from what restore() returned; to go back, call restore(step=…)"
            )

    def save(
        self,
        sealed: SealedState,
        asked: SaveAsked | int,
        *,
        commit_timeout_s: float = 600.0,
        cancelled: Callable[[], bool] = lambda: False,
        threads: UploadThreads | None = None,
        turn: JointTurn | None = None,
        base: Base | None = None,
        uploaded: Callable[[Uploaded], object] = lambda _: None,
    ) -> Commit:
        """Upload, vote, commit, acknowledge. Returns the commit record after it was read back and no newer incarnation was found.

        asked: what the save says of itself; a step alone will do. cancelled and threads: see `upload`; the caller closes the threads too,
        and the source of the chunks. commit_timeout_s: how long the votes of other ranks are waited for. turn: of a save that all ranks
        make. base: the newest checkpoint of this process, which the save may name instead of uploading its bytes. uploaded: called with
        what was uploaded once the commit was acknowledged.

        BaseLostError, or CorruptCheckpointError where packs of the base are gone: give the next save no base. SupersededError: it is
        committed, but a newer incarnation exists. AbandonedError: another rank could not make its part. Any error: the earlier checkpoints
        are as they were.
        """
        asked = asked if isinstance(asked, SaveAsked) else SaveAsked(asked)
        request = self._request(asked, turn)
        self.in_flight.add(request.save)
        try:
            if turn is not None:
                commit, result = self._save_jointly(sealed, request, turn, commit_timeout_s, cancelled, threads, base)
                if commit.save == request.save:
                    uploaded(result)
                return commit
            result = self._upload(sealed, request, cancelled, threads, base)
            vote = result.vote
            commit = self._commit(vote, commit_timeout_s)
            is_ours = commit.vote(self._rank) == vote.name
            if self._world == 1 and is_ours:
                self._collector.know(commit, [file.key for file in vote.files])
            self.acknowledge(commit)
            if is_ours:
                uploaded(result)
            # Earlier steps are never tried again.
            self._attempts = {later: n for later, n in self._attempts.items() if later > asked.step}
            return commit
        finally:
            self.in_flight.discard(request.save)

    def _save_jointly(
        self,
        sealed: SealedState,
        request: SaveRequest,
        turn: JointTurn,
        commit_timeout_s: float,
        cancelled: Callable[[], bool],
        threads: UploadThreads | None,
        base: Base | None,
    ) -> tuple[Commit, Uploaded]:
        assert self._team is not None
        store, fate, step = self.repository.store, turn.fate, request.save.step
        ends = Cancelled(fate, cancelled, self._clock, self._world)
        try:
            earlier, self._told = self._told, fate
            if (
                earlier is not None
            ):  # every rank has learned its outcome, or will not: nobody waits for more than a save
                with contextlib.suppress(BoardLostError):
                    earlier.forget()
            begin(fate, self._rank, step)
            result = self._upload(sealed, request, ends, threads, base)
            commit = JointCommit(store, self._team, fate, self.acknowledge, cancelled, commit_timeout_s).run(
                result.vote
            )
        except BaseException as error:
            if ends.why is not None and not isinstance(error, AbandonedError):
                raise AbandonedError(step, ends.why) from error
            abandon(fate, self._rank, error)
            raise
        self.last = Parent(commit.checkpoint, commit.digest)
        return commit, result

    def _upload(
        self,
        sealed: SealedState,
        request: SaveRequest,
        cancelled: Callable[[], bool],
        threads: UploadThreads | None,
        base: Base | None,
    ) -> Uploaded:
        store = self.repository.store
        ends = StillOurs(self.repository, request.save.epoch, cancelled)
        base, why_full = usable(base, request.parent, store, self._clock())
        return upload(sealed, store, request, self._options, ends, self.uplink, threads, base, why_full)

    def adopt(self, epoch: Epoch, last: Parent | None) -> None:
        """Save under an epoch that rank 0 of this job has claimed. last: what it continues from."""
        self.epoch, self.last, self._attempts = epoch, last, {}

    def _request(self, asked: SaveAsked, turn: JointTurn | None) -> SaveRequest:
        """The next try of a step. SaveError if it cannot follow what there is."""
        if self.epoch is None:
            self.begin()
        assert self.epoch is not None
        self.check_step(asked.step)
        attempt = self._attempts.get(asked.step, 0) if turn is None else turn.attempt
        if attempt > MAX_TRY:
            raise SaveError(f"step {asked.step} has been tried {attempt} times: save another step")
        self._attempts[asked.step] = attempt + 1
        return SaveRequest(
            asked=asked,
            save=SaveId(self.epoch.number, asked.step, attempt),
            parent=self.last,
            rank=self._rank,
            world=self._world,
        )

    def _commit(self, own: Vote, timeout_s: float) -> Commit:
        """Commit, or wait until another rank has done so. SaveError if votes are still missing after `timeout_s`."""
        save = own.name.save
        give_up, pause = self._clock() + timeout_s, 0.05
        while True:
            commit = try_commit(self.repository.store, save, own)
            if commit is not None:
                return commit
            require_vote(self.repository.store, own.name)
            if self._clock() >= give_up:
                there = {name.rank for name in list_votes(self.repository.store, save)}
                missing = sorted(set(range(self._world)) - there)
                raise SaveError(
                    f"step {save.step}: no vote of ranks {missing[:20]} after {timeout_s:.0f} s. Nothing was committed"
                )
            self._sleep(pause * _random.uniform(0.5, 1.5))
            pause = min(2 * pause, _MAX_POLL_S)

    def acknowledge(self, commit: Commit) -> None:
        """To be called after the commit record was seen. SupersededError if a newer incarnation has claimed the repository, or another job
        has taken our epoch.

        RepositoryError if the commit record no longer exists. The marker and our epoch's record are put back if somebody deleted them.
        """
        assert self.epoch is not None
        repository, number = self.repository, self.epoch.number
        self.last = Parent(commit.checkpoint, commit.digest)
        where = repository.location(commit.checkpoint)
        looked = look(repository, commit, self.epoch, at_once=self._options.connections > 1)
        found, newest = looked.commit, looked.newest
        if found is None:
            raise RepositoryError(
                f"{where} was committed and is not there any more: somebody deletes what this job saves, or the store loses it. Look for "
                "lifecycle rules and for scripts that clean up; what is there: `fastckpt check`"
            )
        if not isinstance(found, Commit) or found.digest != commit.digest:
            raise SupersededError(
                f"{where} was committed and is another record now: somebody else writes as this job. Stop this process"
            )
        if newest > number:
            raise SupersededError(
                f"{repository.url}: another incarnation of this job (epoch {newest}) has taken over from this one (epoch "
                f"{number}). Step {commit.save.step} was saved, but will not be restored by default. Stop this process. If the "
                "other one only evaluates, let it read: Checkpointer(…, read_only=True), fastckpt.load(url) or fastckpt.open(url)"
            )
        key = epoch_key(number)
        mine = epoch_bytes(self.epoch)
        ours = looked.epoch if looked.epoch is not None else create(repository.store, key, mine) == mine
        marker = looked.marker if looked.marker is not None else repository.put_back_marker()
        if not ours or not marker:
            raise SupersededError(
                f"{repository.url}: the records of this job ({key}, {MARKER}) are somebody else's now: another job has begun there, or "
                f"the store overwrites where it is asked to create (docs/stores.md). Step {commit.save.step} was saved, but may not be "
                "restored by default. Stop this process"
            )

    def close(self) -> None:
        """Free the memory that was kept for another save."""
        self.uplink.buffers.drop()

    def retain(
        self, keep: Keep | None, grace_s: float = GRACE_S, interrupted: Callable[[], bool] = lambda: False
    ) -> RetentionPlan:
        """One pass of retention, if this is the newest incarnation. Rank 0 only; may run beside saves, one pass at a time.

        Returns the plan; its `refused` lists objects that could not be deleted. interrupted: asked before every request; PassInterrupted
        once it is true. StoreError.
        """
        assert self.epoch is not None
        number = self.epoch.number  # a restore beside this pass claims another epoch: then nothing more is done
        flying = self._in_use()
        self._collector.interrupt_when(interrupted)
        todo = plan_retention(self._collector.look(), keep, flying | self._in_use(), grace_s)
        todo.refused = self._collector.run(todo, number, lambda: flying | self._in_use())
        return todo

    def _in_use(self) -> set[SaveId]:
        """Saves under way, and the checkpoint to which the next one refers: not the newest of the history if an answer was lost."""
        last = self.last
        return self.in_flight | (set() if last is None else {SaveId(*last.checkpoint, 0)})

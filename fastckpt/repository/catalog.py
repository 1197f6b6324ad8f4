"""Which checkpoint comes next: the history of a repository (docs/guarantees.md, section 3), and choosing from it.

`history` and `choose` are pure; `Catalog` reads what they need.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from fastckpt.errors import (
    BaseLostError,
    CheckpointError,
    CorruptCheckpointError,
    Damage,
    MissingObjectError,
    NoCheckpointError,
    ObjectExistsError,
    RepositoryError,
    RetiredError,
    StoreAccessError,
    UnreadableError,
)
from fastckpt.events import logger
from fastckpt.format import keys
from fastckpt.format.keys import CheckpointId, SaveId
from fastckpt.format.repository_records import Commit, Epoch, Skipped, Tombstone
from fastckpt.format.shares import Claims
from fastckpt.reading.chunk_reader import Reader
from fastckpt.repository.commit import open_vote, try_commit
from fastckpt.repository.inventory import Inventory, take_inventory
from fastckpt.repository.rank_reader import lost_shares, needs_any
from fastckpt.repository.record_reader import RecordReader
from fastckpt.repository.repository import Repository
from fastckpt.store.base import Store

_MOST_LISTINGS = 5
"""Of a job that retires checkpoints faster than they can be looked at."""
Which = int | Literal["latest", "latest-valid"] | CheckpointId


def history(
    newest: int, epoch_of: Callable[[int], Epoch | None], commits: Iterable[CheckpointId]
) -> Iterator[CheckpointId]:
    """The checkpoints that a restore goes through, in the order in which it tries them.

    newest: the highest epoch. epoch_of: gives the record of an epoch, or None where it is missing. commits: in any order. Lazy: it reads
    records of epochs only as far as the caller iterates.

    An epoch without a commit counts only if it was a rewind or a fresh start: the incarnation that made an ordinary claim may have died
    before its second reading, so its parent may be older than commits of others.
    """
    steps: dict[int, list[int]] = {}
    for checkpoint in commits:
        steps.setdefault(checkpoint.epoch, []).append(checkpoint.step)
    number, most, counts = newest, keys.MAX_STEP, False
    while number > 0:
        for step in sorted(steps.get(number, ()), reverse=True):
            if step <= most:
                yield CheckpointId(number, step)
        epoch = epoch_of(number)
        counts = counts or number in steps or (epoch is not None and (epoch.rewind or epoch.fresh))
        if epoch is not None and counts and epoch.parent is not None:
            # A parent's epoch is lower than that of its child (checked when the record was read), so this loop ends.
            number, most, counts = epoch.parent.checkpoint.epoch, epoch.parent.checkpoint.step, True
        elif epoch is not None and epoch.fresh:
            return
        else:
            number, most, counts = number - 1, keys.MAX_STEP, False


def stand_in(number: int, commits: Iterable[Commit]) -> Epoch | None:
    """What a missing epoch record must have said about its parent, according to the epoch's oldest living commit. None if that commit does
    not tell.
    """
    first = min(commits, key=lambda commit: commit.save, default=None)
    if first is None or (first.parent is not None and first.parent.checkpoint.epoch >= number):
        return None
    return Epoch(
        number, first.parent, first.parent is None, False, (), first.world, first.digest, first.utc, first.writer
    )


@dataclass(frozen=True)
class Choice:
    """A checkpoint to restore, and the checkpoints that were passed over before it."""

    commit: Commit
    reader: Reader | None = field(repr=False, compare=False)
    """Rank 0's checked index: the caller need not read it again to load the checkpoint. None: nothing but the record was looked at."""
    skipped: tuple[Skipped, ...] = ()


class Catalog:
    """The result of one reading of a repository's names. Records are read when they are needed, each once."""

    def __init__(
        self, repository: RecordReader, listing: Inventory | None = None, *, checks_votes: bool = True
    ) -> None:
        """checks_votes: whether a checkpoint is chosen only after all its votes and packs have been looked at. Many ranks look at their own
        ones instead: one rank would need an hour for thousands.
        """
        self.repository, self._checks_votes = repository, checks_votes
        self.listing = repository.list() if listing is None else listing
        self._listings = 1
        self._epochs: dict[int, Epoch] = {}
        self._commits: dict[CheckpointId, Commit | Tombstone] = {}

    def epoch(self, number: int) -> Epoch | None:
        """An epoch record; None where there is none."""
        if number not in self.listing.epochs:
            return None
        if number not in self._epochs:
            self._epochs[number] = self.repository.epoch(number)
        return self._epochs[number]

    def commit(self, checkpoint: CheckpointId) -> Commit | Tombstone:
        if checkpoint not in self._commits:
            self._commits[checkpoint] = self.repository.commit(checkpoint)
        return self._commits[checkpoint]

    def _retired(self, checkpoint: CheckpointId) -> bool:
        """Whether there is a tombstone. A record that cannot be read does not count as retired: it must not be passed over silently."""
        try:
            return isinstance(self.commit(checkpoint), Tombstone)
        except UnreadableError as error:
            return isinstance(error, MissingObjectError)

    def history(self, without: Collection[int] = ()) -> Iterator[CheckpointId]:
        """Living checkpoints of the history, newest first. without: epochs to treat as never claimed."""
        return (checkpoint for checkpoint in self._listed(without) if not self._retired(checkpoint))

    def _listed(self, without: Collection[int]) -> Iterator[CheckpointId]:
        """The history with its tombstones."""
        commits = [c for c in self.listing.commits if c.epoch not in without]
        epochs = [n for n in (*self.listing.epochs, *(c.epoch for c in commits)) if n not in without]

        def epoch_of(number: int) -> Epoch | None:
            return None if number in without else self.epoch(number) or self.stand_in(number)

        return history(max(epochs, default=0), epoch_of, commits)

    def stand_in(self, number: int) -> Epoch | None:
        """The replacement of a missing epoch record, from its epoch's oldest living commit. None if that commit does not tell."""
        for checkpoint in (c for c in self.listing.commits if c.epoch == number):
            if self._retired(checkpoint):
                continue
            try:
                commit = self.commit(checkpoint)
            except UnreadableError:
                return None
            return stand_in(number, [commit]) if isinstance(commit, Commit) else None
        return None

    def branches(self) -> list[CheckpointId]:
        """Living checkpoints outside of the history, newest first."""
        inside = set(self.history())
        return [c for c in reversed(self.listing.commits) if c not in inside and not self._retired(c)]

    def choose(
        self, step: Which = "latest", known_bad: Iterable[Skipped] = (), without: Collection[int] = ()
    ) -> Choice | None:
        """Choose the checkpoint to restore, and check its record, its indexes and the sizes of its packs. None: nothing was ever committed.

        latest: the newest of the history; damage is an error that names the newest complete one. latest-valid: the newest that passes the
        check. A number: the newest checkpoint of that step, one of the history if there is one. NoCheckpointError, CorruptCheckpointError,
        StoreError. known_bad: passed over without reading them again. without: epochs to ignore.
        """
        if not self.listing.commits:
            if isinstance(step, str):
                return None
            raise NoCheckpointError(f"{self.repository.url} has no checkpoint at all: step {step} cannot be restored")
        if not isinstance(step, str):
            found = self._find(step)
            try:
                return Choice(*self._opened(found))
            except CorruptCheckpointError as error:
                raise self.with_advice(found, error) from error
        newer = self._relisted(without)
        if newer is not None:
            return newer.choose(step, known_bad, without)
        skipped: list[Skipped] = list(known_bad)
        for checkpoint in self.history(without):
            if any(checkpoint == bad.checkpoint for bad in skipped):
                continue
            try:
                return Choice(*self._opened(checkpoint), tuple(skipped))
            except (UnreadableError, RetiredError) as error:
                if step == "latest":
                    raise self.with_advice(checkpoint, error) from error
                logger.warning("%s is passed over: %s", self.repository.location(checkpoint), error)
                skipped.append(Skipped(checkpoint, str(error)[:500]))
        raise self._nothing(skipped)

    def _relisted(self, without: Collection[int]) -> Catalog | None:
        """A newer listing, if this one may be behind: its newest commit is a tombstone, and there are other names by now. A job that goes
        on may have retired all that was listed here; what it has kept of old would be taken for the newest.
        """
        first = next(self._listed(without), None)
        if first is None or not self._retired(first):
            return None
        newer = Catalog(self.repository, checks_votes=self._checks_votes)
        newer._listings = self._listings + 1
        if set(newer.listing.commits) == set(self.listing.commits):
            return None
        if newer._listings > _MOST_LISTINGS:
            raise self._was_retired(first)
        return newer

    def _nothing(self, skipped: Sequence[Skipped]) -> NoCheckpointError:
        """The reason why nothing can be restored although there are commits."""
        url = self.repository.url
        living = [c for c in self.listing.commits if not self._retired(c)]
        if skipped:
            shown = ", ".join(str(s.checkpoint) for s in skipped)
            return NoCheckpointError(
                f"{url}: none of the checkpoints in the history is complete ({shown}). `fastckpt salvage` gets out what can be read"
            )
        if living:
            shown = ", ".join(f"step {c.step} (epoch {c.epoch})" for c in living[-5:])
            return NoCheckpointError(
                f"{url}: the history of epoch {max(self.listing.epochs, default=0)} has no checkpoint (begun with fresh=True, or all "
                f"retired); others are {shown}. Restore one of them with restore(step=…), or pass fresh=True to begin again"
            )
        return NoCheckpointError(f"{url}: every checkpoint has been retired. Pass fresh=True to begin again")

    def _find(self, step: int | CheckpointId) -> CheckpointId:
        if isinstance(step, CheckpointId):
            if step in self.listing.commits and not self._retired(step):
                return step
        else:
            for checkpoint in self.history():
                if checkpoint.step == step:
                    return checkpoint
            for checkpoint in self.branches():
                if checkpoint.step == step:
                    logger.warning("step %d is taken from epoch %d, an abandoned branch", step, checkpoint.epoch)
                    return checkpoint
        known = list(self.history())[:5]
        shown = ", ".join(str(c.step) for c in known) or "none"
        raise NoCheckpointError(
            f"{self.repository.url} has no checkpoint of step {step}; newest: {shown}. `fastckpt ls` lists all"
        )

    def _opened(self, checkpoint: CheckpointId) -> tuple[Commit, Reader | None]:
        try:
            commit = self.commit(checkpoint)
            if isinstance(commit, Tombstone):
                raise self._was_retired(checkpoint)
            return commit, open_checked(self.repository.store, commit) if self._checks_votes else None
        except (CorruptCheckpointError, MissingObjectError) as error:
            raise self.blame(checkpoint, error) from error

    def blame(self, checkpoint: CheckpointId, error: CheckpointError) -> CheckpointError:
        """RetiredError if retention has removed the checkpoint meanwhile, else the error that reading it has raised. StoreError."""
        try:
            retired = isinstance(self.repository.commit(checkpoint), Tombstone)
        except UnreadableError as found:
            retired = isinstance(found, MissingObjectError)
        return self._was_retired(checkpoint) if retired else error

    def _was_retired(self, checkpoint: CheckpointId) -> RetiredError:
        return RetiredError(
            f"{self.repository.location(checkpoint)} was retired while it was being read: a newer checkpoint exists. Try again"
        )

    def with_advice(self, checkpoint: CheckpointId, error: CheckpointError) -> CheckpointError:
        """The error, with advice what to restore instead: a checkpoint that is complete, and names none of the damaged bytes."""
        if not isinstance(error, CorruptCheckpointError):
            return error
        lost = {item.stored for item in error.damage if item.stored is not None}
        for other in self.history():
            if other == checkpoint:
                continue
            try:
                commit, _ = self._opened(other)
                if needs_any(self.repository.store, commit, lost):
                    continue
            except CheckpointError:
                continue
            where = f"step {other.step} (epoch {other.epoch})"
            advice = f'The newest complete one is {where}: restore(step={other.step}), or step="latest-valid"'
            break
        else:
            advice = "No other checkpoint is complete. `fastckpt salvage` gets out what can be read"
        return CorruptCheckpointError(error.source, error.damage, advice)


def open_checked(store: Store, commit: Commit) -> Reader:
    """Check all that can be checked without reading packs: votes by length and digest, indexes, shares, lengths of packs.

    Returns rank 0's index only: the indexes of thousands of ranks would not fit into memory. CorruptCheckpointError lists everything that
    is wrong or missing; StoreError.
    """
    damage: list[Damage] = []
    first: Reader | None = None
    claims, unread = Claims(), set[int]()
    sizes, listed = _sizes(store, commit.save), {commit.save}
    for rank in range(commit.world):
        name = commit.vote(rank)
        key = keys.vote_key(name)
        try:
            reader = open_vote(store, name)
        except MissingObjectError:
            damage.append(Damage("vote", key, f"{name.n_bytes} bytes", "no such object"))
            unread.add(rank)
            continue
        except CorruptCheckpointError as error:
            damage.extend(error.damage)
            unread.add(rank)
            continue
        claims.add(rank, reader.directory)
        first = reader if rank == 0 else first
        for file in reader.files:
            save = keys.parse_pack(file.key)
            if save is not None and save not in listed:  # an earlier one, of which this checkpoint names packs
                sizes.update(_sizes(store, save))
                listed.add(save)
            found = sizes.get(file.key)
            if found != file.n_bytes:
                lost = reader.tensors_of_file(reader.files.index(file) + 1)
                what = "no such object" if found is None else f"{found} bytes"
                damage.append(Damage("pack", file.key, f"{file.n_bytes} bytes", what, lost))
    damage += [lost.damage for lost in lost_shares(store, commit, claims, unread)]
    if damage:
        raise CorruptCheckpointError(f"{store.url}/{keys.commit_key(commit.checkpoint)}", damage)
    assert first is not None  # each commit has a rank 0
    return first


def _sizes(store: Store, save: SaveId) -> dict[str, int]:
    """Lengths of all packs of a save. Uses LIST: one request for a thousand packs."""
    return {info.key: info.n_bytes for info in store.list(f"{keys.DATA}{save}/")}


def pending_saves(store: Store, listing: Inventory) -> list[SaveId]:
    """Saves with votes but without a commit record or tombstone, oldest first."""
    known = set(listing.commits)
    return [save for save in take_inventory(store, keys.VOTES).votes if save.checkpoint not in known]


def complete_pending(repository: Repository, catalog: Catalog) -> list[Commit]:
    """Commit each save whose votes are all there and that would be newer than the newest checkpoint of the history.

    Without the right to write, such saves are left uncommitted: a reader sees only commits. Contradictory votes are logged and left to
    `check`.
    """
    head = next(catalog.history(), None)
    done = []
    for save in pending_saves(repository.store, catalog.listing):
        if head is not None and save.checkpoint <= head:
            continue
        try:
            commit = try_commit(repository.store, save)
        except MissingObjectError:  # a running job has committed and retired it since the LIST
            continue
        except (StoreAccessError, ObjectExistsError) as error:
            logger.warning("%s: the finished save %s is left uncommitted: %s", repository.url, save, error)
            continue
        except (UnreadableError, RepositoryError, BaseLostError) as error:
            logger.warning("%s: the save %s cannot be completed: %s", repository.url, save, error)
            continue
        if commit is not None:
            logger.warning(
                "%s: completed the commit of step %d (epoch %d), whose process ended before it",
                repository.url,
                save.step,
                save.epoch,
            )
            done.append(commit)
    return done


def describe(commit: Commit) -> dict[str, Any]:
    """A commit as a dictionary, for `--json` and tables."""
    return {
        "epoch": commit.save.epoch,
        "step": commit.save.step,
        "try": commit.save.attempt,
        "utc": commit.utc,
        "world": commit.world,
        "trigger": commit.trigger,
        "raw_bytes": commit.raw_bytes,
        "stored_bytes": commit.stored_bytes,
        "seconds": commit.seconds,
        "metrics": commit.metrics,
        "meta": commit.meta,
        "parent": None
        if commit.parent is None
        else {"epoch": commit.parent.checkpoint.epoch, "step": commit.parent.checkpoint.step},
    }

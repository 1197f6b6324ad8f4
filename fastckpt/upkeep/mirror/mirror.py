"""Mirrors a repository: its checkpoints, under their own names, into a repository that has an id of its own and names its origin.

    marker (id of its own, origin) ─→ epoch records ─→ for each checkpoint, the newest first: pin at the source, packs, votes, commit record

The order is that of a save, so a mirror that is killed leaves what a killed save leaves: whole checkpoints, and debris that the next run
uses. Epoch records come before the packs of their epochs: whoever goes on from the copy can then claim none of their numbers.
"""

from __future__ import annotations

import socket

from fastckpt._types import Progress
from fastckpt.errors import (
    MissingObjectError,
    ObjectNotFoundError,
    RepositoryError,
    RetiredError,
    TooLargeError,
    UnreadableError,
)
from fastckpt.format import keys
from fastckpt.format.keys import CheckpointId, commit_key, vote_key
from fastckpt.format.repository_records import Commit, Tombstone
from fastckpt.options import Options
from fastckpt.repository.catalog import Catalog
from fastckpt.repository.commit import create
from fastckpt.repository.inventory import take_inventory
from fastckpt.repository.pinning import Pinning
from fastckpt.repository.repository import Repository
from fastckpt.store.base import Store
from fastckpt.upkeep.mirror.follow import follow
from fastckpt.upkeep.mirror.named import NamedObjects, read_named, votes_of
from fastckpt.upkeep.mirror.open_copy import marker_of, open_copy, require_still_a_copy
from fastckpt.upkeep.mirror.plan import MirrorAsked, MirrorReport, is_compacted, select
from fastckpt.upkeep.mirror.records import AllRecords
from fastckpt.upkeep.mirror.transfer import Transfer

_TURNS = 3  # a job retires while its newest checkpoint is being chosen: then there is a newer one


def mirror(
    source: Store,
    target: Store,
    asked: MirrorAsked | None = None,
    options: Options | None = None,
    progress: Progress = lambda done, total: None,
) -> MirrorReport:
    """Bring checkpoints to the target that it lacks. May be stopped anywhere and run again; a job may write to the source meanwhile.

    Takes a quarter of `options.host_budget_bytes`, 64 MiB of votes and `options.connections` threads.

    Args:
        source: only pins are written there. Without the right to write them it is read without.
        target: nothing, or an earlier mirror of this source.
        asked: None: the whole history.
        options: None for the defaults.
        progress: called with bytes done and, as far as they are known, bytes in all.

    Returns:
        What was copied, and what was not. Damage of a checkpoint at the source is listed in `failed`, and the others are copied.

    Raises:
        RepositoryError: the source is no repository; the target is no copy of it, or has gone on without it. Nothing was written.
        NoCheckpointError: there is nothing to copy; RetiredError: the step that was asked for is gone now.
        StoreError: a store failed. What was copied so far is whole, and the next run goes on from there.
    """
    asked, options = asked or MirrorAsked(), options or Options()
    for turn in range(_TURNS):
        report = _Mirror(source, target, asked, options, progress).run()
        if report.copied or report.present or report.failed or not report.left_out or turn == _TURNS - 1:
            break
    return report


class _Mirror:
    """One run. Used by one thread."""

    def __init__(self, source: Store, target: Store, asked: MirrorAsked, options: Options, progress: Progress) -> None:
        self._source, self._target = Repository(source), Repository(target)
        self._asked, self._progress = asked, progress
        self._transfer = Transfer(source, target, options, contents=asked.contents)
        self._report = MirrorReport(source.url, target.url)
        self._epochs: dict[int, bytes] = {}
        """Records of the source's epochs, which the target may have too."""
        self._done_bytes = self._all_bytes = 0

    def run(self) -> MirrorReport:
        source = self._source
        marker = marker_of(source)
        self._report.origin = marker.repository
        records = AllRecords(source.store, self._transfer.connections)
        catalog = Catalog(records, checks_votes=False)
        wanted = select(catalog, self._asked)
        self._epochs = records.epochs(catalog.listing)
        copy, there = open_copy(marker, source.url, self._epochs, self._target, self._transfer.connections)
        self._report.repository = copy.repository
        commits = self._missing(wanted, records, there)
        self._all_bytes = sum(commit.stored_bytes for commit, _ in commits.values())
        with Pinning(source.store, f"fastckpt mirror on {socket.gethostname()}, to {self._target.url}") as pins:
            for checkpoint, (commit, record) in commits.items():
                pins.hold(checkpoint)
                self._mirror_one(commit, record, pins)
                pins.release(checkpoint)
            if pins.refused is not None:
                self._report.notes.append(f"the source was read without a pin: {pins.refused}")
        if self._asked.prune:
            self._report.retired = follow(self._target, catalog, self._report.notes)
        self._progress(1, 1)
        return self._report

    # -- what stands before the first checkpoint -----------------------------------------------------------------------

    def _missing(
        self, wanted: list[CheckpointId], source: AllRecords, target: AllRecords
    ) -> dict[CheckpointId, tuple[Commit, bytes]]:
        """What has to be copied, in order: commits and their bytes. What has not, or cannot be, is noted in the report."""
        found: dict[CheckpointId, tuple[Commit, bytes]] = {}
        for checkpoint in wanted:
            try:
                commit, record = source.commit(checkpoint), source.data(commit_key(checkpoint))
                if not isinstance(commit, Commit):
                    self._leave_out(checkpoint, "retired at the source")
                elif not self._stands(commit, record, target):
                    found[checkpoint] = commit, record
            except MissingObjectError:  # deleted since the LIST
                self._leave_out(checkpoint, "retired at the source")
            except UnreadableError as error:
                self._report.failed.append((checkpoint, error))
        return found

    def _stands(self, source: Commit, record: bytes, target: AllRecords) -> bool:
        """Whether the target needs nothing of a checkpoint. RepositoryError: it has another one under this key."""
        checkpoint = source.checkpoint
        try:
            found = target.data(commit_key(checkpoint))
        except (KeyError, MissingObjectError):  # never there; or a tombstone whose time was over
            return False
        if found == record:
            if self._asked.contents:
                return False
            self._report.present.append(checkpoint)
            return True
        other = target.commit(checkpoint)
        if isinstance(other, Commit) and is_compacted(other, source):
            self._report.present.append(checkpoint)
            return True
        if isinstance(other, Tombstone):
            self._report.left_out.append((checkpoint, f"retired at the target ({other.why})"))
            return True
        raise RepositoryError(
            f"{target.location(checkpoint)} is not {self._source.location(checkpoint)}: the target is no copy of the source. Nothing was "
            "changed; name an empty place"
        )

    def _leave_out(self, checkpoint: CheckpointId, why: str) -> None:
        if self._asked.step is not None:
            raise RetiredError(f"{self._source.location(checkpoint)}: {why}. `fastckpt ls` lists what is there")
        self._report.left_out.append((checkpoint, why))

    def _is_retired(self, checkpoint: CheckpointId) -> bool:
        """Whether the source has retired a checkpoint by now."""
        try:
            return isinstance(self._source.commit(checkpoint), Tombstone)
        except UnreadableError as error:
            return isinstance(error, MissingObjectError)

    # -- one checkpoint ------------------------------------------------------------------------------------------------

    def _mirror_one(self, commit: Commit, record: bytes, pins: Pinning) -> None:
        checkpoint = commit.checkpoint
        before = self._report.sent_objects
        try:
            self._copy(commit, record, pins)
        except (UnreadableError, TooLargeError) as error:
            if self._is_retired(checkpoint):
                self._leave_out(checkpoint, "retired at the source while it was copied")
            else:
                self._report.failed.append((checkpoint, error))
            return
        there = self._asked.contents and self._report.sent_objects == before
        (self._report.present if there else self._report.copied).append(checkpoint)

    def _copy(self, commit: Commit, record: bytes, pins: Pinning) -> None:
        source, target = self._source.store, self._target.store
        named = read_named(source, commit, self._transfer.connections)
        sizes = self._sizes(named, commit)
        for carried in self._transfer.carry(named.files.values(), sizes):
            if carried.replaced:
                self._report.replaced.append(carried.file.key)
            self._count(carried.file.n_bytes, sent=carried.sent, own=keys.parse_pack(carried.file.key) == commit.save)
            pins.renew()
        kept = named.votes
        rest = [rank for rank in range(commit.world) if commit.vote(rank) not in kept]
        votes = votes_of(source, commit, self._transfer.connections, rest)
        for name, data in (*kept.items(), *votes):
            key = vote_key(name)
            if sizes.get(key) != len(data) or (self._asked.contents and target.get(key) != data):
                target.put(
                    key, data
                )  # its name holds the digest of its bytes: whatever lies there is replaced by what belongs there
                self._count(len(data), sent=True, own=False)
            pins.renew()
        self._require_whole(named, commit)
        self._commit(commit, record)

    def _count(self, n_bytes: int, *, sent: bool, own: bool) -> None:
        if sent:
            self._report.sent_objects += 1
            self._report.sent_bytes += n_bytes
        if own:
            self._done_bytes += n_bytes
        total = max(self._all_bytes, 1)
        self._progress(min(self._done_bytes, total - 1), total)

    def _sizes(self, named: NamedObjects, commit: Commit) -> dict[str, int]:
        """Lengths of the target's objects, of all that the checkpoint may need."""
        saves = sorted({*named.saves, commit.save})
        prefixes = (*(f"{keys.DATA}{save}/" for save in saves), keys.votes_prefix(commit.save))
        return take_inventory(self._target.store, *prefixes).sizes

    def _require_whole(self, named: NamedObjects, commit: Commit) -> None:
        """Right before the commit: all is there in its length, and nobody has gone on from the target. RepositoryError."""
        target = self._target
        wanted: dict[str, int] = {file.key: file.n_bytes for file in named.files.values()}
        wanted |= {vote_key(commit.vote(rank)): commit.votes[rank].n_bytes for rank in range(commit.world)}
        sizes = self._sizes(named, commit)
        wrong = sorted(key for key, n_bytes in wanted.items() if sizes.get(key) != n_bytes)
        if wrong:
            shown = f"{', '.join(wrong[:3])}{' …' if len(wrong) > 3 else ''}"
            raise RepositoryError(
                f"{target.url}: {len(wrong)} objects of step {commit.save.step} are gone that were put there just now ({shown}): somebody "
                "deletes what the mirror copies. The step is not committed"
            )
        require_still_a_copy(self._epochs, target, self._source.url)

    def _commit(self, commit: Commit, record: bytes) -> None:
        target = self._target
        try:
            found = create(target.store, commit_key(commit.checkpoint), record)
        except ObjectNotFoundError as error:
            raise RepositoryError(
                f"{target.location(commit.checkpoint)} was retired while it was copied. It is not committed"
            ) from error
        if found != record:
            raise RepositoryError(
                f"{target.location(commit.checkpoint)} was made by somebody else, or retired, meanwhile. It is not committed: run the "
                "mirror again"
            )


__all__ = ["mirror"]

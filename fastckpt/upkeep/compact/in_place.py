"""Compacts a checkpoint where it is: writes it in full as the first of a new epoch.

    choose ─→ claim an epoch that continues from it ─→ packs, votes ─→ has nobody else come? ─→ commit ─→ acknowledge

The order is that of a save. Until the commit record nothing has happened, wherever it ends: a claim without a commit does not count, and
packs and votes are debris.
"""

from __future__ import annotations

from collections.abc import Collection

from fastckpt._types import Progress
from fastckpt.errors import NoCheckpointError, RepositoryError
from fastckpt.format.keys import CheckpointId, SaveId
from fastckpt.format.repository_records import Commit, Parent
from fastckpt.options import Options
from fastckpt.repository.catalog import Catalog, Which, complete_pending
from fastckpt.repository.commit import try_commit
from fastckpt.repository.incarnation import Incarnation
from fastckpt.repository.repository import Repository
from fastckpt.store.base import Store
from fastckpt.upkeep.compact.report import CompactReport
from fastckpt.upkeep.compact.written import needs_others, write_again
from fastckpt.upkeep.mirror.open_copy import marker_of


def compact_in_place(
    store: Store,
    step: Which = "latest",
    *,
    rewind: bool = False,
    always: bool = False,
    options: Options | None = None,
    progress: Progress = lambda done, total: None,
) -> CompactReport:
    """Write a checkpoint in full, so that a restore takes that one. Only while no job runs or starts here: its next save would fail.

    Takes an eighth of `options.host_budget_bytes`, what an upload takes, and the index of one rank.

    Args:
        store: of the repository.
        step: as for `Checkpointer.restore`.
        rewind: whether checkpoints that are newer than this one may leave the history.
        always: write it also if it is full already.
        options: None for the defaults.
        progress: called with raw bytes done and in all, on any thread, by one at a time.

    Raises:
        NoCheckpointError: there is none. RepositoryError: a newer one would leave the history, or a job has saved or begun meanwhile.
        CorruptCheckpointError, UnsupportedFormatError: it cannot be read; nothing has changed then. SaveError, StoreError.
    """
    options = options or Options()
    repository = Repository(store)
    marker = marker_of(repository)
    repository.initialise()
    complete_pending(
        repository, Catalog(repository)
    )  # as a start does: the run's last save may have died before its commit
    choice = Catalog(repository).choose(step)
    if choice is None:
        raise NoCheckpointError(f"{store.url} has no checkpoint yet: there is nothing to compact")
    commit = choice.commit
    head = _head(repository)
    if head != commit.checkpoint and not rewind:
        raise RepositoryError(
            f"{repository.location(commit.checkpoint)} is not the newest of the history, which is step {head.step if head else '?'}: once "
            "it was written again in place, a restore would take it, and all newer ones would leave the history. Compact the newest, "
            "write this one elsewhere (--to URL), or pass --rewind"
        )
    report = CompactReport.of(store.url, store.url, commit)
    if not always and not needs_others(store, commit):
        return report
    report.enter(_write(repository, commit, head, options, progress))
    progress(1, 1)
    if marker.origin is not None:
        report.notes.append(
            f"this repository was a copy of {marker.origin.url}. It has gone on now: no mirror goes there any more"
        )
    return report


def _write(
    repository: Repository, commit: Commit, head: CheckpointId | None, options: Options, progress: Progress
) -> Commit:
    """Claim, write, commit and acknowledge."""
    store, parent = repository.store, Parent(commit.checkpoint, commit.digest)
    epoch = repository.claim(parent, world=commit.world)
    save = SaveId(epoch.number, commit.save.step, 0)
    write_again(store, commit, store, save, parent, options, progress)
    if _head(repository, {epoch.number}) != head:
        raise RepositoryError(
            f"{store.url}: a job has saved here meanwhile, so the run is not stopped. Nothing was committed: stop the job and try again"
        )
    done = try_commit(store, save)
    assert done is not None, "all votes are there"
    job = Incarnation(repository, options)
    job.adopt(epoch, parent)
    job.acknowledge(done)
    return done


def _head(repository: Repository, without: Collection[int] = ()) -> CheckpointId | None:
    return next(Catalog(repository).history(without), None)


__all__ = ["compact_in_place"]

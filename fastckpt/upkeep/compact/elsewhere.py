"""Compacts a checkpoint into another repository, under its own name, in full: that repository is a copy, and `mirror` may go there too.

    marker, epochs (as a mirror) ─→ pin at the source ─→ packs, votes ─→ commit

The order is that of a save. Until the commit record nothing has happened, wherever it ends: packs and votes are debris there.
"""

from __future__ import annotations

import socket
from typing import Any

from fastckpt._types import Progress
from fastckpt.errors import ObjectExistsError, RepositoryError, RetiredError, TooLargeError, UnreadableError
from fastckpt.format import keys
from fastckpt.format.keys import MAX_TRY, SaveId
from fastckpt.format.repository_records import Commit, Tombstone
from fastckpt.options import Options
from fastckpt.repository.catalog import Catalog
from fastckpt.repository.commit import try_commit
from fastckpt.repository.inventory import take_inventory
from fastckpt.repository.pinning import Pinning
from fastckpt.repository.repository import Repository
from fastckpt.store.base import Store
from fastckpt.store.wrap import Wrapper
from fastckpt.upkeep.compact.report import CompactReport
from fastckpt.upkeep.compact.written import needs_others, write_again
from fastckpt.upkeep.mirror.open_copy import marker_of, open_copy, require_still_a_copy
from fastckpt.upkeep.mirror.plan import MirrorAsked, is_compacted, select
from fastckpt.upkeep.mirror.records import AllRecords


def compact_to(
    source: Store,
    target: Store,
    *,
    step: int | None = None,
    epoch: int | None = None,
    options: Options | None = None,
    progress: Progress = lambda done, total: None,
) -> CompactReport:
    """Write a checkpoint in full into another repository, under its own name. A job may go on at the source, where only a pin is written.

    Takes an eighth of `options.host_budget_bytes`, what an upload takes, and the index of one rank.

    Args:
        source: of the repository.
        target: nothing, or a copy of this source: what `mirror` accepts, and what it may be run on afterwards.
        step, epoch: None: the newest of the history.
        options: None for the defaults.
        progress: called with raw bytes done and in all, on any thread, by one at a time.

    Raises:
        RepositoryError: the target is no copy of the source, has gone on without it, or has this checkpoint as it is at the source.
        NoCheckpointError, RetiredError, CorruptCheckpointError, UnsupportedFormatError, SaveError, StoreError.
    """
    options = options or Options()
    origin, copy = Repository(source), Repository(target)
    marker = marker_of(origin)
    records = AllRecords(source, options.for_store(source.useful_connections).connections)
    catalog = Catalog(records, checks_votes=False)
    last = 1 if step is None and epoch is None else None
    (checkpoint,) = select(catalog, MirrorAsked(step=step, epoch=epoch, last=last))
    commit = records.commit(checkpoint)
    assert isinstance(commit, Commit)
    epochs = records.epochs(catalog.listing)
    report = CompactReport.of(source.url, target.url, commit)
    connections = options.for_store(target.useful_connections).connections
    _, there = open_copy(marker, source.url, epochs, copy, connections)
    found = _at_target(copy, there, commit)
    if found is not None:
        report.stored_bytes = found.stored_bytes
        return report
    save = _free_try(target, commit)
    report.notes += _write(catalog, commit, target, save, options, progress)
    require_still_a_copy(epochs, copy, source.url)
    done = try_commit(target, save)
    if done is None or done.save != save:
        raise RepositoryError(
            f"{copy.location(checkpoint)} was made by somebody else meanwhile. Nothing of this run counts"
        )
    progress(1, 1)
    report.enter(done)
    return report


def _write(
    catalog: Catalog, commit: Commit, target: Store, save: SaveId, options: Options, progress: Progress
) -> list[str]:
    """Write packs and votes while the checkpoint is pinned. Returns what a person should know."""
    source = catalog.repository.store
    with Pinning(source, f"fastckpt compact on {socket.gethostname()}, to {target.url}") as pins:
        pins.hold(commit.checkpoint)

        def go_on(done: int, total: int) -> None:
            pins.renew()  # by one thread at a time, as progress is told
            progress(done, total)

        try:
            write_again(source, commit, _Creating(target), save, commit.parent, options, go_on)
        except (UnreadableError, TooLargeError) as error:
            raise catalog.blame(commit.checkpoint, error) from error
    return [] if pins.refused is None else [f"the source was read without a pin: {pins.refused}"]


def _at_target(copy: Repository, there: AllRecords, commit: Commit) -> Commit | None:
    """What the target has of the checkpoint, if that is full. RepositoryError: it has it in another way."""
    if commit.checkpoint not in there.list().commits:
        return None
    found = there.commit(commit.checkpoint)
    where = copy.location(commit.checkpoint)
    if isinstance(found, Tombstone):
        raise RetiredError(f"{where} was retired there ({found.why}). Name another place")
    if is_compacted(found, commit) or (found.digest == commit.digest and not needs_others(copy.store, found)):
        return found
    raise RepositoryError(
        f"{where} is there already, as a mirror has brought it: it needs packs of earlier saves, which are there too. A commit is created "
        "once: name another place"
    )


def _free_try(target: Store, commit: Commit) -> SaveId:
    """A try of the checkpoint under which the target has nothing. That of the source is never taken: a mirror may bring its packs, which
    later checkpoints need.
    """
    inventory = take_inventory(target, keys.DATA, keys.VOTES)
    taken = {save for save in (*inventory.packs, *inventory.votes) if save.checkpoint == commit.checkpoint}
    for attempt in range(MAX_TRY + 1):
        save = commit.save._replace(attempt=attempt)
        if save != commit.save and save not in taken:
            return save
    raise RepositoryError(
        f"{target.url}: all tries of {commit.checkpoint} are used up there: `fastckpt prune` removes those that failed"
    )


class _Creating(Wrapper):
    """Puts packs only where there are none: of two runs that chose the same try, one ends with an error, and no pack is overwritten."""

    def put(self, key: str, data: Any) -> None:
        if keys.parse_pack(key) is None:
            super().put(key, data)
            return
        try:
            super().put_if_absent(key, data)
        except ObjectExistsError as error:
            raise RepositoryError(
                f"{self.url}/{key} was put by somebody else meanwhile: another run writes the same checkpoint there. Nothing of this one "
                "was committed"
            ) from error


__all__ = ["compact_to"]

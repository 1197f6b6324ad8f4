"""Finds objects that belong to no checkpoint: saves without a commit record, leftovers of retired and superseded saves, and foreign
objects.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from fastckpt.errors import (
    BaseLostError,
    CorruptCheckpointError,
    ObjectNotFoundError,
    RepositoryError,
    UnreadableError,
    UnsupportedFormatError,
)
from fastckpt.format import keys
from fastckpt.format.keys import SaveId, VoteName, parse_pack
from fastckpt.format.repository_records import Parent
from fastckpt.format.shares import Claims
from fastckpt.repository.commit import complete_set, read_vote, require_parent
from fastckpt.repository.inventory import Inventory
from fastckpt.repository.repository import Repository
from fastckpt.store.base import Store
from fastckpt.upkeep.check.records import Records
from fastckpt.upkeep.check.report import ReportBuilder, UnfinishedSave


def check_unfinished(
    repository: Repository, inventory: Inventory, read: Records, referenced: Iterable[str], found: ReportBuilder
) -> set[str]:
    """List the saves that were not committed, and whether they can be. Returns `referenced` and the packs that their votes name.

    referenced: keys of the packs that checkpoints name.
    """
    named = set(referenced)
    taken = read.commits.keys() | read.tombstones.keys() | read.unreadable
    waiting_bytes = 0
    for save in sorted({*inventory.votes, *inventory.packs}):
        votes, packs = inventory.votes.get(save, ()), inventory.packs.get(save, ())
        commit = read.commits.get(save.checkpoint)
        if save.checkpoint not in taken:
            if _is_committed_or_unreadable(repository, save):
                continue  # committed since the LIST
            state, why = _completable(repository.store, save, votes, inventory, named)
        elif commit is not None and commit.save == save:
            continue
        elif commit is not None:
            packs = tuple(key for key in packs if key not in named)
            state, why = "superseded", f"try {commit.save.attempt} of this step was committed"
        elif save.checkpoint in read.unreadable:
            continue  # votes of a damaged commit record, for `salvage`
        else:  # retired: the next passes of retention delete these objects
            waiting_bytes += _n_bytes(inventory, [key for key in packs if key not in named], votes)
            continue
        if votes or packs:
            world = votes[0].world if votes else None
            n_bytes = _n_bytes(inventory, packs, votes)
            found.report.unfinished.append(UnfinishedSave(save, state, why, len(votes), world, len(packs), n_bytes))
    if read.tombstones:
        words = "deleted by the job's retention once their grace is over, or by `fastckpt prune`"
        found.report.notes.append(
            f"{len(read.tombstones)} steps are retired; what is left of them ({waiting_bytes} bytes) is {words}"
        )
    return named


def _n_bytes(inventory: Inventory, packs: Sequence[str], votes: Sequence[VoteName]) -> int:
    return sum(inventory.infos[key].n_bytes for key in (*packs, *map(keys.vote_key, votes)))


def _is_committed_or_unreadable(repository: Repository, save: SaveId) -> bool:
    """Whether a commit record exists by now. Asks the store again."""
    try:
        repository.commit(save.checkpoint)
    except ObjectNotFoundError:
        return False
    except (CorruptCheckpointError, UnsupportedFormatError):
        pass
    return True


def _completable(
    store: Store, save: SaveId, votes: Sequence[VoteName], inventory: Inventory, named: set[str]
) -> tuple[str, str]:
    """The state of a save without a commit record, and the reason. Adds the packs that its votes name to `named`."""
    try:
        names = complete_set(votes, str(save))
    except RepositoryError as error:
        return "damaged", str(error)
    if names is None:
        of = votes[0].world if votes else "an unknown number of"
        return (
            "incomplete",
            f"votes of {len(votes)} of {of} ranks: under way, or its job died and nothing can complete it",
        )
    claims, parents = Claims(), set[Parent | None]()
    for name in names:
        try:
            vote = read_vote(store, name)
        except (CorruptCheckpointError, UnsupportedFormatError, ObjectNotFoundError) as error:
            return "damaged", str(error)
        for file in vote.files:
            info = inventory.infos.get(file.key)
            n_bytes = None if info is None else info.n_bytes
            if n_bytes != file.n_bytes:
                return "damaged", f"{file.key}: expected {file.n_bytes} bytes, found {n_bytes or 'no such object'}"
            named.add(file.key)
            if parse_pack(file.key) != save:
                parents.add(vote.info.parent)
        claims.add(name.rank, vote.directory)
    unmet = claims.unmet()
    if unmet:
        return "damaged", "; ".join(map(str, unmet[:3])) + (f"; and {len(unmet) - 3} more" if len(unmet) > 3 else "")
    for parent in parents:
        try:
            require_parent(store, save, parent)
        except (BaseLostError, UnreadableError) as error:
            return "superseded", str(error)
    return "completable", "the votes of all ranks are there"


def note_leftovers(
    inventory: Inventory, read: Records, named: Collection[str], all_steps: bool, found: ReportBuilder
) -> None:
    """Enter notes about objects that no checkpoint needs. named: keys of all packs that are needed by something.

    all_steps: every checkpoint was checked, so a pack that is not named really belongs to none.
    """
    notes = found.report.notes
    for key in inventory.unknown:
        words = "left by a probe of the store" if key.startswith("probe/") else "not ours: never read, never deleted"
        notes.append(f"{key} ({inventory.infos[key].n_bytes} bytes) is {words}")
    if not all_steps or found.report.findings:
        return
    for commit in read.commits.values():
        own = [key for key in inventory.packs.get(commit.save, ()) if key not in named]
        if own:
            n_bytes = _n_bytes(inventory, own, ())
            notes.append(f"data/{commit.save}/: {len(own)} packs ({n_bytes} bytes) are named by no checkpoint")

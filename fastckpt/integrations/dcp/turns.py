"""One save of a checkpoint_id: the coordinator claims an epoch of the repository there, and commits once every rank has voted.

    coordinator  begin ─→ Assignment for each rank ─(torch's plan)→ every rank uploads, votes ─(torch's results)→ commit ─→ retire

Until the commit, readers find the checkpoint that was there before (an ordinary claim hides nothing).
"""

from __future__ import annotations

import contextlib
import functools
import re
import secrets
from collections import deque
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch.distributed.checkpoint.metadata import Metadata

from fastckpt.errors import RepositoryError, SaveError, UnreadableError
from fastckpt.events import logger
from fastckpt.format.keys import MAX_STEP, CheckpointId, SaveId, VoteName, commit_key, parse_pack
from fastckpt.format.repository_records import Commit, Parent, Tombstone, tombstone_bytes, utc_now
from fastckpt.format.vote import Vote
from fastckpt.host.threads import WorkerPool
from fastckpt.integrations.dcp.items import META, is_paths
from fastckpt.integrations.dcp.layout import differences, layout_of
from fastckpt.repository.catalog import Catalog
from fastckpt.repository.collector import Collector
from fastckpt.repository.commit import commit_votes, create, list_votes, read_vote
from fastckpt.repository.repository import Repository
from fastckpt.repository.retention import GRACE_S, UNFINISHED, Keep, plan_retention
from fastckpt.store.base import Store

_READS_AT_ONCE = 64
_NUMBER = re.compile(r"(\d{1,12})/*$")


class Assignment(NamedTuple):
    """What the coordinator tells a rank, in torch's plan: plain and small, as torch pickles it between ranks."""

    nonce: str
    """Of this save alone: a planner that caches plans gives a rank the assignment of an earlier save."""
    save: SaveId
    parent: tuple[CheckpointId, str] | None
    rank: int
    world: int


def step_of(checkpoint_id: str) -> int:
    """The step that is shown for a checkpoint: the number at the end of its checkpoint_id, else 0."""
    found = _NUMBER.search(checkpoint_id)
    return min(int(found[1]), MAX_STEP) if found else 0


def begin(store: Store, world: int, step: int, overwrite: bool) -> list[Assignment]:
    """Claim the next epoch. Returns the assignments of all ranks. RepositoryError if the place is taken."""
    repository = Repository(store)
    repository.initialise(world)
    parent, is_there = _newest(repository)
    if is_there and not overwrite:
        raise RepositoryError(
            f"{store.url} has a checkpoint already. Choose another checkpoint_id, or let FastckptWriter(overwrite=True) replace it"
        )
    epoch = repository.claim(parent, world=world)
    nonce, save = secrets.token_hex(8), SaveId(epoch.number, step, 0)
    told = None if parent is None else (parent.checkpoint, parent.digest)
    return [Assignment(nonce, save, told, rank, world) for rank in range(world)]


def _newest(repository: Repository) -> tuple[Parent | None, bool]:
    """The checkpoint to continue from, and whether there is any. A damaged one can be replaced, but not be continued from.

    RepositoryError if it is one of a Checkpointer: claiming an epoch there would end that job, and retiring would end its history.
    """
    catalog = Catalog(repository, checks_votes=False)
    try:
        newest = next(catalog.history(), None)
        found = None if newest is None else catalog.commit(newest)
    except UnreadableError as error:
        logger.warning("%s: the checkpoint that is being replaced is damaged: %s", repository.url, error)
        _refuse_others(repository, catalog)
        return None, True
    if not isinstance(found, Commit):
        return None, False
    _refuse_others(repository, catalog, found)
    return Parent(found.checkpoint, found.digest), True


def _refuse_others(repository: Repository, catalog: Catalog, *commits: Commit) -> None:
    """RepositoryError if one of these commits, or of all that can be read, was not made by DCP."""
    found = commits or tuple(repository.read_all(catalog.listing).commits.values())
    others = [commit for commit in found if META not in commit.meta]
    if others:
        raise RepositoryError(
            f"{repository.url} has checkpoints of a Checkpointer (step {others[-1].save.step}), which a save of "
            "torch.distributed.checkpoint would replace. Choose a checkpoint_id of its own"
        )


_heard: deque[str] = deque(maxlen=1000)
"""Nonces of the assignments that ranks of this process have followed."""


def follow(store: Store, told: object, rank: int | None, step: int) -> Assignment:
    """The assignment to follow: what the plan says or, if that is of an earlier save, the newest claim of the repository.

    A planner that caches plans (`enable_plan_caching=True`) drops what the coordinator adds to a plan that has not changed. The coordinator
    refuses to commit if a rank has followed another claim than its own.
    """
    if isinstance(told, Assignment) and told.nonce not in _heard:
        _heard.append(told.nonce)
        return told
    rank = told.rank if isinstance(told, Assignment) else rank
    if rank is None:
        raise SaveError(
            f"{store.url}: the save plan has lost what fastckpt put into its `storage_data`: keep that member in finish_plan"
        )
    repository = Repository(store)
    epoch = repository.epoch(repository.newest_epoch())
    parent = None if epoch.parent is None else (epoch.parent.checkpoint, epoch.parent.digest)
    return Assignment("", SaveId(epoch.number, step, 0), parent, rank, epoch.world)


def commit(store: Store, turn: Assignment, own: Vote | None, told: Sequence[VoteName], metadata: Metadata) -> Commit:
    """Commit a save. Blocks until the record is there.

    turn: the coordinator's own. own: the vote that it has placed. told: what the ranks say that they have placed. metadata: torch's plan of
    the whole. SaveError if votes are missing, or hold anything but what was planned; then nothing is committed, now or later.
    """
    try:
        _check_planner_data(store, metadata)
        votes = _read_votes(store, turn, own, told)
        _check_votes(store, votes, metadata)
    except SaveError:
        _bury(store, turn.save)
        raise
    found = commit_votes(store, [votes[name] for name in sorted(votes, key=lambda name: name.rank)])
    if any(found.vote(name.rank) != name for name in votes):
        raise RepositoryError(
            f"{store.url}: another process has committed this save ({turn.save}). Start one job for each checkpoint_id"
        )
    return found


def _check_votes(store: Store, votes: Mapping[VoteName, Vote], metadata: Metadata) -> None:
    """SaveError unless the votes hold what was planned."""
    layout = layout_of({name.rank: vote.directory for name, vote in votes.items()}, store.url)
    unlike = differences(layout, metadata)
    if unlike:
        listed = "\n  ".join(unlike[:10])
        raise SaveError(
            f"{store.url}: the ranks have not written what the planner says they have. Nothing was committed:\n  {listed}"
        )


def _bury(store: Store, save: SaveId) -> None:
    """See to it that nobody completes a save that was refused although all ranks have voted, as `fastckpt check --repair` would."""
    tombstone = Tombstone(save.checkpoint, None, UNFINISHED, utc_now())
    try:
        create(store, commit_key(save.checkpoint), tombstone_bytes(tombstone))
    except Exception as error:  # the caller has an error of its own to raise
        logger.warning("%s: the refused save %s could not be retired: %s", store.url, save, error)


def _check_planner_data(store: Store, metadata: Metadata) -> None:
    """SaveError for planner's data that could be kept only by pickling them."""
    data = metadata.planner_data
    if data is not None and not is_paths(data):
        raise SaveError(
            f"{store.url}: the planner has `planner_data` of type {type(data).__name__}. fastckpt keeps what torch's own planners have "
            "there (flattened names and their places), and pickles nothing. Nothing was committed"
        )


def _read_votes(store: Store, turn: Assignment, own: Vote | None, told: Sequence[VoteName]) -> Mapping[VoteName, Vote]:
    strange = sorted(name.rank for name in told if name.save != turn.save)
    there = list_votes(store, turn.save)
    missing = sorted(set(range(turn.world)) - {name.rank for name in there})
    more = sorted({name.rank for name in there if name not in told})
    if strange or missing or more:
        raise SaveError(
            f"{store.url}: ranks without a vote in save {turn.save}: {missing[:20]}; ranks that saved as another one: {strange[:20]}; "
            f"votes of other processes as ranks {more[:20]}. Nothing was committed. A checkpoint_id must be one place for all ranks (a "
            "directory that all nodes mount, or an object store), and one job at a time writes there"
        )
    others = [name for name in there if own is None or name != own.name]
    with contextlib.closing(WorkerPool(min(_READS_AT_ONCE, len(others)), "fastckpt-votes")) as pool:
        calls = [(name, pool.submit(functools.partial(read_vote, store, name))) for name in others]
        read = {name: call.result() for name, call in calls}
    return read if own is None else {**read, own.name: own}


def retire_others(store: Store, found: Commit) -> None:
    """Retire the checkpoints that this one has replaced, and delete what only they need. Errors are logged: they are none of the save."""
    if found.save.epoch == 1:  # the first one here
        return
    try:
        collector = Collector(Repository(store))
        view = collector.look()
        todo = plan_retention(view, Keep(last=1), (), GRACE_S)
        retired = {checkpoint for checkpoint, _ in todo.retire if checkpoint in view.living}
        refused = collector.run(todo, found.save.epoch)
        if retired:  # they were committed, so no request of theirs is on its way: their packs need no grace
            view = collector.look()
            todo = plan_retention(view, Keep(last=1), (), GRACE_S)
            if view.needed is not None and retired <= view.tombstones.keys():
                packs = {key for keys in view.packs.values() for key in keys} - set(view.needed) - set(todo.delete)
                todo.delete += sorted(key for key in packs if _checkpoint_of(key) in retired)
            refused += collector.run(todo, found.save.epoch)
        for error in refused:
            logger.warning("%s: an old object could not be removed: %s", store.url, error)
    except Exception as error:
        logger.warning("%s: what was replaced could not be removed: %s. `fastckpt prune` removes it", store.url, error)


def _checkpoint_of(pack: str) -> CheckpointId | None:
    save = parse_pack(pack)
    return None if save is None else save.checkpoint


__all__ = ["Assignment", "begin", "commit", "follow", "retire_others", "step_of"]

"""A rank of a checkpoint, whole: its own vote and what owners write for it (docs/format.md, section 11.3)."""

from __future__ import annotations

import functools
from collections import defaultdict, deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import NamedTuple

from fastckpt.errors import CorruptCheckpointError, Damage, MissingObjectError
from fastckpt.format.keys import vote_key
from fastckpt.format.repository_records import Commit
from fastckpt.format.shares import Claims, UnmetClaim, claims_of, some_ranks
from fastckpt.host.threads import WorkerPool
from fastckpt.reading.chunk_reader import Reader
from fastckpt.reading.merged_reader import Merging
from fastckpt.repository.commit import open_vote
from fastckpt.store.base import Store

_VOTES_AHEAD = (
    4  # there may be 32 owners: each vote takes two requests, and with 10,000 tensors 10 MB until it is merged
)


def open_rank(store: Store, commit: Commit, rank: int) -> Reader:
    """A rank's index, checked whole and merged with the votes of owners. Takes a few votes' memory at a time.

    CorruptCheckpointError lists every tensor whose share is missing or does not fit, with the rank that has it. MissingObjectError where
    the rank's own vote is gone; UnsupportedFormatError, StoreError.
    """
    return with_owners(store, commit, open_vote(store, commit.vote(rank)))


def with_owners(store: Store, commit: Commit, own: Reader) -> Reader:
    """As `open_rank`, of a vote that has been opened."""
    merging = Merging(own)
    add_owners(store, commit, merging)
    return merging.finish()


def add_owners(store: Store, commit: Commit, merging: Merging) -> None:
    """Add the votes of all owners that a rank needs; what is damaged or missing counts as lost. UnsupportedFormatError, StoreError."""
    for rank in merging.needed:
        if rank >= commit.world:
            merging.lose(rank, f"none: the checkpoint has ranks 0 to {commit.world - 1}")
    for rank, opened in opened_votes(store, commit, sorted(rank for rank in merging.needed if rank < commit.world)):
        try:
            merging.add(rank, opened.result())
        except MissingObjectError:
            merging.lose(rank, f"no such object ({vote_key(commit.vote(rank))})")
        except CorruptCheckpointError as error:
            merging.lose(rank, error)


def opened_votes(store: Store, commit: Commit, ranks: Iterable[int]) -> Iterator[tuple[int, Future[Reader]]]:
    """Votes of these ranks, in order, a few of them opened ahead."""
    waiting = deque(ranks)
    if not waiting:
        return
    pool = WorkerPool(min(_VOTES_AHEAD, len(waiting)), "fastckpt-votes")
    try:
        pending: deque[tuple[int, Future[Reader]]] = deque()
        while waiting or pending:
            while waiting and len(pending) < _VOTES_AHEAD:
                rank = waiting.popleft()
                pending.append((rank, pool.submit(functools.partial(open_vote, store, commit.vote(rank)))))
            yield pending.popleft()
    finally:
        pool.close()


def needs_any(store: Store, commit: Commit, stored: Collection[tuple[str, int]]) -> bool:
    """Whether a checkpoint names any of these stored bytes (`Damage.stored`). Reads its votes. UnreadableError, StoreError."""
    if not stored:
        return False
    for rank in range(commit.world):
        reader = open_vote(store, commit.vote(rank))
        keys, offsets = [file.key for file in reader.files], reader.records["offset"]
        for key, offset in stored:
            if key in keys and ((reader.records["file"] == keys.index(key) + 1) & (offsets == offset)).any():
                return True
    return False


class LostShares(NamedTuple):
    """What one owner should have written and its vote does not have."""

    owner: int
    damage: Damage
    """With the names of all tensors that are lost."""
    needed_by: tuple[int, ...]
    """The ranks that cannot be restored without."""


def lost_shares(store: Store, commit: Commit, claims: Claims, unread: Collection[int]) -> list[LostShares]:
    """What is missing of a checkpoint's shares, by owner. claims: of all votes but those of the ranks `unread`, which cannot be read.

    Votes are read again for the names, if there is anything. StoreError.
    """
    by_owner: dict[int, list[UnmetClaim]] = defaultdict(list)
    for one in claims.unmet():
        by_owner[one.owner].append(one)
    found = []
    for owner, unmet in sorted(by_owner.items()):
        ranks = tuple(sorted({rank for one in unmet for rank in one.needed_by}))
        missing = "a vote that cannot be read" if owner in unread else f"no such storage, or another: {unmet[0].claim}"
        expected = f"{len(unmet)} storages as {some_ranks(ranks)} have them"
        names = _names(store, commit, unmet)
        found.append(LostShares(owner, Damage("vote", f"shares of rank {owner}", expected, missing, names), ranks))
    return found


def _names(store: Store, commit: Commit, unmet: Sequence[UnmetClaim]) -> tuple[str, ...]:
    """Names of the tensors in storages that are claimed in vain, as the first rank has them that claims each one."""
    by_rank: dict[int, list[UnmetClaim]] = defaultdict(list)
    for one in unmet:
        by_rank[one.needed_by[0]].append(one)
    names: dict[str, None] = {}
    for rank, some in by_rank.items():
        reader = open_vote(store, commit.vote(rank))
        numbers = claims_of(reader.directory)
        for one in some:
            names |= dict.fromkeys(reader.names_of_storage[numbers[one.claim]])
    return tuple(names)


__all__ = ["LostShares", "add_owners", "lost_shares", "open_rank", "opened_votes", "with_owners"]

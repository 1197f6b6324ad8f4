"""Finds and reads the votes of a checkpoint, as far as possible."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fastckpt.errors import (
    CorruptCheckpointError,
    Damage,
    NoCheckpointError,
    ObjectNotFoundError,
    RepositoryError,
    StoreError,
    UnreadableError,
    UnsupportedFormatError,
)
from fastckpt.format import container, keys
from fastckpt.format.container import FOOTER_BYTES, INDEX_PARTS
from fastckpt.format.digest import digest
from fastckpt.format.keys import CheckpointId, SaveId, VoteName
from fastckpt.format.repository_records import Tombstone
from fastckpt.reading.chunk_reader import Reader
from fastckpt.reading.merged_reader import Merging
from fastckpt.reading.object_source import BytesSource, ObjectSource
from fastckpt.repository.commit import MAX_VOTE_BYTES, complete_set, open_vote
from fastckpt.repository.repository import Repository
from fastckpt.store.base import Store
from fastckpt.writing.container import index_and_footer


@dataclass(frozen=True)
class Votes:
    """The votes that make up a checkpoint, as far as they are known."""

    save: SaveId
    world: int
    names: Mapping[int, VoteName]
    commit: str = "whole"


def find_votes(repository: Repository, checkpoint: CheckpointId) -> Votes:
    """Find the votes of a checkpoint: in the commit record, or by listing if that is damaged or missing.

    NoCheckpointError: there are none, or the checkpoint was retired. StoreError, UnsupportedFormatError.
    """
    try:
        found = repository.commit(checkpoint)
    except ObjectNotFoundError:
        words = "missing: this save was never completed, so it is no checkpoint"
    except (StoreError, UnsupportedFormatError):
        raise
    except CorruptCheckpointError as error:
        words = "; ".join(map(str, error.damage))
    else:
        if isinstance(found, Tombstone):
            raise NoCheckpointError(
                f"{repository.location(checkpoint)}: this checkpoint was retired ({found.why}), its data is being deleted. "
                "`fastckpt ls` lists those that are left"
            )
        return Votes(found.save, found.world, {rank: found.vote(rank) for rank in range(found.world)})
    listed = (keys.parse_vote(info.key) for info in repository.store.list(keys.VOTES))
    votes = choose_try([name for name in listed if name is not None and name.save.checkpoint == checkpoint], words)
    if votes is None:
        raise NoCheckpointError(
            f"{repository.url}: nothing is left of epoch {checkpoint.epoch}, step {checkpoint.step}: its commit record is "
            f"{words.partition(':')[0]} and it has no votes. `fastckpt ls` lists what is here"
        )
    return votes


def choose_try(names: Iterable[VoteName], commit: str) -> Votes | None:
    """Choose a try's votes without a commit record. Pure.

    Takes the first complete try; without one, the try with votes of the most ranks. None: there are no votes. commit: the problem of the
    commit record.
    """
    tries: dict[SaveId, list[VoteName]] = defaultdict(list)
    for name in names:
        tries[name.save].append(name)
    best: tuple[bool, int, int] | None = None
    chosen = None
    for save, found in tries.items():
        rank = (_complete(found), len({name.rank for name in found}), -save.attempt)
        if best is None or rank > best:
            best, chosen = rank, save
    if chosen is None:
        return None
    votes = sorted(tries[chosen], reverse=True)
    return Votes(chosen, max(vote.world for vote in votes), {vote.rank: vote for vote in votes}, commit)


def _complete(names: Sequence[VoteName]) -> bool:
    try:
        return complete_set(names, "") is not None
    except RepositoryError:
        return False


@dataclass
class OpenedIndex:
    """A rank's index, or the reason why there is none."""

    reader: Reader | None
    why: tuple[str, ...] = ()


def open_index(store: Store, name: VoteName | None) -> OpenedIndex:
    """Open a vote. If only its skeleton is damaged, open it without the skeleton: each part has its own digest. name None: the rank has no
    vote.
    """
    if name is None:
        return OpenedIndex(None, ("this rank has not voted",))
    try:
        return OpenedIndex(open_vote(store, name))
    except ObjectNotFoundError:
        return OpenedIndex(None, (f"its vote is missing: {keys.vote_key(name)}",))
    except UnsupportedFormatError as error:
        return OpenedIndex(None, (str(error),))
    except CorruptCheckpointError as error:
        why = tuple(f"its vote is damaged: {damage}" for damage in error.damage)
    try:
        return OpenedIndex(_without_skeleton(store, name), why)
    except (UnreadableError, EOFError):
        return OpenedIndex(None, why)


def _without_skeleton(store: Store, name: VoteName) -> Reader:
    """Open a damaged vote whose directory, file table and records agree with their digests."""
    key = keys.vote_key(name)
    source = f"{store.url}/{key}"
    if not container.MIN_BYTES <= store.head(key).n_bytes <= MAX_VOTE_BYTES:
        raise CorruptCheckpointError(source, [Damage("vote", "length", f"{name.n_bytes} bytes", "another length")])
    data = store.get(key)
    footer = container.parse_footer(data[-FOOTER_BYTES:], len(data), source)
    parts = []
    for part in INDEX_PARTS[:-1]:
        entry = footer.parts[part]
        # Counted from the end: the footer may belong to a container that is shorter than the object.
        start = len(data) - footer.container_bytes + entry.offset
        found = data[start : start + entry.n_bytes]
        if digest(found) != entry.digest:
            raise CorruptCheckpointError(source, [Damage(part, "digest", entry.digest.hex(), digest(found).hex())])
        parts.append(found)
    whole = footer.header_bytes + b"".join(index_and_footer(footer.header_bytes, 0, [*parts, b""]))
    return Reader.open_vote(BytesSource(whole, source), lambda file: ObjectSource(store, file.key, file.n_bytes))


def with_shares(store: Store, votes: Votes, own: Reader) -> tuple[Reader, dict[int, list[Damage]]]:
    """A rank's index with what other ranks write for it, as far as their votes can be read, and by storage what is missing. StoreError."""
    merging = Merging(own)
    for rank in sorted(merging.needed):
        opened = open_index(store, votes.names.get(rank))
        if opened.reader is None:
            merging.lose(rank, "; ".join(opened.why))
        else:
            merging.add(rank, opened.reader)
    return merging.finish_in_part(), merging.lost

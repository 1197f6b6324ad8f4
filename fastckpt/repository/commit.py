"""Votes → commit record: one conditional put makes a checkpoint exist (docs/guarantees.md, section 3).

The record follows from the votes alone, whoever wrote them. So the rank that sees the last vote, a later incarnation, and `check --repair`
all build the same bytes.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from fastckpt import events
from fastckpt.errors import (
    BaseLostError,
    CorruptCheckpointError,
    Damage,
    MissingObjectError,
    ObjectExistsError,
    ObjectNotFoundError,
    RepositoryError,
    UnsupportedVerbError,
)
from fastckpt.format import keys
from fastckpt.format.digest import digest
from fastckpt.format.directory import FileEntry
from fastckpt.format.keys import CheckpointId, SaveId, VoteName, commit_key, vote_key, votes_prefix
from fastckpt.format.repository_records import Commit, Parent, Tombstone, commit_bytes, parse_commit_record
from fastckpt.format.sealed import MAX_SEALED_BYTES
from fastckpt.format.vote import Vote, commit_of, part_ranges, save_info
from fastckpt.host.boot_clock import seconds_since_boot
from fastckpt.host.threads import WorkerPool
from fastckpt.reading.chunk_reader import Reader
from fastckpt.reading.object_source import BytesSource, ObjectSource
from fastckpt.repository.inventory import take_inventory
from fastckpt.repository.pack_sizes import packs_at_odds
from fastckpt.repository.vote_set import VoteSetState, vote_set_of
from fastckpt.store.base import ObjectInfo, Store

T = TypeVar("T")

_MOST_BEFORE_COMMIT_S = 60.0
"""Between the readings on which a commit is decided and the commit: a process that was stopped in between reads again."""
MAX_VOTE_BYTES = 2 << 30
_READS_AT_ONCE = 64
"""Votes of many ranks are read by one: an answer takes 30 ms, and one by one they would take longer than others wait."""


@contextlib.contextmanager
def named_object(store: Store, key: str) -> Iterator[None]:
    """Context for a request of an object that a repository needs: if the object is missing, raises MissingObjectError."""
    try:
        yield
    except ObjectNotFoundError as error:
        raise MissingObjectError(str(error)) from error


def read_again(read: Callable[[], T]) -> T:
    """What `read` returns; if it finds damage, what a second try returns or raises. A bit that flipped on the way is not damage of what is
    stored, and a save or a start should not fail of it.
    """
    try:
        return read()
    except CorruptCheckpointError:
        return read()


def read_vote_bytes(store: Store, name: VoteName, listed: ObjectInfo | None = None) -> bytes:
    """The bytes of a vote, checked against length and digest in its name. listed: see `read_sealed`. CorruptCheckpointError,
    MissingObjectError.
    """
    key = vote_key(name)
    source = f"{store.url}/{key}"
    if listed is None:
        with named_object(store, key):
            listed = store.head(key)
    found = listed.n_bytes
    if found != name.n_bytes or found > MAX_VOTE_BYTES:
        expected = f"{name.n_bytes} bytes, as its name says, and at most {MAX_VOTE_BYTES}"
        raise CorruptCheckpointError(source, [Damage("vote", "length", expected, str(found))])

    def read() -> bytes:
        with named_object(store, key):
            data = store.get(key)
        actual = digest(data).hex()
        if actual != name.digest:
            raise CorruptCheckpointError(source, [Damage("vote", "digest", f"{name.digest}, as its name says", actual)])
        return data

    return read_again(read)


def open_vote(store: Store, name: VoteName, listed: ObjectInfo | None = None) -> Reader:
    """Open a rank's index and check it completely; its chunks are read from packs. listed: see `read_sealed`.

    UnreadableError.
    """
    source = BytesSource(read_vote_bytes(store, name, listed), f"{store.url}/{vote_key(name)}")
    return Reader.open_vote(source, lambda file: ObjectSource(store, file.key, file.n_bytes))


def read_vote(store: Store, name: VoteName, listed: ObjectInfo | None = None) -> Vote:
    """Read the facts about a vote that a commit record needs. Errors as those of `open_vote`."""
    reader = open_vote(store, name, listed)
    info = save_info(reader.directory, name, reader.source.name)
    return Vote(name, info, reader.directory, part_ranges(reader.footer), reader.files)


def complete_set(names: Iterable[VoteName], where: str) -> list[VoteName] | None:
    """The votes of all ranks of one try, rank 0's first; None if some are missing.

    RepositoryError if ranks disagree about the world or one voted twice: such votes must never be committed.
    """
    found = vote_set_of(names)
    if found.state is VoteSetState.CONTRADICTORY:
        raise RepositoryError(
            f"{where}: votes contradict each other ({found.why}): nothing is committed. Save the step again; `fastckpt prune` removes these"
        )
    return list(found.votes) if found.state is VoteSetState.COMPLETE else None


def list_votes(store: Store, save: SaveId) -> list[VoteName]:
    """The existing votes of one try."""
    return list(take_inventory(store, votes_prefix(save)).votes.get(save, ()))


def has_all_votes(store: Store, save: SaveId) -> bool:
    """Whether all ranks' votes of one try are there. RepositoryError as `complete_set`."""
    return complete_set(list_votes(store, save), f"{store.url}/{votes_prefix(save)}") is not None


def read_commit(store: Store, checkpoint: CheckpointId, listed: ObjectInfo | None = None) -> Commit | Tombstone:
    """Read the record at a commit key. listed: see `read_sealed`. UnreadableError; its subclass MissingObjectError if there is none."""
    key = commit_key(checkpoint)
    return read_again(lambda: parse_commit_record(read_sealed(store, key, listed), checkpoint, f"{store.url}/{key}"))


def poll_commit(store: Store, checkpoint: CheckpointId) -> Commit | Tombstone | None:
    """The record at the commit key of a save of one's own job, if there is one: by one request, as thousands of ranks may ask.

    UnreadableError.
    """
    key = commit_key(checkpoint)
    try:
        return read_again(lambda: parse_commit_record(store.get(key), checkpoint, f"{store.url}/{key}"))
    except ObjectNotFoundError:
        return None


def read_sealed(store: Store, key: str, listed: ObjectInfo | None = None) -> bytes:
    """The bytes of a small object; its length is checked before it is read. CorruptCheckpointError, MissingObjectError.

    listed: what a LIST has just said about the object; saves one request.
    """
    if listed is None:
        with named_object(store, key):
            listed = store.head(key)
    with named_object(store, key):
        return _read_small(store, key, listed.n_bytes, store.get)


def _read_small(store: Store, key: str, n_bytes: int, get: Callable[[str], T]) -> T:
    """CorruptCheckpointError if the object is larger than any record; it is not read then."""
    if n_bytes > MAX_SEALED_BYTES:
        damage = Damage(key.partition("/")[0], "length", f"at most {MAX_SEALED_BYTES}", str(n_bytes))
        raise CorruptCheckpointError(f"{store.url}/{key}", [damage])
    return get(key)


def read_for_replacing(store: Store, checkpoint: CheckpointId) -> tuple[Commit | Tombstone | None, str | None]:
    """The record at a commit key, if there is one, and its version for `replace_if_match`; None: the store tells no versions apart.

    UnreadableError.
    """
    key, version = commit_key(checkpoint), None
    try:
        with named_object(store, key):
            listed = store.head(key)
            try:
                data, version = _read_small(store, key, listed.n_bytes, store.get_version)
            except UnsupportedVerbError:
                data = read_sealed(store, key, listed)
    except MissingObjectError:
        return None, None
    return parse_commit_record(data, checkpoint, f"{store.url}/{key}"), version


def create(store: Store, key: str, data: bytes) -> bytes:
    """Put an object if there is none. Returns the bytes that are there now: `data`, or those of somebody else.

    After an error it is unknown whether our object was created (S4), so a caller may simply call again: equal bytes count as ours.
    """
    try:
        store.put_if_absent(key, data)
    except ObjectExistsError:
        return read_sealed(store, key)
    return data


def try_commit(store: Store, save: SaveId, own: Vote | None = None) -> Commit | None:
    """Commit a save if all its votes are there. Returns the record that exists afterwards, perhaps that of another try; None if votes are
    missing.

    own: the vote that this process has placed; it is not read back. RepositoryError if the votes contradict each other or the step was
    retired; CorruptCheckpointError for a damaged vote; StoreError.
    """
    seen_s = seconds_since_boot()
    inventory = take_inventory(store, votes_prefix(save))
    names = complete_set(inventory.votes.get(save, ()), f"{store.url}/{votes_prefix(save)}")
    if names is None:
        return None
    for name in names:
        if own is not None and own.name.rank == name.rank and own.name != name:
            raise RepositoryError(
                f"{store.url}/{vote_key(name)} is a vote of this process's rank {name.rank} that it did not place: two processes "
                "save as one incarnation. Start each with a Checkpointer of its own"
            )
    others = [name for name in names if own is None or name != own.name]
    with contextlib.closing(WorkerPool(min(_READS_AT_ONCE, len(others)), "fastckpt-votes")) as pool:
        calls = [
            pool.submit(functools.partial(read_vote, store, name, inventory.infos[vote_key(name)])) for name in others
        ]
        read = {name: call.result() for name, call in zip(others, calls, strict=True)}
    return commit_votes(store, [read[name] if own is None or name != own.name else own for name in names], seen_s)


def commit_votes(store: Store, votes: Sequence[Vote], seen_s: float | None = None) -> Commit:
    """Commit a save whose votes are all there, rank 0's first: the record that stands afterwards. Errors as those of `try_commit`.

    seen_s: when the votes were seen, by `seconds_since_boot`; None: just now. BaseLostError: the votes name packs of earlier saves, and the
    checkpoint that kept these was retired.
    """
    save = votes[0].name.save
    commit = commit_of(votes, f"{store.url}/{votes_prefix(save)}")
    record = commit_bytes(commit)
    key = commit_key(save.checkpoint)
    others = {file.key: file for vote in votes for file in vote.files if keys.parse_pack(file.key) != save}
    _look_before_commit(store, commit, votes, list(others.values()), seconds_since_boot() if seen_s is None else seen_s)
    try:
        stands = create(store, key, record)
        if stands != record:  # a bit may have flipped on the way
            stands = read_sealed(store, key)
    except MissingObjectError as error:  # do not put it again: the record was retired, and its packs are being deleted
        raise RepositoryError(
            f"{store.url}/{key}: another record stood there and is gone again: step {save.step} of epoch {save.epoch} was retired while it "
            "was being saved. It is not committed"
        ) from error
    found = parse_commit_record(stands, save.checkpoint, f"{store.url}/{key}")
    if isinstance(found, Tombstone):
        raise _retired(store, save, found)
    if stands == record:
        events.emit(events.Committed(target=store.url, key=key, step=save.step, epoch=save.epoch, world=found.world))
    return found


def require_vote(store: Store, name: VoteName) -> None:
    """RepositoryError if a vote that was placed is gone: nobody will place it again, so waiting for it is useless."""
    try:
        store.head(vote_key(name))
        return
    except ObjectNotFoundError:
        pass
    try:
        found = read_commit(store, name.save.checkpoint)
    except ObjectNotFoundError:
        found = None
    if isinstance(found, Tombstone):
        raise _retired(store, name.save, found)
    raise RepositoryError(
        f"{store.url}/{vote_key(name)} was placed and is gone: step {name.save.step} was retired meanwhile, or somebody deletes what this "
        "job saves. It is not committed"
    )


def _retired(store: Store, save: SaveId, found: Tombstone) -> RepositoryError:
    return RepositoryError(
        f"{store.url}/{commit_key(save.checkpoint)}: step {save.step} of epoch {save.epoch} has been retired ({found.why})"
    )


def _look_before_commit(
    store: Store, commit: Commit, votes: Sequence[Vote], others: Sequence[FileEntry], seen_s: float
) -> None:
    """What the commit is decided on, no more than a minute before it: all votes are there; and packs of *other* saves are there in full
    length, and stay, as the save's parent, which names them, lives.

    Retention deletes votes first, packs a grace after the checkpoint or the parent was retired. So the record has that long to take effect
    (A1). This save's own packs need no look: they were acknowledged before the votes were placed.
    """
    damage = packs_at_odds(store, others)
    if damage:
        raise CorruptCheckpointError(f"{store.url}/{votes_prefix(commit.save)}", damage)
    parent_s = -math.inf if others else math.inf
    while seconds_since_boot() - min(seen_s, parent_s) > _MOST_BEFORE_COMMIT_S:  # this process may have been stopped
        if seconds_since_boot() - seen_s > _MOST_BEFORE_COMMIT_S:
            seen_s = seconds_since_boot()
            _require_votes(store, commit.save, votes)
        if seconds_since_boot() - parent_s > _MOST_BEFORE_COMMIT_S:
            parent_s = seconds_since_boot()
            try:
                require_parent(store, commit.save, commit.parent)
            except BaseLostError:  # another rank may have committed the save, and its parent may be retired since
                if poll_commit(store, commit.checkpoint) is None:
                    raise


def _require_votes(store: Store, save: SaveId, votes: Sequence[Vote]) -> None:
    gone = {vote.name for vote in votes} - set(list_votes(store, save))
    if gone:
        raise RepositoryError(
            f"{store.url}/{vote_key(min(gone))} is gone: step {save.step} of epoch {save.epoch} was retired while this process was held "
            "up. It is not committed"
        )


def require_parent(store: Store, save: SaveId, parent: Parent | None) -> None:
    """BaseLostError unless the parent of a save, as its votes name it, is a living checkpoint. UnreadableError, StoreError."""
    found = None if parent is None else poll_commit(store, parent.checkpoint)
    if parent is None or not isinstance(found, Commit) or found.digest != parent.digest:
        which = "no parent" if parent is None else f"the checkpoint {parent.checkpoint}"
        raise BaseLostError(
            f"{store.url}: step {save.step} refers to packs of {which}, which does not exist any more: it was retired while the "
            "step was being saved, perhaps by another process. Nothing was committed; the next save is written in full"
        )

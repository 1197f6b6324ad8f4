"""Votes → commit record: one conditional put makes a checkpoint exist (docs/guarantees.md, section 3).

Nothing here asks who wrote a vote: the record follows from the votes alone, so the rank that sees the last one, a later incarnation and
`check --repair` all build the same bytes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

from fastckpt import events
from fastckpt.errors import (
    CorruptCheckpointError,
    Damage,
    MissingObjectError,
    ObjectExistsError,
    ObjectNotFoundError,
    RepositoryError,
)
from fastckpt.format import keys
from fastckpt.format.digest import digest
from fastckpt.format.keys import CheckpointId, SaveId, VoteName, commit_key, vote_key, votes_prefix
from fastckpt.format.repository_records import Commit, Tombstone, commit_bytes, parse_commit_record
from fastckpt.format.sealed import MAX_SEALED_BYTES
from fastckpt.format.vote import Vote, commit_of, part_ranges, save_info
from fastckpt.reading.chunk_reader import Reader
from fastckpt.reading.object_source import BytesSource, ObjectSource
from fastckpt.repository.inventory import take_inventory
from fastckpt.repository.vote_set import VoteSetState, vote_set_of
from fastckpt.store.base import ObjectInfo, Store

MAX_VOTE_BYTES = 2 << 30


@contextlib.contextmanager
def named_object(store: Store, key: str) -> Iterator[None]:
    """A request for an object that a repository needs: where it is not there, that is MissingObjectError."""
    try:
        yield
    except ObjectNotFoundError as error:
        raise MissingObjectError(str(error)) from error


def read_vote_bytes(store: Store, name: VoteName) -> bytes:
    """The bytes of a vote, which are those its name says. CorruptCheckpointError, MissingObjectError."""
    key = vote_key(name)
    source = f"{store.url}/{key}"
    with named_object(store, key):
        found = store.head(key).n_bytes
    if found != name.n_bytes or found > MAX_VOTE_BYTES:
        expected = f"{name.n_bytes} bytes, as its name says, and at most {MAX_VOTE_BYTES}"
        raise CorruptCheckpointError(source, [Damage("vote", "length", expected, str(found))])
    with named_object(store, key):
        data = store.get(key)
    actual = digest(data).hex()
    if actual != name.digest:
        raise CorruptCheckpointError(source, [Damage("vote", "digest", f"{name.digest}, as its name says", actual)])
    return data


def open_vote(store: Store, name: VoteName) -> Reader:
    """A rank's index, checked whole, whose chunks are read from packs.

    UnreadableError.
    """
    source = BytesSource(read_vote_bytes(store, name), f"{store.url}/{vote_key(name)}")
    return Reader.open_vote(source, lambda file: ObjectSource(store, file.key, file.n_bytes))


def read_vote(store: Store, name: VoteName) -> Vote:
    """What a commit record needs to know of a vote. Errors as those of `open_vote`."""
    reader = open_vote(store, name)
    info = save_info(reader.directory, name, reader.source.name)
    return Vote(name, info, reader.directory, part_ranges(reader.footer), reader.files)


def complete_set(names: Iterable[VoteName], where: str) -> list[VoteName] | None:
    """The votes of all ranks of one try, rank 0's first; None if some are missing.

    RepositoryError if ranks disagree about the world or one voted twice: no commit may come of that.
    """
    found = vote_set_of(names)
    if found.state is VoteSetState.CONTRADICTORY:
        raise RepositoryError(
            f"{where}: votes contradict each other ({found.why}): nothing is committed. Save the step again; `fastckpt prune` removes these"
        )
    return list(found.votes) if found.state is VoteSetState.COMPLETE else None


def list_votes(store: Store, save: SaveId) -> list[VoteName]:
    """The votes of one try that are there."""
    return list(take_inventory(store, votes_prefix(save)).votes.get(save, ()))


def read_commit(store: Store, checkpoint: CheckpointId, listed: ObjectInfo | None = None) -> Commit | Tombstone:
    """What stands at a commit key. listed: see `read_sealed`. UnreadableError: MissingObjectError where nothing does."""
    key = commit_key(checkpoint)
    return parse_commit_record(read_sealed(store, key, listed), checkpoint, f"{store.url}/{key}")


def read_sealed(store: Store, key: str, listed: ObjectInfo | None = None) -> bytes:
    """The bytes of a small object, whose length is looked at first. CorruptCheckpointError, MissingObjectError.

    listed: what a LIST has just told of the object, which saves a request.
    """
    if listed is None:
        with named_object(store, key):
            listed = store.head(key)
    n_bytes = listed.n_bytes
    if n_bytes > MAX_SEALED_BYTES:
        damage = Damage(key.partition("/")[0], "length", f"at most {MAX_SEALED_BYTES}", str(n_bytes))
        raise CorruptCheckpointError(f"{store.url}/{key}", [damage])
    with named_object(store, key):
        return store.get(key)


def create(store: Store, key: str, data: bytes) -> bytes:
    """Put an object if there is none. Returns the bytes that are there now: `data`, or somebody else's.

    An error says nothing about whether ours landed (S4), so a caller may simply call again: equal bytes are ours.
    """
    try:
        store.put_if_absent(key, data)
    except ObjectExistsError:
        return read_sealed(store, key)
    return data


def try_commit(store: Store, save: SaveId, own: Vote | None = None) -> Commit | None:
    """Commit a save if all its votes are there: the record that stands afterwards, perhaps another try's; None if votes are missing.

    own: the vote that this process has placed, which is not read back. RepositoryError where the votes contradict each
    other or the step was retired; CorruptCheckpointError for a damaged vote; StoreError.
    """
    names = complete_set(list_votes(store, save), f"{store.url}/{votes_prefix(save)}")
    if names is None:
        return None
    votes = []
    for name in names:
        mine = own is not None and own.name.rank == name.rank
        if own is not None and mine and own.name != name:
            raise RepositoryError(
                f"{store.url}/{vote_key(name)} is a vote of this process's rank {name.rank} that it did not place: two processes "
                "save as one incarnation. Start each with a Checkpointer of its own"
            )
        vote = own if own is not None and mine else read_vote(store, name)
        _check_packs(store, vote)
        votes.append(vote)
    record = commit_bytes(commit_of(votes, f"{store.url}/{votes_prefix(save)}"))
    key = commit_key(save.checkpoint)
    try:
        stands = create(store, key, record)
    except MissingObjectError as error:  # not put again: what was there was retired, and the packs are being deleted
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
    """RepositoryError if a vote that was placed is gone: nobody places it again, so it is not waited for."""
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


def _check_packs(store: Store, vote: Vote) -> None:
    """Packs of *other* saves must be there in full length: this save's own were acknowledged before the vote was placed."""
    damage = []
    for file in vote.files:
        if keys.parse_pack(file.key) == vote.name.save:
            continue
        try:
            found = str(store.head(file.key).n_bytes)
        except ObjectNotFoundError:
            found = "no such object"
        if found != str(file.n_bytes):
            damage.append(Damage("pack", file.key, f"{file.n_bytes} bytes", found))
    if damage:
        raise CorruptCheckpointError(f"{store.url}/{vote_key(vote.name)}", damage)

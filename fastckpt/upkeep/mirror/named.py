"""What one checkpoint names: the votes of all ranks, and from their file tables the packs, those of earlier saves too."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from fastckpt.errors import CorruptCheckpointError, Damage
from fastckpt.format import keys
from fastckpt.format.directory import FileEntry
from fastckpt.format.keys import SaveId, VoteName, vote_key
from fastckpt.format.repository_records import Commit
from fastckpt.repository.commit import read_vote_bytes
from fastckpt.repository.file_tables import file_table
from fastckpt.store.base import Store
from fastckpt.upkeep.mirror.transfer import in_parallel

_KEPT_BYTES = 64 << 20
"""Votes stay in memory up to this sum; a thousand ranks may have gigabytes of them, which are read again when they are copied."""


@dataclass
class NamedObjects:
    """The packs of a checkpoint in the order of its file tables, and its votes as far as they are kept."""

    files: dict[str, FileEntry] = field(default_factory=dict)
    votes: dict[VoteName, bytes] = field(default_factory=dict)

    @property
    def saves(self) -> set[SaveId]:
        """Whose packs these are."""
        return {save for key in self.files if (save := keys.parse_pack(key)) is not None}


def read_named(store: Store, commit: Commit, connections: int, ranks: Collection[int] | None = None) -> NamedObjects:
    """Read the votes of a checkpoint, verified by length and digest. ranks: None for all.

    CorruptCheckpointError: a vote is damaged, or names what no checkpoint of its epoch can need; MissingObjectError, StoreError.
    """
    found, kept_bytes = NamedObjects(), 0
    for name, data in votes_of(store, commit, connections, ranks):
        source = f"{store.url}/{vote_key(name)}"
        for file in file_table(data, source):
            _enter(found, file, commit, source)
        if kept_bytes + len(data) <= _KEPT_BYTES:
            found.votes[name] = data
            kept_bytes += len(data)
    return found


def votes_of(
    store: Store, commit: Commit, connections: int, ranks: Collection[int] | None = None
) -> Iterator[tuple[VoteName, bytes]]:
    """Names and verified bytes of votes, in the order of the ranks. Errors as those of `read_named`."""
    names = [commit.vote(rank) for rank in (range(commit.world) if ranks is None else sorted(ranks))]
    calls = (functools.partial(read_vote_bytes, store, name) for name in names)
    return zip(names, in_parallel(calls, connections, "fastckpt-votes"), strict=True)


def misplaced(file: FileEntry, commit: Commit) -> Damage | None:
    """What is wrong with a pack that a checkpoint names, by its key alone: no save can know packs of later ones."""
    save = keys.parse_pack(file.key)
    if save is not None and (save == commit.save or save.checkpoint < commit.checkpoint):
        return None
    return Damage("file table", "key", f"a pack of {commit.save} or of an earlier checkpoint", file.key)


def _enter(found: NamedObjects, file: FileEntry, commit: Commit, source: str) -> None:
    wrong = misplaced(file, commit)
    if wrong is not None:  # the copy's next epoch may have this key for itself
        raise CorruptCheckpointError(source, [wrong])
    there = found.files.setdefault(file.key, file)
    if there != file:
        raise CorruptCheckpointError(source, [Damage("file table", file.key, str(there[1:]), str(file[1:]))])


__all__ = ["NamedObjects", "misplaced", "read_named", "votes_of"]

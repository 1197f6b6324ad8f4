"""Finds the packs that a checkpoint names, reading as few bytes of its votes as possible."""

from __future__ import annotations

from fastckpt.errors import CorruptCheckpointError, Damage
from fastckpt.format.container import FOOTER_BYTES, MAX_PART_BYTES, MIN_BYTES, parse_footer
from fastckpt.format.directory import FileEntry, build_file_table, parse_file_table
from fastckpt.format.keys import pack_key, vote_key
from fastckpt.format.repository_records import Commit
from fastckpt.repository.commit import named_object, open_vote
from fastckpt.store.base import Store


def packs_of(store: Store, commit: Commit) -> frozenset[str]:
    """Keys of the packs that the votes of a checkpoint name. UnreadableError, StoreError.

    If the checkpoint has only packs of its own, as most have, one range of each vote is enough. A range has no checksum of its own. So its
    file table is accepted only if it is exactly the expected one: byte for byte the table of packs 0, 1, 2 … of this rank, with as many
    bytes in all as the sealed commit record says. Otherwise the votes are read whole, and checked.
    """
    tables = [_table_alone(store, commit, rank) for rank in range(commit.world)]
    files = [file for table in tables if table is not None for file in table]
    if None in tables or sum(file.n_bytes for file in files) != commit.stored_bytes:
        files = [file for rank in range(commit.world) for file in open_vote(store, commit.vote(rank)).files]
    return frozenset(file.key for file in files)


def _table_alone(store: Store, commit: Commit, rank: int) -> tuple[FileEntry, ...] | None:
    """Read only the file table of a vote, by its range. None if it is not a table of the rank's own packs."""
    key = vote_key(commit.vote(rank))
    offset, n_bytes = commit.votes[rank].parts["file table"]
    if n_bytes > MAX_PART_BYTES["file table"]:
        return None
    data = bytearray(n_bytes)
    try:
        with named_object(store, key):
            store.get_into(key, offset, data)
        files = parse_file_table(bytes(data), False, f"{store.url}/{key}")
    except (CorruptCheckpointError, EOFError):
        return None
    own = [pack_key(commit.save, rank, number) for number in range(len(files))]
    return files if [file.key for file in files] == own and build_file_table(files) == data else None


def file_table(vote: bytes, source: str) -> tuple[FileEntry, ...]:
    """The file table of a vote whose digest was verified. CorruptCheckpointError, UnsupportedFormatError."""
    if len(vote) < MIN_BYTES:
        damage = Damage("vote", "length", f"at least {MIN_BYTES} bytes", str(len(vote)))
        raise CorruptCheckpointError(source, [damage])
    part = parse_footer(vote[-FOOTER_BYTES:], len(vote), source).parts["file table"]
    return parse_file_table(vote[part.offset : part.offset + part.n_bytes], False, source)

"""Finds the packs that a checkpoint names, reading as few bytes of its votes as possible."""

from __future__ import annotations

import contextlib
import functools

from fastckpt.errors import CorruptCheckpointError, Damage
from fastckpt.format.container import FOOTER_BYTES, MAX_PART_BYTES, MIN_BYTES, parse_footer
from fastckpt.format.digest import digest
from fastckpt.format.directory import FileEntry, build_file_table, parse_file_table
from fastckpt.format.keys import pack_key, vote_key
from fastckpt.format.repository_records import Commit
from fastckpt.host.threads import WorkerPool
from fastckpt.repository.commit import named_object
from fastckpt.store.base import Store

_READS_AT_ONCE = 16
"""Ranges of votes: an answer takes 30 ms, and a checkpoint of 1,024 ranks has as many votes."""


def packs_of(store: Store, commit: Commit) -> frozenset[str]:
    """Keys of the packs that the votes of a checkpoint name, those of earlier saves too. UnreadableError, StoreError.

    One range of each vote is enough if the checkpoint has only packs of its own. A range has no checksum of its own: such a file table is
    accepted if it is exactly the expected one, byte for byte the table of packs 0, 1, 2 … of this rank, with as many bytes in all as the
    sealed commit record says. Any other table is compared with its digest in the vote's footer, which has a checksum: one range more.
    """
    threads = 0 if commit.world == 1 else min(_READS_AT_ONCE, commit.world)
    with contextlib.closing(WorkerPool(threads, "fastckpt-tables")) as pool:
        calls = [pool.submit(functools.partial(_range_of_table, store, commit, rank)) for rank in range(commit.world)]
        data = [call.result() for call in calls]
        alone = [_own_packs(commit, rank, one) for rank, one in enumerate(data)]
        own = [file for table in alone if table is not None for file in table]
        if None not in alone and sum(file.n_bytes for file in own) == commit.stored_bytes:
            return frozenset(file.key for file in own)
        checks = [
            pool.submit(functools.partial(_checked_table, store, commit, rank, one)) for rank, one in enumerate(data)
        ]
        return frozenset(file.key for check in checks for file in check.result())


def _range_of_table(store: Store, commit: Commit, rank: int) -> bytes:
    """The bytes where the commit record says that the file table of a vote is. Not checked."""
    offset, n_bytes = commit.votes[rank].parts["file table"]
    return b"" if n_bytes > MAX_PART_BYTES["file table"] else read_range(store, commit, rank, offset, n_bytes)


def _own_packs(commit: Commit, rank: int, data: bytes) -> tuple[FileEntry, ...] | None:
    """The file table, if it is one of the rank's own packs alone."""
    try:
        files = parse_file_table(data, False, "")
    except CorruptCheckpointError:
        return None
    own = [pack_key(commit.save, rank, number) for number in range(len(files))]
    return files if [file.key for file in files] == own and build_file_table(files) == data else None


def _checked_table(store: Store, commit: Commit, rank: int, data: bytes) -> tuple[FileEntry, ...]:
    """The file table, by the footer what it should be. data: what was read in its place."""
    name = commit.vote(rank)
    source = f"{store.url}/{vote_key(name)}"
    if name.n_bytes < MIN_BYTES:
        raise _too_short(source, name.n_bytes)
    footer = parse_footer(
        read_range(store, commit, rank, name.n_bytes - FOOTER_BYTES, FOOTER_BYTES), name.n_bytes, source
    )
    part = footer.parts["file table"]
    if (part.offset, part.n_bytes) != commit.votes[rank].parts["file table"] or digest(data) != part.digest:
        data = read_range(store, commit, rank, part.offset, part.n_bytes)  # a bit may have flipped on the way
    found = digest(data)
    if found != part.digest:
        place = f"bytes {part.offset}–{part.offset + part.n_bytes}, digest"
        raise CorruptCheckpointError(source, [Damage("file table", place, part.digest.hex(), found.hex())])
    return parse_file_table(data, False, source)


def read_range(store: Store, commit: Commit, rank: int, offset: int, n_bytes: int) -> bytes:
    """A stretch of a vote, which nothing has checked. CorruptCheckpointError if the vote ends before; MissingObjectError, StoreError."""
    key = vote_key(commit.vote(rank))
    data = bytearray(n_bytes)
    try:
        with named_object(store, key):
            store.get_into(key, offset, data)
    except EOFError as error:
        expected = f"at least {offset + n_bytes} bytes"
        raise CorruptCheckpointError(f"{store.url}/{key}", [Damage("vote", "length", expected, str(error))]) from error
    return bytes(data)


def file_table(vote: bytes, source: str) -> tuple[FileEntry, ...]:
    """The file table of a vote whose digest was verified. CorruptCheckpointError, UnsupportedFormatError."""
    if len(vote) < MIN_BYTES:
        raise _too_short(source, len(vote))
    part = parse_footer(vote[-FOOTER_BYTES:], len(vote), source).parts["file table"]
    return parse_file_table(vote[part.offset : part.offset + part.n_bytes], False, source)


def _too_short(source: str, n_bytes: int) -> CorruptCheckpointError:
    return CorruptCheckpointError(source, [Damage("vote", "length", f"at least {MIN_BYTES} bytes", str(n_bytes))])

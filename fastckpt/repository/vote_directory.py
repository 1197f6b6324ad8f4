"""Reads what a rank's vote lists without its records: two ranges instead of the whole, for whoever asks 1,024 votes who has what."""

from __future__ import annotations

from fastckpt.errors import CorruptCheckpointError, Damage
from fastckpt.format import directory_reader
from fastckpt.format.container import FOOTER_BYTES, MAX_PART_BYTES, parse_footer
from fastckpt.format.digest import digest
from fastckpt.format.directory import Directory
from fastckpt.format.keys import vote_key
from fastckpt.format.repository_records import Commit
from fastckpt.format.vote import save_info
from fastckpt.repository.file_tables import read_range
from fastckpt.store.base import Store


def read_directory(store: Store, commit: Commit, rank: int) -> bytes:
    """The bytes of a vote's directory, by the footer's checksum what they should be. UnreadableError, StoreError.

    The footer has a checksum of its own. What is read later, chunks and the records that describe them, is verified then.
    """
    name = commit.vote(rank)
    source = f"{store.url}/{vote_key(name)}"
    footer = parse_footer(
        read_range(store, commit, rank, name.n_bytes - FOOTER_BYTES, FOOTER_BYTES), name.n_bytes, source
    )
    part = footer.parts["directory"]
    if part.n_bytes > MAX_PART_BYTES["directory"]:
        expected = f"at most {MAX_PART_BYTES['directory']} bytes"
        raise CorruptCheckpointError(source, [Damage("directory", "length", expected, str(part.n_bytes))])
    data = read_range(store, commit, rank, part.offset, part.n_bytes)
    found = digest(data)
    if found != part.digest:
        place = f"bytes {part.offset}–{part.offset + part.n_bytes}, digest"
        raise CorruptCheckpointError(source, [Damage("directory", place, part.digest.hex(), found.hex())])
    return data


def parse_directory(store: Store, commit: Commit, rank: int, data: bytes) -> Directory:
    """Check what `read_directory` has read, except extents. UnreadableError."""
    name = commit.vote(rank)
    source = f"{store.url}/{vote_key(name)}"
    listed = directory_reader.parse(data, None, source)
    save_info(listed, name, source)
    return listed

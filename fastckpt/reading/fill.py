"""Reads storages of a checkpoint into memory that is there already, such as that of live tensors."""

from __future__ import annotations

from collections.abc import Mapping

from fastckpt._types import U8
from fastckpt.reading.chunk_reader import Reader
from fastckpt.reading.reads import PLAIN_READS, Reads
from fastckpt.reading.storage_loader import StorageLoader


def fill(reader: Reader, memory: Mapping[int, U8], threads: int, reads: Reads = PLAIN_READS) -> None:
    """Read, verify and decode storages into the caller's memory, in the order of the mapping.

    Args:
        reader: of the container or vote.
        memory: number of a storage → host memory as long as the storage; written by several threads until this returns.
        threads: how many decode at once, and of files read, too.
        reads: how many reads of a store are under way at once, in how much memory (`Reads.of` the options).

    Raises:
        CorruptCheckpointError: lists all damage of the container; some of the memory may have been written.
        StoreError: the store failed; some of the memory may have been written.
    """
    with StorageLoader(reader, threads, None, list(memory), given=memory, reads=reads) as loader:
        for number in memory:
            loader.take(number)

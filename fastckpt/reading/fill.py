"""Reads storages of a checkpoint into memory that is there already, such as that of live tensors."""

from __future__ import annotations

from collections.abc import Mapping

from fastckpt._types import U8
from fastckpt.options import Options
from fastckpt.reading.chunk_reader import Reader
from fastckpt.reading.reads import Reads
from fastckpt.reading.storage_loader import StorageLoader
from fastckpt.reading.window import Sink


def fill(reader: Reader, memory: Mapping[int, U8 | Sink], options: Options) -> None:
    """Read, verify and decode storages into the caller's memory, in the order of the mapping.

    Args:
        reader: of the container or vote.
        memory: number of a storage → host memory as long as the storage, or what takes its bytes to a device; written by several threads
            until this returns.
        options: how many read and decode at once.

    Raises:
        CorruptCheckpointError: lists all damage of the container; some of the memory may have been written.
        StoreError: the store failed; some of the memory may have been written.
    """
    threads, reads = options.load_threads, Reads.of(options)
    with StorageLoader(reader, threads, None, list(memory), given=memory, reads=reads) as loader:
        for number in memory:
            loader.take(number)

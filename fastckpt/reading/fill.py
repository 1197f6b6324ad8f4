"""Reads storages of a checkpoint into memory that is there already, such as that of live tensors."""

from __future__ import annotations

import time
from collections.abc import Mapping

from fastckpt import events
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
    started = time.perf_counter()
    n_bytes = sum(reader.directory.storages[number].n_bytes for number in memory)
    events.emit(events.LoadStarted(source=reader.source.name, raw_bytes=n_bytes, chunks=len(reader.records)))
    threads, reads = options.load_threads, Reads.of(options)
    with StorageLoader(reader, threads, None, list(memory), given=memory, reads=reads) as loader:
        for number in memory:
            loader.take(number)
    seconds = time.perf_counter() - started
    events.emit(events.LoadFinished(source=reader.source.name, raw_bytes=n_bytes, seconds=seconds))

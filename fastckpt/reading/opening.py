"""Opens the source behind a path, a URL or a file object, and finds out whether it is a fastckpt container."""

from __future__ import annotations

import io
import os
from typing import Any

from fastckpt.errors import EmptyCheckpointError, TooLargeError
from fastckpt.host.torch_names import check_can_seek
from fastckpt.reading.chunk_reader import Reader, is_container
from fastckpt.reading.object_source import ObjectSource
from fastckpt.reading.sources import FileObjectSource, PathSource, Source
from fastckpt.store.location import is_url, location
from fastckpt.store.open import open_object


def open_source(f: Any) -> Source:
    """The bytes that `f` names; the caller closes them. Raises the errors of `open` for a path, StoreError or SaveError for a URL."""
    if not isinstance(f, (str, os.PathLike)):
        check_can_seek(f)
        return FileObjectSource(f)
    where = location(f)
    if not is_url(where):
        return PathSource(where)
    store, key = open_object(where)
    try:
        return ObjectSource(store, key, owns_store=True, keeps_ends=True)
    except BaseException:
        store.close()
        raise


def open_reader(source: Source) -> Reader:
    """Open the container in the source. A caller's file object may contain more after it."""
    try:
        return Reader.open(source, alone=not isinstance(source, FileObjectSource))
    finally:
        if isinstance(source, ObjectSource):
            source.let_ends_go()


def leave_behind(source: Source, reader: Reader) -> None:
    """Move a caller's file object to the end of the container that was read from it."""
    if isinstance(source, FileObjectSource):
        source.seek_to(reader.start + reader.footer.container_bytes)


def is_ours(source: Source) -> bool:
    """Whether this is (or was) a fastckpt container. Does not move a file object."""
    if source.n_bytes == 0:
        raise EmptyCheckpointError(f"{source.name} is empty: not a checkpoint")
    found = is_container(source)
    if isinstance(source, FileObjectSource):
        source.seek_to(0)
    return found


def for_torch(f: Any, source: Source, max_load_bytes: int) -> Any:
    """A path or file object that torch can read. TooLargeError if an object of a store does not fit into memory."""
    if isinstance(source, PathSource):
        return source.name
    if isinstance(source, FileObjectSource):
        return f
    if source.n_bytes > max_load_bytes:
        raise TooLargeError(
            f"{source.name} has {source.n_bytes} bytes: more than max_load_bytes = {max_load_bytes}. Download it first"
        )
    data = bytearray(source.n_bytes)
    source.read_into(0, data)
    return io.BytesIO(data)
